"""The layout of SimMIM's official code and of Swin's: ViT, Swin and SwinV2.

Pretrained files have the encoder behind `encoder.` and a 1 x 1 convolution in front of
a pixel shuffle, `decoder.0`; fine-tuned ones have no prefix and a classifier. The ViT
is a timm Beit. Swin merges patches at the end of a stage, timm's at the beginning of
the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightly_mim.checkpoints.reading import Content
from lightly_mim.checkpoints.shapes import coordinates, count, encoder_of, is_encoder
from lightly_mim.checkpoints.weights import Weights, pixels

_PREFIX = "encoder."
_HEAD = "decoder.0."
_CLASSIFIER = ("head.weight", "head.bias")
# What the code computes again from sizes.
_BUFFERS = (
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
)
_LICENCE = "MIT, if they are Microsoft's own weights of SimMIM or began with them"


def read(content: Content, num_heads: int | None = None) -> Weights | None:
    """Returns the weights of a file in this layout, None for one in another.

    Args:
        content:
            What is in the file.
        num_heads:
            Not used: tables of relative positions tell it.
    """
    pretrained = f"{_PREFIX}mask_token" in content.tensors
    tensors = {
        name.removeprefix(_PREFIX): tensor for name, tensor in content.tensors.items()
    }
    is_swin = "layers.0.downsample.reduction.weight" in tensors
    tuned = any(name.endswith("relative_position_index") for name in tensors)
    if not is_encoder(tensors) or not (pretrained or is_swin or tuned):
        return None
    left_out = tuple(
        name
        for name in content.tensors
        if name.endswith(_BUFFERS) or name in _CLASSIFIER
    )
    head = {
        name.removeprefix(_HEAD): tensors[name]
        for name in tensors
        if name.startswith(_HEAD)
    }
    encoder = {
        _ours(name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(_BUFFERS)
        and not name.startswith(_HEAD)
        and name not in (*_CLASSIFIER, "mask_token")
    }
    spec = encoder_of(encoder, pool="mean", **_hints(tensors, content.beside))
    options: dict[str, Any] = {}
    parts: dict[str, Tensor] = {}
    if head:
        patch = spec["options"]["patch_size"]
        stride = patch * 2 ** max(count(encoder, "layers.") - 1, 0)
        moved = pixels(head, (stride, stride))
        parts = {f"head.{name}": tensor for name, tensor in moved.items()}
        options = {"target": _target(content.beside, encoder)}
    return Weights(
        "official SimMIM" if pretrained else "official SimMIM or Swin, fine-tuned",
        spec,
        encoder,
        tensors.get("mask_token"),
        "SimMIM" if pretrained else None,
        options,
        parts,
        left_out,
        _LICENCE,
    )


def _ours(name: str) -> str:
    name = name.replace("attn.rpe_mlp.", "attn.cpb_mlp.")  # of early SwinV2 files
    return re.sub(
        r"^layers\.(\d+)\.downsample\.",
        lambda match: f"layers.{int(match[1]) + 1}.downsample.",
        name,
    )


def _hints(tensors: Mapping[str, Tensor], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what buffers and the configuration tell of a Swin."""
    hints: dict[str, Any] = {}
    stages = count(tensors, "layers.")
    if not stages:
        return hints
    tables = [
        coordinates(tensors[name])
        for stage in range(stages)
        if (name := f"layers.{stage}.blocks.0.attn.relative_coords_table") in tensors
    ]
    index = tensors.get("layers.0.blocks.0.attn.relative_position_index")
    window = None if index is None else math.isqrt(len(index))
    if tables:
        window = tables[0][0]
        hints["window_size"] = window
        hints["pretrained_window_sizes"] = [unit for _, unit in tables]
        if all(size == unit for size, unit in tables):
            del hints["pretrained_window_sizes"]
    shifted = tensors.get("layers.0.blocks.1.attn_mask")
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    said = _said(beside, "DATA", "IMG_SIZE")
    if isinstance(said, int):
        hints["img_size"] = said
    elif shifted is not None and window is not None:
        hints["img_size"] = math.isqrt(len(shifted)) * window * patch
    return hints


def _target(beside: Mapping[str, Any], encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the target: pixels, normalised in the neighbourhood for SwinV2."""
    second = "layers.0.blocks.0.attn.logit_scale" in encoder
    local = _said(beside, "MODEL", "SIMMIM", "NORM_TARGET")
    enabled, window = second, 47
    if isinstance(local, Mapping):
        enabled, window = local.get("ENABLE", second), local.get("PATCH_SIZE", window)
    if not enabled:
        return {"class_path": "lightly_mim.targets.Pixels"}
    return {
        "class_path": "lightly_mim.targets.LocallyNormalizedPixels",
        "init_args": {"window_size": window},
    }


def _said(beside: Mapping[str, Any], *names: str) -> Any:
    """Returns what the configuration beside the weights says."""
    value: Any = beside.get("config")
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
