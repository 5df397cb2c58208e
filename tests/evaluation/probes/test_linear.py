from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.evaluation.features import Features, Key
from lightly_mim.evaluation.probes import linear
from lightly_mim.evaluation.probes.linear import GridChoice, Linear
from lightly_mim.evaluation.probes.standardize import Standardizer
from lightly_mim.evaluation.splits import assign_folds


def random_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator, dtype=dtype)
    return features, torch.randint(3, (50,), generator=generator)


RATES, DECAYS = [0.01, 0.5], [0.0, 0.1]


def test_fit_linear_grid__equals_training_alone() -> None:
    features, labels = random_problem()
    rates = [0.01, 0.1, 1.0]
    settings = {"epochs": 7, "batch_size": 16, "seed": 3}
    weight, bias = linear.fit_linear_grid(
        features, labels, 3, rates, DECAYS, **settings
    )
    assert weight.shape == (6, 3, 6)
    for i, (rate, decay) in enumerate(itertools.product(rates, DECAYS)):
        alone_weight, alone_bias = linear.fit_linear_grid(
            features, labels, 3, [rate], [decay], **settings
        )
        torch.testing.assert_close(weight[i], alone_weight[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(bias[i], alone_bias[0], rtol=1e-10, atol=0)


def test_fit_linear_grid__equals_torch_sgd() -> None:
    features, labels = random_problem()
    weight, bias = linear.fit_linear_grid(
        features, labels, 3, RATES, DECAYS, epochs=5, batch_size=20, seed=3
    )
    for i, (rate, decay) in enumerate(itertools.product(RATES, DECAYS)):
        probe = nn.Linear(6, 3, dtype=torch.float64)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        groups: list[dict[str, Any]] = [
            {"params": [probe.weight], "weight_decay": decay},
            {"params": [probe.bias]},
        ]
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
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


def digits(num_train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits: 64 pixels, many of them correlated, some constant."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    features = torch.tensor(pixels, dtype=torch.float32)[order]
    targets = torch.tensor(labels)[order]
    train, test = slice(num_train), slice(num_train, None)
    return features[train], targets[train], features[test], targets[test]


def fit_and_score(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, rate: float
) -> Tensor:
    scaler = Standardizer.fit(train)
    weight, bias = linear.fit_linear_grid(scaler(train), labels, num_classes, [rate])
    return torch.nn.functional.linear(scaler(test), weight[0], bias[0])


PENALTIES = [1e-3, 1e-2, 1e-1, 1.0, 10.0]


@pytest.mark.parametrize("num_train", [200, 600])
def test_fit_and_score_linear__reaches_logistic_regression(num_train: int) -> None:
    train, labels, test, expected = digits(num_train)
    accuracies = []
    for rate in linear.LEARNING_RATES:
        logits = fit_and_score(train, labels, test, 10, rate)
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
    choice = linear.choose_linear([train], labels, 10)[0]
    logits = fit_and_score(train, labels, test, 10, choice.learning_rate)
    accuracy = float((logits.argmax(1) == expected).float().mean())
    search = GridSearchCV(LogisticRegression(max_iter=3000), {"C": PENALTIES})
    model = make_pipeline(StandardScaler(), search).fit(train.numpy(), labels.numpy())
    assert accuracy > model.score(test.numpy(), expected.numpy()) - 0.01


def test_choose_linear__prefers_the_lower_loss_of_equal_accuracies() -> None:
    features = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    labels = torch.tensor([0, 1]).repeat(20)
    [choice] = linear.choose_linear(
        [features], labels, 2, Linear([0.01, 1.0], epochs=3)
    )
    assert choice.accuracy == 1.0
    assert choice.learning_rate == 1.0
    other = linear.choose_linear([features], labels, 2, Linear([1.0, 0.01], epochs=3))
    assert other == [choice]


def test_choose_linear__is_a_function_of_the_seed() -> None:
    features, labels = random_problem(torch.float32)
    rates = [0.01, 0.1]
    first = linear.choose_linear([features], labels, 3, Linear(rates, epochs=5), seed=1)
    torch.manual_seed(123)  # the global generator plays no part
    again = linear.choose_linear([features], labels, 3, Linear(rates, epochs=5), seed=1)
    assert again == first
    other = linear.choose_linear([features], labels, 3, Linear(rates, epochs=5), seed=2)
    assert other != first


def test_choose_linear__one_class() -> None:
    features = torch.randn(10, 3)
    labels = torch.zeros(10, dtype=torch.int64)
    [choice] = linear.choose_linear([features], labels, 1, Linear(epochs=2))
    assert choice.accuracy == 1.0


def by_hand(features: Tensor, labels: Tensor, num_folds: int, seed: int) -> GridChoice:
    """Cross-validation over RATES and DECAYS, one probe after the other."""
    folds = assign_folds(labels, num_folds, seed=seed)
    choices: list[Any] = []
    for rate, decay in itertools.product(RATES, DECAYS):
        correct, loss = 0, 0.0
        for fold in range(num_folds):
            train, test = features[folds != fold], features[folds == fold]
            scaler = StandardScaler().fit(train.numpy())
            weight, bias = linear.fit_linear_grid(
                torch.from_numpy(scaler.transform(train.numpy())),
                labels[folds != fold],
                3,
                [rate],
                [decay],
                epochs=4,
                seed=seed,
            )
            logits = torch.from_numpy(scaler.transform(test.numpy())) @ weight[0].T
            logits, expected = logits + bias[0], labels[folds == fold]
            correct += int((logits.argmax(1) == expected).sum())
            loss += float(
                functional.cross_entropy(logits, expected, reduction="sum").double()
            )
        held_out: Any = pytest.approx(loss / len(labels))
        choices.append(GridChoice(rate, decay, correct / len(labels), held_out))
    best: GridChoice = max(choices, key=lambda c: (c.accuracy, -c.loss.expected))
    return best


@pytest.mark.parametrize("max_numbers", [1, 1500, 2**26])
def test_choose_linear__equals_cross_validation_by_hand(max_numbers: int) -> None:
    features, labels = random_problem()  # 50 images: parts of 17, 17 and 16
    several = [features, features[:, :2] + labels[:, None], features.flip(0)]
    choices = linear.choose_linear(
        several,
        labels,
        3,
        Linear(RATES, DECAYS, num_folds=3, epochs=4, max_numbers=max_numbers),
        seed=2,
    )
    assert choices == [by_hand(values, labels, 3, 2) for values in several]
    assert len({choice.learning_rate for choice in choices}) == 2


def test_linear__takes_half_precision_and_the_best_features() -> None:
    train, labels, test, expected = digits(300)
    noise = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    values: dict[Key, Tensor] = {(0, "mean"): noise.half(), (1, "mean"): train.half()}
    tests: dict[Key, Tensor] = {
        (0, "mean"): noise[:100].half(),
        (1, "mean"): test[:100].half(),
    }
    protocol = linear.Linear([0.02, 0.2], epochs=20)
    assert protocol.check(300) == []
    [outcome] = protocol(
        Features(values, labels, [], 0.0),
        Features(tests, expected[:100], [], 0.0),
        10,
        seed=3,
    )
    assert outcome.key == (1, "mean")
    assert [row["layer"] for row in outcome.selection] == [0, 1]
    assert outcome.ranked.shape == (100, 5)
    best = outcome.selection[1]
    assert outcome.hyperparameters == {
        name: best[name] for name in ("learning_rate", "weight_decay")
    }
    # Pixels are whole numbers below 17, so that half precision loses nothing.
    scaler = Standardizer.fit(train)
    (weight,), (bias,) = linear.fit_linear_grid(
        scaler(train), labels, 10, [best["learning_rate"]], epochs=20, seed=3
    )
    logits = torch.nn.functional.linear(scaler(test[:100]), weight, bias)
    assert outcome.classifier is not None
    folded = outcome.classifier(test[:100])
    torch.testing.assert_close(folded, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(outcome.ranked[:, 0], logits.argmax(dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(5, 2, 2)}, "matrix"),
        ({"features": torch.ones(4, 2)}, "matrix"),
        ({"labels": torch.full((5,), 3)}, r"lie in \[0, 3\)"),
        ({"labels": torch.full((5,), -1)}, r"lie in \[0, 3\)"),
        ({"learning_rates": []}, "learning_rates of .* one or more"),
        ({"learning_rates": [0.1, 0.0]}, "above 0, got learning_rates"),
        ({"weight_decays": []}, "weight_decays of .* one or more"),
        ({"weight_decays": [-0.1]}, "at least 0, got weight_decays"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_fit_linear_grid__bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.ones(5, 2),
        "labels": torch.zeros(5, dtype=torch.int64),
        "num_classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        linear.fit_linear_grid(**(arguments | change))


def test_score_linear__equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 4, generator=generator)
    labels = torch.randint(3, (20,), generator=generator)
    weight = torch.randn(2, 3, 4, generator=generator)
    bias = torch.randn(2, 3, generator=generator)
    for max_numbers in (1, 40, 2**26):
        correct, loss = linear.score_linear(
            weight, bias, features, labels, max_numbers=max_numbers
        )
        for i in range(2):
            logits = features @ weight[i].T + bias[i]
            assert int(correct[i]) == int((logits.argmax(dim=1) == labels).sum())
            probability = logits.double().softmax(dim=1).numpy()
            expected = log_loss(labels, probability, normalize=False, labels=range(3))
            assert float(loss[i]) == pytest.approx(expected, rel=1e-5)
