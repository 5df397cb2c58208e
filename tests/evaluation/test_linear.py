from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.evaluation import linear


def random_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator, dtype=dtype)
    return features, torch.randint(3, (50,), generator=generator)


def test_fit_linear_grid__equals_training_alone() -> None:
    features, labels = random_problem()
    rates = [0.01, 0.1, 1.0]
    weight, bias = linear.fit_linear_grid(
        features, labels, 3, rates, epochs=7, batch_size=16, seed=3
    )
    for i, rate in enumerate(rates):
        alone_weight, alone_bias = linear.fit_linear_grid(
            features, labels, 3, [rate], epochs=7, batch_size=16, seed=3
        )
        torch.testing.assert_close(weight[i], alone_weight[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(bias[i], alone_bias[0], rtol=1e-10, atol=0)


def test_fit_linear_grid__equals_torch_sgd() -> None:
    features, labels = random_problem()
    rates = [0.01, 0.5]
    weight, bias = linear.fit_linear_grid(
        features, labels, 3, rates, epochs=5, batch_size=20, seed=3
    )
    for i, rate in enumerate(rates):
        probe = nn.Linear(6, 3, dtype=torch.float64)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        optimizer = torch.optim.SGD(probe.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 15))
        )
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            order = torch.randperm(50, generator=generator)
            for index in (order[:17], order[17:34], order[34:]):  # as equal as possible
                optimizer.zero_grad()
                functional.cross_entropy(
                    probe(features[index]), labels[index]
                ).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(weight[i], probe.weight.data, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(bias[i], probe.bias.data, rtol=1e-10, atol=1e-14)


def test_standardizer__equals_scikit_learn() -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    features[:, 2] = features[:, 2] * 1e-4 - 3  # small spread, but not constant
    features[:, 3] = 0.1  # constant
    expected = StandardScaler().fit_transform(features.double().numpy())
    standardized = linear.Standardizer.fit(features)(features)
    torch.testing.assert_close(
        standardized.double(), torch.from_numpy(expected), rtol=0, atol=5e-3
    )
    assert standardized[:, 3].abs().max() < 1e-6


def test_standardizer__rounding_is_no_feature() -> None:
    features = torch.full((30, 1), 100.0)
    features[::2] += 1e-5  # one step of float32 at this size
    assert features.std() > 0
    assert linear.Standardizer.fit(features)(features).abs().max() < 1e-4


def digits(num_train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits: 64 pixels, many of them correlated, some constant."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    features = torch.tensor(pixels, dtype=torch.float32)[order]
    targets = torch.tensor(labels)[order]
    train, test = slice(num_train), slice(num_train, None)
    return features[train], targets[train], features[test], targets[test]


PENALTIES = [1e-3, 1e-2, 1e-1, 1.0, 10.0]


@pytest.mark.parametrize("num_train", [200, 600])
def test_fit_and_score_linear__reaches_logistic_regression(num_train: int) -> None:
    train, labels, test, expected = digits(num_train)
    accuracies = []
    for rate in linear.LEARNING_RATES:
        logits = linear.fit_and_score_linear(train, labels, test, 10, rate)
        accuracies.append(float((logits.argmax(1) == expected).float().mean()))
    reference = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=3000))
        .fit(train.numpy(), labels.numpy())
        .score(test.numpy(), expected.numpy())
        for c in PENALTIES
    ]
    assert max(accuracies) > max(reference) - 0.01
    # The grid goes from too little training to more than enough.
    assert max(accuracies) > max(accuracies[0], accuracies[-1]) + 0.005


def test_choose_linear__reaches_cross_validated_logistic_regression() -> None:
    train, labels, test, expected = digits(600)
    choice = linear.choose_linear(train, labels, 10)
    logits = linear.fit_and_score_linear(train, labels, test, 10, choice.learning_rate)
    accuracy = float((logits.argmax(1) == expected).float().mean())
    search = GridSearchCV(LogisticRegression(max_iter=3000), {"C": PENALTIES})
    model = make_pipeline(StandardScaler(), search).fit(train.numpy(), labels.numpy())
    assert accuracy > model.score(test.numpy(), expected.numpy()) - 0.01


