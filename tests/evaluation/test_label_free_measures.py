from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightly_mim.evaluation import Features
from lightly_mim.evaluation.features import Key
from lightly_mim.evaluation.label_free_measures import (
    alpha_req,
    label_free,
    rank_me,
    singular_values,
    uniformity,
)


def with_spectrum(values: list[float], num_images: int = 60) -> Tensor:
    """Random features with exactly these singular values."""
    generator = torch.Generator().manual_seed(0)
    options: Any = {"generator": generator, "dtype": torch.float64}
    left = torch.linalg.qr(torch.randn(num_images, len(values), **options)).Q
    right = torch.linalg.qr(torch.randn(len(values), len(values), **options)).Q
    scale = torch.diag(torch.tensor(values, dtype=torch.float64))
    features: Tensor = left @ scale @ right.T
    return features


def power_law(alpha: float, count: int = 64, num_images: int = 400) -> Tensor:
    """Features whose covariance has exactly the eigenvalues n ** -alpha."""
    features = torch.randn(
        num_images, count, generator=torch.Generator().manual_seed(1)
    ).double()
    features -= features.mean(dim=0)
    white: Tensor = torch.linalg.qr(features).Q * math.sqrt(num_images - 1)
    scale = torch.arange(1, count + 1, dtype=torch.float64) ** (-alpha / 2)
    return white * scale + 3.0  # the mean does not count


def noise(num_images: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(
        num_images, dim, generator=torch.Generator().manual_seed(seed)
    ) + torch.linspace(0, 1, dim)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (9000, 5), (3, 9001), (2, 1)])
@pytest.mark.parametrize("center", [False, True])
def test_singular_values__equal_numpy(shape: tuple[int, int], center: bool) -> None:
    features = noise(*shape)
    matrix = features.double().numpy()
    if center:
        matrix = matrix - matrix.mean(axis=0)
    expected = np.linalg.svd(matrix, compute_uv=False)
    values = singular_values(features, center=center)
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-9)


def test_singular_values__keep_small_ones() -> None:
    """The eigenvalues of the square would lose these."""
    spectrum = [1.0, 1e-5, 1e-10, 1e-12]
    values = singular_values(with_spectrum(spectrum))
    np.testing.assert_allclose(values, spectrum, rtol=1e-3)


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [([1.0] * 7, 7.0), ([5.0, 5.0, 0.0, 0.0], 2.0), ([2.0, 0.0], 1.0)],
)
def test_rank_me__known_spectra(spectrum: list[float], rank: float) -> None:
    assert rank_me(with_spectrum(spectrum)) == pytest.approx(rank, rel=1e-4)


def test_rank_me__plain_restatement() -> None:
    features = noise(40, 12)
    sigma = np.linalg.svd(features.double().numpy(), compute_uv=False)
    entropy = 0.0
    for value in sigma:
        p = value / sigma.sum() + 1e-7
        entropy -= p * math.log(p)
    assert rank_me(features) == pytest.approx(math.exp(entropy), rel=1e-12)
    # Neither of what other libraries compute.
    variances = sigma**2 / (sigma**2).sum()
    other = math.exp(-(variances * np.log(variances)).sum())
    assert rank_me(features) > 1.2 * other


def test_rank_me__scale_and_rotation_do_not_count() -> None:
    features = noise(40, 12).double()
    rotation = torch.linalg.qr(noise(12, 12, 5).double()).Q
    assert rank_me(1000 * features @ rotation) == pytest.approx(rank_me(features))


def test_rank_me__collapsed_features() -> None:
    assert rank_me(torch.ones(30, 8)) == pytest.approx(1, abs=1e-4)
    assert rank_me(torch.zeros(30, 8)) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_req__known_exponents(alpha: float) -> None:
    features = power_law(alpha)
    assert alpha_req(features) == pytest.approx(alpha, abs=1e-8)
    assert alpha_req(features, 1, 64) == pytest.approx(alpha, abs=1e-8)


def test_alpha_req__plain_restatement() -> None:
    features = noise(300, 40) * torch.linspace(1, 0.05, 40) ** 2
    eigenvalues = np.linalg.eigvalsh(np.cov(features.double().numpy().T))[::-1]
    n = np.arange(5, 31)
    slope, _ = np.polyfit(np.log(n), np.log(eigenvalues[4:30]), 1, w=n**-0.5)
    assert alpha_req(features, 5, 30) == pytest.approx(-slope, rel=1e-6)
    # Fewer eigenvalues than the range has.
    assert alpha_req(features, 5, 1000) == pytest.approx(alpha_req(features, 5, 40))


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_uniformity__plain_restatement(chunk_size: int) -> None:
    features = noise(20, 6)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    weights = [
        math.exp(-2 * float(((unit[i] - unit[j]) ** 2).sum()))
        for i in range(20)
        for j in range(i)
    ]
    expected = math.log(sum(weights) / len(weights))
    assert uniformity(features, chunk_size=chunk_size) == pytest.approx(expected)


def test_uniformity__ends() -> None:
    assert uniformity(torch.full((9, 4), 0.3)) == pytest.approx(0, abs=1e-12)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8)
    assert uniformity(torch.zeros(3, 2)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_label_free__rows(dtype: torch.dtype) -> None:
    values: dict[Key, Tensor] = {
        (0, "mean"): noise(70, 60).to(dtype),
        (1, "cls"): torch.full((70, 60), 0.1, dtype=dtype),
        (1, "tokens"): torch.zeros(70, 4, 60),
        (None, "pixels"): noise(70, 3).to(dtype),
    }
    labels = torch.zeros(70, dtype=torch.int64)
    rows = label_free(Features(values, labels, [], 0.0))
    assert [(row["layer"], row["pooling"]) for row in rows] == [
        (0, "mean"),
        (1, "cls"),
        (None, "pixels"),
    ]
    healthy, collapsed, pixels = rows
    assert (healthy["num_images"], healthy["dim"]) == (70, 60)
    first = values[0, "mean"]
    assert healthy["rank_me"] == rank_me(first)
    assert healthy["alpha_req"] == alpha_req(first)
    assert healthy["uniformity"] == uniformity(first)
    assert collapsed["rank_me"] == pytest.approx(1, abs=1e-3)
    assert collapsed["alpha_req"] is None
    assert collapsed["uniformity"] == pytest.approx(0, abs=1e-9)
    assert pixels["alpha_req"] is None  # three eigenvalues, the fit begins at the fifth


@pytest.mark.parametrize("measure", [rank_me, alpha_req, uniformity])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.full((5, 4), torch.nan), "NaN or infinite"),
        (torch.full((5, 4), torch.inf), "NaN or infinite"),
        (torch.zeros(1, 4), "at least two images, got 1"),
        (torch.zeros(5), r"shape \(5,\)"),
        (torch.zeros(5, 3, 4), r"shape \(5, 3, 4\)"),
        (torch.zeros(5, 0), r"shape \(5, 0\)"),
    ],
)
def test_bad_features(measure: Any, features: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(features)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="0 eigenvalue.*collapsed"):
        alpha_req(torch.full((50, 20), 0.1))
    with pytest.raises(ValueError, match="first=0"):
        alpha_req(noise(9, 9), first=0)
    with pytest.raises(ValueError, match="first=5 and last=5"):
        alpha_req(noise(9, 9), 5, 5)
    with pytest.raises(ValueError, match="t=0"):
        uniformity(noise(9, 9), t=0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        uniformity(noise(9, 9), chunk_size=0)
