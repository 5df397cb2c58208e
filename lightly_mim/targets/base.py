"""What every target is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightly_mim.config import Recorded
from lightly_mim.patches import gather_patches


class Target(Recorded, ABC):
    """Turns the cells to predict into numbers, and predicted numbers into pixels.

    A target is either numbers to come close to or, with `num_classes`, classes to
    choose from. In the latter case a method predicts `num_classes` values (logits) for
    each of them, those of one class decision behind each other.

    One that learns from images before the training starts is a `LearnedTarget`.

    Attributes:
        num_classes:
            Number of classes of each value. None for numbers.
        drawable:
            Whether `to_pixels` works.
        picture_note:
            What a picture made by `to_pixels` shows that was not predicted, in a
            sentence. Empty if there is nothing to say.
    """

    num_classes: int | None = None
    drawable: ClassVar[bool] = False
    picture_note: ClassVar[str] = ""

    @property
    def per_pixel(self) -> bool:
        """Whether a cell's values are those of its pixels, in their order."""
        return False

    @abstractmethod
    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        """Returns how many values the target of a cell has.

        Args:
            cell_size:
                (height, width) of a cell in pixels.
            in_chans:
                Number of image channels.

        Raises:
            ValueError: If the target cannot be made of such cells.
        """

    @abstractmethod
    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the values to predict.

        Args:
            images:
                Float tensor with shape (batch_size, channels, height, width),
                normalised.
            index:
                int64 tensor with shape (batch_size, num_cells), raster order.
            cell_size:
                (height, width) of a cell in pixels.

        Returns:
            Tensor with shape (batch_size, num_cells, width): float, or int64 classes
            from 0 to `num_classes` - 1.
        """

    def weight(
        self, masked: Tensor, index: Tensor, cell_size: tuple[int, int], in_chans: int
    ) -> Tensor:
        """Returns how much each value counts where cells are masked in part.

        By default every value of a cell counts by the share of its pixels that count.

        Args:
            masked:
                Bool tensor with shape (batch_size, 1, height, width), True for the
                pixels that count.
            index:
                int64 tensor with shape (batch_size, num_cells), raster order.
            cell_size:
                (height, width) of a cell in pixels.
            in_chans:
                Number of image channels.

        Returns:
            Float tensor with shape (batch_size, num_cells, width), from 0 to 1.
        """
        pixels = gather_patches(masked.float(), index, cell_size)
        width = self.width(cell_size, in_chans)
        return pixels.mean(dim=-1, keepdim=True).expand(-1, -1, width)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        cell_size: tuple[int, int],
    ) -> Tensor:
        """Returns predicted values as pixels of the normalised images.

        Args:
            prediction:
                Float tensor with shape (batch_size, num_cells, width), or (batch_size,
                num_cells, width * num_classes) logits.
            images:
                The images that the target was made from.
            index:
                int64 tensor with shape (batch_size, num_cells), raster order.
            cell_size:
                (height, width) of a cell in pixels.

        Returns:
            Float tensor with shape (batch_size, num_cells, cell_height * cell_width *
            channels), in the order of `lightly_mim.patches`.

        Raises:
            ValueError: If no picture is defined for this target, see `drawable`.
        """
        raise ValueError(
            f"{type(self).__name__} does not say what a patch looks like, so it cannot "
            "be drawn. Only targets that are made of pixels can."
        )


def at_least_float32(values: Tensor) -> Tensor:
    """Returns values of half precision in float32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
