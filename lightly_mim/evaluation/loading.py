"""From what a user calls an encoder to the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from lightly_mim.checkpoints import read_encoder
from lightly_mim.data.seeding import keyed_random_state
from lightly_mim.encoders import Encoder, MaskedEncoder, masked_encoder
from lightly_mim.patches import Size


def load_encoder(
    encoder: Encoder | Path,
    *,
    img_size: Size | None = None,
    in_chans: int = 3,
    pretrained: bool = True,
) -> MaskedEncoder:
    """Finds or builds an encoder.

    Args:
        encoder:
            The directory of a pretraining run or its `encoder.safetensors`; the name of
            a timm model; a timm model; or one of our encoders, which is returned as it
            is.
        img_size:
            For the name of a timm model: height and width of the images in pixels. By
            default those that the model was made for.
        in_chans:
            For the name of a timm model: number of image channels.
        pretrained:
            For the name of a timm model: whether timm loads its pretrained weights.

    Returns:
        The encoder, on the CPU unless it was passed as a module.

    Raises:
        ValueError: If there is neither such a run nor such a timm model, if its weights
            cannot be loaded, or if the run trained a module that was passed by hand.
    """
    if not isinstance(encoder, nn.Module) and Path(encoder).exists():
        encoder = _load_saved(Path(encoder))
    if isinstance(encoder, nn.Module):  # an img_size that does not fit is an error
        return masked_encoder(encoder, img_size=img_size, in_chans=in_chans)
    name = str(encoder)
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"'{name}' is neither the directory of a run nor the name of a timm model. "
            "Check the path, or see timm.list_models('*vit*') for names."
        )
    try:
        return masked_encoder(
            name, img_size=img_size, in_chans=in_chans, pretrained=pretrained
        )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"Cannot load timm's pretrained weights of '{name}': {error} Weights come "
            "from the Hugging Face hub, or from its cache on this machine. "
            "pretrained=False takes random weights."
        ) from error


def at_random(encoder: MaskedEncoder, seed: int) -> MaskedEncoder:
    """Builds the same encoder once more, at random initialisation.

    Args:
        encoder:
            An encoder that was built by its timm name.
        seed:
            Decides the weights; the global random state is left as it was.

    Returns:
        An encoder that takes the same images.

    Raises:
        ValueError: If the encoder was built by hand.
    """
    if encoder.name is None:
        raise ValueError(
            "The baseline at random initialisation builds the encoder anew by its timm "
            "name, and this one was passed by hand. Leave the baseline out, or "
            "evaluate a second module with random weights."
        )
    with keyed_random_state(seed, "evaluation", "random"):
        other = _build(
            encoder.name,
            encoder.img_size,
            encoder.in_chans,
            encoder.pos_embed,
            encoder.options,
        )
    other.mean, other.std = encoder.mean, encoder.std
    return other


def _load_saved(path: Path) -> MaskedEncoder:
    weights, spec = read_encoder(path)
    if spec["name"] is None:
        raise ValueError(
            f"The encoder in {path} was passed to its run as a module, so how to build "
            "it is not recorded. Build it, load the weights with "
            "safetensors.torch.load_model, and pass the module as encoder=..."
        )
    encoder = _build(
        spec["name"],
        tuple(spec["img_size"]),
        spec["in_chans"],
        spec["pos_embed"],
        spec["options"],
    )
    try:
        encoder.vit.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path} do not fit timm's '{spec['name']}' as this version "
            f"of timm builds it: {error}"
        ) from error
    encoder.mean, encoder.std = tuple(spec["mean"]), tuple(spec["std"])
    return encoder


def _build(
    name: str,
    img_size: tuple[int, ...],
    in_chans: int,
    pos_embed: Any,
    options: dict[str, Any],
) -> MaskedEncoder:
    height, width = img_size
    return masked_encoder(
        name,
        img_size=(height, width),
        in_chans=in_chans,
        pos_embed=pos_embed,
        **options,
    )
