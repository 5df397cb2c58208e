"""What the probes on cached features share: statistics, parts, checks and scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

# Numbers that are held at a time, a quarter of a gigabyte in float32.
MAX_NUMBERS = 2**26


class GridChoice(NamedTuple):
    """What held-out training images have chosen from a grid of probes.

    Attributes:
        learning_rate:
            The best learning rate.
        weight_decay:
            The best weight decay.
        accuracy:
            Their top-1 accuracy on the held-out images, in [0, 1].
        loss:
            Their cross-entropy there, which decides between equal accuracies.
    """

    learning_rate: float
    weight_decay: float
    accuracy: float
    loss: float


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
        """Takes the statistics of features.

        They are computed in float64, some rows at a time.

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

        def chunk(start: int) -> Tensor:
            if rows is None:
                return features[start : start + size].double()
            return features[rows[start : start + size]].double()

        mean = features.new_zeros(features.shape[-1], dtype=torch.float64)
        for start in range(0, num_images, size):
            mean += chunk(start).sum(dims) / count
        variance = torch.zeros_like(mean)
        for start in range(0, num_images, size):
            variance += (chunk(start) - mean).square().sum(dims) / count
        std = variance.sqrt()
        # A spread of this size is the rounding of float32, not a feature.
        std[std <= 1e-6 * mean.abs()] = 1.0
        return cls(mean.to(dtype), std.to(dtype))

    def __call__(self, features: Tensor) -> Tensor:
        """Returns standardised features with the shape of the features."""
        return (features - self.mean) / self.scale


def assign_folds(labels: Tensor, num_folds: int = 5, seed: int = 0) -> Tensor:
    """Deals the images of a training set into parts, class by class.

    Each class is shuffled and dealt out in turn, going on where the last class ended.
    All parts, and each class in them, are as equal in size as can be.

    Args:
        labels:
            int64 tensor with shape (num_images,).
        num_folds:
            Number of parts.
        seed:
            Decides which image goes where.

    Returns:
        int64 tensor with shape (num_images,) on the CPU, the part of each image.

    Raises:
        ValueError: If there are fewer than two parts, or more than images.
    """
    check_folds(num_folds, len(labels))
    by_class = spread_over_classes(labels, Generator().manual_seed(seed))
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[by_class] = torch.arange(len(labels)) % num_folds
    return folds


def spread_over_classes(labels: Tensor, generator: Generator) -> Tensor:
    """Orders images class by class, shuffled within each.

    Whoever takes them at even distances takes from each class in proportion.

    Args:
        labels:
            int64 tensor with shape (num_images,).
        generator:
            Decides the order within a class.

    Returns:
        int64 tensor with shape (num_images,) on the CPU, numbers of images.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    return shuffled[labels.cpu()[shuffled].argsort(stable=True)]


def score_linear(
    weight: Tensor,
    bias: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    max_numbers: int = MAX_NUMBERS,
) -> tuple[Tensor, Tensor]:
    """Scores many linear classifiers at once.

    Args:
        weight:
            Tensor with shape (num_probes, num_classes, dim).
        bias:
            Tensor with shape (num_probes, num_classes).
        features:
            Standardised features with shape (num_images, dim).
        labels:
            int64 tensor with shape (num_images,).
        max_numbers:
            Largest number of logits at a time.

    Returns:
        (correct, loss), int64 and float64 tensors with shape (num_probes,) on the CPU:
        how many images each of them gets right, and the sum of its cross-entropies.
    """
    num_probes = len(weight)
    correct = torch.zeros(num_probes, dtype=torch.int64)
    loss = torch.zeros(num_probes, dtype=torch.float64)
    size = max(1, max_numbers // bias.numel())
    for start in range(0, len(features), size):
        batch, target = features[start : start + size], labels[start : start + size]
        logits = torch.addmm(bias.view(-1, 1), weight.flatten(0, 1), batch.T)
        logits = logits.view(*bias.shape, len(batch))
        targets = target.expand(num_probes, -1)
        correct += (logits.argmax(dim=1) == targets).sum(dim=1).cpu()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        loss += losses.sum(dim=1, dtype=torch.float64).cpu()
    return correct, loss


def check_fit(features: Tensor, labels: Tensor, num_classes: int) -> None:
    """Checks that features, labels and the number of classes go together.

    Args:
        features:
            Tensor with shape (num_images, dim).
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.

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
    """Checks that labels are classes.

    Args:
        labels:
            int64 tensor with shape (num_images,).
        num_classes:
            Number of classes.

    Raises:
        ValueError: If a label is not in [0, num_classes).
    """
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"Labels lie in [0, {num_classes}), got {int(labels.min())} to "
            f"{int(labels.max())}."
        )


def check_folds(num_folds: int, num_images: int) -> None:
    """Checks that a training set can be dealt into parts.

    Args:
        num_folds:
            Number of parts.
        num_images:
            Number of training images.

    Raises:
        ValueError: If there are fewer than two parts, or more than images.
    """
    if not 2 <= num_folds <= num_images:
        raise ValueError(
            "Cross-validation holds out one part of the training images after the "
            "other: that takes at least 2 parts and one "
            f"image in each, got num_folds={num_folds} for {num_images} image(s)."
        )
