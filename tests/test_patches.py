from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.models import utils
from lightly.models.utils import get_2d_sine_cosine_positional_embedding

from lightly_mim.patches import (
    gather_patches,
    grid_size,
    patchify,
    scatter_patches,
    sincos_positions,
    to_pair,
    unpatchify,
)

sides = st.integers(1, 4)


@settings(deadline=None, max_examples=50)
@given(sides, sides, sides, sides, st.integers(1, 5))
def test_unpatchify__inverts_patchify(h: int, w: int, p: int, q: int, c: int) -> None:
    images = torch.randn(2, c, h * p, w * q)
    patches = patchify(images, (p, q))
    assert patches.shape == (2, h * w, p * q * c)
    assert torch.equal(unpatchify(patches, (p, q), (h, w)), images)


def test_patchify__equals_lightly() -> None:
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(patchify(images, (8, 8)), utils.patchify(images, 8))


@settings(deadline=None, max_examples=50)
@given(sides, sides, sides, sides, st.integers(1, 4), st.integers(0, 2**31))
def test_gather_and_scatter__equal_plain_loops(
    h: int, w: int, p: int, q: int, c: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, c, h * p, w * q, generator=generator)
    index = torch.rand(2, h * w, generator=generator).argsort(1)[:, : (h * w + 1) // 2]
    patches = gather_patches(images, index, (p, q))
    pasted = scatter_patches(images, index, patches + 1, (p, q))
    expected = images.clone()
    for i in range(2):
        for k, cell in enumerate(index[i].tolist()):
            y, x = cell // w * p, cell % w * q
            block = images[i, :, y : y + p, x : x + q]
            assert torch.equal(patches[i, k], block.permute(1, 2, 0).flatten())
            expected[i, :, y : y + p, x : x + q] += 1
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("size", [0, -1, (1,), (1, 2, 3), (8, 0), 1.5])
def test_to_pair__refuses(size: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        to_pair(size)  # type: ignore[arg-type]


def test_to_pair() -> None:
    assert to_pair(3) == (3, 3)
    assert to_pair((3, 4)) == (3, 4)
    assert to_pair([3, 4]) == (3, 4)  # type: ignore[arg-type]  # YAML has no tuples


def test_grid_size__names_both_sizes() -> None:
    with pytest.raises(ValueError, match="65 x 64 pixels.*16 x 16.*64 x 64"):
        grid_size((65, 64), (16, 16))


def test_unpatchify__refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="5 patches of 12 values"):
        unpatchify(torch.zeros(1, 5, 12), (2, 2), (2, 2))


def test_sincos_positions__square_equals_lightly() -> None:
    expected = get_2d_sine_cosine_positional_embedding(
        embed_dim=32, grid_size=5, num_prefix_tokens=2
    )
    positions = sincos_positions((5, 5), 32, num_prefix_tokens=2)
    torch.testing.assert_close(positions, torch.from_numpy(expected).float())


def test_sincos_positions__non_square_equals_plain_loops() -> None:
    height, width, dim = 2, 3, 16
    expected = torch.zeros(height * width, dim, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for i in range(dim // 4):
                frequency = 1 / 10000 ** (i / (dim // 4))
                row = expected[y * width + x]
                row[i] = math.sin(x * frequency)
                row[dim // 4 + i] = math.cos(x * frequency)
                row[dim // 2 + i] = math.sin(y * frequency)
                row[3 * dim // 4 + i] = math.cos(y * frequency)
    positions = sincos_positions((height, width), dim)
    torch.testing.assert_close(positions, expected.float())


def test_sincos_positions__refuses() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        sincos_positions((2, 2), 30)
