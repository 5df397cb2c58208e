from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightly.models import utils

from lightly_mim.masking import (
    BlockMasking,
    GridMasking,
    RandomMasking,
    count_masked,
    expand_mask,
    mask_to_index,
    split_index,
)

percent = st.integers(1, 99)


@given(st.integers(1, 30), st.integers(1, 30), percent)
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


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 9), st.integers(2, 9), percent, st.integers(0, 2**31))
def test_random_masking__counts_are_exact(
    h: int, w: int, share: int, seed: int
) -> None:
    masking = RandomMasking((8, 4), share / 100)
    assume(0 < -(-h * w * share // 100) < h * w)
    generator = torch.Generator().manual_seed(seed)
    mask = masking(3, (h * 8, w * 4), generator=generator)
    assert mask.shape == (3, h, w)
    assert mask.dtype == torch.bool
    assert count_masked(mask) == masking.count(h, w)


def test_random_masking__every_block_is_as_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = RandomMasking(32, 0.6)(20_000, (96, 96), generator=generator)
    share = mask.float().mean(dim=0)
    # 6 of 9; the standard error of a share is 0.0033.
    assert (share - 6 / 9).abs().max() < 5 * 0.0033


def test_random_masking__generator_decides() -> None:
    masks = [
        RandomMasking(8, 0.5)(4, (64, 64), generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 20), st.integers(2, 20), percent, st.integers(0, 2**31))
def test_block_masking__counts_are_exact(h: int, w: int, share: int, seed: int) -> None:
    masking = BlockMasking((8, 4), share / 100)
    assume(0 < -(-h * w * share // 100) < h * w)
    generator = torch.Generator().manual_seed(seed)
    mask = masking(3, (h * 8, w * 4), generator=generator)
    assert mask.shape == (3, h, w)
    assert count_masked(mask) == masking.count(h, w)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_block_masking__equals_plain_loops(ratio: float) -> None:
    # The same random numbers, rectangle by rectangle.
    masking = BlockMasking(16, ratio)
    masks = masking(5, (224, 160), generator=torch.Generator().manual_seed(3))
    h, w, count = 14, 10, masking.count(14, 10)
    uniform = torch.rand(4, 5, 64, 1, generator=torch.Generator().manual_seed(3))
    for b in range(5):
        chosen: list[tuple[int, int]] = []
        for r in range(64):
            size, shape, top, left = uniform[:, b, r, 0].tolist()
            area = 16 + (count - 16) * size
            aspect = math.exp(math.log(0.3) * (1 - 2 * shape))
            assert 16 <= area <= count
            assert 0.3 <= aspect <= 1 / 0.3 + 1e-6
            height = min(max(round(math.sqrt(area * aspect)), 1), h)
            width = min(max(round(math.sqrt(area / aspect)), 1), w)
            y0, x0 = int(top * (h - height + 1)), int(left * (w - width + 1))
            for y in range(y0, y0 + height):
                for x in range(x0, x0 + width):
                    if (y, x) not in chosen and len(chosen) < count:
                        chosen.append((y, x))
        assert masks[b].nonzero().tolist() == [list(place) for place in sorted(chosen)]


def test_block_masking__masks_neighbours_together() -> None:
    def borders(masking: RandomMasking | BlockMasking) -> float:
        mask = masking(500, (224, 224), generator=torch.Generator().manual_seed(0))
        return (mask[:, 1:] != mask[:, :-1]).float().mean().item()

    # Of neighbours in a random mask, 2 * 0.5 * 0.5 differ.
    assert borders(RandomMasking(16, 0.5)) == pytest.approx(0.5, abs=0.01)
    assert borders(BlockMasking(16, 0.5)) < 0.15


def test_grid_masking__keeps_one_of_four() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = GridMasking((8, 4))(4000, (32, 24), generator=generator)
    assert mask.shape == (4000, 4, 6)
    assert count_masked(mask) == 18
    cells = (~mask).view(4000, 2, 2, 3, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert (cells.sum(dim=-1) == 1).all()
    assert (cells == cells[:, :1, :1]).all()  # the same place everywhere
    share = cells[:, 0, 0].float().mean(dim=0)
    # One of 4; the standard error of a share is 0.0068.
    assert (share - 0.25).abs().max() < 5 * 0.0068


def test_grid_masking__refuses() -> None:
    with pytest.raises(ValueError, match=r"0\.75, got 0\.5"):
        GridMasking(16, 0.5)
    with pytest.raises(ValueError, match="even number of patches.*got 3 x 4"):
        GridMasking(16)(1, (48, 64))
    with pytest.raises(ValueError, match="does not divide"):
        GridMasking(16)(1, (40, 64))


@pytest.mark.parametrize("masking", [BlockMasking(8, 0.5), GridMasking(8)])
def test_other_maskings__generator_decides(
    masking: BlockMasking | GridMasking,
) -> None:
    masks = [
        masking(8, (64, 64), generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert repr(masking).startswith(f"{type(masking).__name__}(mask_patch_size=(8, 8)")


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.1])
def test_random_masking__refuses_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        RandomMasking(32, ratio)


def test_random_masking__refuses_sizes() -> None:
    with pytest.raises(ValueError, match="72 x 64 pixels.*mask_patch_size 32 x 32"):
        RandomMasking(32)(1, (72, 64))
    with pytest.raises(ValueError, match=r"masks 1 of 1 block\(s\) of 32 x 32"):
        RandomMasking(32)(1, (32, 32))


def test_count_masked__refuses() -> None:
    with pytest.raises(ValueError, match="bool tensor"):
        count_masked(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="bool tensor"):
        count_masked(torch.ones(1, 4, dtype=torch.bool))
    uneven = torch.tensor([[[True, False]], [[True, True]]])
    with pytest.raises(ValueError, match="got 1 to 2 of 2"):
        count_masked(uneven)
    for everything in (True, False):
        with pytest.raises(ValueError, match="leaves some of it visible"):
            count_masked(torch.full((2, 2, 2), everything))


def test_expand_mask__repeats() -> None:
    mask = torch.tensor([[[True, False], [False, True]]])
    expected = torch.kron(mask.int(), torch.ones(1, 3, 2, dtype=torch.int)).bool()
    assert torch.equal(expand_mask(mask, (6, 4)), expected)
    with pytest.raises(ValueError, match="2 x 2 cells.*grid of 5 x 4"):
        expand_mask(mask, (5, 4))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 4), st.integers(0, 2**31))
def test_mask_to_index__round_trips(h: int, w: int, prefix: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_masked = max(1, h * w // 3)
    masked = torch.rand(2, h * w, generator=generator).argsort(1)[:, :num_masked]
    mask = torch.zeros(2, h * w, dtype=torch.bool).scatter(1, masked, True)
    mask = mask.view(2, h, w)
    idx_keep, idx_mask = mask_to_index(mask, num_masked, prefix)

    # Together the whole sequence, each part in order, the prefix kept.
    both = torch.cat([idx_keep, idx_mask], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(prefix + h * w).expand(2, -1))
    assert torch.equal(idx_keep[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert torch.equal(idx_mask, idx_mask.sort(dim=1).values)
    assert torch.equal(idx_keep, idx_keep.sort(dim=1).values)
    again = torch.zeros(2, prefix + h * w, dtype=torch.bool).scatter(1, idx_mask, True)
    assert torch.equal(again[:, prefix:].view_as(mask), mask)


def test_mask_to_index__means_what_lightly_means() -> None:
    mask = RandomMasking(16, 0.5)(2, (64, 64))
    idx_keep, idx_mask = mask_to_index(mask, 8, num_prefix_tokens=1)
    tokens = torch.randn(2, 17, 4)
    masked = utils.mask_at_index(tokens, idx_mask, torch.full((1, 1, 4), 9.0))
    flat = torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask.flatten(1)], dim=1)
    assert torch.equal((masked == 9).all(-1), flat)
    kept = utils.get_at_index(tokens, idx_keep)
    assert torch.equal(kept, tokens[~flat].view(2, 9, 4))


def test_split_index__is_in_raster_order() -> None:
    mask = torch.tensor([[[False, True], [True, False]]])
    masked, visible = split_index(mask, 2)
    assert masked.tolist() == [[1, 2]]
    assert visible.tolist() == [[0, 3]]
