"""Tells by the names and shapes of a timm model's weights how to build it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightly_mim.encoders.statistics import imagenet_statistics
from lightly_mim.patches import sincos_positions

# Of published ViTs, whose weights do not tell how many attention heads there are.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_VIT_NAMES = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
_SWIN_NAMES: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (192, (2, 2, 18, 2)): "swin_large_patch4_window7_224",
}


def is_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether these are the weights of a transformer under timm's names.

    Args:
        tensors:
            Weights by their names.
    """
    blocks = ("blocks.0.attn.qkv.weight", "layers.0.blocks.0.attn.qkv.weight")
    return "patch_embed.proj.weight" in tensors and any(b in tensors for b in blocks)


def encoder_of(
    tensors: Mapping[str, Tensor],
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    mean: Any = None,
    std: Any = None,
    pool: str | None = None,
    pos_embed: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Returns what to build the encoder of some weights from, see `EncoderCheckpoint`.

    Args:
        tensors:
            The weights, under timm's names.
        num_heads:
            Number of attention heads of a ViT that has no tables to tell it. None for
            that of published ViTs of this width.
        img_size:
            Height and width of the images in pixels. None to find them in the shapes.
        mean:
            Mean of each channel of images in [0, 1]. None for ImageNet's.
        std:
            Deviation of each channel.
        pool:
            The pooling of the encoder. None for the class token where there is one and
            nothing normalises the mean.
        pos_embed:
            See `lightly_mim.encoders.masked_encoder`. None to look whether they are
            sines and cosines.
        options:
            Arguments of the timm model that shapes do not tell.

    Raises:
        ValueError: If the shapes do not tell it.
    """
    projection = tensors["patch_embed.proj.weight"]
    if projection.ndim != 4:
        raise ValueError(
            "patch_embed.proj.weight has shape (dim, channels, height, width), got "
            f"{tuple(projection.shape)}."
        )
    in_chans = projection.shape[1]
    patch = _pair(projection.shape[2:])
    if "layers.0.blocks.0.attn.qkv.weight" in tensors:
        name, size, found = _swin(tensors, patch)
        pool = "mean"
    else:
        name, size, found = _vit(tensors, patch, num_heads)
        plain = "cls_token" in tensors and "fc_norm.weight" not in tensors
        pool = pool or ("cls" if plain else "mean")
    height, width = _pair(img_size or size)
    if not height:
        raise ValueError(
            "These weights do not tell the size of their images, as their grid of "
            "patches is not a square: build the encoder, load them, and pass the model "
            "itself."
        )
    if pos_embed is None and _are_sincos(tensors, (height, width), patch):
        pos_embed = "sincos"
    own_mean, own_std = imagenet_statistics(in_chans)
    return {
        "name": name,
        "img_size": [height, width],
        "in_chans": in_chans,
        "options": found | options,
        "pos_embed": pos_embed,
        "init": "timm",
        "mean": list(mean or own_mean),
        "std": list(std or own_std),
        "pool": pool,
    }


def count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Returns how many numbered modules there are behind a prefix such as `blocks.`.

    Args:
        tensors:
            Weights by their names.
        prefix:
            What stands before the number.

    Raises:
        ValueError: If there are fewer weights than modules.
    """
    found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in tensors)
    number = max((int(match[1]) + 1 for match in found if match), default=0)
    if number > len(tensors):  # somebody would count for years
        raise ValueError(f"There are {len(tensors)} weights, and {prefix}{number - 1}.")
    return number


