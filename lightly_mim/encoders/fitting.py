"""Makes an encoder with weights take the images that are wanted."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import nn

from lightly_mim.encoders.base import MaskedEncoder
from lightly_mim.encoders.build import copy_settings, resize_encoder
from lightly_mim.encoders.transformer import MaskedTransformer
from lightly_mim.patches import Size, to_pair


def fit_encoder(
    encoder: MaskedEncoder,
    *,
    img_size: Size | None = None,
    patch_size: Size | None = None,
    window_size: Size | None = None,
    in_chans: int | None = None,
) -> tuple[MaskedEncoder, str]:
    """Makes an encoder take other images, with the weights that it has.

    Args:
        encoder:
            The encoder. Its timm model is changed: do not use it any more.
        img_size:
            See `resize_encoder`. What is None stays as it is.
        patch_size:
            See `resize_encoder`.
        window_size:
            See `resize_encoder`.
        in_chans:
            Number of image channels: from three to one, the weights of the colours are
            summed, to others they are repeated and scaled, as timm does.

    Returns:
        (the encoder, a sentence that says what was changed, empty if nothing was).

    Raises:
        ValueError: If patches or windows do not tile such images, or if there is no
            sense in such channels.
    """
    before = _described(encoder)
    if in_chans not in (None, encoder.in_chans):
        encoder = _with_channels(encoder, in_chans)
    fitted = resize_encoder(
        encoder,
        encoder.img_size if img_size is None else img_size,
        patch_size=patch_size,
        window_size=window_size,
    )
    after = _described(fitted)
    if after == before:
        return fitted, ""
    changes = "; ".join(
        f"{name} {was} -> {after[name]}"
        for name, was in before.items()
        if was != after[name]
    )
    return fitted, (
        f"The weights were made for another encoder and are interpolated ({changes})."
    )


def _described(encoder: MaskedEncoder) -> dict[str, Any]:
    described: dict[str, Any] = {
        "img_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
    }
    stages = getattr(encoder.vit, "layers", ())
    if stages:
        windows = [tuple(stage.blocks[0].window_size) for stage in stages]
        described["window_size"] = windows
    return described


def _with_channels(encoder: MaskedEncoder, in_chans: int | None) -> MaskedEncoder:
    old: nn.Conv2d = encoder.vit.patch_embed.proj
    sensible = old.in_channels == 3 or (old.in_channels % 3 == 0 and in_chans == 1)
    if in_chans is None or in_chans < 1 or not sensible:
        raise ValueError(
            f"Weights for {old.in_channels} channel(s) do not tell what to make of "
            f"{in_chans}: those for three colours can be summed or repeated. Take "
            f"images with in_chans={old.in_channels}."
        )
    new = nn.Conv2d(
        in_chans,
        old.out_channels,
        to_pair(encoder.patch_size),
        to_pair(encoder.patch_size),
        bias=old.bias is not None,
    ).to(old.weight)
    with torch.no_grad():
        new.weight.copy_(adapt_input_conv(in_chans, old.weight))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    encoder.vit.patch_embed.proj = new
    encoder.vit.in_chans = in_chans
    assert isinstance(encoder, MaskedTransformer)
    fitted = type(encoder)(encoder.vit)
    copy_settings(encoder, fitted)
    fitted.mean, fitted.std = (
        (sum(values) / len(values),) * in_chans
        for values in (encoder.mean, encoder.std)
    )
    return fitted