def test_choose_linear__prefers_the_lower_loss_of_equal_accuracies() -> None:
    features = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    labels = torch.tensor([0, 1]).repeat(20)
    choice = linear.choose_linear(features, labels, 2, [0.01, 1.0], epochs=3)
    assert choice.accuracy == 1.0
    assert choice.learning_rate == 1.0
    assert linear.choose_linear(features, labels, 2, [1.0, 0.01], epochs=3) == choice


def test_choose_linear__is_a_function_of_the_seed() -> None:
    features, labels = random_problem(torch.float32)
    rates = [0.01, 0.1]
    first = linear.choose_linear(features, labels, 3, rates, epochs=5, seed=1)
    torch.manual_seed(123)  # the global generator plays no part
    assert linear.choose_linear(features, labels, 3, rates, epochs=5, seed=1) == first
    assert linear.choose_linear(features, labels, 3, rates, epochs=5, seed=2) != first


def test_linear_probe__one_class() -> None:
    features = torch.randn(10, 3)
    labels = torch.zeros(10, dtype=torch.int64)
    assert linear.choose_linear(features, labels, 1, epochs=2).accuracy == 1.0


def test_choose_linear__equals_cross_validation_by_hand() -> None:
    features, labels = random_problem()
    rates = [0.001, 0.1]
    folds = linear.assign_folds(labels, 3, seed=2)
    correct, loss = [0, 0], [0.0, 0.0]
    for fold in range(3):
        train, test = features[folds != fold], features[folds == fold]
        scaler = StandardScaler().fit(train.numpy())
        for i, rate in enumerate(rates):
            weight, bias = linear.fit_linear_grid(
                torch.from_numpy(scaler.transform(train.numpy())),
                labels[folds != fold],
                3,
                [rate],
                epochs=4,
                seed=2,
            )
            logits = torch.from_numpy(scaler.transform(test.numpy())) @ weight[0].T
            expected = labels[folds == fold]
            correct[i] += int(((logits + bias[0]).argmax(1) == expected).sum())
            loss[i] += float(
                functional.cross_entropy(logits + bias[0], expected, reduction="sum")
            )
    best = max((0, 1), key=lambda i: (correct[i], -loss[i]))
    choice = linear.choose_linear(
        features, labels, 3, rates, num_folds=3, epochs=4, seed=2
    )
    assert choice.learning_rate == rates[best]
    assert choice.accuracy == correct[best] / 50
    assert choice.loss == pytest.approx(loss[best] / 50, rel=1e-9)


def test_assign_folds() -> None:
    labels = torch.tensor([0] * 51 + [1] * 20 + [2] * 2 + [4])
    labels = labels[torch.randperm(74, generator=torch.Generator().manual_seed(5))]
    folds = linear.assign_folds(labels, 5, seed=0)
    assert sorted(folds.bincount().tolist()) == [14, 15, 15, 15, 15]
    for label, largest in ((0, 11), (1, 4), (2, 1), (4, 1)):
        counts = folds[labels == label].bincount(minlength=5)
        assert counts.max() == largest
        assert counts.min() >= largest - 1
    assert torch.equal(linear.assign_folds(labels, 5, seed=0), folds)
    assert not torch.equal(linear.assign_folds(labels, 5, seed=1), folds)


@pytest.mark.parametrize("num_folds", [1, 0, 7])
def test_assign_folds__bad_number(num_folds: int) -> None:
    with pytest.raises(ValueError, match=f"num_folds={num_folds} for 6 image"):
        linear.assign_folds(torch.zeros(6, dtype=torch.int64), num_folds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(5, 2, 2)}, "matrix"),
        ({"features": torch.ones(4, 2)}, "matrix"),
        ({"labels": torch.full((5,), 3)}, r"lie in \[0, 3\)"),
        ({"labels": torch.full((5,), -1)}, r"lie in \[0, 3\)"),
        ({"learning_rates": []}, "at least one learning rate"),
        ({"learning_rates": [0.1, 0.0]}, "positive"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_fit_linear_grid__bad_input(change: dict[str, object], message: str) -> None:
    arguments = {
        "features": torch.ones(5, 2),
        "labels": torch.zeros(5, dtype=torch.int64),
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        linear.fit_linear_grid(**(arguments | change))
