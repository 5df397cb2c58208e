"""The ways to mask a share of the patches: at random, rectangles, squares, a grid."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from lightly_mim.arguments import InnerShare
from lightly_mim.masking.base import UnitMasking, scan_from_a_side
from lightly_mim.patches import Size


class RandomMasking(UnitMasking):
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

    def _rank(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        generator: Generator | None,
    ) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)


class BlockMasking(UnitMasking):
    """Masks large rectangles, one after the other, until the count is reached.

    As in BEiT's algorithm 1, a rectangle has 16 or more patches (before its sides are
    rounded, and cut to those of the image) and an aspect ratio between 0.3 and 1 / 0.3,
    and may lie anywhere, the edges of the image included. All rectangles of all images
    are drawn at once, which makes two differences: their size does not depend on what
    is masked already, and the last one is cut off, at a side drawn for each image, to
    meet the count. Should 30 rectangles not reach it (which takes a ratio of 0.9 or
    more), the rest is masked from such a side, too.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377 (figure 6 and table 1f)
    - [1]: BEiT, 2021, https://arxiv.org/abs/2106.08254 (algorithm 1)

    Attributes:
        mask_patch_size:
            (height, width) in pixels of a patch.
        ratio:
            Share of patches that is masked, strictly between 0 and 1.

    Raises:
        ValueError: If the patch size or the ratio is out of range.
    """

    num_rectangles: ClassVar[int] = 30  # each one a bit of an int32
    min_area: ClassVar[int] = 16
    min_aspect: ClassVar[float] = 0.3

    def _rank(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        generator: Generator | None,
    ) -> Tensor:
        batch_size, h, w = shape
        # (4, B, R, 1), R rectangles in each image.
        uniform = torch.rand(
            (4, batch_size, self.num_rectangles, 1), device=device, generator=generator
        )
        count = self.count(h, w)
        smallest = min(self.min_area, count)
        area = smallest + (count - smallest) * uniform[0]
        aspect = _log_uniform(self.min_aspect, uniform[1])
        rows = _within(h, (area * aspect).sqrt(), uniform[2])  # (B, h)
        columns = _within(w, (area / aspect).sqrt(), uniform[3])  # (B, w)
        # A cell lies in the rectangles that its row and its column have in common; one
        # more bit stands for the image as a whole. The lowest bit is the first of them.
        common = rows[:, :, None] & columns[:, None, :] | (1 << self.num_rectangles)
        first = (common & -common).float().log2().round().long()
        return first * (h * w) + scan_from_a_side(shape, device, generator)


class SquareMasking(UnitMasking):
    """Masks a square at a random place.

    The square is one of pixels, whatever the patches' shape. It grows from its centre
    by one row or column of patches after the other, the nearest first; the last one is
    filled from an end drawn for each image as far as the count goes. So a count that is
    no square gives a square with a part of a further row or column, and a square that
    is higher or wider than the image a rectangle across the image.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 4.1.1)

    Attributes:
        mask_patch_size:
            (height, width) in pixels of a patch.
        ratio:
            Share of patches that is masked, strictly between 0 and 1.

    Raises:
        ValueError: If the patch size or the ratio is out of range.
    """

    central: ClassVar[bool] = False

    def _rank(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        generator: Generator | None,
    ) -> Tensor:
        batch_size, h, w = shape
        place = torch.rand((2, batch_size, 1), device=device, generator=generator)
        p, q = self.mask_patch_size
        square = torch.full((batch_size, 1), q / p, device=device)
        number = _grow((h, w), self.count(h, w), square, place, self.central)
        return number * (h * w) + scan_from_a_side(shape, device, generator)


class CentralMasking(SquareMasking):
    """Masks the square in the middle of the image.

    As `SquareMasking`, with the centre in the middle. Where the count or the parity of
    the grid rules out a square in the very middle, the sides on which it reaches one
    patch further are drawn for each image.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 4.1.1)

    Attributes:
        mask_patch_size:
            (height, width) in pixels of a patch.
        ratio:
            Share of patches that is masked, strictly between 0 and 1.

    Raises:
        ValueError: If the patch size or the ratio is out of range.
    """

    central: ClassVar[bool] = True


class InverseBlockMasking(UnitMasking):
    """Keeps one rectangle visible and masks everything else.

    The rectangle has an aspect ratio between 0.5 and 2 as far as it fits into the
    image. It is made to have the exact count as the square of `SquareMasking` is, and
    may be rolled over the edges of the image: then it goes on at the opposite edge, and
    every patch is visible as often as the other.

    - [0]: CAPI, 2025, https://arxiv.org/abs/2502.08769 (ratio 0.65, rolled)

    Attributes:
        mask_patch_size:
            (height, width) in pixels of a patch.
        ratio:
            Share of patches that is masked, strictly between 0 and 1.
        roll:
            Whether the rectangle may be rolled over the edges.

    Raises:
        ValueError: If the patch size or the ratio is out of range.
    """

    min_aspect: ClassVar[float] = 0.5

    def __init__(
        self, mask_patch_size: Size = 16, ratio: InnerShare = 0.65, roll: bool = True
    ) -> None:
        super().__init__(mask_patch_size, ratio)
        self.roll = roll

    def _rank(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        generator: Generator | None,
    ) -> Tensor:
        batch_size, h, w = shape
        uniform = torch.rand((5, batch_size, 1), device=device, generator=generator)
        p, q = self.mask_patch_size
        aspect = _log_uniform(self.min_aspect, uniform[0]) * (q / p)
        visible = h * w - self.count(h, w)
        number = _grow((h, w), visible, aspect, uniform[1:3])
        rank = scan_from_a_side(shape, device, generator) - number * (h * w)
        if not self.roll:
            return rank
        rows = (torch.arange(h, device=device) + (uniform[3] * h).long()) % h
        columns = (torch.arange(w, device=device) + (uniform[4] * w).long()) % w
        images = torch.arange(batch_size, device=device)[:, None, None]
        return rank[images, rows[:, :, None], columns[:, None, :]]


class GridMasking(UnitMasking):
    """Keeps one of every four patches, at the same place in each 2 x 2 of them.

    The place is drawn for each image, each of the four as likely, so that every
    position is trained; MAE does not say which one it keeps.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377 (figure 6 and table 1f)

    Attributes:
        mask_patch_size:
            (height, width) in pixels of a patch.
        ratio:
            Share of patches that is masked: 0.75.

    Raises:
        ValueError: If the patch size is out of range or the ratio is not 0.75.
    """

    def __init__(self, mask_patch_size: Size = 16, ratio: InnerShare = 0.75) -> None:
        super().__init__(mask_patch_size, ratio)
        if ratio != 0.75:
            raise ValueError(
                "A grid keeps one of every four patches, which is a mask ratio of "
                f"0.75, got {ratio}."
            )

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns how many patches lie along (height, width) of an image.

        Raises:
            ValueError: If the patches, or 2 x 2 of them, do not tile the image.
        """
        h, w = super().grid(image_size)
        if h % 2 or w % 2:
            raise ValueError(
                "A grid keeps one of 2 x 2 patches: an image has an even number of "
                f"patches along its height and its width, got {h} x {w}."
            )
        return h, w

    def _rank(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        generator: Generator | None,
    ) -> Tensor:
        batch_size, h, w = shape
        place = torch.randint(4, (batch_size, 1, 1), device=device, generator=generator)
        rows = torch.arange(h, device=device)[:, None] % 2
        columns = torch.arange(w, device=device) % 2
        kept = rows * 2 + columns == place
        return kept.to(torch.uint8)


