"""Logistic regression on cached features, by L-BFGS.

- [0]: DINOv2, 2023, https://arxiv.org/abs/2304.07193 (`dinov2/eval/log_regression.py`:
  45 values of C from 1e-6 to 1e5 in equal ratios, at most 1,000 iterations)
- [1]: Liu and Nocedal, 1989, https://doi.org/10.1007/BF01589116 (L-BFGS)

Without learning rates and batches: the loss is convex, and its minimum is found for one
penalty after the other. What is minimised is what scikit-learn's `LogisticRegression`
minimises, the sum of the cross-entropies times C plus half the squared weights, with
biases that are not penalised. It gets there in fewer steps: L-BFGS works on rotated and
scaled features, for which the curvature is about the same in all directions. The
minimum does not depend on that.

As in the linear probe, the features are standardised, and layer, pooling and C are
chosen by cross-validation on the training set.

Shapes: N images, D features, C classes, R directions in which the features vary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from lightly_mim.arguments import (
    AtLeastTwo,
    Device,
    NonEmpty,
    PositiveFloat,
    PositiveInt,
    Seed,
    checked,
)
from lightly_mim.evaluation.base import Outcome, best_key, merit
from lightly_mim.evaluation.features import Features
from lightly_mim.evaluation.probes.linear import (
    MAX_NUMBERS,
    linear_outcome,
    score_linear,
)
from lightly_mim.evaluation.probes.standardize import Standardizer, check_fit
from lightly_mim.evaluation.splits import assign_folds, check_folds

# [0]'s range up to 30, in steps of half a decade where [0] has a quarter. On the
# standardised features of the solar cells the best value was between 1 and 10 for every
# layer; beyond, the fits get slower and worse.
CS = tuple(10 ** (exponent / 2) for exponent in range(-12, 4))


@checked
@dataclass(frozen=True)
class Logistic:
    """Logistic regression: layer, pooling and C chosen by cross-validation.

    Attributes:
        cs:
            Values of C to choose from, the inverse of the penalty.
        num_folds:
            Number of parts of the training set of which each is held out once.
        tolerance:
            See `fit_logistic_path`.
        max_iterations:
            See `fit_logistic_path`.
        max_numbers:
            Bounds the memory, see `fit_logistic_path`.
    """

    name: ClassVar[str] = "logistic"
    reads: ClassVar[str] = "pooled"

    cs: NonEmpty[PositiveFloat] = CS
    num_folds: AtLeastTwo = 5
    tolerance: PositiveFloat = 1e-4
    max_iterations: PositiveInt = 1000
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
        """See `FeatureProtocol`. The seed decides the parts.

        Warns:
            ConvergenceWarning: If the final fit ended at `max_iterations`.
        """
        found = choose_logistic(
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
        (weight,), (bias,), _, (converged,) = self.fit(
            standardize(features),
            train.labels.to(device),
            num_classes,
            [choices[key].c],
        )
        if not converged:
            warnings.warn(
                f"Logistic regression with C={choices[key].c:g} on layer {key[0]}, "
                f"pooling '{key[1]}', did not converge in {self.max_iterations} "
                "iterations. Its accuracy may change with a larger max_iterations.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return [linear_outcome(choices, standardize, weight, bias, test)]

    def fit(
        self, features: Tensor, labels: Tensor, num_classes: int, cs: Sequence[float]
    ) -> LogisticPath:
        """Returns `fit_logistic_path` with these settings."""
        return fit_logistic_path(
            features,
            labels,
            num_classes,
            cs,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            max_numbers=self.max_numbers,
        )


class LogisticChoice(NamedTuple):
    """What cross-validation has chosen, with its accuracy and mean cross-entropy.

    Unless `converged`, some of its fits were cut at the largest number of iterations.
    """

    c: float
    accuracy: float
    loss: float
    converged: bool


class LogisticPath(NamedTuple):
    """One fit per C: weights (num_cs, num_classes, dim), biases (num_cs, num_classes).

    `iterations` and `converged` say how each of them ended.
    """

    weight: Tensor
    bias: Tensor
    iterations: list[int]
    converged: list[bool]


@checked
def fit_logistic_path(
    features: Tensor,
    labels: Tensor,
    num_classes: PositiveInt,
    cs: NonEmpty[PositiveFloat] = CS,
    *,
    tolerance: PositiveFloat = 1e-4,
    max_iterations: PositiveInt = 1000,
    max_numbers: PositiveInt = MAX_NUMBERS,
) -> LogisticPath:
    """Fits multinomial logistic regression for each C, from the smallest C up.

    Each fit starts where the one before ended. A class without images is an answer like
    any other, and becomes as improbable as the tolerance asks for.

    Args:
        features:
            Tensor with shape (num_images, dim), standardised. Its dtype is the dtype of
            the matrix products; sums over images and the steps of L-BFGS are float64.
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        cs:
            Values of C, the weight of the sum of the cross-entropies against half the
            squared weights.
        tolerance:
            A fit ends when no component of the gradient of the mean cross-entropy plus
            penalty is larger, with respect to the weights of features that are rotated
            and scaled. Default from scikit-learn, which takes the features as they are;
            on those of the solar cells the minimum is met about ten times as closely.
        max_iterations:
            Largest number of iterations of a fit. Default from [0].
        max_numbers:
            Bounds the memory: largest number of logits at a time.

    Returns:
        Weights and biases in the order of `cs`, and how the fits ended.

    Raises:
        ValueError: If shapes, labels or settings are out of range.
    """
    check_fit(features, labels, num_classes)
    num_images = len(features)
    variance, rotation = _principal_directions(features)
    rotated = features @ rotation.to(features.dtype)
    # Variables are the weights of features that are rotated and scaled, then biases.
    weight = rotation.new_zeros(num_classes, len(variance))
    bias = rotation.new_zeros(num_classes)
    weights = features.new_empty(len(cs), *weight.shape[:1], features.shape[1])
    biases = features.new_empty(len(cs), num_classes)
    iterations, converged = [0] * len(cs), [False] * len(cs)
    size = max(1, max_numbers // num_classes)
    for i in sorted(range(len(cs)), key=lambda i: cs[i]):
        objective = _Objective(rotated, labels, 1 / (cs[i] * num_images), size)
        objective.precondition(variance, weight, bias)
        result = minimize(
            objective,
            objective.pack(weight, bias),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "maxfun": 10 * max_iterations,
                "maxls": 50,  # as scikit-learn, for the sake of hard problems
                "gtol": tolerance,
                "ftol": 64 * np.finfo(np.float64).eps,  # as scikit-learn
            },
        )
        weight, bias = objective.unpack(result.x)
        weights[i], biases[i] = weight @ rotation.T, bias
        iterations[i] = int(result.nit)
        # Status 1: cut at the largest number of iterations. 2: the line search found
        # nothing lower, which is what rounding does close to the minimum.
        largest = float(np.abs(result.jac).max())
        converged[i] = result.status == 0 or largest <= 10 * tolerance
    return LogisticPath(weights, biases, iterations, converged)


@checked
def choose_logistic(
    features: Sequence[Tensor],
    labels: Tensor,
    num_classes: PositiveInt,
    settings: Logistic = Logistic(),
    *,
    standardized: bool = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> list[LogisticChoice]:
    """Chooses C for each of several features, by cross-validation.

    Ties go to the lower cross-entropy, then to the first C.

    Args:
        features:
            Tensors with shape (num_images, dim) of the training images, as extracted;
            one per layer and pooling.
        labels:
            int64 tensor with shape (num_images,) with values in [0, num_classes).
        num_classes:
            Number of classes.
        settings:
            The values of C, and how the fits end.
        standardized:
            Whether the features are standardised already. Otherwise each part of the
            cross-validation does so with the statistics of what is not held out.
        seed:
            Decides which images are held out together.
        device:
            Where to compute.

    Returns:
        The choice for each of the features.

    Raises:
        ValueError: If shapes, labels or settings are out of range.
    """
    for values in features:
        check_fit(values, labels, num_classes)
    folds = assign_folds(labels, settings.num_folds, seed)
    choices = []
    for values in features:
        correct = torch.zeros(len(settings.cs), dtype=torch.int64)
        loss = torch.zeros(len(settings.cs), dtype=torch.float64)
        converged = [True] * len(settings.cs)
        for fold in range(settings.num_folds):
            kept, held_out = folds != fold, folds == fold
            train, test = values[kept], values[held_out]
            if not standardized:
                standardize = Standardizer.fit(train)
                train, test = standardize(train), standardize(test)
            path = settings.fit(
                train.to(device), labels[kept].to(device), num_classes, settings.cs
            )
            hits, lost = score_linear(
                path.weight,
                path.bias,
                test.to(device),
                labels[held_out].to(device),
                max_numbers=settings.max_numbers,
            )
            correct += hits
            loss += lost
            converged = [
                a and b for a, b in zip(converged, path.converged, strict=True)
            ]
        grid = [
            LogisticChoice(c, hits / len(labels), lost / len(labels), done)
            for c, hits, lost, done in zip(
                settings.cs, correct.tolist(), loss.tolist(), converged, strict=True
            )
        ]
        choices.append(max(grid, key=merit))
    return choices


class _Objective:
    """Mean cross-entropy plus penalty, and its gradient, as scipy calls for them.

    `features` are rotated, with shape (N, R), and read `size` images at a time;
    `penalty` is the factor of half the squared weights.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, penalty: float, size: int
    ) -> None:
        self.batches = list(zip(features.split(size), labels.split(size), strict=True))
        self.num_images = len(features)
        self.penalty = penalty

    def precondition(self, variance: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Scales the variables so that the curvature is about 1 in all directions.

        The curvature along a principal direction is its variance times p (1 - p), on
        average over images and classes, plus the penalty.
        """
        spread = 0.0
        for batch, _ in self.batches:
            p = _logits(batch, weight, bias).softmax(dim=0)
            spread += float((p * (1 - p)).mean(dim=0).sum(dtype=torch.float64))
        # With one class, or where all is certain, it is 0.
        spread = max(spread / self.num_images, 1e-6)
        self.scale = (spread * variance + self.penalty).rsqrt()
        self.bias_scale = spread**-0.5

    def pack(self, weight: Tensor, bias: Tensor) -> np.ndarray[Any, Any]:
        """Returns the variables of weights with shape (C, R) and biases (C,)."""
        parts = [(weight / self.scale).flatten(), bias / self.bias_scale]
        return torch.cat(parts).cpu().numpy()

    def unpack(self, variables: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Returns the weights with shape (C, R) and biases (C,) of variables."""
        values = torch.from_numpy(variables).to(self.scale.device)
        num_classes = len(values) // (len(self.scale) + 1)
        weight = values[:-num_classes].view(num_classes, -1) * self.scale
        return weight, values[-num_classes:] * self.bias_scale

    def __call__(
        self, variables: np.ndarray[Any, Any]
    ) -> tuple[float, np.ndarray[Any, Any]]:
        """Returns the value and its gradient, float64 with shape (C * (R + 1),)."""
        weight, bias = self.unpack(variables)
        value = 0.5 * self.penalty * weight.square().sum()
        weight_gradient = self.penalty * weight
        bias_gradient = torch.zeros_like(bias)
        for batch, labels in self.batches:
            target = labels[None]
            # Classes first, which is the fast way round, see `fit_linear_grid`.
            error = _logits(batch, weight, bias).log_softmax(dim=0)
            loss = error.gather(0, target).sum(dtype=torch.float64)
            value -= loss / self.num_images
            error.exp_()
            error.scatter_add_(0, target, error.new_full(target.shape, -1.0))
            weight_gradient += (error @ batch).double() / self.num_images
            bias_gradient += error.sum(dim=1, dtype=torch.float64) / self.num_images
        parts = [
            (weight_gradient * self.scale).flatten(),
            bias_gradient * self.bias_scale,
        ]
        return float(value), torch.cat(parts).cpu().numpy()


def _logits(batch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns the logits of some images with shape (C, images)."""
    return torch.addmm(bias[:, None].to(batch.dtype), weight.to(batch.dtype), batch.T)


def _principal_directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the directions in which features vary about zero.

    A penalised classifier has no weight along the others, so leaving them out changes
    nothing. With few images it saves most of the work.

    Returns:
        (variance, rotation), float64 tensors with shape (R,) and (D, R).
    """
    num_images, dim = features.shape
    if num_images < dim:
        values = features.double()
        variance, rotation = torch.linalg.eigh(values @ values.T / num_images)
        rotation = values.T @ rotation
    else:
        covariance = features.new_zeros(dim, dim, dtype=torch.float64)
        for start in range(0, num_images, 2**14):
            values = features[start : start + 2**14].double()
            covariance += values.T @ values / num_images
        variance, rotation = torch.linalg.eigh(covariance)
    kept = variance > 1e-14 * variance[-1].clamp(min=1e-30)
    rotation = rotation[:, kept]
    return variance[kept], rotation / rotation.norm(dim=0)
