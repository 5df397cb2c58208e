"""Items of a data set, read as a function of (seed, epoch, index), and batches."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from lightly.data.multi_view_collate import MultiViewCollate
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.arguments import AnyDataset, Seed, checked
from lightly_mim.data.notes import printable
from lightly_mim.data.opening import BrokenImageError
from lightly_mim.data.seeding import keyed_random_state

Key = tuple[int, int]  # (epoch, index)
Item = tuple[Any, int, str]  # (sample, target, filename)


@checked
class KeyedDataset(Dataset[Any]):
    """Reads items of another data set under a random state that is keyed.

    Transforms then draw the same numbers for (seed, epoch, index) whatever was drawn
    before and whichever process reads; the random state outside is left as it was.

    Attributes:
        dataset:
            Data set of (sample, target, filename), (sample, target) or samples. What is
            missing becomes target 0 and the index as filename, as in lightly.
        seed:
            First part of the key.
        labels:
            Whether targets are labels, whole numbers. False replaces them by 0,
            whatever they are, masks, boxes or None; None replaces those by -1 that are
            no whole numbers.
    """

    def __init__(
        self, dataset: AnyDataset, seed: Seed, labels: bool | None = True
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.labels = labels

    def __getitem__(self, key: Key) -> Item | BrokenImageError:
        """Returns the item for (epoch, index), or the error of one that is no use.

        The error is returned, since a worker would pass on a raised one as a long
        traceback; `KeyedLoader` raises it.
        """
        epoch, index = key
        with keyed_random_state(self.seed, epoch, index):
            try:
                sample, target, filename = as_item(self.dataset[index], index)
                _check_sample(sample, index)
                label = self._label(target, index)
            except BrokenImageError as error:
                return error
            return sample, label, filename

    def _label(self, target: Any, index: int) -> int:
        if self.labels is False:
            return 0
        try:
            return _as_label(target, index)
        except BrokenImageError:
            if self.labels is None:
                return -1
            raise


def _check_sample(sample: Any, index: int) -> None:
    views = sample if isinstance(sample, list) else [sample]
    if not views or not all(isinstance(view, Tensor) for view in views):
        kinds = ", ".join(type(view).__name__ for view in views) or "no view"
        raise BrokenImageError(
            f"Sample {index} of the data set cannot be used: it is "
            f"{'a list of ' if isinstance(sample, list) else 'of type '}{kinds}; a "
            "batch is made of tensors or of lists of them. Give the data set a "
            "transform, for example lightly_mim.SimMIMTransform()."
        )


def _as_label(target: Any, index: int) -> int:
    try:
        number = operator.index(target)  # also of numpy's and PyTorch's whole numbers
        if number.bit_length() > 63:
            raise ValueError
        return number
    except (TypeError, ValueError, RuntimeError):
        shown = printable(repr(target))
        raise BrokenImageError(
            f"The label of sample {index} of the data set is no class: whole numbers "
            f"of 64 bits are needed, got {type(target).__name__} "
            f"{shown if len(shown) < 80 else shown[:80] + ' ...'}."
        ) from None


def as_item(item: Any, index: int) -> Item:
    """Returns lightly's (sample, target, filename) for an item of any data set."""
    if not isinstance(item, tuple):
        return item, 0, str(index)
    if len(item) == 1:
        return item[0], 0, str(index)
    if len(item) == 2:
        return item[0], item[1], str(index)
    return item[0], item[1], item[2]


def collate(items: Sequence[Item | BrokenImageError]) -> Any:
    """Makes a batch: lightly's for lists of views, plain for tensors.

    Args:
        items:
            (sample, target, filename) each, with a list of views or a tensor as sample.

    Returns:
        ([views], targets, filenames) or (samples, targets, filenames); each view and
        the samples are a tensor with shape (batch_size, ...), the targets int64 with
        shape (batch_size,). An error among the items is returned in their place.

    Raises:
        ValueError: If the samples have not all the same shape.
    """
    whole: list[Item] = []
    for item in items:
        if isinstance(item, BrokenImageError):
            return item
        whole.append(item)
    shapes = [_shapes(sample) for sample, _, _ in whole]
    for shape, (_, _, filename) in zip(shapes, whole, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"All samples of a batch need the same shape, {printable(filename)} "
                f"has {shape} and {printable(whole[0][2])} {shapes[0]}. Give the data "
                "set a transform that crops, for example lightly_mim.SimMIMTransform()."
            )
    if isinstance(whole[0][0], list):
        return MultiViewCollate()(whole)
    samples, targets, filenames = zip(*whole, strict=True)
    return torch.stack(samples), torch.tensor(targets), list(filenames)


def _shapes(sample: Tensor | list[Tensor]) -> list[list[int]]:
    """Returns the shape of each view."""
    views = sample if isinstance(sample, list) else [sample]
    return [list(view.shape) for view in views]
