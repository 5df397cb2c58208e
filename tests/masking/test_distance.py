from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from lightly_mim.masking import (
    BlockMasking,
    CentralMasking,
    GridMasking,
    InverseBlockMasking,
    Mask,
    Masking,
    MixtureMasking,
    RandomMasking,
    SquareMasking,
    average_distance,
)


def scipys(mask: Mask, image_size: tuple[int, int]) -> list[float]:
    pictures = mask.pixels(image_size)[:, 0].numpy()
    return [distance_transform_edt(each)[each].mean() for each in pictures]


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 99),
    st.integers(0, 2**31),
)
def test_equals_scipy_for_any_shape(
    h: int, w: int, p: int, q: int, share: int, seed: int
) -> None:
    assume(0 < -(-h * w * share // 100) < h * w)
    generator = torch.Generator().manual_seed(seed)
    size = h * p, w * q
    mask = RandomMasking((p, q), share / 100)(3, size, generator=generator)
    distance = average_distance(mask, size)
    assert distance.shape == (3,)
    assert distance.dtype == torch.float32
    assert distance.tolist() == pytest.approx(scipys(mask, size), rel=1e-5)


@pytest.mark.parametrize(
    "masking",
    [
        *(RandomMasking(unit, 0.6) for unit in (1, 4, 16, 32)),
        RandomMasking(4, 0.99),
        BlockMasking(16, 0.6),
        SquareMasking(16, 0.6),
        CentralMasking(32, 0.6),
        InverseBlockMasking(16, 0.9),
        GridMasking(16),
        MixtureMasking([RandomMasking(32, 0.6), SquareMasking(16, 0.7)]),
    ],
    ids=str,
)
def test_equals_scipy_for_every_masking(masking: Masking) -> None:
    size = 160, 192
    mask = masking(4, size, generator=torch.Generator().manual_seed(0))
    expected = scipys(mask, size)
    assert average_distance(mask, size).tolist() == pytest.approx(expected, rel=1e-5)
    assert average_distance(mask.cells, size).tolist() == pytest.approx(
        expected, rel=1e-5
    )


def test_by_hand() -> None:
    # Masked are 3 x 2 of 6 x 4 pixels, in a corner; the next visible one is on the
    # right, or below.
    mask = torch.tensor([[[True, False], [False, False]]])
    distances = [2, 1, 2, 1, 1, 1]
    assert average_distance(mask, (6, 4)).item() == pytest.approx(sum(distances) / 6)
    # All but one pixel in the corner of 2 x 2.
    mask = torch.tensor([[[True, True], [True, False]]])
    expected = (1 + 1 + math.sqrt(2)) / 3
    assert average_distance(mask, (2, 2)).item() == pytest.approx(expected)


def test_nothing_waits_for_the_device() -> None:
    mask = RandomMasking(16, 0.5)(3, (64, 48), device="meta")
    assert average_distance(mask, (64, 48)).shape == (3,)


def test_refuses() -> None:
    mask = RandomMasking(16, 0.5)(2, (64, 48))
    with pytest.raises(ValueError, match="4 x 3 cells .* image of 64 x 50 pixels"):
        average_distance(mask, (64, 50))
    with pytest.raises(ValueError, match="bool tensor"):
        average_distance(mask.cells.float(), (64, 48))
    with pytest.raises(ValueError, match="some of it visible"):
        average_distance(torch.ones(1, 2, 2, dtype=torch.bool), (4, 4))
