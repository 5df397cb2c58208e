"""What probes do to features first: they check them, and bring them to variance 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Standardizer(NamedTuple):
    """Brings features to mean 0 and variance 1, as the training set has them.

    Attributes:
        mean:
            Tensor with shape (dim,).
        scale:
            Tensor with shape (dim,), the standard deviation, and 1 where a feature is
            constant.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, features: Tensor, rows: Tensor | None = None) -> Standardizer:
        """Takes the statistics of features, in float64 and some rows at a time.

        Args:
            features:
                Tensor with shape (num_images, ..., dim).
            rows:
                int64 tensor with the numbers of the images to take. By default all.

        Returns:
            Statistics with the dtype of the features, but at least float32.
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        num_images = len(features) if rows is None else len(rows)
        dims = tuple(range(features.ndim - 1))
        count = num_images * math.prod(features.shape[1:-1])
        size = max(1, 2**22 // max(1, features[:1].numel()))  # 32 MB in float64

        def parts() -> Iterator[Tensor]:
            if rows is None:
                yield from features.split(size)
            else:
                yield from (features[index] for index in rows.split(size))

        mean = features.new_zeros(features.shape[-1], dtype=torch.float64)
        for part in parts():
            mean += part.double().sum(dims) / count
        variance = torch.zeros_like(mean)
        for part in parts():
            variance += (part.double() - mean).square().sum(dims) / count
        std = variance.sqrt()
        # A spread of this size is the rounding of float32, not a feature.
        std[std <= 1e-6 * mean.abs()] = 1.0
        return cls(mean.to(dtype), std.to(dtype))

    def __call__(self, features: Tensor) -> Tensor:
        """Returns standardised features with the shape of the features."""
        return (features - self.mean) / self.scale

    def folded_into(self, weight: Tensor, bias: Tensor) -> nn.Linear:
        """Returns the linear layer that does both: standardises, and then classifies.

        `weight` has shape (num_classes, dim) and `bias` (num_classes,).
        """
        folded = weight.double().cpu() / self.scale.double().cpu()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            layer = nn.Linear(folded.shape[1], folded.shape[0])
            layer.weight.copy_(folded)
            layer.bias.copy_(bias.double().cpu() - folded @ self.mean.double().cpu())
        return layer


def check_fit(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Checks that features (num_images, dim), labels and number of classes go together.

    Raises:
        ValueError: If they do not, or if there are no images.
    """
    if features.ndim != 2 or not len(features) or labels.shape != features.shape[:1]:
        raise ValueError(
            "Features are a matrix with one row per image, and labels have one number "
            f"per image, got shapes {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    check_label_range(labels, num_classes)


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Raises a ValueError if a label is not in [0, num_classes)."""
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"Labels lie in [0, {num_classes}), got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
