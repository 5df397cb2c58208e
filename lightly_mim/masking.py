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
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lightly_mim.patches import Size, grid_size, to_pair


class Masking:
    """What every way to choose the masked blocks of pixels has in common.

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
        if not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
            raise ValueError(
                f"The mask ratio lies strictly between 0 and 1, got {ratio}."
            )
        self.ratio = ratio

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(mask_patch_size={self.mask_patch_size}, ratio={self.ratio})"

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
        order = self._rank((batch_size, h, w), device, generator).flatten(1)
        chosen = order.argsort(dim=1, stable=True)[:, : self.count(h, w)]
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, chosen, True)
        return mask.view(batch_size, h, w)

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
        raise NotImplementedError


class RandomMasking(Masking):
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


class BlockMasking(Masking):
    """Masks large rectangles, one after the other, until the count is reached.

    As in BEiT's algorithm 1, a rectangle has 16 or more patches and an aspect ratio
    between 0.3 and 1 / 0.3. All rectangles of all images are drawn at once, which makes
    two differences: their size does not depend on what is masked already, and the last
    one is cut off at the bottom to meet the count. Should 64 rectangles not reach it,
    the rest is masked from the top of the image.

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

    num_rectangles: ClassVar[int] = 64
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
        # The logarithm is uniform: as many wide rectangles as tall ones.
        aspect = self.min_aspect ** (1 - 2 * uniform[1])
        rows = _within(h, (area * aspect).sqrt(), uniform[2])  # (B, R, h)
        columns = _within(w, (area / aspect).sqrt(), uniform[3])  # (B, R, w)
        # (B, R, h, w): the number of the rectangle where it lies, R elsewhere.
        number = torch.arange(self.num_rectangles, dtype=torch.uint8, device=device)
        number = number[:, None, None]
        inside = rows[..., :, None] & columns[..., None, :]
        return torch.where(inside, number, self.num_rectangles).amin(dim=1)


class GridMasking(Masking):
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

    def __init__(self, mask_patch_size: Size = 16, ratio: float = 0.75) -> None:
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


def _within(length: int, size: Tensor, uniform: Tensor) -> Tensor:
    """Places intervals on a line of cells.

    Args:
        length:
            Number of cells.
        size:
            Float tensor with shape (..., 1), how many cells to cover: rounded, at least
            one, at most all.
        uniform:
            Tensor with that shape and values in [0, 1), where to begin.

    Returns:
        Bool tensor with shape (..., length), True where an interval covers a cell.
    """
    size = size.round().clamp(1, length)
    start = (uniform * (length - size + 1)).floor()
    cell = torch.arange(length, device=size.device)
    return (cell >= start) & (cell < start + size)


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
