"""The protocols of this package, by name, and those that a user passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from lightly_mim.arguments import one_of
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.evaluation.probes.attentive import Attentive
from lightly_mim.evaluation.probes.knn import KNN
from lightly_mim.evaluation.probes.linear import Linear
from lightly_mim.evaluation.probes.logistic import Logistic
from lightly_mim.evaluation.probes.low_label import LowLabel
from lightly_mim.evaluation.supervised.finetune import FineTune
from lightly_mim.evaluation.supervised.linear_mae import LinearMAE

# A protocol of this package is one file, and one name here.
PROTOCOLS: dict[str, type[Any]] = {
    each.name: each
    for each in (KNN, Linear, Logistic, Attentive, LowLabel, LinearMAE, FineTune)
}
ProtocolName = Annotated[str, one_of(PROTOCOLS)]
LABEL_FREE = "label_free"  # what else may be measured, which no protocol is called


def resolve_protocols(
    protocols: Sequence[Any], known: Mapping[str, type[Any]] = PROTOCOLS
) -> dict[str, Any]:
    """Returns protocols by their names, of which some are named and some are objects.

    Raises:
        ValueError: If one is a class, if a name cannot be one, or if two protocols
            with different settings have the same name.
    """
    found: dict[str, Any] = {}
    for each in protocols:
        protocol = known[each]() if isinstance(each, str) else each
        if isinstance(protocol, type):
            raise ValueError(
                f"protocols has the class {protocol.__name__}. Make an object of it: "
                f"{protocol.__name__}(...)."
            )
        name = protocol.name
        if not (isinstance(name, str) and name.isprintable() and name.strip()):
            raise ValueError(f"The name of a protocol is text, got {name!r}.")
        if name == LABEL_FREE or found.setdefault(name, protocol) != protocol:
            raise ValueError(
                f"Two protocols are called {name!r}, with different settings. Evaluate "
                "one after the other, or give one another name."
            )
    return found


def check_encoder(
    protocols: Mapping[str, Any], model: AnyEncoder, distributed: bool
) -> None:
    """Raises a ValueError if a protocol cannot train through the encoder.

    Nor can it in processes that Lightning does not know of (`distributed`).
    """
    training = [name for name, each in protocols.items() if each.reads == "images"]
    if training and not isinstance(model, MaskedEncoder):
        raise ValueError(
            f"{' and '.join(training)} (training through the encoder) needs one of our "
            "encoders, a run of ours, or a timm ViT, BEiT, EVA or Swin, got "
            f"{type(model.model).__name__}. Leave it out."
        )
    if training and distributed:
        raise ValueError(
            f"{' and '.join(training)} train in processes that Lightning knows of: in "
            "the place of distributed pass devices and num_nodes, which take those of "
            "torchrun and SLURM, or start them."
        )
    for name in training:
        protocols[name].check_encoder(model)
