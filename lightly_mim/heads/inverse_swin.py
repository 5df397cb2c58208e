"""The inverse Swin: a Swin Transformer that runs backwards, from cells to pixels.

A cell is cut into (n, n) fine tokens of width C, each of (p, q) pixels.
"""

from __future__ import annotations

from typing import Literal

from timm.models.swin_transformer import SwinTransformerStage
from torch import Tensor, nn

from lightly_mim.arguments import PositiveInt
from lightly_mim.heads.base import (
    Head,
    initialize,
    resolve_num_heads,
    take,
    to_width,
)
from lightly_mim.patches import Size, patchify, to_pair


class InverseSwinHead(Head):
    """A Swin Transformer run backwards, from coarse cells to fine tokens.

    SimMIM's heavy heads (section 4.1.2). Stages of timm's Swin blocks come in reverse
    order. Between two of them each token is split into 2 x 2 tokens of half the width
    (a linear layer and a norm), at the end a norm and a linear layer make values of a
    fine token. It begins with timm's initialisation of a Swin: weights of deviation
    0.02, biases of zero.

    The paper says no more than the names. What is not in Swin is chosen here:

    - A head enters where Swin has tokens of the encoder's stride: at stride 32 with all
      four stages, at stride 16 (ViT) with the last three. Cells of other sizes are
      split as often as halves are whole pixels, and at least 4 of them a side.
    - Windows need not be 7 tokens wide. In each stage and direction they are the number
      from 4 to 14 closest to 7 that tiles the grid, or the whole of a smaller grid: 6
      for Swin at SimMIM's 192 pixels, 7 at 224. The module takes images of other sizes
      too, if the same windows tile them.
    - Where the target has values for each pixel, a fine token predicts those of its
      own pixels. Other targets (coarse pixels, gradient histograms) are predicted by
      one linear layer from all fine tokens of a cell side by side, since their order is
      not known. This layer is large for many classes per coarse pixel.

    Args:
        size:
            'tiny' for Swin-T (last width 96, depths 2, 6, 2, 2) or 'base' for Swin-B
            (128 and 2, 18, 2, 2).
        embed_dim:
            Width of the last stage, each earlier one is twice as wide as the next. None
            for that of `size`. A linear layer in front leads to the first stage's width
            from another.
        depths:
            Number of blocks of each stage, first stage first. All of these stages are
            built, and the sides of a cell must halve that often. None for those of
            `size` that fit the cell.
        num_heads:
            Number of attention heads of each stage, as many as there are depths, each a
            divisor of the stage's width. None for heads of 32 channels, as in Swin, or,
            where 32 does not divide a width, of the highest power of 2 that does.
        window_size:
            Side of the windows in tokens, or (height, width). They must tile the grid
            of each stage, or be the larger. None to choose them as said above.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        size: Literal["tiny", "base"] = "tiny",
        embed_dim: PositiveInt | None = None,
        depths: tuple[PositiveInt, ...] | None = None,
        num_heads: tuple[PositiveInt, ...] | None = None,
        window_size: Size | None = None,
    ) -> None:
        self.embed_dim, self.depths = _SWIN_SIZES[size]
        self.all_stages = depths is not None
        if depths is not None:
            self.depths = tuple(depths)
        if embed_dim is not None:
            self.embed_dim = embed_dim
        if not self.depths:
            raise ValueError("depths is one number for each stage, got none.")
        if num_heads is not None and len(num_heads) != len(self.depths):
            raise ValueError(
                "num_heads is one number for each stage, of which there are "
                f"{len(self.depths)} of depths {self.depths}, got {tuple(num_heads)}."
            )
        stages = range(len(self.depths))
        self.widths = [self.embed_dim * 2**number for number in reversed(stages)]
        self.num_heads = [
            resolve_num_heads(width, num_heads[number] if num_heads else None, 32)
            for number, width in enumerate(self.widths)
        ]
        self.window_size = (
            None if window_size is None else to_pair(window_size, "window_size")
        )

    def __call__(
        self,
        embed_dim: int,
        num_values: int,
        cell_size: tuple[int, int],
        grid: tuple[int, int],
        per_pixel: bool = False,
    ) -> nn.Module:
        """Builds the stages, see `Head`.

        Raises:
            ValueError: If a cell cannot be split that often, or windows do not tile the
                grid.
        """
        stages = list(zip(self.widths, self.depths, self.num_heads, strict=True))
        if not self.all_stages:
            stages = stages[-1 - _fitting_splits(cell_size) :]
        if any(side % 2 ** (len(stages) - 1) for side in cell_size):
            raise ValueError(
                f"{len(stages)} stages halve the sides of a cell {len(stages) - 1} "
                f"times, which one of {cell_size[0]} x {cell_size[1]} pixels does not "
                "allow. Give fewer depths."
            )
        return _InverseSwin(
            embed_dim,
            num_values,
            cell_size,
            grid,
            stages,
            self.window_size,
            per_pixel,
        )


# Width of the last stage, and depths in reverse order (Swin, 2021, section 3.3,
# https://arxiv.org/abs/2103.14030).
_SWIN_SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "tiny": (96, (2, 6, 2, 2)),
    "base": (128, (2, 18, 2, 2)),
}


class _InverseSwin(nn.Module):
    """The head; a stage is told by its (width, depth, number of heads)."""

    def __init__(
        self,
        embed_dim: int,
        num_values: int,
        cell_size: tuple[int, int],
        grid: tuple[int, int],
        stages: list[tuple[int, int, int]],
        window_size: tuple[int, int] | None,
        per_pixel: bool,
    ) -> None:
        super().__init__()
        self.embed = to_width(embed_dim, stages[0][0])
        self.splits = nn.ModuleList(_PatchSplitting(width) for width, *_ in stages[:-1])
        self.stages = nn.ModuleList()
        self.windows: list[tuple[int, int]] = []
        for number, (width, depth, num_heads) in enumerate(stages):
            rows, columns = grid[0] * 2**number, grid[1] * 2**number
            window = window_size or _closest_window((rows, columns))
            self.windows.append((min(window[0], rows), min(window[1], columns)))
            stage = SwinTransformerStage(
                width,
                width,
                (rows, columns),
                depth,
                downsample=False,
                num_heads=num_heads,
                window_size=self.windows[-1],
                # Made in each pass, because images may have other sizes.
                dynamic_mask=True,
            )
            self.stages.append(stage)
        self._check_windows(grid)
        last_width = stages[-1][0]
        self.norm = nn.LayerNorm(last_width)
        self.fine = 2 ** len(self.splits)
        self.fine_size = (cell_size[0] // self.fine, cell_size[1] // self.fine)
        self.per_pixel = per_pixel
        if self.per_pixel:
            self.output = nn.Linear(last_width, num_values // self.fine**2)
        else:
            self.output = nn.Linear(last_width * self.fine**2, num_values)
        initialize(self)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], index: Tensor | None = None
    ) -> Tensor:
        """Predicts the indexed cells, see `Head`.

        Raises:
            ValueError: If the windows do not tile the grid.
        """
        self._check_windows(grid)
        x: Tensor = self.embed(tokens)
        x = x.reshape(len(x), *grid, -1)
        for number, stage in enumerate(self.stages):
            if number:
                x = self.splits[number - 1](x)
            x = stage(x)
        n = self.fine
        cells = take(patchify(x.permute(0, 3, 1, 2), (n, n)), index)
        fine = self.norm(cells.view(*cells.shape[:2], n * n, -1))  # (B, K, n * n, C)
        prediction: Tensor
        if not self.per_pixel:
            prediction = self.output(fine.flatten(2))
            return prediction
        values = self.output(fine).view(*cells.shape[:2], n, n, *self.fine_size, -1)
        prediction = values.transpose(3, 4).flatten(2)  # rows of pixels, then columns
        return prediction

    def _check_windows(self, grid: tuple[int, int]) -> None:
        """Raises a ValueError where timm would pad the grid in silence."""
        for number, (height, width) in enumerate(self.windows):
            rows, columns = grid[0] * 2**number, grid[1] * 2**number
            if rows % height or columns % width:
                raise ValueError(
                    f"Windows of {height} x {width} tokens do not tile a stage of the "
                    f"head that has {rows} x {columns} of them. Use another "
                    "window_size, or images of another size."
                )


class _PatchSplitting(nn.Module):
    """Makes 2 x 2 tokens of half the width of each token, Swin's merging backwards."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Takes (B, h, w, C) and returns (B, 2 * h, 2 * w, C / 2)."""
        batch_size, height, width, _ = x.shape
        x = self.expansion(x).view(batch_size, height, width, 2, 2, -1)
        x = x.transpose(2, 3).reshape(batch_size, 2 * height, 2 * width, -1)
        output: Tensor = self.norm(x)
        return output


def _fitting_splits(cell_size: tuple[int, int]) -> int:
    """Returns how often a cell halves into whole pixels, at least 4 of them a side."""
    splits = 0
    while all(n % 2 ** (splits + 1) == 0 and n >= 8 * 2**splits for n in cell_size):
        splits += 1
    return splits


def _closest_window(grid: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) of windows that tile, about as large as Swin's."""
    sides = []
    for side in grid:
        fitting = [n for n in range(4, 15) if side % n == 0]
        if side >= 4 and not fitting:
            raise ValueError(
                f"No window of 4 to 14 tokens tiles a grid of {grid[0]} x {grid[1]}. "
                "Use images of another size, or give a window_size: the whole grid of "
                "cells is possible, at the price of more attention."
            )
        sides.append(min(fitting, key=lambda n: abs(n - 7), default=side))
    return sides[0], sides[1]
