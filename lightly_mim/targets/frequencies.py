"""Low frequencies of the pixels.

Shapes: B images, C channels, K cells of (p, q) pixels, D = size * size * C values each.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lightly_mim.arguments import PositiveInt
from lightly_mim.patches import gather_patches
from lightly_mim.targets.base import Target, at_least_float32


class LowFrequencies(Target):
    """The lowest size x size frequencies of each cell and channel.

    These are coefficients of the orthonormal two-dimensional cosine transform (DCT-II,
    `scipy.fft.dctn(cell, norm="ortho")[:size, :size]`), so their squared differences
    sum up to those of the low-passed pixels; the first one is the cell's mean times the
    square root of its number of pixels.

    PixMIM filters the whole image by its Fourier transform and regresses the pixels
    that are left, as many as before. A transform of each cell tells the same of its
    pixels in fewer values, and nothing of the cells around it.

    - [0]: PixMIM, 2023, https://arxiv.org/abs/2303.02416 (low-frequency targets)

    Attributes:
        size:
            Number of frequencies along height and width.

    Raises:
        ValueError: If the size is below 1.
    """

    drawable: ClassVar[bool] = True

    def __init__(self, size: PositiveInt = 4) -> None:
        super().__init__()
        self.size = size

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        """Returns size * size * channels, see `Target`.

        Raises:
            ValueError: If a cell has fewer frequencies.
        """
        height, width = cell_size
        if self.size > min(cell_size):
            raise ValueError(
                f"A cell of {height} x {width} pixels has no {self.size} x {self.size} "
                f"frequencies: choose a size of at most {min(cell_size)}."
            )
        return self.size**2 * in_chans

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the coefficients in order (row, column, channel), see `Target`."""
        self.width(cell_size, images.shape[1])
        pixels = at_least_float32(gather_patches(images, index, cell_size))
        pixels = pixels.reshape(*index.shape, *cell_size, -1)
        return self._transform("bkyxc,vy,ux->bkvuc", pixels, cell_size)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        cell_size: tuple[int, int],
    ) -> Tensor:
        """Returns pixels that have the predicted frequencies and no others."""
        values = at_least_float32(prediction)
        values = values.reshape(*index.shape, self.size, self.size, -1)
        return self._transform("bkvuc,vy,ux->bkyxc", values, cell_size)

    def _transform(
        self, equation: str, values: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        height, width = (self._cosines(side, values) for side in cell_size)
        # The first coefficient is large: half precision would drown the others.
        with torch.autocast(values.device.type, enabled=False):
            return torch.einsum(equation, values, height, width).flatten(2)

    def _cosines(self, side: int, like: Tensor) -> Tensor:
        """Returns the first cosines of the transform, with shape (size, side)."""
        frequency = torch.arange(self.size, dtype=like.dtype, device=like.device)
        position = torch.arange(side, dtype=like.dtype, device=like.device) + 0.5
        cosines = torch.cos(math.pi / side * frequency[:, None] * position)
        scale = (2 - (frequency == 0).to(like.dtype)) / side
        return cosines * scale.sqrt()[:, None]
