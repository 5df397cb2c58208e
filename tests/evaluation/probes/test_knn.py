from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.utils.benchmarking import knn_predict
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional

from lightly_mim.evaluation.probes import knn


def clusters(
    num_images: int, num_classes: int = 4, dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian clusters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(num_images, dim, generator=generator), labels


KS, TEMPERATURES = [20, 1, 5], [0.07, 0.5]


def test_knn_predict_grid__equals_lightly() -> None:
    bank, labels = clusters(150, num_classes=6)
    queries, _ = clusters(70, num_classes=6, seed=1)
    ranked = knn.knn_predict_grid(
        queries, bank, labels, 6, KS, TEMPERATURES, num_ranks=1, chunk_size=32
    )
    assert ranked.shape == (3, 2, 70, 1)
    for i, k in enumerate(KS):
        for j, temperature in enumerate(TEMPERATURES):
            expected = knn_predict(
                functional.normalize(queries, dim=1),
                functional.normalize(bank, dim=1).T,
                labels,
                num_classes=6,
                knn_k=k,
                knn_t=temperature,
            )
            assert torch.equal(ranked[i, j, :, 0], expected[:, 0])


def test_knn_predict_grid__ranks_equal_lightly() -> None:
    # With every image a neighbour, every class has votes and no two are equal.
    bank, labels = clusters(150, num_classes=6)
    queries, _ = clusters(70, num_classes=6, seed=1)
    ranked = knn.knn_predict_grid(queries, bank, labels, 6, [150], [0.2], num_ranks=5)
    expected = knn_predict(
        functional.normalize(queries, dim=1),
        functional.normalize(bank, dim=1).T,
        labels,
        num_classes=6,
        knn_k=150,
        knn_t=0.2,
    )
    assert torch.equal(ranked[0, 0], expected[:, :5])


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_knn_predict_grid__equals_scikit_learn(k: int, temperature: float) -> None:
    # The columns of 1,003 images fall into groups, with some over.
    bank, labels = clusters(1003)
    queries, _ = clusters(60, seed=1)
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    ).fit(bank.numpy(), labels.numpy())
    ranked = knn.knn_predict_grid(queries, bank, labels, 4, [k], [temperature])
    assert ranked.flatten().tolist() == reference.predict(queries.numpy()).tolist()


@settings(max_examples=100, deadline=None)
@given(
    columns=st.integers(1, 700),
    part=st.floats(0, 1),
    values=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 9),
)
def test_largest__equals_topk(
    columns: int, part: float, values: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(values, (5, columns), generator=generator).float()
    rows[0, : columns // 2] = -torch.inf
    k = max(1, round(part**3 * columns))  # small ones more often, as in use
    index = knn._largest(rows, k)
    assert all(len(set(row)) == k for row in index.tolist())
    found = rows.gather(1, index).sort(dim=1, descending=True).values
    assert torch.equal(found, rows.topk(k, dim=1).values)


@settings(max_examples=30, deadline=None)
@given(
    chunk_size=st.integers(1, 40),
    num_images=st.integers(30, 120),
    k=st.integers(1, 29),
    values=st.integers(1, 3),
    leave_one_out=st.booleans(),
)
def test_knn_predict_grid__ties(
    chunk_size: int, num_images: int, k: int, values: int, leave_one_out: bool
) -> None:
    # One-hot features: similarities are exactly 0 or 1, so nearly all of them are tied.
    generator = torch.Generator().manual_seed(7)
    bank = torch.eye(3)[torch.randint(values, (num_images,), generator=generator)]
    labels = torch.randint(3, (num_images,), generator=generator)
    queries = bank if leave_one_out else torch.eye(3)
    ranked = knn.knn_predict_grid(
        None if leave_one_out else queries,
        bank,
        labels,
        3,
        [k],
        [0.5],
        num_ranks=3,
        chunk_size=chunk_size,
    )
    for query, prediction in enumerate(ranked[0, 0].tolist()):
        others = [n for n in range(num_images) if not (leave_one_out and n == query)]
        near = [float(queries[query] @ bank[n]) for n in others]
        order = sorted(range(len(others)), key=lambda n: (-near[n], others[n]))[:k]
        votes = [0.0, 0.0, 0.0]
        for n in order:
            votes[int(labels[others[n]])] += float(np.exp((near[n] - 1) / 0.5))
        # The sums of equal weights may differ in the last bit from ours: round.
        expected = sorted(range(3), key=lambda c: (-round(votes[c], 9), c))
        assert prediction == expected


def test_knn_predict_grid__small_temperature_does_not_overflow() -> None:
    bank, labels = clusters(40)
    ranked = knn.knn_predict_grid(bank, bank, labels, 4, [10], [1e-4])
    assert torch.equal(ranked.flatten(), labels)  # each image is its own nearest


def test_choose_knn__equals_scikit_learn_leave_one_out() -> None:
    bank, labels = clusters(60)
    grid = {}
    for k in (1, 5, 15):
        for temperature in (0.05, 0.3):
            correct = 0
            for n in range(60):
                rest = torch.arange(60) != n
                model = KNeighborsClassifier(
                    k,
                    metric="cosine",
                    weights=lambda d, t=temperature: np.exp((1 - d) / t),
                ).fit(bank[rest].numpy(), labels[rest].numpy())
                correct += model.predict(bank[n : n + 1].numpy())[0] == labels[n].item()
            grid[k, temperature] = correct / 60
    best = max(grid, key=lambda setting: grid[setting])
    choice = knn.choose_knn(bank, labels, 4, knn.KNN([1, 5, 15], [0.05, 0.3], 13))
    assert (choice.k, choice.temperature) == best
    assert choice.accuracy == pytest.approx(grid[best])


def test_choose_knn__default_ks_fit_the_training_set() -> None:
    assert knn.fitting_ks(15) == [1, 5, 10]
    assert knn.fitting_ks(10) == [1, 5]  # leave-one-out has nine neighbours
    bank, labels = clusters(6)
    assert knn.choose_knn(bank, labels, 4).k in (1, 5)


def test_choose_knn__one_class() -> None:
    bank, _ = clusters(12)
    choice = knn.choose_knn(bank, torch.zeros(12, dtype=torch.int64), 1)
    assert choice.accuracy == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [13]}, "between 1 and the 12 training image"),
        ({"ks": [12], "queries": None}, "between 1 and the 11 training image"),
        ({"ks": [0]}, "at least 1, got ks"),
        ({"ks": []}, "one or more"),
        ({"temperatures": [0.0]}, "above 0, got temperatures"),
        (
            {"temperatures": []},
            "temperatures of .* one or more",
        ),
        ({"num_ranks": 5}, "num_ranks"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"queries": torch.ones(3, 5)}, "as many columns"),
        ({"bank_labels": torch.zeros(11, dtype=torch.int64)}, "Labels are int64"),
        ({"bank_labels": torch.zeros(12)}, "Labels are int64"),
        ({"bank_labels": torch.full((12,), 4)}, r"lie in \[0, 4\)"),
    ],
)
def test_knn_predict_grid__bad_input(change: dict[str, object], message: str) -> None:
    bank, labels = clusters(12)
    arguments: dict[str, Any] = {
        "queries": bank,
        "bank": bank,
        "bank_labels": labels,
        "num_classes": 4,
        "ks": [1],
        "temperatures": [0.1],
    }
    with pytest.raises(ValueError, match=message):
        knn.knn_predict_grid(**(arguments | change))


def test_choose_knn__one_image() -> None:
    with pytest.raises(ValueError, match="ks of .* one or more"):
        knn.choose_knn(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), 1)
