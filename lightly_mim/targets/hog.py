"""Histograms of oriented gradients.

Shapes: B images, C channels, K cells of (p, q) pixels, blocks of (f, f) pixels, R
orientations, D = p / f * q / f * C * R values per cell.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightly_mim.arguments import AtLeastTwo, PositiveInt
from lightly_mim.patches import gather_patches
from lightly_mim.targets.base import Target, at_least_float32
from lightly_mim.targets.blocks import average_blocks, count_blocks


class HOG(Target):
    """Histograms of oriented gradients, one for each block of pixels and channel.

    They are scikit-image's: `skimage.feature.hog(channel, num_orientations,
    (pixels_per_cell, pixels_per_cell), cells_per_block=(1, 1), block_norm="L2")`, each
    channel on its own, where a cell of scikit-image's is a block here. So gradients are
    differences of the pixel's two neighbours, zero at the image's own border;
    orientations are unsigned (0 to 180 degrees); a gradient counts by its magnitude to
    one orientation; each histogram is divided by its L2 norm. MaskFeat has the same
    orientations, blocks, channels and norm; its reference code takes gradients with a
    Sobel filter and weights them with a Gaussian window of 16 pixels.

    Gradients are taken of whole images, because those of a cell reach into its
    neighbours; histograms of the cells asked for only. The values of a block are those
    of its channels one behind the other.

    - [0]: MaskFeat, 2021, https://arxiv.org/abs/2112.09133

    Attributes:
        num_orientations:
            Number of bins of a histogram.
        pixels_per_cell:
            Side of a block in pixels, a divisor of the cell's.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, num_orientations: AtLeastTwo = 9, pixels_per_cell: PositiveInt = 8
    ) -> None:
        super().__init__()
        self.num_orientations = num_orientations
        self.pixels_per_cell = pixels_per_cell

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        """Returns blocks * channels * orientations, see `Target`.

        Raises:
            ValueError: If the blocks do not tile the cell.
        """
        blocks = count_blocks(cell_size, self.pixels_per_cell, "pixels_per_cell")
        return math.prod(blocks) * in_chans * self.num_orientations

    def weight(
        self, masked: Tensor, index: Tensor, cell_size: tuple[int, int], in_chans: int
    ) -> Tensor:
        """Returns the share of each histogram's pixels that count, see `Target`."""
        pixels = gather_patches(masked, index, cell_size).float()
        share = average_blocks(pixels, cell_size, self.pixels_per_cell)
        return share.repeat_interleave(in_chans * self.num_orientations, dim=-1)

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the histograms, from 0 to 1, see `Target`."""
        images = at_least_float32(images)
        rows = F.pad(images[..., 2:, :] - images[..., :-2, :], (0, 0, 1, 1))
        columns = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
        magnitude = torch.hypot(rows, columns)
        # In degrees, so that 45 of them, which 8-bit images often have, stay 45.
        # Opposite gradients are one orientation.
        angle = torch.rad2deg(torch.atan2(rows, columns)) % 180
        orientation = angle.div(180 / self.num_orientations, rounding_mode="floor")
        # The smallest of negative angles is rounded to 180.
        orientation = orientation.clamp(max=self.num_orientations - 1)

        magnitude = gather_patches(magnitude, index, cell_size)
        orientation = gather_patches(orientation, index, cell_size)
        # One by one: all at once would take the memory of as many copies of the image.
        histograms = torch.stack(
            [
                average_blocks(
                    magnitude * (orientation == number),
                    cell_size,
                    self.pixels_per_cell,
                    "pixels_per_cell",
                )
                for number in range(self.num_orientations)
            ],
            dim=-1,
        )
        # scikit-image's epsilon is 1e-5.
        norm = (histograms.square().sum(dim=-1, keepdim=True) + 1e-10).sqrt()
        return (histograms / norm).flatten(-2)
