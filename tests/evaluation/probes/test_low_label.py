from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightly_mim.data.notes import printable
from lightly_mim.evaluation import KNN, evaluate
from lightly_mim.evaluation.features import Features, Key
from lightly_mim.evaluation.probes import low_label
from lightly_mim.evaluation.splits import draw_per_class


def digits() -> tuple[Features, Features]:
    """Handwritten digits, with a bad and a good layer."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    values, targets = torch.tensor(pixels[order]).float(), torch.tensor(labels[order])

    def part(rows: slice) -> Features:
        several: dict[Key, Tensor] = {
            (0, "mean"): values[rows],
            (2, "mean"): values[rows, 20:25].half(),
            (2, "cls"): values[rows, :30],
        }
        return Features(several, targets[rows], [], 0.0)

    return part(slice(600)), part(slice(600, 900))


def test_draw_per_class() -> None:
    labels = torch.tensor([0] * 20 + [1] * 8 + [2] * 50)
    drawn = draw_per_class(labels, 3, 8, seed=0)
    assert drawn.shape == (3, 8)
    assert torch.equal(labels[drawn], torch.arange(3)[:, None].expand(3, 8))
    assert len(drawn.unique()) == 24
    fewer = draw_per_class(labels, 3, 5, seed=0)
    assert torch.equal(fewer, drawn[:, :5])
    assert not torch.equal(draw_per_class(labels, 3, 8, seed=1), drawn)
    # Every image has its turn.
    seen = [draw_per_class(labels, 3, 1, seed) for seed in range(200)]
    assert len(torch.cat(seen)[:, 0].unique()) > 60


def test_draw_per_class__too_few() -> None:
    labels = torch.tensor([0, 0, 2, 2, 2])
    with pytest.raises(ValueError, match=r"Class 1 has 0 .* draw 2 per class"):
        draw_per_class(labels, 3, 2, seed=0)
    with pytest.raises(ValueError, match=r"Class 0 has 2 .* draw 3 per class"):
        draw_per_class(labels // 2, 2, 3, seed=0)


def test_low_label() -> None:
    train, test = digits()
    protocol = low_label.LowLabel(shots=(1, 4), draws=2, cs=(1e-3, 0.1))
    assert protocol.check(600) == []
    one, four = protocol(train, test, 10, seed=5)
    assert (one.variant, four.variant) == ("1 per class", "4 per class")
    assert one.ranked.shape == four.ranked.shape == (2, 300, 5)
    # Nothing to choose with, and the first pooling of the last layer.
    assert (one.key, one.hyperparameters) == ((2, "mean"), {"c": 1.0})
    assert one.selection == []
    # All pixels are more than some.
    assert four.key == (0, "mean")
    assert [row["draw"] for row in four.selection] == [0, 1]
    accuracies = (four.ranked[..., 0] == test.labels).double().mean(dim=1)
    assert 0.6 < float(accuracies.min()) < float(accuracies.max()) < 0.95
    again = protocol(train, test, 10, seed=5)
    assert torch.equal(again[1].ranked, four.ranked)
    other = protocol(train, test, 10, seed=6)
    assert not torch.equal(other[1].ranked, four.ranked)


def one_shot_by_scikit_learn(train: Features, test: Features, rows: Tensor) -> Tensor:
    values = train.values[0, "mean"].double().numpy()
    scaler = StandardScaler().fit(values)
    model = LogisticRegression(tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(values)[rows.numpy()], train.labels[rows].numpy())
    tests = scaler.transform(test.values[0, "mean"].double().numpy())
    return torch.from_numpy(model.predict(tests))


def test_low_label__equals_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one layer and one C there is nothing left to choose."""
    train, test = digits()
    train, test = (
        Features({(0, "mean"): part.values[0, "mean"]}, part.labels, [], 0.0)
        for part in (train, test)
    )
    drawn: list[Tensor] = []

    def record(*args: Any) -> Tensor:
        drawn.append(draw_per_class(*args))
        return drawn[-1]

    monkeypatch.setattr(low_label, "draw_per_class", record)
    protocol = low_label.LowLabel(shots=[1, 3], draws=2, cs=[1.0])
    one, three = protocol(train, test, 10)
    for outcome, shots in ((one, 1), (three, 3)):
        for ranked, rows in zip(outcome.ranked, drawn, strict=True):
            expected = one_shot_by_scikit_learn(train, test, rows[:, :shots].flatten())
            assert (ranked[:, 0] == expected).double().mean() > 0.985


