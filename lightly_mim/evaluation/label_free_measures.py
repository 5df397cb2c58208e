"""Label-free measures of features: how many directions they fill.

- [0]: RankMe, 2023, https://arxiv.org/abs/2210.02885 (section 3.2, equations 1 and 2)
- [1]: alpha-ReQ, 2022, https://openreview.net/forum?id=ii9X4vtZGTZ (section 3)
- [2]: Stringer et al., 2019, https://doi.org/10.1038/s41586-019-1346-5 (methods: the
  exponent of a spectrum that follows a power law)
- [3]: Wang and Isola, 2020, https://arxiv.org/abs/2005.10242 (section 4.1.2, equation
  2)

They find a collapse, where all images get nearly the same feature. They do not rank
masked image models: a higher value need not mean a better accuracy.

Everything is computed in float64, in pieces: besides the features themselves the
memory is that of a square matrix of the shorter side, min(N, D), and one piece.

Shapes: N images, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightly_mim.arguments import NonNegativeFloat, PositiveFloat, PositiveInt, checked
from lightly_mim.evaluation.features import Features

# What [0] adds to every normalised singular value, so that its logarithm is finite.
EPSILON = 1e-7
# The exponent is fitted from the 5th to the 50th eigenvalue by default. The first few
# do not follow the power law, nor do the last, which noise and the number of images
# decide; [1] and [2] leave both ends out as well.
FIT_RANGE = (5, 50)

_CHUNK = 4096  # rows or columns in a piece


@checked
def label_free(features: Features) -> list[dict[str, Any]]:
    """Measures the features of every layer and pooling, without their labels.

    Args:
        features:
            Pooled features of at least two images.

    Returns:
        For each layer and pooling a dictionary with `layer`, `pooling`, `num_images`,
        `dim`, `rank_me`, `alpha_req` (None if too few eigenvalues are left to fit, as
        with collapsed features) and `uniformity`. Patch tokens ("tokens"), which are
        not one feature per image, are left out.

    Raises:
        ValueError: If there are fewer than two images, or if a feature is not finite.
    """
    measured = []
    for (layer, pooling), values in features.values.items():
        if pooling == "tokens":
            continue
        num_images, dim = _check(values)
        measured.append(
            {
                "layer": layer,
                "pooling": pooling,
                "num_images": num_images,
                "dim": dim,
                "rank_me": rank_me(values),
                "alpha_req": _exponent(_spectrum(values), *FIT_RANGE),
                "uniformity": uniformity(values),
            }
        )
    return measured


@checked
def rank_me(features: Tensor, epsilon: NonNegativeFloat = EPSILON) -> float:
    """Returns RankMe: how many directions the features fill, in a soft count.

    The exponential of the entropy of the singular values of the feature matrix, divided
    by their sum [0]. The matrix is not centred, and these are not its eigenvalues or
    variances, which give lower numbers.

    Args:
        features:
            Tensor with shape (num_images, dim). Use several times more images than
            dimensions, or the number of images is the limit.
        epsilon:
            What is added to every normalised singular value. Default from [0].

    Returns:
        A number from 1 (all features are multiples of one) to min(num_images, dim), by
        `epsilon` more at most; 0 if all features are zero.

    Raises:
        ValueError: If there are fewer than two images, or if a feature is not finite.
    """
    _check(features)
    values = singular_values(features)
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total + epsilon
    return float(torch.exp(-(p * p.log()).sum()))


@checked
def alpha_req(
    features: Tensor,
    first: PositiveInt = FIT_RANGE[0],
    last: PositiveInt = FIT_RANGE[1],
) -> float:
    """Returns the exponent alpha of the eigenspectrum of the features' covariance.

    The n-th largest eigenvalue is taken to be proportional to n ** -alpha [1]. alpha is
    the slope of a line through (log n, log eigenvalue), fitted by least squares with
    weights 1 / n as in [2], since large n lie densely on the logarithmic axis. Near 0
    the features fill all directions alike, far above 1 only a few.

    Args:
        features:
            Tensor with shape (num_images, dim).
        first:
            Number of the first eigenvalue that is fitted, the largest is 1.
        last:
            Number of the last one. Fewer are fitted if there are fewer that differ from
            zero by more than rounding.

    Returns:
        The exponent.

    Raises:
        ValueError: If there are fewer than two images, if a feature is not finite, or
            if fewer than two eigenvalues are left to fit.
    """
    if first >= last:
        raise ValueError(
            f"The fit runs from one eigenvalue to a later one, the largest is 1, got "
            f"first={first} and last={last}."
        )
    _check(features)
    spectrum = _spectrum(features)
    exponent = _exponent(spectrum, first, last)
    if exponent is None:
        raise ValueError(
            f"Features with shape {tuple(features.shape)} have {len(spectrum)} "
            f"eigenvalue(s) that differ from zero, too few to fit a line from the "
            f"{first}th on: the features have collapsed, or the images are too few."
        )
    return exponent


@checked
def uniformity(
    features: Tensor, t: PositiveFloat = 2.0, chunk_size: PositiveInt = 1024
) -> float:
    """Returns how evenly the directions of the features cover the sphere.

    The logarithm of the mean of exp(-t * squared distance) over all pairs of different
    images, of features that are divided by their length [3]. A feature of length 0
    stays at 0.

    Args:
        features:
            Tensor with shape (num_images, dim).
        t:
            How fast the weight of a pair falls with its distance. Default from [3].
        chunk_size:
            Number of images whose distances to all others are held at a time.

    Returns:
        A number from -4 * t to 0, where 0 means that all directions are the same. The
        lower, the more even; even directions in many dimensions give about -2 * t.

    Raises:
        ValueError: If there are fewer than two images, if a feature is not finite, or
            if an argument is not positive.
    """
    num_images, _ = _check(features)

    # 2 bytes a number may be on disk, 8 are needed: not all at once.
    def direction(start: int) -> Tensor:
        return functional.normalize(features[start : start + chunk_size].double())

    total = 0.0
    starts = range(0, num_images, chunk_size)
    for start in starts:
        rows = direction(start)
        for other in starts:
            if other < start:  # a pair counts once
                continue
            columns = rows if other == start else direction(other)
            lengths = (rows**2).sum(dim=1)[:, None] + (columns**2).sum(dim=1)
            distances = (lengths - 2 * rows @ columns.T).clamp(min=0)
            weights = torch.exp(-t * distances)
            if other == start:
                weights = weights.triu(diagonal=1)
            total += float(weights.sum())
    return math.log(total / (num_images * (num_images - 1) / 2))


def singular_values(features: Tensor, *, center: bool = False) -> Tensor:
    """Returns the singular values of a feature matrix, the largest first.

    The matrix is reduced piece by piece to a triangular one with the same singular
    values (QR decomposition). The eigenvalues of its square would be cheaper, but lose
    half of the digits. With `center` the mean feature is subtracted first.

    Returns:
        float64 tensor with shape (min(num_images, dim),) on the device of the features.
    """
    num_images, dim = features.shape
    mean = features.new_zeros(dim, dtype=torch.float64)
    if center:
        for rows in torch.split(features, _CHUNK):
            mean += rows.double().sum(dim=0)
        mean /= num_images

    def pieces() -> Iterator[Tensor]:
        """Yields the rows of the taller of the matrix and its transpose."""
        if num_images >= dim:
            for rows in torch.split(features, _CHUNK):
                yield rows.double() - mean
        else:
            split = torch.split(features, _CHUNK, dim=1), torch.split(mean, _CHUNK)
            for columns, shift in zip(*split, strict=True):
                yield (columns.double() - shift).T

    triangle = mean.new_empty(0, min(num_images, dim))
    for piece in pieces():
        triangle = torch.linalg.qr(torch.cat([triangle, piece]), mode="r").R
    values: Tensor = torch.linalg.svdvals(triangle)
    return values


def _spectrum(features: Tensor) -> Tensor:
    """Returns the eigenvalues of the covariance that are more than rounding."""
    spectrum = singular_values(features, center=True) ** 2 / (len(features) - 1)
    # The mean feature counts: if all features are the same, the rest is rounding.
    scale = features.abs().max().double() ** 2 * features.shape[1]
    eps = torch.finfo(features.dtype).eps if features.is_floating_point() else 0.0
    return spectrum[spectrum > (scale * max(eps, 1e-12) ** 2).item()]


def _exponent(spectrum: Tensor, first: int, last: int) -> float | None:
    """Returns the exponent of a spectrum, None if too few eigenvalues are left."""
    y = spectrum[first - 1 : last].log()
    if len(y) < 2:
        return None
    n = torch.arange(first, first + len(y), dtype=torch.float64, device=y.device)
    x, w = n.log(), 1 / n / (1 / n).sum()
    x = x - (w * x).sum()
    return float(-(w * x * y).sum() / (w * x**2).sum())


def _check(features: Tensor) -> tuple[int, int]:
    """Returns the number of images and of dimensions of features that are fit."""
    if features.ndim != 2 or features.shape[1] < 1:
        raise ValueError(
            "Features are a matrix with one row per image, got a tensor with shape "
            f"{tuple(features.shape)}."
        )
    if len(features) < 2:
        raise ValueError(
            f"How features vary takes at least two images, got {len(features)}."
        )
    for rows in torch.split(features, _CHUNK):
        if not bool(rows.isfinite().all()):
            raise ValueError(
                "The features hold NaN or infinite values: the weights of the encoder "
                "are broken, or the images are."
            )
    num_images, dim = features.shape
    return num_images, dim
