"""Pixels: as they are, averaged, or normalised in their patch or their surroundings.

Shapes: B images, C channels, K cells of (p, q) pixels, D = p * q * C values each, in
the order of `lightly_mim.patches`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightly_mim.arguments import PositiveInt
from lightly_mim.patches import gather_patches
from lightly_mim.targets.base import Target, at_least_float32
from lightly_mim.targets.blocks import (
    average_blocks,
    count_blocks,
    repeat_blocks,
)


class PixelTarget(Target):
    """A target with one value for each pixel, or block of pixels, and channel.

    Attributes:
        factor:
            Side of the blocks in pixels.
    """

    drawable: ClassVar[bool] = True

    factor: int = 1

    @property
    def per_pixel(self) -> bool:
        """Whether no pixels are averaged, see `Target`."""
        return self.factor == 1

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        """Returns how many pixels, or blocks, times channels a cell has, see `Target`.

        Raises:
            ValueError: If the blocks do not tile the cell.
        """
        return math.prod(count_blocks(cell_size, self.factor)) * in_chans

    def weight(
        self, masked: Tensor, index: Tensor, cell_size: tuple[int, int], in_chans: int
    ) -> Tensor:
        """Returns the share of each pixel, or block, that counts, see `Target`."""
        pixels = masked.expand(-1, in_chans, -1, -1)
        pixels = gather_patches(pixels, index, cell_size).float()
        return average_blocks(pixels, cell_size, self.factor)


class Pixels(PixelTarget):
    """The normalised pixels themselves, or their averages over square blocks.

    A factor of 32 averages images of 192 x 192 pixels to a resolution of 6 x 6.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 3.4: raw pixels, also
      at a lower resolution; its reference code takes them after ImageNet normalisation
      and at full resolution)

    Attributes:
        factor:
            Side of the blocks in pixels, a divisor of the cell's. 1 keeps every pixel.

    Raises:
        ValueError: If the factor is below 1.
    """

    def __init__(self, factor: PositiveInt = 1) -> None:
        super().__init__()
        self.factor = factor

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the pixels of the cells, or the averages, see `Target`."""
        pixels = gather_patches(images, index, cell_size)
        return average_blocks(pixels, cell_size, self.factor)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        cell_size: tuple[int, int],
    ) -> Tensor:
        """Gives each pixel the prediction for its block, see `Target`."""
        return repeat_blocks(prediction, cell_size, self.factor)


class PatchNormalizedPixels(PixelTarget):
    """Pixels minus the mean, over the standard deviation, of the patch they are in.

    Mean and variance are those of all values of a patch, channels together. The
    variance is unbiased and 1e-6 is added to it, as in MAE's reference code.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377 (section 3, "Reconstruction
      target", and table 1d)
    """

    picture_note: ClassVar[str] = (
        "Brightness and contrast of each predicted patch come from the original patch."
    )

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        """Returns the number of values of a cell, see `Target`.

        Raises:
            ValueError: If it is one, which has no deviation.
        """
        width = super().width(cell_size, in_chans)
        if width == 1:
            raise ValueError(
                f"{type(self).__name__} divides by the deviation within a patch, and a "
                "patch of 1 x 1 pixel and 1 channel has none: use a larger patch_size, "
                "or target=Pixels()."
            )
        return width

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the normalised pixels, of half precision in float32, see `Target`."""
        patches = at_least_float32(gather_patches(images, index, cell_size))
        mean, std = self.statistics(patches)
        return (patches - mean) / std

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        cell_size: tuple[int, int],
    ) -> Tensor:
        """Undoes the normalisation with the true statistics of the masked patches.

        A picture made this way shows more than the model predicted: brightness and
        contrast of each patch are the image's own.
        """
        patches = at_least_float32(gather_patches(images, index, cell_size))
        mean, std = self.statistics(patches)
        return (prediction * std + mean).to(prediction.dtype)

    @staticmethod
    def statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of each patch.

        Args:
            patches:
                Float tensor with shape (batch_size, num_cells, dim).

        Returns:
            (mean, std), each with shape (batch_size, num_cells, 1).
        """
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()


class LocallyNormalizedPixels(PixelTarget):
    """Pixels minus the mean, over the standard deviation, of the window around each.

    The window is cut off at the image border, the variance is unbiased, and 1e-6 is
    added to it, as in SwinV2's reference code (`NORM_TARGET`, window 47).

    - [0]: SwinV2, 2021, https://arxiv.org/abs/2111.09883

    Attributes:
        window_size:
            Side of the window in pixels, odd.

    Raises:
        ValueError: If the window size is even or below 3.
    """

    picture_note: ClassVar[str] = (
        "Local brightness and contrast of the prediction come from the original image."
    )

    def __init__(self, window_size: int = 47) -> None:
        super().__init__()
        if window_size < 3 or window_size % 2 == 0:
            raise ValueError(
                f"The window of a local normalisation has an odd side of at least 3 "
                f"pixels, got window_size={window_size}."
            )
        self.window_size = window_size

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the normalised pixels of the cells, see `Target`."""
        mean, std = self.statistics(images)
        return gather_patches((images - mean) / std, index, cell_size)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        cell_size: tuple[int, int],
    ) -> Tensor:
        """Undoes the normalisation with the true statistics of the images.

        Those include the masked pixels, so a picture made this way shows more than the
        model predicted: local brightness and contrast are the image's own.
        """
        mean, std = self.statistics(images)
        std = gather_patches(std, index, cell_size)
        return prediction * std + gather_patches(mean, index, cell_size)

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the window around each pixel.

        Args:
            images:
                Float tensor with shape (batch_size, channels, height, width).

        Returns:
            (mean, std), each with the shape of the images.
        """
        count = self._window_sum(torch.ones_like(images[:1, :1]))
        mean = self._window_sum(images) / count
        mean_square = self._window_sum(images.square()) / count
        # Rounding may leave a flat window with a variance just below zero.
        variance = (mean_square - mean.square()).clamp(min=0) * count / (count - 1)
        return mean, (variance + 1e-6).sqrt()

    def _window_sum(self, images: Tensor) -> Tensor:
        size, border = self.window_size, self.window_size // 2
        # Rows, then columns: 2 * size additions per pixel instead of size * size.
        rows = F.avg_pool2d(images, (size, 1), 1, (border, 0), divisor_override=1)
        return F.avg_pool2d(rows, (1, size), 1, (0, border), divisor_override=1)
