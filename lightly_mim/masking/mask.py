"""A mask: which cells of each image are masked, and how many."""

from __future__ import annotations

import torch
from torch import Tensor


class Mask:
    """A small picture of booleans laid over each image, True = masked, and its count.

    Any grid that divides the image serves. Every image of a batch has the same number
    of True entries, which is known as a plain integer: shapes stay static and nothing
    waits for the device. The constructor takes that number on trust; `Mask.of` checks
    and counts a tensor that comes from outside.

    Attributes:
        cells:
            Bool tensor with shape (batch_size, height, width), True = masked.
        count:
            Number of True entries in each image.
    """

    def __init__(self, cells: Tensor, count: int) -> None:
        self.cells = cells
        self.count = count
        self._order: Tensor | None = None

    @classmethod
    def of(cls, mask: Mask | Tensor) -> Mask:
        """Returns a mask as it is, and a bool tensor checked and counted, eagerly.

        Args:
            mask:
                The mask, or bool tensor with shape (batch_size, height, width), True =
                masked. Counting it waits for the device.

        Raises:
            ValueError: If the tensor has another dtype or shape, if its images differ
                in their number of masked cells, or if nothing or everything is masked.
        """
        if isinstance(mask, Mask):
            return mask
        is_tensor = isinstance(mask, Tensor)
        if not is_tensor or mask.dtype != torch.bool or mask.ndim != 3 or not len(mask):
            got = (
                f"{mask.dtype} with shape {tuple(mask.shape)}"
                if is_tensor
                else type(mask).__name__
            )
            raise ValueError(
                "A mask is a bool tensor with shape (batch_size, height, width), True "
                f"= masked, got {got}."
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
        return cls(mask, lowest)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: slice) -> Mask:
        """Returns the masks of some images of the batch."""
        return Mask(self.cells[rows], self.count)

    def __repr__(self) -> str:
        h, w = self.grid
        return f"Mask({self.count} of {h} x {w} cells in each of {len(self)} images)"

    @property
    def grid(self) -> tuple[int, int]:
        """How many cells lie along (height, width)."""
        return self.cells.shape[-2], self.cells.shape[-1]

    def to(self, device: torch.device | str) -> Mask:
        """Returns the mask on a device."""
        return Mask(self.cells.to(device), self.count)

    def fits(self, grid: tuple[int, int]) -> bool:
        """Returns whether each cell of a grid is wholly masked or wholly visible."""
        return grid[0] % self.grid[0] == 0 and grid[1] % self.grid[1] == 0

    def on(self, grid: tuple[int, int]) -> Mask:
        """Lays the mask on a finer grid.

        Args:
            grid:
                How many cells lie along (height, width) there.

        Raises:
            ValueError: If the mask does not divide the grid.
        """
        (h, w), (height, width) = self.grid, grid
        if (h, w) == grid:
            return self
        if not self.fits(grid):
            raise ValueError(
                f"A mask of {h} x {w} cells cannot be laid over a grid of {height} x "
                f"{width}: each side of the grid must be a multiple of the mask's. "
                "Choose a mask_patch_size that is a multiple of the encoder's patch "
                "size."
            )
        finer = self.cells.repeat_interleave(height // h, dim=-2)
        finer = finer.repeat_interleave(width // w, dim=-1)
        return Mask(finer, self.count * (height // h) * (width // w))

    def pixels(self, image_size: tuple[int, int]) -> Tensor:
        """Returns which pixels are masked.

        Args:
            image_size:
                (height, width) of the images in pixels.

        Returns:
            Bool tensor with shape (batch_size, 1, height, width), True = masked.

        Raises:
            ValueError: If the mask does not divide the image.
        """
        return self.on(image_size).cells[:, None]

    def index(self) -> tuple[Tensor, Tensor]:
        """Returns which cells are masked and which are visible.

        Returns:
            (masked, visible), int64 tensors with shape (batch_size, count) and
            (batch_size, height * width - count), each in raster order.
        """
        order = self._order
        if order is None:
            # The sort is stable, so both parts stay in raster order.
            flags = (~self.cells).flatten(1).to(torch.uint8)
            order = flags.argsort(dim=1, stable=True)
            # Made once, however often it is asked for. Compiled code cannot ask whether
            # a tensor is of inference mode, which autograd does not take.
            if torch.compiler.is_compiling() or not order.is_inference():
                self._order = order
        return order[:, : self.count], order[:, self.count :]

    def token_index(self, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns lightly's indices, prefix tokens counted in, for a cell per token.

        Args:
            num_prefix_tokens:
                Number of class and register tokens in front of the patch tokens. They
                are always kept.

        Returns:
            (idx_keep, idx_mask), int64 tensors with shape (batch_size,
            num_prefix_tokens + num_visible) and (batch_size, num_masked).
        """
        masked, visible = self.index()
        prefix = torch.arange(num_prefix_tokens, device=self.cells.device)
        prefix = prefix.expand(len(self), -1)
        idx_keep = torch.cat([prefix, visible + num_prefix_tokens], dim=1)
        return idx_keep, masked + num_prefix_tokens
