from __future__ import annotations

import pytest
import torch
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from lightly_mim.evaluation.splits import assign_folds, hold_out


def some_labels() -> torch.Tensor:
    labels = torch.tensor([0] * 51 + [1] * 20 + [2] * 9 + [4] * 5)
    return labels[torch.randperm(85, generator=torch.Generator().manual_seed(5))]


def test_assign_folds__sizes_equal_scikit_learn() -> None:
    labels = some_labels()
    folds = assign_folds(labels, 5, seed=0)
    splitter = StratifiedKFold(5, shuffle=True, random_state=0)
    expected = [
        labels[rows].bincount().tolist() for _, rows in splitter.split(labels, labels)
    ]
    found = [labels[folds == part].bincount().tolist() for part in range(5)]
    assert sorted(found) == sorted(expected)


def test_assign_folds__where_scikit_learn_refuses() -> None:
    labels = torch.arange(12) % 3
    with pytest.raises(ValueError, match="n_splits=5 cannot be greater"):
        next(StratifiedKFold(5).split(labels, labels))
    folds = assign_folds(labels, 5)
    assert sorted(folds.bincount().tolist()) == [2, 2, 2, 3, 3]
    alone = torch.tensor([0] * 9 + [1])
    with pytest.raises(ValueError, match="least populated class"):
        next(StratifiedShuffleSplit(1, test_size=0.2).split(alone, alone))
    assert not hold_out(alone, 0.2, 0)[9]


def test_assign_folds() -> None:
    labels = torch.tensor([0] * 51 + [1] * 20 + [2] * 2 + [4])
    labels = labels[torch.randperm(74, generator=torch.Generator().manual_seed(5))]
    folds = assign_folds(labels, 5, seed=0)
    assert sorted(folds.bincount().tolist()) == [14, 15, 15, 15, 15]
    for label, largest in ((0, 11), (1, 4), (2, 1), (4, 1)):
        counts = folds[labels == label].bincount(minlength=5)
        assert counts.max() == largest
        assert counts.min() >= largest - 1
    assert torch.equal(assign_folds(labels, 5, seed=0), folds)
    assert not torch.equal(assign_folds(labels, 5, seed=1), folds)


@pytest.mark.parametrize("num_folds", [1, 0, 7])
def test_assign_folds__bad_number(num_folds: int) -> None:
    with pytest.raises(ValueError, match=f"num_folds={num_folds} for 6 image"):
        assign_folds(torch.zeros(6, dtype=torch.int64), num_folds)
