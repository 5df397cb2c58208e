from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightly_mim.evaluation.base import rank_classes
from lightly_mim.evaluation.scores import score, wilson_interval


def predictions(
    num_images: int = 90, num_classes: int = 7, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 1
    return logits, labels


def test_score__equals_torchmetrics_and_scikit_learn() -> None:
    logits, labels = predictions()
    ranked = rank_classes(logits, 5)
    found = score(ranked, labels, 7)
    assert found.top5 is not None
    for k, value in ((1, found.top1.value), (5, found.top5.value)):
        metric = MulticlassAccuracy(7, top_k=k, average="micro")
        assert value == pytest.approx(float(metric(logits, labels)))
    truth, said = labels.numpy(), ranked[:, 0].numpy()
    assert found.confusion == confusion_matrix(truth, said, labels=range(7)).tolist()
    assert found.mean_class.value == pytest.approx(balanced_accuracy_score(truth, said))
    per_class = MulticlassAccuracy(7, average=None)(logits, labels)
    assert found.per_class == pytest.approx(per_class.tolist())
    assert found.draws is None


def test_score__intervals_equal_scipys_bootstrap() -> None:
    logits, labels = predictions(200)
    ranked = rank_classes(logits, 5)
    found = score(ranked, labels, 7)
    hits = (ranked == labels[:, None]).numpy()

    def mean_class(index: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = np.apply_along_axis(
            lambda i: np.mean(
                [
                    hits[i, 0][labels.numpy()[i] == c].mean()
                    for c in set(labels[i].tolist())
                ]
            ),
            axis,
            index,
        )
        return rows

    for accuracy, statistic, sample in (
        (found.top1, np.mean, hits[:, 0]),
        (found.top5, np.mean, hits.any(axis=1)),
        (found.mean_class, mean_class, np.arange(200)),
    ):
        assert accuracy is not None
        reference = stats.bootstrap(
            (sample,),
            statistic,
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        # Both are random: the ends vary by about 0.0015.
        assert accuracy.low == pytest.approx(reference.low, abs=0.01)
        assert accuracy.high == pytest.approx(reference.high, abs=0.01)


def test_score__is_a_function_of_the_seed() -> None:
    logits, labels = predictions()
    ranked = rank_classes(logits, 5)
    assert score(ranked, labels, 7, seed=3) == score(ranked, labels, 7, seed=3)
    other = score(ranked, labels, 7, seed=4)
    assert other.top1.value == score(ranked, labels, 7, seed=3).top1.value
    assert other != score(ranked, labels, 7, seed=3)


@pytest.mark.parametrize("right", [True, False])
def test_score__all_right_or_all_wrong_is_wilsons(right: bool) -> None:
    labels = torch.arange(20) % 2
    ranked = (labels if right else 1 - labels)[:, None]
    found = score(ranked, labels, 2)
    expected = stats.binomtest(20 * right, 20).proportion_ci(0.95, method="wilson")
    assert found.top1.value == found.mean_class.value == float(right)
    assert (found.top1.low, found.top1.high) == pytest.approx(tuple(expected))
    assert found.top1.high - found.top1.low > 0.1
    assert found.top5 is None


def test_score__draws() -> None:
    ranked, labels = [], predictions()[1]
    for seed in range(4):
        logits = predictions(seed=seed)[0]
        ranked.append(rank_classes(logits, 5))
    found = score(torch.stack(ranked), labels, 7)
    alone = [score(each, labels, 7) for each in ranked]
    assert found.draws is not None
    assert found.draws == pytest.approx([each.top1.value for each in alone])
    assert found.top1.value == pytest.approx(np.mean(found.draws))
    assert (
        found.confusion == np.sum([each.confusion for each in alone], axis=0).tolist()
    )
    assert found.top1.low <= found.top1.value <= found.top1.high
    shares: Any = [each.per_class for each in alone]
    expected = np.mean(shares, axis=0)
    assert found.per_class == pytest.approx(expected.tolist())


def test_score__class_without_images() -> None:
    labels = torch.tensor([0, 0, 2])
    found = score(torch.tensor([[0], [1], [2]]), labels, 4)
    assert found.per_class == [0.5, None, 1.0, None]
    assert found.mean_class.value == 0.75
    assert sum(map(sum, found.confusion)) == 3


def test_score__bad_input() -> None:
    with pytest.raises(ValueError, match="3 predictions for 2 test images"):
        score(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="0 predictions"):
        score(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64), 2)


@pytest.mark.parametrize(("correct", "total"), [(0, 5), (5, 5), (500, 656), (1, 1)])
def test_wilson_interval__equals_scipy(correct: int, total: int) -> None:
    expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, total) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2), (1.5, 2)])
def test_wilson_interval__bad_input(correct: int, total: int) -> None:
    with pytest.raises(
        ValueError, match=r"do not make an accuracy|of wilson_interval is"
    ):
        wilson_interval(correct, total)
