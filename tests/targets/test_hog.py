from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.feature import hog
from sklearn.datasets import load_sample_images

from lightly_mim.targets import HOG


def _expected(
    images: torch.Tensor, cell: tuple[int, int], orientations: int, pixels: int
) -> torch.Tensor:
    """scikit-image's histograms of all cells, channel by channel."""
    rows, columns = images.shape[2] // cell[0], images.shape[3] // cell[1]
    p, q = cell[0] // pixels, cell[1] // pixels
    histograms = np.stack(
        [
            [
                hog(
                    channel,
                    orientations,
                    (pixels, pixels),
                    (1, 1),
                    block_norm="L2",
                    feature_vector=False,
                )[:, :, 0, 0]
                for channel in image
            ]
            for image in images.double().numpy()
        ]
    )
    grid = histograms.reshape(len(images), -1, rows, p, columns, q, orientations)
    cells = grid.transpose(0, 2, 4, 3, 5, 1, 6)
    return torch.from_numpy(cells.reshape(len(images), rows * columns, -1))


@pytest.mark.parametrize(
    ("cell", "orientations", "pixels"),
    [
        ((16, 16), 9, 8),
        ((8, 16), 12, 4),
        ((16, 8), 8, 2),
        ((9, 9), 6, 3),
        ((8, 8), 2, 8),
        ((4, 4), 9, 1),
    ],
)
@pytest.mark.parametrize("channels", [1, 4])
def test_hog__equals_scikit_image(
    cell: tuple[int, int], orientations: int, pixels: int, channels: int
) -> None:
    size = (cell[0] * 3, cell[1] * 2)
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    target = HOG(orientations, pixels)
    expected = _expected(images, cell, orientations, pixels)
    values = target(images, torch.arange(6).expand(2, -1), cell)
    torch.testing.assert_close(values, expected)
    assert values.shape[-1] == target.width(cell, channels)
    some = torch.tensor([[5, 0], [3, 4]])
    values = target(images, some, cell)
    torch.testing.assert_close(values[1], expected[1, [3, 4]])


def test_hog__equals_scikit_image_on_photographs() -> None:
    photos = np.stack(load_sample_images().images)[:, 64:128, 64:160]
    levels = torch.from_numpy(photos).movedim(-1, 1)
    # Differences of levels lie on the edges of bins more often than random numbers do.
    for orientations in (2, 4, 8, 9, 12, 13):
        values = HOG(orientations)(levels.float(), _all_cells(), (16, 16))
        expected = _expected(levels, (16, 16), orientations, 8)
        torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-5)


def test_hog__half_precision_is_measured_in_float32() -> None:
    images = torch.randn(2, 3, 64, 96).bfloat16()
    values = HOG()(images, _all_cells(), (16, 16))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, HOG()(images.float(), _all_cells(), (16, 16)))


def test_hog__flat_image_is_zero() -> None:
    values = HOG()(torch.full((2, 3, 64, 96), 1.7), _all_cells(), (16, 16))
    assert values.eq(0).all()


def test_hog__refuses() -> None:
    with pytest.raises(ValueError, match="at least 2, got num_orientations=1"):
        HOG(1)
    with pytest.raises(ValueError, match="got pixels_per_cell=0"):
        HOG(9, 0)
    with pytest.raises(ValueError, match="14 x 14 pixels.*pixels_per_cell=8"):
        HOG().width((14, 14), 3)
    with pytest.raises(ValueError, match="4 x 4 pixels.*pixels_per_cell=8"):
        HOG()(torch.zeros(1, 3, 8, 8), torch.tensor([[0]]), (4, 4))
    with pytest.raises(ValueError, match="HOG.*cannot be drawn"):
        images = torch.zeros(1, 3, 8, 8)
        HOG().to_pixels(torch.zeros(1, 1, 27), images, torch.tensor([[0]]), (8, 8))


def _all_cells() -> torch.Tensor:
    return torch.arange(24).expand(2, -1)
