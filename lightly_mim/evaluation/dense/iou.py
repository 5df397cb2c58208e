"""Intersection over union, and its interval."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightly_mim.data.seeding import seed_from
from lightly_mim.data.segmentation import IGNORED
from lightly_mim.evaluation.scores import CONFIDENCE, NUM_RESAMPLES


def count_pixels(predicted: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by class; pixels without a class, -1 in the mask, do not count.

    Prediction and mask are int64 with shape (height, width) or (B, height, width).

    Returns:
        float64 tensor with shape (num_classes, 3): pixels of the class in both, only in
        the prediction, and only in the mask.
    """
    confusion = multiclass_confusion_matrix(
        predicted, mask, num_classes, ignore_index=IGNORED, validate_args=False
    ).double()
    both = confusion.diagonal()
    return torch.stack(
        [both, confusion.sum(dim=0) - both, confusion.sum(dim=1) - both], dim=-1
    )


def class_iou(counts: Tensor) -> Tensor:
    """Returns intersection over union of each class, NaN for one that is nowhere.

    `counts` are sums of `count_pixels` with shape (..., num_classes, 3).
    """
    return counts[..., 0] / counts.sum(dim=-1)


def miou_interval(counts: Tensor, seed: int) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over classes, by the bootstrap over images.

    `counts` has shape (num_images, num_classes, 3), see `count_pixels`.
    """
    generator = Generator().manual_seed(seed_from(seed, "segmentation", "bootstrap"))
    num_images = len(counts)
    drawn = torch.randint(num_images, (NUM_RESAMPLES, num_images), generator=generator)
    times = torch.zeros(NUM_RESAMPLES, num_images, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    sums = (times @ counts.flatten(1)).view(NUM_RESAMPLES, -1, 3)
    means = class_iou(sums).nanmean(dim=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = means.nanquantile(torch.tensor([tail, 1 - tail]).double())
    return float(low), float(high)
