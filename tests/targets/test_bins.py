from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightly_mim.patches import gather_patches
from lightly_mim.targets import ColorBins

INDEX = torch.tensor([[0, 3, 5], [1, 2, 4]])
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def test_color_bins__are_the_levels_of_8_bit_images() -> None:
    levels = torch.arange(256).reshape(1, 1, 16, 16).expand(-1, 3, -1, -1)
    images = (levels / 255 - MEAN) / STD
    cells = torch.tensor([[0]])
    for num_bins in (256, 128, 8, 2):
        target = ColorBins(num_bins)
        target.fit(images)
        bins = target(images, cells, (16, 16))
        expected = gather_patches(levels, cells, (16, 16)) // (256 // num_bins)
        assert torch.equal(bins, expected)


@settings(max_examples=20)
@given(st.integers(2, 40), st.sampled_from([2, 4, 8]), st.integers(1, 5))
def test_color_bins__equal_plain_loops(
    num_bins: int, factor: int, channels: int
) -> None:
    images = torch.randn(2, channels, 16, 24, dtype=torch.float64)
    target = ColorBins(num_bins, factor)
    target.fit(images[:1])
    bins = target(images, INDEX, (8, 8))
    assert bins.dtype == torch.int64
    assert bins.shape[-1] == target.width((8, 8), channels)
    side = 8 // factor
    for b, k, y, x, c in np.ndindex(2, 3, side, side, channels):
        top = int(INDEX[b, k]) // 3 * 8 + y * factor
        left = int(INDEX[b, k]) % 3 * 8 + x * factor
        value = images[b, c, top : top + factor, left : left + factor].mean()
        low, high = images[0, c].aminmax()
        edges = np.linspace(float(low), float(high), num_bins + 1)
        number = int(bins[b, k].reshape(side, side, channels)[y, x, c])
        assert number == 0 or edges[number] <= value + 1e-6
        assert number == num_bins - 1 or value - 1e-6 <= edges[number + 1]


def test_color_bins__are_drawn_as_their_middles() -> None:
    images = torch.rand(2, 3, 16, 24) * torch.tensor([1.0, 2, 3])[:, None, None]
    target = ColorBins(16)
    target.fit(images)
    bins = target(images, INDEX, (8, 8))
    logits = torch.nn.functional.one_hot(bins, 16).flatten(-2).bfloat16()
    pixels = target.to_pixels(logits, images, INDEX, (8, 8))
    half_bin = (target.high - target.low).repeat(64) / 32
    error = (pixels - gather_patches(images, INDEX, (8, 8))).abs()
    assert (error <= half_bin + 1e-5).all()
    assert error.max() > half_bin.min() / 2


def test_color_bins__what_lies_outside_counts_to_the_outermost() -> None:
    target = ColorBins(8)
    target.fit(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
    images = torch.tensor([[-5.0, -0.01], [1.0, 7.0]])[None, None]
    assert target(images, torch.tensor([[0]]), (2, 2)).tolist() == [[[0, 0, 7, 7]]]


def test_color_bins__refuses() -> None:
    with pytest.raises(ValueError, match="at least 2, got num_bins=1"):
        ColorBins(1)
    with pytest.raises(ValueError, match="at least 1, got factor=0"):
        ColorBins(8, factor=0)
    images = torch.randn(2, 3, 16, 24)
    images[:, 1] = 0.5
    with pytest.raises(ValueError, match="Channel 1 .* 0.5 to 0.5"):
        ColorBins().fit(images)
    images[0, 1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Channel 1 .* nan"):
        ColorBins().fit(images)
    images[0, 1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="Channel 1 .* inf"):
        ColorBins().fit(images)
