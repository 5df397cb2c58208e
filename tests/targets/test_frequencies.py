from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightly_mim.patches import gather_patches
from lightly_mim.targets import LowFrequencies

INDEX = torch.tensor([[0, 3, 5], [1, 2, 4]])


@given(st.integers(1, 6), st.integers(6, 9), st.integers(6, 9), st.integers(1, 4))
def test_low_frequencies__equal_scipy(
    size: int, height: int, width: int, channels: int
) -> None:
    images = torch.randn(2, channels, 2 * height, 3 * width, dtype=torch.float64)
    target = LowFrequencies(size)
    values = target(images, INDEX, (height, width))
    assert values.shape == (2, 3, target.width((height, width), channels))
    for b in range(2):
        for k, cell in enumerate(INDEX[b].tolist()):
            y, x = cell // 3 * height, cell % 3 * width
            pixels = images[b, :, y : y + height, x : x + width].numpy()
            expected = np.stack(
                [scipy.fft.dctn(channel, norm="ortho") for channel in pixels], axis=-1
            )[:size, :size]
            np.testing.assert_allclose(values[b, k], expected.flatten(), atol=1e-9)


def test_low_frequencies__all_of_them_round_trip() -> None:
    images = torch.randn(2, 3, 16, 24)
    target = LowFrequencies(8)
    values = target(images, INDEX, (8, 8))
    pixels = target.to_pixels(values, images, INDEX, (8, 8))
    torch.testing.assert_close(pixels, gather_patches(images, INDEX, (8, 8)))


def test_low_frequencies__are_drawn_as_scipy_inverts_them() -> None:
    images = torch.randn(2, 3, 16, 36)
    target = LowFrequencies(3)
    values = target(images, INDEX, (8, 12))
    pixels = target.to_pixels(values, images, INDEX, (8, 12))
    for b, k, c in np.ndindex(2, 3, 3):
        kept = np.zeros((8, 12))
        kept[:3, :3] = values[b, k].reshape(3, 3, 3)[..., c].numpy()
        expected = scipy.fft.idctn(kept, norm="ortho")
        actual = pixels[b, k].reshape(8, 12, 3)[..., c].numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_low_frequencies__half_precision_is_measured_in_float32() -> None:
    images = 3 + torch.randn(2, 3, 16, 24).bfloat16()
    target = LowFrequencies(4)
    expected = target(images.float(), INDEX, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        for values in (
            target(images, INDEX, (8, 8)),
            target(images.float(), INDEX, (8, 8)),
        ):
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, expected)
        pixels = target.to_pixels(expected.bfloat16(), images, INDEX, (8, 8))
    assert pixels.dtype == torch.float32


def test_low_frequencies__refuses() -> None:
    with pytest.raises(ValueError, match="at least 1, got size=0"):
        LowFrequencies(0)
    with pytest.raises(ValueError, match="8 x 16 pixels has no 9 x 9.*at most 8"):
        LowFrequencies(9).width((8, 16), 3)
    with pytest.raises(ValueError, match="8 x 8 pixels has no 9 x 9"):
        LowFrequencies(9)(torch.zeros(2, 3, 16, 24), INDEX, (8, 8))
