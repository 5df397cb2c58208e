"""Files of classifiers, which somebody else may have written.

A file holds the head of a linear or logistic probe, and says which encoder it belongs
to, or the whole fine-tuned network; and the names of the classes and how images are
prepared.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightly_mim.arguments import (
    NonEmpty,
    PositiveInt,
    Probability,
    Share,
    check_arguments,
)
from lightly_mim.checkpoints import encoder_spec, hash_tensors
from lightly_mim.data.depth import ValueRange
from lightly_mim.encoders import Pool
from lightly_mim.evaluation.base import Outcome
from lightly_mim.evaluation.fingerprints import encoder_fingerprint
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.evaluation.supervised.finetune import FineTuned
from lightly_mim.files import atomic_write, check_regular

CLASSIFIERS = "classifiers"  # the folder of an evaluation that they lie in

_METADATA_KEY = "lightly_mim_classifier"


@dataclass(frozen=True)
class Said:
    """What a file says of its classifier."""

    version: Literal[1]
    classes: NonEmpty[str]
    accuracy: Probability | None  # on held-out training images, if there were any
    img_size: tuple[PositiveInt, PositiveInt]
    crop_ratio: Share
    value_range: ValueRange | None
    # Of a probe: the layer and pooling that it reads, the path or name of its encoder,
    # and what tells that from others.
    key: tuple[int, str] | None = None
    source: str | None = None
    fingerprint: dict[str, Any] | None = None
    # Of a fine-tuned network: its pooling, and what its encoder is built from.
    pool: Pool | None = None
    encoder: dict[str, Any] | None = None


def save_classifier(
    path: Path,
    outcome: Outcome,
    encoder: AnyEncoder,
    source: str | None,
    classes: list[str],
    *,
    crop_ratio: float,
    value_range: ValueRange | None = None,
) -> None:
    """Writes what an outcome has predicted with, if it can be used without it.

    `source` is where the encoder comes from, a path or a name, None for a module.

    Raises:
        OSError: If the file cannot be written. What was there before is left as it was.
    """
    model = outcome.classifier
    if model is None or getattr(encoder, "names_features", False):
        return
    accuracies = [entry["accuracy"] for entry in outcome.selection]
    own: dict[str, Any] = {}
    if isinstance(model, FineTuned):
        own |= {"pool": model.pool, "encoder": encoder_spec(model.encoder)}
    else:
        is_file = source is not None and Path(source).exists()
        own |= {
            "key": outcome.key,
            "source": str(Path(source).absolute()) if source and is_file else source,
            "fingerprint": encoder_fingerprint(encoder),
        }
    height, width = encoder.img_size
    said = Said(
        version=1,
        classes=classes,
        accuracy=max(accuracies) if accuracies else None,
        img_size=(height, width),
        crop_ratio=crop_ratio,
        value_range=value_range,
        **own,
    )
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    text = json.dumps(asdict(said))
    checksum = hash_tensors(sorted(tensors.items()), text)
    try:
        with atomic_write(path) as temporary:
            # One entry, since the order of several is left to chance.
            whole = json.dumps({"said": text, "sha256": checksum})
            save_file(tensors, temporary, {_METADATA_KEY: whole})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"Cannot write {path}: {error}") from error


def read_classifier(path: Path) -> tuple[Said, dict[str, Tensor]]:
    """Reads what a file of `save_classifier` says, and its tensors.

    Each value is checked to be of a kind and size that is allowed.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is something else, or damaged.
    """
    remedy = "Evaluate once more to get it again."
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as content:
            text = (content.metadata() or {}).get(_METADATA_KEY)
            tensors = {name: content.get_tensor(name) for name in content.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no classifier, or damaged: {error}") from error
    if text is None:
        raise ValueError(
            f"{path} is no classifier. Pass a file from the folder {CLASSIFIERS} of an "
            "evaluation, or the evaluation's directory."
        )
    try:
        whole = json.loads(text)
        if whole["sha256"] != hash_tensors(sorted(tensors.items()), whole["said"]):
            raise ValueError("its checksum is another")
        given: dict[str, Any] = {**json.loads(whole["said"])}
        if given.get("version") != 1:
            raise ValueError("it is of another version of lightly_mim")
        if unknown := given.keys() - {field.name for field in fields(Said)}:
            raise ValueError(f"it has {', '.join(sorted(unknown))}")
        said = Said(**check_arguments(Said, given, "a classifier"))
        if said.key is None and None in (said.pool, said.encoder):
            raise ValueError("it is neither of a probe nor of a fine-tuned network")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("its weights hold NaN or infinite values")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from error
    return said, tensors
