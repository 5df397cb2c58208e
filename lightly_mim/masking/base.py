"""What the ways to mask have in common.

Masks are drawn for a whole batch at once, on the device: there is no loop over images
and nothing waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction

import torch
from torch import Generator, Tensor

from lightly_mim.arguments import InnerShare
from lightly_mim.config import Recorded
from lightly_mim.masking.mask import Mask
from lightly_mim.patches import Size, grid_size, to_pair


class Masking(Recorded, ABC):
    """A way to mask. On the command line, one of one's own is a subclass of this.

    In Python any object with this call will do; it may return a bool tensor with shape
    (batch_size, height, width), True = masked, which is then checked and counted.
    """

    @abstractmethod
    def __call__(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        device: torch.device | str | None = None,
        generator: Generator | None = None,
    ) -> Mask:
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
            The masks, with the same number of masked cells in each image.

        Raises:
            ValueError: If the masking does not fit the images.
        """


class UnitMasking(Masking):
    """Masks a share of the blocks of pixels that tile the image, by their rank.

    Attributes:
        mask_patch_size:
            (height, width) in pixels of the blocks that are masked as a whole.
        ratio:
            Share of blocks that is masked, strictly between 0 and 1.

    Raises:
        ValueError: If the block size or the ratio is out of range.
    """

    def __init__(self, mask_patch_size: Size = 32, ratio: InnerShare = 0.6) -> None:
        self.mask_patch_size = to_pair(mask_patch_size, "mask_patch_size")
        self.ratio = ratio

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
    ) -> Mask:
        """Draws the masks of a batch, see `Masking.__call__`.

        Returns:
            The masks, with a cell for each block and `count(height, width)` of them
            masked in each image.

        Raises:
            ValueError: If the blocks do not tile the image.
        """
        h, w = self.grid(image_size)
        count = self.count(h, w)
        rank = self._rank((batch_size, h, w), device, generator)
        return Mask(mark_lowest(rank, count), count)

    @abstractmethod
    def _rank(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        generator: Generator | None,
    ) -> Tensor:
        """Says in which order blocks are masked.

        Args:
            shape:
                (batch_size, mask_height, mask_width).
            device:
                Where the masks are made.
            generator:
                Source of the random numbers.

        Returns:
            Tensor with that shape. The lowest numbers are masked, the first in raster
            order among equal ones.
        """


def mark_lowest(rank: Tensor, count: int) -> Tensor:
    """Marks the cells with the lowest numbers, the first in raster order among equals.

    Args:
        rank:
            Tensor with shape (batch_size, height, width).
        count:
            How many cells to mark in each image.

    Returns:
        Bool tensor with that shape and `count` True entries in each image.
    """
    flat = rank.flatten(1)
    # Several times as fast as a sort, but of equal numbers topk takes any.
    lowest = flat.topk(count, dim=1, largest=False, sorted=False).values
    last = lowest.amax(dim=1, keepdim=True)
    below, equal = flat < last, flat == last
    missing = count - below.sum(dim=1, keepdim=True)
    return (below | (equal & (equal.cumsum(dim=1) <= missing))).view(rank.shape)


def scan_from_a_side(
    shape: tuple[int, int, int],
    device: torch.device | str | None,
    generator: Generator | None,
) -> Tensor:
    """Numbers the cells from the top, the bottom, the left or the right, by chance.

    What is cut off in this order loses its end on a side drawn for each image.

    Args:
        shape:
            (batch_size, height, width).
        device:
            Where the numbers are made.
        generator:
            Source of the random numbers.

    Returns:
        int64 tensor with that shape, 0 to height * width - 1 in each image.
    """
    batch_size, h, w = shape
    rows = torch.arange(h, device=device)[:, None]
    columns = torch.arange(w, device=device)
    down, right = rows * w + columns, columns * h + rows
    last = h * w - 1
    scans = torch.stack([down, last - down, right, last - right])
    return scans[torch.randint(4, (batch_size,), device=device, generator=generator)]
