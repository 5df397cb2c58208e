from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.models import utils

from lightly_mim.patches import gather_patches
from lightly_mim.targets import LocallyNormalizedPixels, PatchNormalizedPixels, Pixels

INDEX = torch.tensor([[0, 3, 5], [1, 2, 4]])


def test_pixels__are_the_pixels() -> None:
    images = torch.randn(2, 3, 16, 24)
    expected = gather_patches(images, INDEX, (8, 8))
    assert torch.equal(Pixels()(images, INDEX, (8, 8)), expected)
    assert Pixels().to_pixels(expected, images, INDEX, (8, 8)) is expected


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pixels__coarse_ones_equal_plain_loops(factor: int) -> None:
    images = torch.randn(2, 2, 16, 24, dtype=torch.float64)
    values = Pixels(factor)(images, INDEX, (8, 8))
    expected = torch.empty(2, 3, 8 // factor, 8 // factor, 2, dtype=torch.float64)
    for b, k, y, x, c in np.ndindex(expected.shape):
        top = int(INDEX[b, k]) // 3 * 8 + y * factor
        left = int(INDEX[b, k]) % 3 * 8 + x * factor
        block = images[b, c, top : top + factor, left : left + factor]
        expected[b, k, y, x, c] = block.sum() / factor**2
    torch.testing.assert_close(values, expected.flatten(2))


def test_pixels__coarse_ones_are_drawn_as_squares() -> None:
    coarse = torch.randn(2, 3, 4, 6)
    images = F.interpolate(coarse, scale_factor=4, mode="nearest")
    target = Pixels(4)
    values = target(images, INDEX, (8, 8))
    pixels = target.to_pixels(values, images, INDEX, (8, 8))
    torch.testing.assert_close(pixels, gather_patches(images, INDEX, (8, 8)))


def test_pixels__coarse_ones_of_half_precision_are_averaged_in_float32() -> None:
    images = torch.randn(2, 3, 16, 24).bfloat16()
    values = Pixels(8)(images, INDEX, (8, 8))
    assert values.dtype == torch.float32
    assert torch.equal(values, Pixels(8)(images.float(), INDEX, (8, 8)))


def test_pixels__refuses() -> None:
    with pytest.raises(ValueError, match="at least 1, got factor=0"):
        Pixels(0)
    with pytest.raises(ValueError, match="16 x 24 pixels.*16 x 16 .factor=16"):
        Pixels(16).width((16, 24), 3)
    with pytest.raises(ValueError, match="8 x 8 pixels.*3 x 3 .factor=3"):
        Pixels(3)(torch.zeros(2, 3, 16, 24), INDEX, (8, 8))


def test_patch_normalized_pixels__equals_lightly() -> None:
    images = 0.3 + 2 * torch.randn(2, 3, 24, 24)
    patches = utils.normalize_mean_var(utils.patchify(images, 8))
    expected = utils.get_at_index(patches, INDEX)
    values = PatchNormalizedPixels()(images, INDEX, (8, 8))
    torch.testing.assert_close(values, expected)


def test_patch_normalized_pixels__equals_plain_loops() -> None:
    images = torch.randn(2, 2, 8, 24)
    values = PatchNormalizedPixels()(images, INDEX, (4, 8))
    for b in range(2):
        for k, cell in enumerate(INDEX[b].tolist()):
            y, x = cell // 3 * 4, cell % 3 * 8
            patch = images[b, :, y : y + 4, x : x + 8].permute(1, 2, 0).flatten()
            variance = (patch - patch.mean()).square().sum() / (len(patch) - 1)
            expected = (patch - patch.mean()) / (variance + 1e-6).sqrt()
            torch.testing.assert_close(values[b, k], expected)


def test_patch_normalized_pixels__round_trips() -> None:
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    target = PatchNormalizedPixels()
    values = target(images, INDEX, (8, 8))
    pixels = target.to_pixels(values, images, INDEX, (8, 8))
    torch.testing.assert_close(pixels, gather_patches(images, INDEX, (8, 8)))


def test_patch_normalized_pixels__flat_patch_stays_finite() -> None:
    values = PatchNormalizedPixels()(torch.full((2, 3, 16, 24), 2.1), INDEX, (8, 8))
    assert values.abs().max() < 1e-2


def test_patch_normalized_pixels__half_precision_is_measured_in_float32() -> None:
    images = torch.randn(2, 3, 16, 24).bfloat16()
    target = PatchNormalizedPixels()
    values = target(images, INDEX, (8, 8))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, target(images.float(), INDEX, (8, 8)))
    pixels = target.to_pixels(values.bfloat16(), images, INDEX, (8, 8))
    assert pixels.dtype == torch.bfloat16


def test_locally_normalized_pixels__equals_plain_loops() -> None:
    images = torch.randn(1, 2, 9, 11, dtype=torch.float64)
    mean, std = LocallyNormalizedPixels(5).statistics(images)
    for channel in range(2):
        for y in range(9):
            for x in range(11):
                window = images[
                    0, channel, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3
                ]
                torch.testing.assert_close(mean[0, channel, y, x], window.mean())
                expected = (window.var(correction=1) + 1e-6).sqrt()
                torch.testing.assert_close(std[0, channel, y, x], expected)


def test_locally_normalized_pixels__round_trips() -> None:
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    target = LocallyNormalizedPixels(7)
    values = target(images, INDEX, (8, 8))
    pixels = target.to_pixels(values, images, INDEX, (8, 8))
    torch.testing.assert_close(pixels, gather_patches(images, INDEX, (8, 8)))


def test_locally_normalized_pixels__flat_image_stays_finite() -> None:
    values = LocallyNormalizedPixels(47)(torch.full((2, 3, 16, 24), 2.1), INDEX, (8, 8))
    assert values.abs().max() < 1e-2


@pytest.mark.parametrize("window_size", [1, 4, -3, 0])
def test_locally_normalized_pixels__refuses(window_size: int) -> None:
    with pytest.raises(ValueError, match="odd side of at least 3"):
        LocallyNormalizedPixels(window_size)
