"""Pixels <-> patches, for any number of channels and any aspect ratio; positions.

A patch is flattened row by row with the channels last, (height, width, channels), as
in MAE's reference code and in `lightly.models.utils.patchify`, which serves square
images only.

Shapes: B images, C channels, (H, W) pixels, a grid of (h, w) patches of (p, q) pixels,
N = h * w patches, K of them selected, D = p * q * C values each.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from lightly.models import utils
from torch import Tensor
from torch.nn import functional

from lightly_mim.arguments import PositiveInt, Rule, fits

_SIZE = "one positive whole number or a (height, width) pair of them"


def _is_size(size: Any) -> bool:
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    return len(pair) == 2 and all(fits(side, PositiveInt) for side in pair)


Size = Annotated[int | tuple[int, int], Rule(_SIZE, _is_size, alone=True)]


def to_pair(size: Size, name: str = "size") -> tuple[int, int]:
    """Returns (height, width).

    Args:
        size:
            One number for both, or (height, width).
        name:
            What the size is called in the error message.

    Raises:
        ValueError: If the size is not one or two positive whole numbers.
    """
    if not _is_size(size):
        raise ValueError(f"{name} is {_SIZE}, got {size!r}.")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def grid_size(
    image_size: tuple[int, int], patch_size: tuple[int, int], name: str = "patch_size"
) -> tuple[int, int]:
    """Returns how many patches lie along (height, width).

    Args:
        image_size:
            (height, width) in pixels.
        patch_size:
            (height, width) of a patch in pixels.
        name:
            What the patch size is called in the error message.

    Raises:
        ValueError: If the patches do not tile the image.
    """
    (height, width), (p, q) = image_size, patch_size
    if height % p or width % q:
        raise ValueError(
            f"An image of {height} x {width} pixels does not divide into {name} "
            f"{p} x {q}. Resize or crop the images to a multiple of it, for example to "
            f"{max(height // p, 1) * p} x {max(width // q, 1) * q}."
        )
    return height // p, width // q


def _as_grid(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Views images with shape (B, C, H, W) as (B, h, w, p, q, C), without a copy."""
    p, q = patch_size
    h, w = grid_size((images.shape[-2], images.shape[-1]), patch_size)
    grid = images.reshape(images.shape[0], images.shape[1], h, p, w, q)
    return grid.permute(0, 2, 4, 3, 5, 1)


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cuts images into flattened patches.

    Args:
        images:
            Tensor with shape (batch_size, channels, height, width).
        patch_size:
            (height, width) of a patch in pixels.

    Returns:
        Tensor with shape (batch_size, num_patches, patch_height * patch_width *
        channels), patches in raster order.

    Raises:
        ValueError: If the patches do not tile the images.
    """
    return _as_grid(images, patch_size).flatten(3).flatten(1, 2)


def unpatchify(
    patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Puts flattened patches together again, the inverse of `patchify`.

    Args:
        patches:
            Tensor with shape (batch_size, num_patches, patch_height * patch_width *
            channels), patches in raster order.
        patch_size:
            (height, width) of a patch in pixels.
        grid:
            How many patches lie along (height, width).

    Returns:
        Tensor with shape (batch_size, channels, height, width).

    Raises:
        ValueError: If the number of patches or of values does not fit.
    """
    (p, q), (h, w) = patch_size, grid
    batch_size, num_patches, dim = patches.shape
    if num_patches != h * w or dim % (p * q):
        raise ValueError(
            f"{num_patches} patches of {dim} values do not make a grid of {h} x {w} "
            f"patches of {p} x {q} pixels."
        )
    images = patches.reshape(batch_size, h, w, p, q, dim // (p * q))
    return images.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, -1, h * p, w * q)


def gather_patches(
    images: Tensor, index: Tensor, patch_size: tuple[int, int]
) -> Tensor:
    """Cuts out the indexed patches alone; nothing is made for the others.

    Args:
        images:
            Tensor with shape (batch_size, channels, height, width).
        index:
            int64 tensor with shape (batch_size, num_selected), patches in raster order.
        patch_size:
            (height, width) of a patch in pixels.

    Returns:
        Tensor with shape (batch_size, num_selected, patch_height * patch_width *
        channels).

    Raises:
        ValueError: If the patches do not tile the images.
    """
    grid = _as_grid(images, patch_size)
    rows = torch.arange(len(images), device=images.device)[:, None]
    columns = grid.shape[2]
    return grid[rows, index // columns, index % columns].flatten(2)


def scatter_patches(
    images: Tensor, index: Tensor, patches: Tensor, patch_size: tuple[int, int]
) -> Tensor:
    """Returns a copy of the images with the indexed patches replaced.

    Args:
        images:
            Tensor with shape (batch_size, channels, height, width).
        index:
            int64 tensor with shape (batch_size, num_selected), patches in raster order.
        patches:
            Tensor with shape (batch_size, num_selected, patch_height * patch_width *
            channels).
        patch_size:
            (height, width) of a patch in pixels.

    Returns:
        Tensor with shape (batch_size, channels, height, width) and the images' dtype.

    Raises:
        ValueError: If the patches do not tile the images.
    """
    grid = grid_size((images.shape[-2], images.shape[-1]), patch_size)
    pasted = patchify(images, patch_size)
    index = index[..., None].expand(-1, -1, pasted.shape[-1])
    pasted = pasted.scatter(1, index, patches.to(pasted.dtype))
    return unpatchify(pasted, patch_size, grid)


def sincos_positions(
    grid: tuple[int, int], embed_dim: int, num_prefix_tokens: int = 0
) -> Tensor:
    """Makes fixed 2-D sine-cosine positions for any aspect ratio.

    The layout is that of MAE's reference code: sines and cosines of the column, then of
    the row, and zeros for the prefix tokens.

    Args:
        grid:
            How many patches lie along (height, width).
        embed_dim:
            Size of a token, a multiple of 4.
        num_prefix_tokens:
            Number of class and register tokens in front of the patch tokens.

    Returns:
        Float tensor with shape (num_prefix_tokens + height * width, embed_dim).

    Raises:
        ValueError: If the size of a token is no multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(
            "Sine-cosine positions need an embed_dim that is a multiple of 4, got "
            f"{embed_dim}."
        )
    rows, columns = np.indices(grid, dtype=np.float32)
    patches = utils.get_2d_sine_cosine_positional_embedding_from_grid(
        embed_dim, np.stack([columns, rows])
    )
    positions = torch.from_numpy(patches).float()
    return functional.pad(positions, (0, 0, num_prefix_tokens, 0))