def _log_uniform(lowest: float, uniform: Tensor) -> Tensor:
    """Draws between `lowest` and 1 / `lowest`: as many wide shapes as tall ones."""
    return lowest ** (1 - 2 * uniform)


def _within(length: int, size: Tensor, uniform: Tensor) -> Tensor:
    """Places intervals on a line of cells.

    Args:
        length:
            Number of cells.
        size:
            Float tensor with shape (batch_size, num_intervals, 1), how many cells to
            cover: rounded, at least one, at most all.
        uniform:
            Tensor with that shape and values in [0, 1), where to begin.

    Returns:
        int32 tensor with shape (batch_size, length): the bits of a number say which
        intervals cover the cell, the lowest bit is the first interval's.
    """
    size = size.round().clamp(1, length)
    start = (uniform * (length - size + 1)).floor()
    cell = torch.arange(length, device=size.device)
    covers = (cell >= start) & (cell < start + size)
    bit = 1 << torch.arange(size.shape[1], dtype=torch.int32, device=size.device)
    return (covers * bit[:, None]).sum(dim=1, dtype=torch.int32)


def _grow(
    grid: tuple[int, int],
    area: int,
    aspect: Tensor,
    place: Tensor,
    central: bool = False,
) -> Tensor:
    """Says in which order rectangles reach the cells as they grow from their centres.

    Args:
        grid:
            How many cells lie along (height, width).
        area:
            How many cells a rectangle is to have.
        aspect:
            Float tensor with shape (batch_size, 1), the height of a rectangle over its
            width, in cells. One that does not fit into the grid is made to.
        place:
            Tensor with shape (2, batch_size, 1) and values in [0, 1), where a rectangle
            lies along the height and the width.
        central:
            Whether the place moves the centre by up to half a cell from the middle
            alone, to draw the sides that grow first.

    Returns:
        int64 tensor with shape (batch_size, height, width). The cells of a number are
        the part of a row or of a column that is next to the lower ones.
    """
    h, w = grid
    height = (area * aspect).sqrt().clamp(area / w, h)
    distances = []
    for length, size, at in ((h, height, place[0]), (w, area / height, place[1])):
        # Half a cell over each edge, so that the first and the last row or column are
        # reached as often as if whole cells were drawn.
        room = 1 if central else length - size + 1
        centre = length / 2 + (at - 0.5) * room
        cells = torch.arange(length, device=place.device) + 0.5
        distances.append((cells - centre).abs() / size)
    order = torch.cat(distances, dim=1).argsort(dim=1, stable=True)
    number = order.argsort(dim=1)  # of each row and each column
    return torch.maximum(number[:, :h, None], number[:, None, h:])
