"""What predictions are worth: accuracies, their intervals, and the confusion matrix.

Every interval is the percentile bootstrap over test images. It covers the draw of the
test images, but not that of training images or seeds. Where every resample says the
same (all images are right, or all are wrong; for the mean over classes, those of each
class; over draws, each image as often as the others) the bootstrap has nothing to say:
there, and only there, Wilson's score of as many images gives the interval.

- [0]: Efron, 1979, https://doi.org/10.1214/aos/1176344552
- [1]: Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from lightly_mim.arguments import (
    InnerShare,
    NonNegativeInt,
    PositiveInt,
    checked,
)

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


class Accuracy(NamedTuple):
    """A share of test images in [0, 1], with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Scores(NamedTuple):
    """What predictions are worth: over several draws of training images, the means.

    Attributes:
        top1:
            Share of images whose class is the most probable one.
        top5:
            Share of images whose class is among the five most probable, None with five
            classes or fewer.
        mean_class:
            Mean over classes, those with test images, of the accuracy on their images.
        per_class:
            Accuracy on the images of each class, None for classes without any.
        confusion:
            Number of images of each class (row) for which each class (column) was
            predicted, over all draws.
        draws:
            Top-1 accuracy of each draw, if there are several.
    """

    top1: Accuracy
    top5: Accuracy | None
    mean_class: Accuracy
    per_class: list[float | None]
    confusion: list[list[int]]
    draws: list[float] | None

    def columns(self) -> dict[str, Any]:
        """Returns them as a row has them: `top1`, `top1_low`, `top1_high` and so on."""
        columns = self._asdict()
        for name in ("top1", "top5", "mean_class"):
            value, low, high = columns[name] or (None, None, None)
            columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return columns


def score(ranked: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> Scores:
    """Returns what ranked classes are worth, see `Outcome`, against labels (num_test,).

    Raises:
        ValueError: If there are no images, or not as many predictions as labels.
    """
    draws = ranked if ranked.ndim == 3 else ranked[None]
    if not len(labels) or draws.shape[1] != len(labels):
        raise ValueError(
            f"{draws.shape[1]} predictions for {len(labels)} test images cannot be "
            "scored."
        )
    hits = draws == labels[:, None]  # (num_draws, num_test, num_ranks)
    top1 = hits[..., 0].double().mean(dim=0)
    top5 = hits.any(dim=-1).double().mean(dim=0) if num_classes > 5 else None
    pairs = (labels * num_classes + draws[..., 0]).flatten()
    confusion = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    sizes = labels.bincount(minlength=num_classes)
    right = confusion.diagonal().double() / len(draws)
    per_class = [
        float(count / size) if size else None
        for count, size in zip(right.tolist(), sizes.tolist(), strict=True)
    ]
    found = bootstrap(top1, top5, labels, seed)
    return Scores(
        found["top1"],
        found.get("top5"),
        found["mean_class"],
        per_class,
        confusion.tolist(),
        hits[..., 0].double().mean(dim=1).tolist() if ranked.ndim == 3 else None,
    )


def bootstrap(
    top1: Tensor, top5: Tensor | None, labels: Tensor, seed: int = 0
) -> dict[str, Accuracy]:
    """Returns "top1", "top5" (if given) and "mean_class" with their intervals.

    `top1` and `top5` say how often each image was right, in [0, 1]: float64 with shape
    (num_test,). Images of the same class with the same hits are alike. A resample is
    therefore drawn as the number of images of each kind, multinomially, which is the
    same distribution as drawing image by image and takes no time.
    """
    rows = torch.stack([labels.double(), top1, top1 if top5 is None else top5], dim=1)
    kinds, counts = np.unique(rows.numpy(), axis=0, return_counts=True)
    total = len(labels)
    classes, inverse = np.unique(kinds[:, 0], return_inverse=True)
    member = np.eye(len(classes))[inverse]  # (kinds, classes)
    generator = np.random.default_rng(seed)

    def accuracies(drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the accuracies of resamples with shape (resamples, kinds)."""
        sizes = drawn @ member
        per_class = (drawn * kinds[:, 1]) @ member / np.maximum(sizes, 1)
        found = {
            "top1": drawn @ kinds[:, 1] / total,
            "mean_class": per_class.sum(axis=1) / (sizes > 0).sum(axis=1),
        }
        if top5 is not None:
            found["top5"] = drawn @ kinds[:, 2] / total
        return found

    values = accuracies(counts[None])
    parts = [
        # A part at a time: with 1,000 classes there are thousands of kinds.
        accuracies(
            generator.multinomial(total, counts / total, size=NUM_RESAMPLES // 8)
        )
        for _ in range(8)
    ]
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for name, value in values.items():
        accuracy = float(value[0])
        resampled = np.concatenate([part[name] for part in parts])
        low, high = (float(q) for q in np.quantile(resampled, [tail, 1 - tail]))
        if low == high:
            low, high = wilson_interval(round(accuracy * total), total)
        found[name] = Accuracy(accuracy, min(low, accuracy), max(high, accuracy))
    return found


@checked
def wilson_interval(
    correct: NonNegativeInt, total: PositiveInt, confidence: InnerShare = CONFIDENCE
) -> tuple[float, float]:
    """Returns the interval of an accuracy that Wilson's score gives.

    Unlike the normal approximation it stays in [0, 1] and does not shrink to nothing at
    the ends.

    Args:
        correct:
            Number of images that were right.
        total:
            Number of images.
        confidence:
            Share of such intervals that hold the true accuracy.

    Returns:
        (low, high), in [0, 1].

    Raises:
        ValueError: If there are no images.
    """
    if correct > total:
        raise ValueError(f"{correct} of {total} images do not make an accuracy.")
    found = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)
