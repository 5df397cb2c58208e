from __future__ import annotations

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from lightly_mim.evaluation.probes.standardize import Standardizer


def test_standardizer__equals_scikit_learn() -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    features[:, 2] = features[:, 2] * 1e-4 - 3  # small spread, but not constant
    features[:, 3] = 0.1  # constant
    expected = StandardScaler().fit_transform(features.double().numpy())
    standardized = Standardizer.fit(features)(features)
    torch.testing.assert_close(
        standardized.double(), torch.from_numpy(expected), rtol=0, atol=5e-3
    )
    assert standardized[:, 3].abs().max() < 1e-6


def test_standardizer__rounding_is_no_feature() -> None:
    features = torch.full((30, 1), 100.0)
    features[::2] += 1e-5  # one step of float32 at this size
    assert features.std() > 0
    assert Standardizer.fit(features)(features).abs().max() < 1e-4


def test_standardizer__tokens_rows_and_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(30, 4, 5, generator=generator) * 3 + 1).half()
    rows = torch.tensor([3, 4, 9, 28])
    statistics = Standardizer.fit(tokens, rows)
    assert statistics.mean.dtype == torch.float32
    expected = StandardScaler().fit(tokens[rows].double().flatten(0, 1).numpy())
    np.testing.assert_allclose(statistics.mean, expected.mean_, rtol=1e-5)
    np.testing.assert_allclose(statistics.scale, expected.scale_, rtol=1e-5)
    standardized = statistics(tokens)
    assert standardized.shape == tokens.shape
    assert standardized.dtype == torch.float32


def test_standardizer__in_chunks() -> None:
    features = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(0))
    statistics = Standardizer.fit(features)  # two chunks
    expected = StandardScaler().fit(features.double().numpy())
    np.testing.assert_allclose(statistics.mean, expected.mean_, rtol=0, atol=1e-7)
    np.testing.assert_allclose(statistics.scale, expected.scale_, rtol=1e-6)
