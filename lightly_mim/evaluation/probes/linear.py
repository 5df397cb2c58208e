"""Linear classification of cached features, with many learning rates at once.

- [0]: DINOv2, 2023, https://arxiv.org/abs/2304.07193 (`dinov2/eval/linear.py`: momentum
  SGD without weight decay, cosine schedule, 13 learning rates trained side by side)
- [1]: MAE, 2021, https://arxiv.org/abs/2111.06377 (appendix A.1: features go through a
  BatchNorm without affine parameters first)

The probes share every batch, so they are one problem: one matrix product gives the
logits of all. Layers, poolings and the parts of the cross-validation are further
problems of the same shape, and one batched product serves them all. Learning rate and
weight decay are chosen by cross-validation on the training set; the probe is then
fitted again on all of it, and the test set is scored once.

Two things differ from the papers because features are cached. The features are
standardised with the statistics of the whole training set, which [1]'s BatchNorm
estimates from batches. And the images are not augmented.

Shapes: N images, D features, C classes, G probes (learning rates times weight decays),
B images in a batch, P problems (features and parts of the cross-validation).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

from lightly_mim.arguments import (
    AtLeastTwo,
    Device,
    NonEmpty,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Rate,
    Seed,
    checked,
)
from lightly_mim.evaluation.base import (
    Choice,
    Outcome,
    best_key,
    describe_choices,
    hyperparameters,
    merit,
    rank_classes,
)
from lightly_mim.evaluation.features import Features, Key
from lightly_mim.evaluation.probes.standardize import Standardizer, check_fit
from lightly_mim.evaluation.splits import assign_folds, check_folds

# Numbers that are held at a time, a quarter of a gigabyte in float32.
MAX_NUMBERS = 2**26

# [0] has 1e-5 to 0.1 in the same steps, for features that are not standardised and
# 12,500 iterations. With standardised features and about 1,000 iterations this range
# runs from underfitted to overfitted.
LEARNING_RATES = (
    1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0,
)  # fmt: skip


class GridChoice(NamedTuple):
    """What was chosen from a grid of probes, with accuracy and mean cross-entropy."""

    learning_rate: float
    weight_decay: float
    accuracy: float
    loss: float


@checked
@dataclass(frozen=True)
class Linear:
    """The linear probe: layer, pooling, rate and decay chosen by cross-validation.

    Attributes:
        learning_rates:
            Learning rates to choose from.
        weight_decays:
            Weight decays to choose from, each with each learning rate.
        epochs:
            Number of passes over the training features.
        batch_size:
            Largest number of images in a batch.
        num_folds:
            Number of parts of the training set of which each is held out once.
        max_numbers:
            Bounds the memory: as much is trained together as keeps features, weights
            and logits below this many numbers. One part of the cross-validation on one
            of the features may take more, for that is never cut.
    """

    name: ClassVar[str] = "linear"
    reads: ClassVar[str] = "pooled"

    learning_rates: NonEmpty[PositiveFloat] = LEARNING_RATES
    weight_decays: NonEmpty[NonNegativeFloat] = (0.0,)
    epochs: PositiveInt = 100
    batch_size: PositiveInt = 128
    num_folds: AtLeastTwo = 5
    max_numbers: PositiveInt = MAX_NUMBERS

    def check(self, num_train: int) -> list[str]:
        """See `FeatureProtocol`."""
        check_folds(self.num_folds, num_train)
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
        """See `FeatureProtocol`. The seed decides the parts and the order of images."""
        found = choose_linear(
            list(train.values.values()),
            train.labels,
            num_classes,
            self,
            seed=seed,
            device=device,
        )
        choices = dict(zip(train.values, found, strict=True))
        key = best_key(choices)
        features = train.values[key].to(device)
        standardize = Standardizer.fit(features)
        (weight,), (bias,) = fit_linear_grid(
            standardize(features),
            train.labels.to(device),
            num_classes,
            [choices[key].learning_rate],
            [choices[key].weight_decay],
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
        )
        return [linear_outcome(choices, standardize, weight, bias, test)]


@checked
def fit_linear_grid(
    features: Tensor,
    labels: Tensor,
    num_classes: PositiveInt,
    learning_rates: NonEmpty[PositiveFloat] = LEARNING_RATES,
    weight_decays: NonEmpty[NonNegativeFloat] = (0.0,),
    *,
    epochs: PositiveInt = 100,
    batch_size: PositiveInt = 128,
    momentum: Rate = 0.9,
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """Trains a linear classifier with each learning rate, all of them at once.

    Momentum SGD on the cross-entropy, cosine schedule to zero over all steps. All
    probes start at zero and see the same batches, so each one ends with the weights
    that it would have if trained alone.

    Args:
        features:
            Tensor with shape (num_images, dim), standardised. Its dtype is the dtype of
            the computation.
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        learning_rates:
            The learning rates, not scaled by the batch size.
        weight_decays:
            As in `torch.optim.SGD`, on the weight and not on the bias. Default from
            [0].
        epochs:
            Number of passes over the images. Default from [1], 90, rounded.
        batch_size:
            Largest number of images in a batch. An epoch is cut into batches of sizes
            as equal as possible.
        momentum:
            Momentum of SGD. Default from [0].
        seed:
            Decides the order of the images.

    Returns:
        (weight, bias), tensors with shape (num_probes, num_classes, dim) and
        (num_probes, num_classes). The probes are in the order of
        `itertools.product(learning_rates, weight_decays)`.

    Raises:
        ValueError: If shapes, labels or settings are out of range.
    """
    check_fit(features, labels, num_classes)
    weight, bias = _train(
        features[None],
        labels[None],
        num_classes,
        list(itertools.product(learning_rates, weight_decays)),
        epochs,
        batch_size,
        momentum,
        seed,
    )
    return weight[0], bias[0]


@checked
def choose_linear(
    features: Sequence[Tensor],
    labels: Tensor,
    num_classes: PositiveInt,
    settings: Linear = Linear(),
    *,
    seed: Seed = 0,
    device: Device = "cpu",
) -> list[GridChoice]:
    """Chooses the learning rate and weight decay of each of several features.

    By cross-validation on the training set: every image is held out once. On training
    sets of 200 to 2,000 images this found better rates than a single held-out fifth, by
    0 to 1.2 points of accuracy. Ties go to the lower cross-entropy, then to the first
    probe.

    Features with equally many dimensions are trained together, and so are the parts of
    the cross-validation that hold out equally many images. Which ones meet in a product
    does not change what they learn.

    Args:
        features:
            Tensors with shape (num_images, dim) of the training images, as extracted;
            one per layer and pooling.
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        settings:
            The grid, and how it is trained.
        seed:
            Decides which images are held out together and the order of the others.
        device:
            Where to compute.

    Returns:
        The choice for each of the features.

    Raises:
        ValueError: If shapes, labels or settings are out of range.
    """
    for values in features:
        check_fit(values, labels, num_classes)
    probes = list(itertools.product(settings.learning_rates, settings.weight_decays))
    folds = assign_folds(labels, settings.num_folds, seed)
    sizes = folds.bincount(minlength=settings.num_folds).tolist()
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, values in enumerate(features):
        for fold, size in enumerate(sizes):
            alike.setdefault((values.shape[1], size), []).append((i, fold))
    correct = torch.zeros(len(features), len(probes), dtype=torch.int64)
    loss = torch.zeros(len(features), len(probes), dtype=torch.float64)
    for (dim, size), problems in alike.items():
        numbers = (len(labels) - size) * dim + len(probes) * num_classes * (
            3 * dim + 2 * settings.batch_size
        )
        together = max(1, settings.max_numbers // numbers)
        for start in range(0, len(problems), together):
            chunk = problems[start : start + together]
            scalers = [Standardizer.fit(features[i][folds != f]) for i, f in chunk]
            parts = zip(scalers, chunk, strict=True)
            weights, biases = _train(
                torch.stack([s(features[i][folds != f]) for s, (i, f) in parts]).to(
                    device
                ),
                torch.stack([labels[folds != f] for _, f in chunk]).to(device),
                num_classes,
                probes,
                settings.epochs,
                settings.batch_size,
                0.9,
                seed,
            )
            for weight, bias, scale, (i, f) in zip(
                weights, biases, scalers, chunk, strict=True
            ):
                hits, lost = score_linear(
                    weight,
                    bias,
                    scale(features[i][folds == f]).to(device),
                    labels[folds == f].to(device),
                    max_numbers=settings.max_numbers,
                )
                correct[i] += hits
                loss[i] += lost
    return [
        best_probe(probes, *tallied, len(labels))
        for tallied in zip(correct, loss, strict=True)
    ]


def best_probe(
    probes: Sequence[tuple[float, float]], correct: Tensor, loss: Tensor, count: int
) -> GridChoice:
    """Returns the best of probes by what `tally` says of so many held-out images."""
    grid = [
        GridChoice(*probe, hits / count, lost / count)
        for probe, hits, lost in zip(
            probes, correct.tolist(), loss.tolist(), strict=True
        )
    ]
    return max(grid, key=merit)


def score_linear(
    weight: Tensor,
    bias: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    max_numbers: int = MAX_NUMBERS,
) -> tuple[Tensor, Tensor]:
    """Scores many linear classifiers at once, with at most `max_numbers` logits.

    `weight` has shape (num_probes, num_classes, dim), `bias` (num_probes, num_classes)
    and the standardised features (num_images, dim).

    Returns:
        See `tally`.
    """
    correct = torch.zeros(len(weight), dtype=torch.int64)
    loss = torch.zeros(len(weight), dtype=torch.float64)
    size = max(1, max_numbers // bias.numel())
    for batch, target in zip(features.split(size), labels.split(size), strict=True):
        logits = torch.addmm(bias.view(-1, 1), weight.flatten(0, 1), batch.T)
        hits, lost = tally(logits.view(*bias.shape, len(batch)), target)
        correct += hits
        loss += lost
    return correct, loss


def tally(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Counts what each of many probes gets right.

    Args:
        logits:
            Tensor with shape (num_probes, num_classes, num_images).
        labels:
            int64 tensor with shape (num_images,).

    Returns:
        (correct, loss), int64 and float64 tensors with shape (num_probes,) on the CPU:
        how many images each of them gets right, and the sum of its cross-entropies.
    """
    target = labels.expand(len(logits), -1)
    correct = (logits.argmax(dim=1) == target).sum(dim=1)
    losses = functional.cross_entropy(logits, target, reduction="none")
    return correct.cpu(), losses.sum(dim=1, dtype=torch.float64).cpu()