def test_low_label__reads_no_other_label(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = digits()
    protocol = low_label.LowLabel(shots=[2], draws=1, cs=[0.1, 1.0])
    rows = draw_per_class(train.labels, 10, 2, seed=3)
    monkeypatch.setattr(low_label, "draw_per_class", lambda *_: rows)
    [outcome] = protocol(train, test, 10)
    few = torch.full_like(train.labels, -1)
    few[rows] = train.labels[rows]
    [blind] = protocol(Features(train.values, few, [], 0.0), test, 10)
    assert torch.equal(blind.ranked, outcome.ranked)
    assert blind.selection == outcome.selection


def test_low_label__says_when_it_did_not_converge() -> None:
    train, test = digits()
    protocol = low_label.LowLabel(shots=[1], draws=2, max_iterations=1)
    with pytest.warns(ConvergenceWarning, match="Of 2 fits to 1 images per class, 2 "):
        protocol(train, test, 10)


def test_low_label__one_class_and_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    values: dict[Key, Tensor] = {
        (None, "pixels"): torch.randn(12, 4, generator=generator)
    }
    data = Features(values, torch.zeros(12, dtype=torch.int64), [], 0.0)
    for outcome in low_label.LowLabel(shots=[1, 2], draws=2)(data, data, 1):
        assert outcome.key == (None, "pixels")
        assert torch.equal(outcome.ranked, torch.zeros(2, 12, 1, dtype=torch.int64))


def test_low_label__too_few_images_of_a_class() -> None:
    train, test = digits()
    with pytest.raises(ValueError, match=r"Class \d has \d+ .*draw 70 per class"):
        low_label.LowLabel(shots=[1, 70])(train, test, 10)


def test_evaluate__too_few_images_of_a_class_is_refused_early(photos: Path) -> None:
    class Colours(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.full((3, 16, 16), index, dtype=torch.uint8), index % 2

    class Never(KNN):
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("A protocol has run.")

    read = []

    def feature_function(images: Tensor) -> Tensor:
        read.append(images)
        return images[:, :, 0, 0]

    def evaluate_on(data: Any, shots: int) -> None:
        evaluate(
            nn.Identity(),
            data,
            [Never(), low_label.LowLabel(shots=[1, shots])],
            val=None if isinstance(data, Path) else data,
            feature_function=feature_function,
            img_size=16,
            num_workers=0,
            device="cpu",
        )

    with pytest.raises(ValueError, match=r"Class flower has 16 training .*draw 17 per"):
        evaluate_on(photos, 17)
    assert not read
    with pytest.raises(ValueError, match=r"Class 0 has 2 training .*draw 3 per"):
        evaluate_on(Colours(), 3)
    assert read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": []}, "shots of LowLabel is a list of one or more"),
        ({"shots": [0, 1]}, "at least 1, got shots"),
        ({"shots": [11]}, "from 1 to the 10"),
        ({"draws": 0}, "draws=0"),
        ({"num_folds": 1}, "num_folds=1"),
        ({"cs": []}, "cs of LowLabel is a list of one or more"),
        ({"fixed_c": 0.0}, "above 0, got fixed_c"),
    ],
)
def test_low_label__bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        low_label.LowLabel(**({"shots": [1]} | settings)).check(10)


@pytest.mark.parametrize("name", ["tench", "grün", "two\nlines", "na\udcefve"])
def test_check_labels__names_the_class(name: str) -> None:
    labels = torch.tensor([0, 0, 1, 2, 2])
    settings = low_label.LowLabel(shots=[1, 2])
    with pytest.raises(ValueError) as error:
        settings.check_labels(labels, ["a", name, "c"])
    assert str(error.value).startswith(f"Class {printable(name)} has 1 training image")
    settings.check_labels(labels[[0, 1, 3, 4]] // 2, ["a", name])
