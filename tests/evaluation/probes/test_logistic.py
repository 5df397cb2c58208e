from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from lightly_mim.evaluation.features import Features
from lightly_mim.evaluation.probes import logistic
from lightly_mim.evaluation.splits import assign_folds


def digits(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Handwritten digits, standardised: 64 pixels, some of them constant."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[:count]
    features = StandardScaler().fit_transform(pixels[order])
    return torch.tensor(features, dtype=dtype), torch.tensor(labels[order])


@pytest.mark.parametrize("num_images", [40, 300])  # fewer and more than dimensions
@pytest.mark.parametrize("num_classes", [3, 10])
def test_fit_logistic_path__equals_scikit_learn(
    num_images: int, num_classes: int
) -> None:
    features, labels = digits(num_images)
    labels = labels % num_classes
    cs = [10.0, 1e-3, 0.1]
    path = logistic.fit_logistic_path(
        features, labels, num_classes, cs, tolerance=1e-9, max_iterations=5000
    )
    assert path.converged == [True, True, True]
    assert path.weight.dtype == torch.float64
    for i, c in enumerate(cs):
        expected = LogisticRegression(C=c, tol=1e-9, max_iter=20_000)
        expected.fit(features.numpy(), labels.numpy())
        scale = np.abs(expected.coef_).max()
        assert np.abs(path.weight[i].numpy() - expected.coef_).max() < 1e-5 * scale
        # Only differences of biases count.
        bias = path.bias[i] - path.bias[i].mean()
        centred = expected.intercept_ - expected.intercept_.mean()
        assert np.abs(bias.numpy() - centred).max() < 1e-4 * np.abs(centred).max()


def test_fit_logistic_path__is_at_the_minimum() -> None:
    """By automatic differentiation of the formula, in other words than the module's."""
    features, labels = digits(100)
    path = logistic.fit_logistic_path(features, labels, 10, [0.3], tolerance=1e-8)
    weight = path.weight[0].requires_grad_()
    bias = path.bias[0].requires_grad_()
    loss = functional.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
    (0.3 * loss + weight.square().sum() / 2).backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def test_fit_logistic_path__does_not_depend_on_the_size_of_chunks() -> None:
    features, labels = digits(150)
    whole = logistic.fit_logistic_path(features, labels, 10, [0.1], tolerance=1e-9)
    parts = logistic.fit_logistic_path(
        features, labels, 10, [0.1], tolerance=1e-9, max_numbers=70
    )
    torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=1e-8)


def test_fit_logistic_path__float32_and_warm_starts() -> None:
    features, labels = digits(300)
    cs = [0.01, 0.1, 1.0]
    path = logistic.fit_logistic_path(features.float(), labels, 10, cs)
    assert path.weight.dtype == torch.float32
    assert all(path.converged)
    for i, c in enumerate(cs):
        alone = logistic.fit_logistic_path(features, labels, 10, [c], tolerance=1e-8)
        torch.testing.assert_close(
            path.weight[i].double(), alone.weight[0], rtol=0, atol=3e-3
        )


def test_fit_logistic_path__absent_class_and_one_class() -> None:
    features, labels = digits(100)
    labels = labels % 2 * 2  # classes 0 and 2 of 3
    path = logistic.fit_logistic_path(features, labels, 3, [1.0])
    logits = features @ path.weight[0].T + path.bias[0]
    assert logits.softmax(dim=1)[:, 1].max() < 0.01
    assert (logits.argmax(dim=1) == labels).all()
    path = logistic.fit_logistic_path(features, torch.zeros_like(labels), 1, [1.0])
    assert path.converged == [True]
    assert path.weight.abs().max() == 0


def test_fit_logistic_path__constant_features() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    path = logistic.fit_logistic_path(torch.zeros(4, 3), labels, 2, [1.0])
    assert path.weight.abs().max() == 0
    probability = path.bias[0].softmax(dim=0)
    torch.testing.assert_close(
        probability, torch.tensor([0.75, 0.25]), atol=1e-3, rtol=0
    )


