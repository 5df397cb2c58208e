from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.models import utils

from lightly_mim.masking import Mask, RandomMasking

CELLS = torch.tensor([[[True, False], [False, True]], [[False, True], [False, True]]])


def drawn(batch_size: int, h: int, w: int, seed: int = 0) -> Mask:
    """A third of the cells, chosen by a sort of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, h * w // 3)
    order = torch.rand(batch_size, h * w, generator=generator).argsort(dim=1)
    flags = torch.zeros(batch_size, h * w, dtype=torch.bool)
    return Mask.of(flags.scatter(1, order[:, :count], True).view(batch_size, h, w))


def test_of__counts_a_tensor_and_keeps_a_mask() -> None:
    mask = Mask.of(CELLS)
    assert torch.equal(mask.cells, CELLS)
    assert mask.count == 2
    assert len(mask) == 2
    assert mask.grid == (2, 2)
    assert repr(mask) == "Mask(2 of 2 x 2 cells in each of 2 images)"
    assert Mask.of(mask) is mask


def test_of__refuses() -> None:
    with pytest.raises(ValueError, match=r"bool tensor .* got torch.float32 .*1, 2, 2"):
        Mask.of(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"bool tensor .* got torch.bool .*1, 4"):
        Mask.of(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bool tensor .* shape \(0, 2, 2\)"):
        Mask.of(torch.ones(0, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool tensor .* got ndarray"):
        Mask.of(cast(Any, CELLS.numpy()))
    uneven = torch.tensor([[[True, False]], [[True, True]]])
    with pytest.raises(ValueError, match="got 1 to 2 of 2"):
        Mask.of(uneven)
    for everything, count in ((True, 4), (False, 0)):
        with pytest.raises(ValueError, match=f"some of it visible, got {count} of 4"):
            Mask.of(torch.full((2, 2, 2), everything))


def test_getitem__and_to() -> None:
    mask = drawn(5, 3, 4)
    part = mask[1:3]
    assert torch.equal(part.cells, mask.cells[1:3])
    assert part.count == mask.count == 4
    moved = mask.to("meta")
    assert moved.cells.device.type == "meta"
    assert moved.count == 4


def test_on__repeats_cells() -> None:
    mask = Mask.of(CELLS)
    ones = torch.ones(1, 3, 2, dtype=torch.int)
    finer = mask.on((6, 4))
    assert torch.equal(finer.cells, torch.kron(CELLS.int(), ones).bool())
    assert finer.count == 12 == Mask.of(finer.cells).count
    assert mask.on((2, 2)) is mask
    assert mask.fits((6, 4))
    assert mask.fits((2, 2))


@pytest.mark.parametrize("grid", [(5, 4), (4, 5), (1, 2)])
def test_on__refuses(grid: tuple[int, int]) -> None:
    mask = Mask.of(CELLS)
    assert not mask.fits(grid)
    with pytest.raises(ValueError, match=f"2 x 2 cells.*grid of {grid[0]} x {grid[1]}"):
        mask.on(grid)


def test_pixels__are_cells_enlarged() -> None:
    mask = drawn(3, 2, 5)
    pixels = mask.pixels((8, 30))
    assert pixels.shape == (3, 1, 8, 30)
    for b, y, x in ((b, y, x) for b in range(3) for y in range(8) for x in range(30)):
        assert pixels[b, 0, y, x] == mask.cells[b, y // 4, x // 6]
    with pytest.raises(ValueError, match="2 x 5 cells.*8 x 31"):
        mask.pixels((8, 31))


def test_index__is_in_raster_order() -> None:
    masked, visible = Mask.of(CELLS).index()
    assert masked.tolist() == [[0, 3], [1, 3]]
    assert visible.tolist() == [[1, 2], [0, 2]]


def test_index__is_made_once() -> None:
    mask = drawn(2, 4, 4)
    first, second = mask.index()[0], mask.index()[0]
    assert first.data_ptr() == second.data_ptr()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 2**31))
def test_index__round_trips_through_lightly(h: int, w: int, seed: int) -> None:
    mask = drawn(2, h, w, seed)
    masked, visible = mask.index()
    tokens = torch.randn(2, h * w, 3)
    flat = mask.cells.flatten(1)
    taken = utils.get_at_index(tokens, masked)
    assert torch.equal(taken, tokens[flat].view(2, -1, 3))
    kept = utils.get_at_index(tokens, visible)
    assert torch.equal(kept, tokens[~flat].view(2, -1, 3))
    again = utils.set_at_index(torch.zeros_like(tokens), masked, taken)
    assert torch.equal(utils.set_at_index(again, visible, kept), tokens)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 4), st.integers(0, 2**31))
def test_token_index__counts_prefix_tokens(
    h: int, w: int, prefix: int, seed: int
) -> None:
    mask = drawn(2, h, w, seed)
    idx_keep, idx_mask = mask.token_index(prefix)
    # Together the whole sequence, each part in order, the prefix kept.
    both = torch.cat([idx_keep, idx_mask], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(prefix + h * w).expand(2, -1))
    assert torch.equal(idx_keep[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert torch.equal(idx_mask, idx_mask.sort(dim=1).values)
    assert torch.equal(idx_keep, idx_keep.sort(dim=1).values)
    again = torch.zeros(2, prefix + h * w, dtype=torch.bool).scatter(1, idx_mask, True)
    assert torch.equal(again[:, prefix:].view_as(mask.cells), mask.cells)


def test_token_index__means_what_lightly_means() -> None:
    mask = RandomMasking(16, 0.5)(2, (64, 64))
    idx_keep, idx_mask = mask.token_index(1)
    tokens = torch.randn(2, 17, 4)
    masked = utils.mask_at_index(tokens, idx_mask, torch.full((1, 1, 4), 9.0))
    flat = torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask.cells.flatten(1)], 1)
    assert torch.equal((masked == 9).all(-1), flat)
    kept = utils.get_at_index(tokens, idx_keep)
    assert torch.equal(kept, tokens[~flat].view(2, 9, 4))


def test_index__of_inference_mode_is_not_kept() -> None:
    mask = Mask.of(torch.eye(4, dtype=torch.bool)[None])
    with torch.inference_mode():
        mask.index()
    values = torch.randn(1, 16, requires_grad=True)
    torch.autograd.backward(values.gather(1, mask.index()[0]).sum())
    assert values.grad is not None
