from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightly_mim.masking import RandomMasking, UnitMasking
from lightly_mim.masking.base import mark_lowest, scan_from_a_side


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 99))
def test_count__is_both_references_in_exact_arithmetic(
    h: int, w: int, share: int
) -> None:
    n = h * w
    simmim = -(-n * share // 100)  # ceil(n * ratio)
    mae = n - n * (100 - share) // 100  # n - floor(n * (1 - ratio))
    assume(0 < simmim < n)
    assert RandomMasking(16, share / 100).count(h, w) == simmim == mae


@pytest.mark.parametrize(
    ("grid", "ratio", "count"), [((6, 6), 0.6, 22), ((7, 7), 0.6, 30)]
)
def test_count__published(grid: tuple[int, int], ratio: float, count: int) -> None:
    # SimMIM at 192 and at 224 pixels.
    assert RandomMasking(32, ratio).count(*grid) == count


def test_count__where_the_reference_floats_differ() -> None:
    # MAE keeps int(100 * (1 - 0.8)) = 19 of 100 patches, and int(100 * (1 - 0.9)) = 9.
    assert 100 - int(100 * (1 - 0.8)) == 81
    assert RandomMasking(16, 0.8).count(10, 10) == 80
    assert 100 - int(100 * (1 - 0.9)) == 91
    assert RandomMasking(16, 0.9).count(10, 10) == 90
    # SimMIM's ceil(100 * 0.07) is 8: the product is 7.000000000000001.
    assert math.ceil(100 * 0.07) == 8
    assert Decimal("0.07") * 100 == RandomMasking(16, 0.07).count(10, 10) == 7


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.1, math.nan, "0.5"])
def test_unit_masking__refuses_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        RandomMasking(32, ratio)


def test_unit_masking__refuses_sizes() -> None:
    with pytest.raises(ValueError, match="mask_patch_size .* is one positive"):
        RandomMasking(0)
    with pytest.raises(ValueError, match="72 x 64 pixels.*mask_patch_size 32 x 32"):
        RandomMasking(32)(1, (72, 64))
    with pytest.raises(ValueError, match=r"masks 1 of 1 block\(s\) of 32 x 32"):
        RandomMasking(32)(1, (32, 32))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 4, 1000]),
    st.sampled_from([torch.uint8, torch.int32, torch.int64, torch.float32]),
    st.integers(0, 2**31),
    st.data(),
)
def test_mark_lowest__is_a_stable_sort(
    h: int, w: int, top: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randint(top, (3, h, w), generator=generator).to(dtype)
    count = data.draw(st.integers(1, h * w))
    chosen = rank.flatten(1).argsort(dim=1, stable=True)[:, :count]
    expected = torch.zeros(3, h * w, dtype=torch.bool).scatter(1, chosen, True)
    assert torch.equal(mark_lowest(rank, count), expected.view(3, h, w))


def test_scan_from_a_side__draws_each_of_four() -> None:
    generator = torch.Generator().manual_seed(0)
    scans = scan_from_a_side((4000, 2, 3), None, generator)
    counts = [
        (scans == torch.tensor(scan)).all(dim=(1, 2)).sum().item()
        for scan in (
            [[0, 1, 2], [3, 4, 5]],  # from the top
            [[5, 4, 3], [2, 1, 0]],  # from the bottom
            [[0, 2, 4], [1, 3, 5]],  # from the left
            [[5, 3, 1], [4, 2, 0]],  # from the right
        )
    ]
    assert sum(counts) == 4000
    # 1000 each; the standard error is 27.
    assert all(abs(count - 1000) < 5 * 27 for count in counts)


class Corner(UnitMasking):
    """A masking of one's own: from the upper left corner."""

    def _rank(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        batch_size, h, w = shape
        rows, columns = torch.arange(h)[:, None], torch.arange(w)
        return (rows + columns).expand(batch_size, h, w)


def test_unit_masking__ranks_of_ones_own() -> None:
    mask = Corner(8, 0.5)(2, (16, 24))
    assert mask.count == 3
    assert mask.cells.int().tolist() == [[[1, 1, 0], [1, 0, 0]]] * 2
    assert repr(Corner(8, 0.5)) == "Corner(mask_patch_size=8, ratio=0.5)"