def _vit(
    tensors: Mapping[str, Tensor], patch: tuple[int, int], num_heads: int | None
) -> tuple[str, tuple[int, int], dict[str, Any]]:
    """Returns name, image size and options of a ViT or a Beit."""
    dim, depth = len(tensors["patch_embed.proj.weight"]), count(tensors, "blocks.")
    shared = tensors.get("rel_pos_bias.relative_position_bias_table")
    own = tensors.get("blocks.0.attn.relative_position_bias_table")
    table = shared if shared is not None else own
    is_beit = table is not None or any(
        f"blocks.0.{name}" in tensors for name in ("attn.q_bias", "gamma_1")
    )
    if num_heads is None:
        num_heads = table.shape[1] if table is not None else _HEADS.get(dim)
    if num_heads is None:
        raise ValueError(
            f"These weights of a ViT with {dim} channels do not tell how many "
            "attention heads it has: pass num_heads as well."
        )
    options: dict[str, Any] = {
        "patch_size": _short(patch),
        "embed_dim": dim,
        "depth": depth,
        "num_heads": num_heads,
    }
    ratio = len(tensors["blocks.0.mlp.fc1.weight"]) / dim
    if ratio != 4:
        options["mlp_ratio"] = ratio
    pooled = "norm.weight" not in tensors  # what is normalised is the mean
    positions = tensors.get("pos_embed")
    if is_beit:
        name = "beit_base_patch16_224"
        options |= {
            "use_abs_pos_emb": positions is not None,
            "use_rel_pos_bias": own is not None,
            "use_shared_rel_pos_bias": shared is not None,
            "use_fc_norm": pooled,
            # None would be the named model's own.
            "init_values": 0.1 if "blocks.0.gamma_1" in tensors else 0.0,
            "qkv_bias": "blocks.0.attn.q_bias" in tensors,
        }
    else:
        name = _VIT_NAMES.get((dim, depth, patch[0]), "vit_base_patch16_224")
        if "blocks.0.attn.qkv.bias" not in tensors:
            options["qkv_bias"] = False
        if "blocks.0.ls1.gamma" in tensors:
            options["init_values"] = 1e-5
        if "reg_token" in tensors:
            options["reg_tokens"] = tensors["reg_token"].shape[1]
        if "cls_token" not in tensors:
            options |= {"class_token": False, "global_pool": "avg", "fc_norm": pooled}
        elif pooled:
            options["global_pool"] = "avg"
    prefix = sum(
        tensors[n].shape[1] for n in ("cls_token", "reg_token") if n in tensors
    )
    if positions is not None:
        side = _root(positions.shape[1] - prefix)
        if side is None and (side := _root(positions.shape[1])):
            options["no_embed_class"] = True
    else:
        side = None if table is None else _table_side(len(table) - 3)
    return name, _size(side, patch), options


def _swin(
    tensors: Mapping[str, Tensor], patch: tuple[int, int]
) -> tuple[str, tuple[int, int], dict[str, Any]]:
    """Returns name, image size and options of a Swin, the last window's size if so."""
    dim, stages = len(tensors["patch_embed.proj.weight"]), count(tensors, "layers.")
    depths = [count(tensors, f"layers.{stage}.blocks.") for stage in range(stages)]
    second = "layers.0.blocks.0.attn.logit_scale" in tensors
    kind = "logit_scale" if second else "relative_position_bias_table"
    tables = [tensors[f"layers.{s}.blocks.0.attn.{kind}"] for s in range(stages)]
    options: dict[str, Any] = {
        "patch_size": _short(patch),
        "embed_dim": dim,
        "depths": depths,
        "num_heads": [len(t) if second else t.shape[1] for t in tables],
    }
    ratio = len(tensors["layers.0.blocks.0.mlp.fc1.weight"]) / dim
    if ratio != 4:
        options["mlp_ratio"] = ratio
    if second:
        return "swinv2_base_window12_192", (0, 0), options
    sides = [_table_side(len(table)) for table in tables]
    if sides[0] is None or sides[-1] is None:
        raise ValueError(
            "The tables of relative positions are not of square windows, which their "
            "shapes do not tell: build the encoder, and pass the model itself."
        )
    options["window_size"] = sides[0]
    name = _SWIN_NAMES.get((dim, tuple(depths)), "swin_base_patch4_window7_224")
    # In all published ones the last stage's window is that stage's whole grid.
    side = sides[-1] * 2 ** (stages - 1)
    return name, _size(side, patch), options


def coordinates(table: Tensor) -> tuple[int, int]:
    """Returns the window that SwinV2's table of coordinates is for, and is in units of.

    Args:
        table:
            Tensor with shape (1, 2 * window - 1, 2 * window - 1, 2): sign times
            log2(8 * distance / (unit - 1) + 1) / log2(8).
    """
    window = (table.shape[1] + 1) // 2
    largest = float(table.max())
    unit = 1 + 8 * (window - 1) / (8**largest - 1) if largest > 0 else window
    return window, round(unit)


def _are_sincos(
    tensors: Mapping[str, Tensor], size: tuple[int, int], patch: tuple[int, int]
) -> bool:
    """Returns whether a ViT's positions are those that MAE sets and leaves alone."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.shape[-1] % 4:
        return False
    grid = size[0] // patch[0], size[1] // patch[1]
    prefix = positions.shape[1] - grid[0] * grid[1]
    if prefix < 0:
        return False
    fixed = sincos_positions(grid, positions.shape[-1], prefix)
    return torch.allclose(positions.float(), fixed.float(), atol=1e-4)


def _table_side(rows: int) -> int | None:
    side = _root(rows)
    return (side + 1) // 2 if side is not None and side % 2 else None


def _root(number: int) -> int | None:
    side = math.isqrt(max(number, 0))
    return side if side * side == number else None


def _size(side: int | None, patch: tuple[int, int]) -> tuple[int, int]:
    """Returns the image of a square grid, (0, 0) where there is none."""
    return (0, 0) if side is None else (side * patch[0], side * patch[1])


def _pair(size: int | torch.Size | tuple[int, ...] | list[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _short(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
