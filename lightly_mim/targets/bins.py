"""Each channel of each pixel as one of a few classes of brightness.

Shapes: B images, C channels, K cells, D = classes decided per cell: one for each pixel,
or block of pixels, and channel, in the order of `lightly_mim.patches`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightly_mim.arguments import AtLeastTwo, PositiveInt
from lightly_mim.patches import gather_patches
from lightly_mim.targets.base import at_least_float32
from lightly_mim.targets.blocks import average_blocks, repeat_blocks
from lightly_mim.targets.learned import LearnedTarget
from lightly_mim.targets.pixels import PixelTarget


class ColorBins(PixelTarget, LearnedTarget):
    """Channel by channel, which of `num_bins` bins of equal width a pixel lies in.

    The bins of a channel divide the range between the darkest and the brightest value
    of the images that `fit` has seen, so they need not know how images are normalised;
    what lies outside counts to the outermost bin. Where these images reach from black
    to white, bins are those of 8-bit images from 0 to 255, and 256 of them are its
    levels.

    A method predicts num_bins values for each pixel and channel, at full resolution as
    many as 196,608 for 256 bins and a cell of 16 x 16 RGB pixels: where that is too
    many, a `factor` bins the averages of blocks. The paper does not say at which
    resolution it compares its bins.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 3.4, "Channel-wise
      bin color discretization", with 8 and 256 bins)

    Attributes:
        num_classes:
            Number of bins.
        factor:
            Side of the blocks in pixels, a divisor of the cell's. 1 bins every pixel.
        low:
            Buffer with shape (channels,), the lower end of the first bin.
        high:
            Buffer with shape (channels,), the upper end of the last bin.

    Args:
        num_bins:
            Number of bins, at least 2.
        factor:
            Side of the blocks in pixels.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_classes: int
    low: Tensor
    high: Tensor

    def __init__(self, num_bins: AtLeastTwo = 8, factor: PositiveInt = 1) -> None:
        super().__init__()
        self.num_classes = num_bins
        self.factor = factor
        self.register_buffer("low", torch.zeros(0))
        self.register_buffer("high", torch.zeros(0))

    def fit(self, images: Tensor) -> None:
        """Takes the range of each channel from images, see `LearnedTarget`.

        Raises:
            ValueError: If the values of a channel are all the same or not finite.
        """
        images = images.float()
        low, high = images.amin(dim=(0, 2, 3)), images.amax(dim=(0, 2, 3))
        usable = (high > low) & (high - low).isfinite()
        if not usable.all():
            channel = int(usable.int().argmin())
            raise ValueError(
                f"Channel {channel} of the images that {self} is fitted on ranges from "
                f"{low[channel]:g} to {high[channel]:g}, which cannot be divided into "
                "bins: show it images that differ in that channel."
            )
        self.low = low.to(self.low.device)
        self.high = high.to(self.high.device)

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the bins as int64 classes, see `Target`.

        Raises:
            ValueError: If the target was not fitted on images of as many channels.
        """
        self.check_fitted(images.shape[1])
        pixels = at_least_float32(gather_patches(images, index, cell_size))
        values = average_blocks(pixels, cell_size, self.factor)
        values = values.reshape(*index.shape, -1, len(self.low))
        bins = (values - self.low) / (self.high - self.low) * self.num_classes
        return bins.floor().clamp(0, self.num_classes - 1).long().flatten(-2)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        cell_size: tuple[int, int],
    ) -> Tensor:
        """Gives each pixel the middle of its most probable bin, see `Target`."""
        self.check_fitted(images.shape[1])
        shape = (*index.shape, -1, len(self.low), self.num_classes)
        logits = prediction.reshape(shape)
        share = (logits.argmax(dim=-1) + 0.5) / self.num_classes
        values = (self.low + share * (self.high - self.low)).flatten(-2)
        return repeat_blocks(values, cell_size, self.factor)
