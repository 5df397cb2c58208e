"""Each pixel as one of a palette of colours.

Shapes: B images, C channels, K cells, D = classes decided per cell: one for each pixel,
or block of pixels, in the order of `lightly_mim.patches`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightly_mim.arguments import AtLeastTwo, PositiveInt
from lightly_mim.patches import gather_patches
from lightly_mim.targets.base import at_least_float32
from lightly_mim.targets.blocks import (
    average_blocks,
    count_blocks,
    repeat_blocks,
)
from lightly_mim.targets.learned import LearnedTarget

# k-means sees this many pixels: seconds on one core for 512 clusters.
_NUM_SAMPLES = 2**16
# Distances between pixels and colours that are held at once: 32 MB.
_NUM_DISTANCES = 2**23


class ColorClusters(LearnedTarget):
    """Which of `num_clusters` colours is the nearest to a pixel, channels together.

    The colours are centroids of k-means on the images that `fit` has seen, of which
    65,536 pixels are drawn, always the same. SimMIM takes the 512 colours of iGPT,
    learned from ImageNet; here they are the user's own, of any number of channels.

    The distances of a pixel to all colours are computed in every step, for a number of
    pixels at a time, so memory stays bounded. A `factor` shortens that, and makes the
    head smaller: it predicts num_clusters values for each pixel, or block.

    - [0]: iGPT, 2020, https://cdn.openai.com/papers/Generative_Pretraining_from_Pixels_V2.pdf
    - [1]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (section 3.4, "Color
      clustering")

    Attributes:
        num_classes:
            Number of colours.
        factor:
            Side of the blocks in pixels that are averaged first, a divisor of the
            cell's. 1 keeps every pixel.
        centroids:
            Buffer with shape (num_clusters, channels), the colours.

    Args:
        num_clusters:
            Number of colours, at least 2.
        factor:
            Side of the blocks in pixels.

    Raises:
        ValueError: If an argument is out of range.
    """

    drawable: ClassVar[bool] = True

    num_classes: int
    centroids: Tensor

    def __init__(self, num_clusters: AtLeastTwo = 512, factor: PositiveInt = 1) -> None:
        super().__init__()
        self.num_classes = num_clusters
        self.factor = factor
        self.register_buffer("centroids", torch.zeros(num_clusters, 0))

    def fit(self, images: Tensor) -> None:
        """Finds the colours by k-means, see `LearnedTarget`.

        Raises:
            ValueError: If the images have fewer colours than clusters.
        """
        blocks = F.avg_pool2d(images.float(), self.factor)
        pixels = blocks.movedim(1, -1).flatten(0, -2).cpu().numpy()
        if len(pixels) > _NUM_SAMPLES:
            rng = np.random.default_rng(0)
            pixels = pixels[rng.choice(len(pixels), _NUM_SAMPLES, replace=False)]
        num_colors = len(np.unique(pixels, axis=0))
        if num_colors < self.num_classes:
            raise ValueError(
                f"{self} needs at least {self.num_classes} different colours to learn "
                f"from, and the images have {num_colors}: choose num_clusters well "
                "below that, or show it more images."
            )
        # Several threads would add up their sums in the order in which they finish.
        with threadpool_limits(1):
            means = KMeans(self.num_classes, random_state=0).fit(pixels)
        centroids = torch.from_numpy(means.cluster_centers_).float()
        self.centroids = centroids.to(self.centroids.device)

    @property
    def per_pixel(self) -> bool:
        """Whether no pixels are averaged, see `Target`."""
        return self.factor == 1

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        """Returns how many pixels, or blocks, a cell has, see `Target`.

        Raises:
            ValueError: If the blocks do not tile the cell.
        """
        return math.prod(count_blocks(cell_size, self.factor))

    def weight(
        self, masked: Tensor, index: Tensor, cell_size: tuple[int, int], in_chans: int
    ) -> Tensor:
        """Returns the share of each pixel, or block, that counts, see `Target`."""
        pixels = gather_patches(masked, index, cell_size).float()
        return average_blocks(pixels, cell_size, self.factor)

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        """Returns the nearest colours as int64 classes, see `Target`.

        Raises:
            ValueError: If the target was not fitted on images of as many channels.
        """
        self.check_fitted(images.shape[1])
        pixels = at_least_float32(gather_patches(images, index, cell_size))
        values = average_blocks(pixels, cell_size, self.factor)
        nearest = self._nearest(values.reshape(-1, images.shape[1]))
        return nearest.reshape(*index.shape, -1)

    def to_pixels(
        self,
        prediction: Tensor,
        images: Tensor,
        index: Tensor,
        cell_size: tuple[int, int],
    ) -> Tensor:
        """Gives each pixel its most probable colour, see `Target`."""
        self.check_fitted(images.shape[1])
        logits = prediction.reshape(*index.shape, -1, self.num_classes)
        colors = self.centroids[logits.argmax(dim=-1)]
        return repeat_blocks(colors.flatten(-2), cell_size, self.factor)

    def _nearest(self, colors: Tensor) -> Tensor:
        """Returns the nearest centroid of each colour, int64 with shape (N,)."""
        half_norms = self.centroids.square().sum(dim=1) / 2
        nearest = []
        for part in torch.split(colors, max(1, _NUM_DISTANCES // self.num_classes)):
            # Half the squared distance less half the colour's own square. A matrix
            # product would be rounded to what autocast or the user's choice for matrix
            # products leaves of float32, which is coarser than the palette.
            distances = half_norms.expand(len(part), -1)
            for value, centroid in zip(part.T, self.centroids.T, strict=True):
                distances = torch.addcmul(distances, value[:, None], centroid, value=-1)
            nearest.append(distances.argmin(dim=1))
        return torch.cat(nearest)
