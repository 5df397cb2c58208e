"""Weighted k-nearest-neighbour classification on cached features.

- [0]: InstDisc, 2018, https://arxiv.org/abs/1805.01978 (section 3.4: cosine similarity,
  each of the k neighbours votes with weight exp(similarity / temperature))
- [1]: DINOv2, 2023, https://arxiv.org/abs/2304.07193 (temperature 0.07, k of 10, 20,
  100, 200 in `dinov2/eval/knn.py`)

k and the temperature are chosen by leave-one-out on the training set; the test set is
scored once, with that choice.

Shapes: Q queries, N images in the bank, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightly_mim.arguments import NonEmpty, PositiveFloat, PositiveInt, checked
from lightly_mim.evaluation.base import (
    NUM_RANKS,
    Outcome,
    best_key,
    describe_choices,
    hyperparameters,
    rank_classes,
)
from lightly_mim.evaluation.features import Features
from lightly_mim.evaluation.probes.standardize import check_label_range

# The published values of k, and smaller ones for small training sets.
KS = (1, 5, 10, 20, 50, 100, 200)
# [0] uses 0.1, [1] 0.07. The smaller ones serve encoders whose features lie in a narrow
# cone, as means of patch tokens do: there all similarities are close to 1, and at 0.07
# every neighbour would have about the same say.
TEMPERATURES = (0.01, 0.02, 0.05, 0.07, 0.1, 0.2)


@checked
@dataclass(frozen=True)
class KNN:
    """The kNN protocol: layer, pooling, k and temperature chosen by leave-one-out.

    Attributes:
        ks:
            Numbers of neighbours to choose from. None for those of 1, 5, 10, 20, 50,
            100 and 200 that are smaller than the number of training images.
        temperatures:
            Temperatures to choose from.
        chunk_size:
            Number of queries at a time; bounds the memory, see `knn_predict_grid`.
    """

    name: ClassVar[str] = "knn"
    reads: ClassVar[str] = "pooled"

    ks: NonEmpty[PositiveInt] | None = None
    temperatures: NonEmpty[PositiveFloat] = TEMPERATURES
    chunk_size: PositiveInt = 256

    def check(self, num_train: int) -> list[str]:
        """See `FeatureProtocol`."""
        ks = fitting_ks(num_train) if self.ks is None else self.ks
        _check_ks(ks, num_train - 1)
        if self.ks is None and len(ks) < len(KS):
            return [f"kNN: with {num_train} training images, k is one of {ks}."]
        return []

    def __call__(
        self,
        train: Features,
        test: Features,
        num_classes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> list[Outcome]:
        """See `FeatureProtocol`. Nothing is random."""
        labels = train.labels.to(device)
        choices = {
            key: choose_knn(values.to(device), labels, num_classes, self)
            for key, values in train.values.items()
        }
        key = best_key(choices)
        ranked = knn_predict_grid(
            test.values[key].to(device),
            train.values[key].to(device),
            labels,
            num_classes,
            [choices[key].k],
            [choices[key].temperature],
            num_ranks=min(NUM_RANKS, num_classes),
            chunk_size=self.chunk_size,
        )
        chosen, selection = hyperparameters(choices[key]), describe_choices(choices)
        return [Outcome(key, chosen, selection, ranked[0, 0].cpu())]


class KNNChoice(NamedTuple):
    """What leave-one-out on the training set has chosen, with its accuracy."""

    k: int
    temperature: float
    accuracy: float


def fitting_ks(num_images: int) -> list[int]:
    """Returns those of the default values of k that leave-one-out allows."""
    return [k for k in KS if k < num_images]


@checked
def knn_predict_grid(
    queries: Tensor | None,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: PositiveInt,
    ks: NonEmpty[PositiveInt],
    temperatures: NonEmpty[PositiveFloat],
    *,
    num_ranks: PositiveInt = 1,
    chunk_size: PositiveInt = 256,
) -> Tensor:
    """Predicts with every k and every temperature in one pass over the similarities.

    The result is exact. Of neighbours that are equally near, those that come first in
    the bank are taken; of classes with equally many votes, the one with the lowest
    number.

    Args:
        queries:
            Tensor with shape (num_queries, dim), which need not be normalised. None
            leaves one out: each image of the bank asks all the others.
        bank:
            Tensor with shape (num_images, dim), the training images.
        bank_labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        ks:
            Numbers of neighbours.
        temperatures:
            Temperatures of the weights exp(similarity / temperature).
        num_ranks:
            How many classes to return per query, the most probable first.
        chunk_size:
            Number of queries at a time. Bounds the memory: the largest tensor has
            chunk_size * num_images numbers.

    Returns:
        int64 tensor with shape (len(ks), len(temperatures), num_queries, num_ranks)
        with the predicted classes.

    Raises:
        ValueError: If the shapes, a k, a temperature or the number of ranks is out of
            range.
    """
    leave_one_out = queries is None
    queries = bank if queries is None else queries
    _check_bank(queries, bank, bank_labels, num_classes)
    _check_ks(ks, len(bank) - leave_one_out)
    if num_ranks > num_classes:
        raise ValueError(
            f"num_ranks lies between 1 and the {num_classes} classes, got {num_ranks}."
        )
    queries = functional.normalize(queries.float(), dim=1)
    bank = functional.normalize(bank.float(), dim=1)
    buffer = bank.new_empty(min(chunk_size, len(queries)), len(bank))
    predictions = [
        _vote_grid(
            *_nearest(queries, bank, start, max(ks), leave_one_out, buffer),
            bank_labels,
            num_classes,
            ks,
            temperatures,
            num_ranks,
        )
        for start in range(0, len(queries), len(buffer))
    ]
    return torch.cat(predictions, dim=2)


@checked
def choose_knn(
    features: Tensor,
    labels: Tensor,
    num_classes: PositiveInt,
    settings: KNN = KNN(),
) -> KNNChoice:
    """Chooses k and the temperature by leave-one-out on the training set.

    Ties go to the first setting of the grid, with k in the outer loop.

    Args:
        features:
            Tensor with shape (num_images, dim) of the training images.
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        settings:
            The grid.

    Raises:
        ValueError: If a k or a temperature is out of range.
    """
    if features.ndim != 2:
        raise ValueError(
            f"features has shape (num_images, dim), got {tuple(features.shape)}."
        )
    ks = fitting_ks(len(features)) if settings.ks is None else list(settings.ks)
    temperatures = settings.temperatures
    predictions = knn_predict_grid(
        None,
        features,
        labels,
        num_classes,
        ks,
        temperatures,
        chunk_size=settings.chunk_size,
    )
    correct = (predictions[..., 0] == labels).sum(dim=2).flatten()
    best = int(correct.argmax())  # the first of ties
    return KNNChoice(
        k=ks[best // len(temperatures)],
        temperature=temperatures[best % len(temperatures)],
        accuracy=int(correct[best]) / len(labels),
    )


def _nearest(
    queries: Tensor,
    bank: Tensor,
    start: int,
    k: int,
    leave_one_out: bool,
    buffer: Tensor,
) -> tuple[Tensor, Tensor]:
    """Finds the k nearest of a chunk of normalised queries, the first of equals first.

    The chunk begins at `start` and has as many rows as the buffer, with shape
    (chunk_size, num_images), which is written to. With `leave_one_out` the queries are
    the bank.

    Returns:
        (similarities, indices), tensors with shape (chunk, k).
    """
    chunk = queries[start : start + len(buffer)]
    # Into the same memory each time: fresh memory cost a fifth of the time at 100,000
    # images, which is that of its page faults.
    similarity = torch.mm(chunk, bank.T, out=buffer[: len(chunk)])
    if leave_one_out:
        rows = torch.arange(len(similarity), device=similarity.device)
        similarity[rows, rows + start] = -torch.inf
    # In the bank's order first, which a stable sort keeps among equals.
    index = _sort_rows(_largest(similarity, min(k + 1, similarity.shape[1])))
    values, order = similarity.gather(1, index).sort(
        dim=1, descending=True, stable=True
    )
    index = index.gather(1, order)
    if index.shape[1] > k:
        # Any of equals may be among the largest. A row whose k-th neighbour is as near
        # as the next one is sorted in full, which is rare and slow.
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        if len(tied):
            order = similarity[tied].argsort(dim=1, descending=True, stable=True)
            index[tied, :k] = order[:, :k]
    return values[:, :k], index[:, :k]


def _largest(similarity: Tensor, k: int) -> Tensor:
    """Returns where the k largest of each row are, in any order.

    On a CPU the columns are dealt out to groups. The k groups with the largest maxima
    hold the k largest: outside of them nothing is above the least of these maxima. So
    one pass finds the maxima, and only a few columns are partitioned, by NumPy's
    vectorised quickselect: 3.5 ms for 200 of 9,469 in 256 rows, where topk takes 18,
    and 20 against 66 for 200 of 100,000.
    """
    if similarity.device.type != "cpu":
        return similarity.topk(k, dim=1).indices
    rows, columns = similarity.shape
    # Twice as many groups as columns in k of them: going through groups is the cheaper.
    size = math.isqrt(columns // (2 * k))
    if size < 2:
        return _partition(similarity, k)
    groups = columns // size
    grouped = similarity[:, : groups * size].view(rows, size, groups)
    best = _partition(grouped.amax(dim=1), k)
    index = (best[:, None] + groups * torch.arange(size)[:, None]).flatten(1)
    rest = torch.arange(groups * size, columns).expand(rows, -1)
    index = torch.cat([index, rest], dim=1)
    return index.gather(1, _partition(similarity.gather(1, index), k))


def _partition(values: Tensor, k: int) -> Tensor:
    """Returns where the k largest of each row are, in any order."""
    columns = values.shape[1]
    index = np.argpartition(values.numpy(), columns - k, axis=1)
    return torch.from_numpy(index[:, columns - k :])


def _sort_rows(index: Tensor) -> Tensor:
    """Sorts the numbers in each row; NumPy does it in a tenth of the time."""
    if index.device.type != "cpu":
        return index.sort(dim=1).values
    return torch.from_numpy(np.sort(index.numpy(), axis=1))


def _vote_grid(
    similarities: Tensor,
    index: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_ranks: int,
) -> Tensor:
    """Lets the k nearest vote, for every k and temperature.

    Returns classes with shape (len(ks), len(temperatures), chunk, num_ranks).
    """
    labels = bank_labels[index]
    chunk = len(labels)
    predictions = labels.new_empty(len(ks), len(temperatures), chunk, num_ranks)
    by_size = sorted(range(len(ks)), key=lambda i: ks[i])
    for j, temperature in enumerate(temperatures):
        # Relative to the nearest one: the votes keep their proportions and
        # exp(1 / temperature) cannot overflow.
        logits = (similarities - similarities[:, :1]).double() / temperature
        weights = logits.exp()
        votes = weights.new_zeros(chunk, num_classes)
        counted = 0
        for i in by_size:  # a larger k adds its further neighbours to the smaller one's
            new = slice(counted, ks[i])
            votes.scatter_add_(1, labels[:, new], weights[:, new])
            predictions[i, j] = rank_classes(votes, num_ranks)
            counted = ks[i]
    return predictions


def _check_ks(ks: Sequence[int], num_neighbours: int) -> None:
    if not ks:
        raise ValueError(
            f"The kNN grid needs at least one k, got none for {num_neighbours} "
            "neighbour(s)."
        )
    if max(ks) > num_neighbours:
        raise ValueError(
            f"k lies between 1 and the {num_neighbours} training image(s) that can be "
            f"neighbours, got {list(ks)}. Use smaller values or more training images."
        )


def _check_bank(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int
) -> None:
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            "Queries and bank are matrices with as many columns, got shapes "
            f"{tuple(queries.shape)} and {tuple(bank.shape)}."
        )
    if bank_labels.shape != bank.shape[:1] or bank_labels.dtype != torch.int64:
        raise ValueError(
            f"Labels are int64 with shape ({len(bank)},), got {bank_labels.dtype} with "
            f"shape {tuple(bank_labels.shape)}."
        )
    check_label_range(bank_labels, num_classes)
