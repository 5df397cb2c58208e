"""Every split of an evaluation: parts of a training set, what is held out, few labels.

All are stratified by class and functions of a seed. scikit-learn's splitters are not
used, since training sets are often smaller than they allow: `StratifiedKFold` refuses
five parts of 12 images of three classes, `StratifiedShuffleSplit` a class with one
image, and neither draws so many per class that a small draw is part of a larger one.
Where they do split, the sizes are the same, for parts and for classes in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lightly_mim.arguments import NonNegativeInt, PositiveInt, Seed, checked
from lightly_mim.data.notes import printable


def assign_folds(labels: Tensor, num_folds: int = 5, seed: int = 0) -> Tensor:
    """Deals the images of a training set into parts, class by class.

    Each class is shuffled by the seed and dealt out in turn, going on where the last
    class ended. All parts, and each class in them, are as equal in size as can be.

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
    """Returns the numbers of the images class by class, shuffled within each.

    Whoever takes them at even distances takes from each class in proportion.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    return shuffled[labels.cpu()[shuffled].argsort(stable=True)]


def check_folds(num_folds: int, num_images: int) -> None:
    """Raises a ValueError if there are fewer than two parts, or more than images."""
    if not 2 <= num_folds <= num_images:
        raise ValueError(
            "Cross-validation holds out one part of the training images after the "
            "other: that takes at least 2 parts and one "
            f"image in each, got num_folds={num_folds} for {num_images} image(s)."
        )


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Holds out a share of the images in (0, 1), evenly from each class.

    Where a class has a fraction of an image to give, the seed decides. Its last image
    is kept for training.

    Returns:
        Boolean tensor with shape (num_images,).

    Raises:
        ValueError: If that leaves no image on one side.
    """
    generator = Generator().manual_seed(seed)
    # Every so many images of the classes in random order, from a random one on.
    shuffled = torch.randperm(int(labels.max()) + 1, generator=generator)[labels]
    order = spread_over_classes(shuffled, generator)
    first = torch.rand((), generator=generator, dtype=torch.float64)
    steps = (torch.arange(len(labels) + 1).double() * share + first).floor()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[order] = steps.diff() > 0
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        if len(members) and held_out[members].all():
            held_out[members[0]] = False
    if not held_out.any() or held_out.all():
        raise ValueError(
            f"holdout={share} of {len(labels)} training image(s) leaves none on one "
            "side. Give more images, or another share."
        )
    return held_out


@checked
def draw_per_class(
    labels: Tensor,
    num_classes: PositiveInt,
    count: NonNegativeInt,
    seed: Seed,
) -> Tensor:
    """Draws as many images of each class, without replacement.

    Args:
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        count:
            Number of images per class.
        seed:
            Decides which images. The first columns are the draw of a smaller count.

    Returns:
        int64 tensor with shape (num_classes, count) with the numbers of the images.

    Raises:
        ValueError: If a class has fewer images.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            "labels has shape (num_images,) and whole numbers, got "
            f"{tuple(labels.shape)} of {labels.dtype}."
        )
    check_counts(labels, [str(label) for label in range(num_classes)], count)
    generator = Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    classes = labels[shuffled]
    drawn = [shuffled[classes == label][:count] for label in range(num_classes)]
    return torch.stack(drawn)


def check_counts(labels: Tensor, classes: Sequence[str], count: int) -> None:
    """Raises a ValueError, naming the class, if one has fewer images than `count`."""
    present = labels.bincount(minlength=len(classes))
    rarest = int(present.argmin())
    if int(present[rarest]) < count:
        raise ValueError(
            f"Class {printable(classes[rarest])} has {int(present[rarest])} training "
            f"image(s), too few to draw {count} per class. Use smaller shots."
        )
