from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from lightly_mim.evaluation import preparation


def test_standardizer__equals_scikit_learn() -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    features[:, 2] = features[:, 2] * 1e-4 - 3  # small spread, but not constant
    features[:, 3] = 0.1  # constant
    expected = StandardScaler().fit_transform(features.double().numpy())
    standardized = preparation.Standardizer.fit(features)(features)
    torch.testing.assert_close(
        standardized.double(), torch.from_numpy(expected), rtol=0, atol=5e-3
    )
    assert standardized[:, 3].abs().max() < 1e-6


def test_standardizer__rounding_is_no_feature() -> None:
    features = torch.full((30, 1), 100.0)
    features[::2] += 1e-5  # one step of float32 at this size
    assert features.std() > 0
    assert preparation.Standardizer.fit(features)(features).abs().max() < 1e-4


def test_standardizer__tokens_rows_and_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(30, 4, 5, generator=generator) * 3 + 1).half()
    rows = torch.tensor([3, 4, 9, 28])
    statistics = preparation.Standardizer.fit(tokens, rows)
    assert statistics.mean.dtype == torch.float32
    expected = StandardScaler().fit(tokens[rows].double().flatten(0, 1).numpy())
    np.testing.assert_allclose(statistics.mean, expected.mean_, rtol=1e-5)
    np.testing.assert_allclose(statistics.scale, expected.scale_, rtol=1e-5)
    standardized = statistics(tokens)
    assert standardized.shape == tokens.shape
    assert standardized.dtype == torch.float32


def test_standardizer__in_chunks() -> None:
    features = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(0))
    statistics = preparation.Standardizer.fit(features)  # two chunks
    expected = StandardScaler().fit(features.double().numpy())
    np.testing.assert_allclose(statistics.mean, expected.mean_, rtol=0, atol=1e-7)
    np.testing.assert_allclose(statistics.scale, expected.scale_, rtol=1e-6)


def test_score_linear__equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 4, generator=generator)
    labels = torch.randint(3, (20,), generator=generator)
    weight = torch.randn(2, 3, 4, generator=generator)
    bias = torch.randn(2, 3, generator=generator)
    for max_numbers in (1, 40, 2**26):
        correct, loss = preparation.score_linear(
            weight, bias, features, labels, max_numbers=max_numbers
        )
        for i in range(2):
            logits = features @ weight[i].T + bias[i]
            assert int(correct[i]) == int((logits.argmax(dim=1) == labels).sum())
            probability = logits.double().softmax(dim=1).numpy()
            expected = log_loss(labels, probability, normalize=False, labels=range(3))
            assert float(loss[i]) == pytest.approx(expected, rel=1e-5)


def test_assign_folds() -> None:
    labels = torch.tensor([0] * 51 + [1] * 20 + [2] * 2 + [4])
    labels = labels[torch.randperm(74, generator=torch.Generator().manual_seed(5))]
    folds = preparation.assign_folds(labels, 5, seed=0)
    assert sorted(folds.bincount().tolist()) == [14, 15, 15, 15, 15]
    for label, largest in ((0, 11), (1, 4), (2, 1), (4, 1)):
        counts = folds[labels == label].bincount(minlength=5)
        assert counts.max() == largest
        assert counts.min() >= largest - 1
    assert torch.equal(preparation.assign_folds(labels, 5, seed=0), folds)
    assert not torch.equal(preparation.assign_folds(labels, 5, seed=1), folds)


@pytest.mark.parametrize("num_folds", [1, 0, 7])
def test_assign_folds__bad_number(num_folds: int) -> None:
    with pytest.raises(ValueError, match=f"num_folds={num_folds} for 6 image"):
        preparation.assign_folds(torch.zeros(6, dtype=torch.int64), num_folds)
