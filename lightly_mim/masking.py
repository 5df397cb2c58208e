"""Where to mask.

A mask is a small picture of booleans laid over the image: bool (B, h, w), True =
masked, in any grid that divides the image. Every image of a batch has the same number
of True entries, `num_masked`, which is known as a plain integer: shapes stay static
and nothing waits for the device.

Shapes: B images, a mask of (h, w) cells, an encoder grid of (H, W) tokens, N = H * W,
K masked and V = N - K visible tokens.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Generator, Tensor

from lightly_mim.patches import Size, grid_size, to_pair


class RandomMasking:
    """Masks blocks of pixels, each as likely as the other.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 3.2: blocks of 32
      pixels whatever the encoder's patch size, ratio 0.6)
    - [1]: MAE, 2021, https://arxiv.org/abs/2111.06377 (section 3: single patches of 16
      pixels, ratio 0.75)

    Attributes:
        mask_patch_size:
            (height, width) in pixels of the blocks that are masked as a whole.
        ratio:
            Share of blocks that is masked, strictly between 0 and 1.

    Raises:
        ValueError: If the block size or the ratio is out of range.
    """

    def __init__(self, mask_patch_size: Size = 32, ratio: float = 0.6) -> None:
        self.mask_patch_size = to_pair(mask_patch_size, "mask_patch_size")
        if not 0 < ratio < 1:
            raise ValueError(
                f"The mask ratio lies strictly between 0 and 1, got {ratio}."
            )
        self.ratio = ratio

    def __repr__(self) -> str:
        return (
            f"RandomMasking(mask_patch_size={self.mask_patch_size}, ratio={self.ratio})"
        )

    def count(self, height: int, width: int) -> int:
        """Returns how many of height * width blocks are masked: ceil(n * ratio).

        In exact decimal arithmetic this is SimMIM's count, ceil(n * ratio), and MAE's,
        n - floor(n * (1 - ratio)), at once. The reference codes compute in floats and
        differ from it at a few ratios: MAE's `int(100 * (1 - 0.8))` is 19, not 20.

        Args:
            height:
                Number of blocks along the height.
            width:
                Number of blocks along the width.

        Raises:
            ValueError: If nothing or everything would be masked.
        """
        num_blocks = height * width
        num_masked = math.ceil(num_blocks * Fraction(str(self.ratio)))
        if not 0 < num_masked < num_blocks:
            raise ValueError(
                f"A mask ratio of {self.ratio} masks {num_masked} of {num_blocks} "
                f"block(s) of {self.mask_patch_size[0]} x {self.mask_patch_size[1]} "
                "pixels, which leaves nothing to predict or nothing to predict from. "
                "Use larger images, a smaller mask_patch_size or another ratio."
            )
        return num_masked

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns how many blocks lie along (height, width) of an image.

        Raises:
            ValueError: If the blocks do not tile the image.
        """
        return grid_size(image_size, self.mask_patch_size, "mask_patch_size")

    def __call__(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        device: torch.device | str | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """Draws the masks of a batch.

        Args:
            batch_size:
                Number of masks.
            image_size:
                (height, width) of the images in pixels.
            device:
                Where the mask is made.
            generator:
                Source of the random numbers, on the same device.

        Returns:
            Bool tensor with shape (batch_size, mask_height, mask_width), True = masked,
            with `count(mask_height, mask_width)` True entries in each image.

        Raises:
            ValueError: If the blocks do not tile the image.
        """
        h, w = self.grid(image_size)
        noise = torch.rand(batch_size, h * w, device=device, generator=generator)
        chosen = noise.argsort(dim=1)[:, : self.count(h, w)]
        mask = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, chosen, True)
        return mask.view(batch_size, h, w)


def count_masked(mask: Tensor) -> int:
    """Checks a mask that comes from outside and counts it, eagerly.

    Args:
        mask:
            Bool tensor with shape (batch_size, mask_height, mask_width).

    Returns:
        The number of True entries per image.

    Raises:
        ValueError: If the mask has another dtype or shape, or if its images differ in
            their number of masked cells, or if nothing or everything is masked.
    """
    if mask.dtype != torch.bool or mask.ndim != 3 or len(mask) == 0:
        raise ValueError(
            "A mask is a bool tensor with shape (batch_size, height, width), True = "
            f"masked, got {mask.dtype} with shape {tuple(mask.shape)}."
        )
    counts = mask.flatten(1).sum(dim=1)
    lowest, highest = int(counts.min()), int(counts.max())
    if lowest != highest:
        raise ValueError(
            "Every image of a batch needs the same number of masked cells, got "
            f"{lowest} to {highest} of {mask[0].numel()}."
        )
    if not 0 < lowest < mask[0].numel():
        raise ValueError(
            "A mask covers some of the image and leaves some of it visible, got "
            f"{lowest} of {mask[0].numel()} cells masked."
        )
    return lowest


def expand_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeats a mask upward to a finer grid.

    Args:
        mask:
            Bool tensor with shape (batch_size, mask_height, mask_width).
        grid:
            (height, width) of the finer grid.

    Returns:
        Bool tensor with shape (batch_size, grid_height, grid_width).

    Raises:
        ValueError: If the mask does not divide the grid.
    """
    (h, w), (height, width) = mask.shape[-2:], grid
    if height % h or width % w:
        raise ValueError(
            f"A mask of {h} x {w} cells cannot be laid over a grid of {height} x "
            f"{width}: each side of the grid must be a multiple of the mask's. Choose "
            "a mask_patch_size that is a multiple of the encoder's patch size."
        )
    mask = mask.repeat_interleave(height // h, dim=-2)
    return mask.repeat_interleave(width // w, dim=-1)


def split_index(mask: Tensor, num_masked: int) -> tuple[Tensor, Tensor]:
    """Turns a mask into the indices of its masked and of its visible cells.

    Args:
        mask:
            Bool tensor with shape (batch_size, height, width).
        num_masked:
            Number of True entries in each image.

    Returns:
        (masked, visible), int64 tensors with shape (batch_size, num_masked) and
        (batch_size, num_visible), each in raster order, prefix tokens not counted.
    """
    # The sort is stable, so both parts stay in raster order.
    order = (~mask).flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :num_masked], order[:, num_masked:]


def mask_to_index(
    mask: Tensor, num_masked: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Turns a mask over the tokens into lightly's indices, prefix tokens counted in.

    Args:
        mask:
            Bool tensor with shape (batch_size, height, width), a cell per patch token.
        num_masked:
            Number of True entries in each image.
        num_prefix_tokens:
            Number of class and register tokens in front of the patch tokens. They are
            always kept.

    Returns:
        (idx_keep, idx_mask), int64 tensors with shape (batch_size, num_prefix_tokens +
        num_visible) and (batch_size, num_masked).
    """
    masked, visible = split_index(mask, num_masked)
    prefix = torch.arange(num_prefix_tokens, device=mask.device)
    prefix = prefix.expand(len(mask), -1)
    idx_keep = torch.cat([prefix, visible + num_prefix_tokens], dim=1)
    return idx_keep, masked + num_prefix_tokens