def linear_outcome(
    choices: Mapping[Key, Choice],
    standardize: Standardizer,
    weight: Tensor,
    bias: Tensor,
    test: Features,
) -> Outcome:
    """Predicts the test images with a linear layer on the best features."""
    key = best_key(choices)
    logits = functional.linear(
        standardize(test.values[key].to(weight.device)), weight, bias
    )
    return Outcome(
        key,
        hyperparameters(choices[key]),
        describe_choices(choices),
        rank_classes(logits).cpu(),
        classifier=standardize.folded_into(weight, bias),
    )


def _train(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    probes: Sequence[tuple[float, float]],
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Trains all probes on all of P problems of the same size.

    `features` has shape (P, N, D), `labels` (P, N); `probes` are G pairs of a learning
    rate and a weight decay. The order of the images is the same for all problems.

    Returns:
        (weight, bias), tensors with shape (P, G, C, D) and (P, G, C).
    """
    num_problems, num_images, dim = features.shape
    num_batches = math.ceil(num_images / batch_size)
    # One row per probe and class, so that each product takes all probes of a problem.
    rates, decays = (
        features.new_tensor(column).repeat_interleave(num_classes)[:, None]
        for column in zip(*probes, strict=True)
    )
    weight = features.new_zeros(num_problems, len(rates), dim)
    bias = features.new_zeros(num_problems, len(rates), 1)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rows, targets = features.flatten(0, 1), labels.flatten()
    first = torch.arange(num_problems, device=features.device)[:, None] * num_images
    minus_one = features.new_tensor(-1.0)
    smallest = torch.finfo(features.dtype).tiny
    generator = Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(num_images, generator=generator).to(features.device)
        for index in order.tensor_split(num_batches):
            size = len(index)
            # index_select is several times as fast as an index in brackets.
            index = (first + index).flatten()
            batch = rows.index_select(0, index).view(num_problems, size, dim)
            target = targets.index_select(0, index).view(num_problems, 1, 1, size)
            # Images last: softmax is several times as fast over a dimension that is
            # not the last one, if classes are few.
            logits = torch.baddbmm(bias, weight, batch.mT)
            # Gradient of the cross-entropy: probabilities minus one-hot labels.
            error = logits.view(num_problems, len(probes), num_classes, size).softmax(2)
            # Classes that are all but ruled out. If a hundredth of the probabilities
            # are subnormal, the product below takes three times as long on an Intel
            # Xeon, if a tenth is, 23 times.
            functional.threshold(error, smallest, 0.0, inplace=True)
            target = target.expand(-1, len(probes), -1, -1)
            error.scatter_add_(2, target, minus_one.expand_as(target))
            error = error.view(num_problems, len(rates), size)
            weight_velocity.baddbmm_(error, batch, beta=momentum, alpha=1 / size)
            bias_velocity.mul_(momentum).add_(
                error.sum(2, keepdim=True), alpha=1 / size
            )
            if any(decay for _, decay in probes):
                weight_velocity.addcmul_(decays, weight)
            cosine = 0.5 * (1 + math.cos(math.pi * step / (epochs * num_batches)))
            weight.addcmul_(rates, weight_velocity, value=-cosine)
            bias.addcmul_(rates, bias_velocity, value=-cosine)
            step += 1
    shape = (num_problems, len(probes), num_classes)
    return weight.view(*shape, dim), bias.view(shape)