def test_choose_logistic__equals_cross_validation_by_hand() -> None:
    features, labels = digits(120)
    features = features * 2 + 1
    cs = [1e-4, 0.03, 1.0]
    folds = assign_folds(labels, 3, seed=4).numpy()
    grid = []
    for c in cs:
        correct, loss = 0, 0.0
        for fold in range(3):
            train, test = features[folds != fold], features[folds == fold]
            scaler = StandardScaler().fit(train.numpy())
            model = LogisticRegression(C=c, tol=1e-7, max_iter=5000)
            model.fit(scaler.transform(train.numpy()), labels[folds != fold].numpy())
            scaled = scaler.transform(test.numpy())
            expected = labels[folds == fold].numpy()
            correct += int((model.predict(scaled) == expected).sum())
            loss += log_loss(
                expected, model.predict_proba(scaled), normalize=False, labels=range(10)
            )
        grid.append((c, correct / 120, loss / 120))
    best = max(grid, key=lambda row: (row[1], -row[2]))
    worse, choice = logistic.choose_logistic(
        [features[:, :20], features],
        labels,
        10,
        logistic.Logistic(cs, num_folds=3, tolerance=1e-7),
        seed=4,
    )
    wanted: Any = (best[0], best[1], pytest.approx(best[2], rel=1e-4), True)
    assert choice == wanted
    assert worse.accuracy < choice.accuracy


def as_features(values: Tensor, labels: Tensor) -> Features:
    noise = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0))
    return Features({(0, "mean"): noise.half(), (1, "mean"): values}, labels, [], 0.0)


def test_logistic() -> None:
    features, labels = digits(400, torch.float32)
    train = as_features(features[:200], labels[:200])
    test = as_features(features[200:], labels[200:])
    protocol = logistic.Logistic(cs=[1e-3, 0.1], num_folds=3)
    assert protocol.check(200) == []
    [outcome] = protocol(train, test, 10, seed=1)
    assert outcome.key == (1, "mean")
    assert outcome.hyperparameters == {"c": 0.1}
    assert outcome.ranked.shape == (200, 5)
    scaler = StandardScaler().fit(features[:200].numpy())
    expected = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)
    expected.fit(scaler.transform(features[:200].numpy()), labels[:200].numpy())
    predicted = expected.predict(scaler.transform(features[200:].numpy()))
    assert (outcome.ranked[:, 0].numpy() == predicted).mean() > 0.99
    again = protocol(train, test, 10, seed=1)
    assert torch.equal(again[0].ranked, outcome.ranked)


def test_logistic__says_when_it_did_not_converge() -> None:
    features, labels = digits(100, torch.float32)
    data = as_features(features, labels)
    protocol = logistic.Logistic(cs=[10.0], num_folds=2, max_iterations=2)
    with pytest.warns(ConvergenceWarning, match=r"C=10 on layer .*in 2 iterations"):
        [outcome] = protocol(data, data, 10)
    assert [row["converged"] for row in outcome.selection] == [False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cs": []}, "cs of Logistic is a list of one or more"),
        ({"cs": [1.0, 0.0]}, "above 0, got cs"),
        ({"tolerance": 0.0}, "above 0, got tolerance"),
        ({"max_iterations": 0}, "at least 1"),
        ({"num_folds": 1}, "at least 2, got num_folds=1"),
        ({"num_folds": 11}, "num_folds=11 for 10 image"),
    ],
)
def test_logistic__bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logistic.Logistic(**settings).check(10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(5, 2, 2)}, "matrix"),
        ({"labels": torch.full((5,), 3)}, r"lie in \[0, 3\)"),
        ({"cs": [-1.0]}, "above 0, got cs"),
    ],
)
def test_fit_logistic_path__bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.ones(5, 2),
        "labels": torch.zeros(5, dtype=torch.int64),
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        logistic.fit_logistic_path(**(arguments | change))
