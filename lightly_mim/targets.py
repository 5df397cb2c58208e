"""What to predict.

A target turns images and the cells to predict into values, and turns predicted values
back into pixels for pictures.

Shapes: B images, C channels, K cells of (p, q) pixels, D = p * q * C values each, in
the order of `lightly_mim.patches`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightly_mim.patches import gather_patches


class Target(Protocol):
    """What every target offers."""

    def __call__(
        self, images: Tensor, index: Tensor, patch_size: tuple[int, int]
    ) -> Tensor:
        """Returns the values to predict.

        Args:
            images:
                Float tensor with shape (batch_size, channels, height, width),
                normalised.
            index:
                int64 tensor with shape (batch_size, num_cells), raster order.
            patch_size:
                (height, width) of a cell in pixels.

        Returns:
            Float tensor with shape (batch_size, num_cells, dim).
        """
        ...

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        patch_size: tuple[int, int],
    ) -> Tensor:
        """Returns predicted values as pixels of the normalised images.

        Args:
            prediction:
                Float tensor with shape (batch_size, num_cells, dim).
            images:
                The images that the target was made from.
            index:
                int64 tensor with shape (batch_size, num_cells), raster order.
            patch_size:
                (height, width) of a cell in pixels.

        Returns:
            Float tensor with shape (batch_size, num_cells, patch_height * patch_width *
            channels).
        """
        ...


class Pixels:
    """The normalised pixels themselves.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 3.4: raw pixels; its
      reference code takes them after ImageNet normalisation)
    """

    def __call__(
        self, images: Tensor, index: Tensor, patch_size: tuple[int, int]
    ) -> Tensor:
        """Returns the pixels of the cells, see `Target`."""
        return gather_patches(images, index, patch_size)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        patch_size: tuple[int, int],
    ) -> Tensor:
        """Returns the prediction as it is, see `Target`."""
        return prediction


class PatchNormalizedPixels:
    """Pixels minus the mean, over the standard deviation, of the patch they are in.

    Mean and variance are those of all values of a patch, channels together. The
    variance is unbiased and 1e-6 is added to it, as in MAE's reference code.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377 (section 3, "Reconstruction
      target", and table 1d)
    """

    def __call__(
        self, images: Tensor, index: Tensor, patch_size: tuple[int, int]
    ) -> Tensor:
        """Returns the normalised pixels, of half precision in float32, see `Target`."""
        patches = _at_least_float32(gather_patches(images, index, patch_size))
        mean, std = self.statistics(patches)
        return (patches - mean) / std

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        patch_size: tuple[int, int],
    ) -> Tensor:
        """Undoes the normalisation with the true statistics of the masked patches.

        A picture made this way shows more than the model predicted: brightness and
        contrast of each patch are the image's own.
        """
        patches = _at_least_float32(gather_patches(images, index, patch_size))
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


class LocallyNormalizedPixels:
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

    def __init__(self, window_size: int = 47) -> None:
        if window_size < 3 or window_size % 2 == 0:
            raise ValueError(
                f"The window of a local normalisation has an odd side of at least 3 "
                f"pixels, got {window_size}."
            )
        self.window_size = window_size

    def __call__(
        self, images: Tensor, index: Tensor, patch_size: tuple[int, int]
    ) -> Tensor:
        """Returns the normalised pixels of the cells, see `Target`."""
        mean, std = self.statistics(images)
        return gather_patches((images - mean) / std, index, patch_size)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        patch_size: tuple[int, int],
    ) -> Tensor:
        """Undoes the normalisation with the true statistics of the images.

        Those include the masked pixels, so a picture made this way shows more than the
        model predicted: local brightness and contrast are the image's own.
        """
        mean, std = self.statistics(images)
        std = gather_patches(std, index, patch_size)
        return prediction * std + gather_patches(mean, index, patch_size)

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


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
