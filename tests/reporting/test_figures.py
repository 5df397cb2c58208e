from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightly_mim.reporting import reconstruction_grid


def four_images(
    channels: int = 3, size: tuple[int, int] = (24, 32)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second, third, fourth = (
        torch.rand(2, channels, *size, generator=generator) for _ in range(4)
    )
    return first, second, third, fourth


def find(picture: Image.Image, image: Tensor) -> tuple[int, int]:
    """Returns (top, left) of the one place where the image stands, enlarged."""
    scale = 5  # 32 pixels enlarged to at least 160
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    canvas = np.asarray(picture)
    height, width = pixels.shape[:2]
    places = [
        (top, left)
        for top in range(canvas.shape[0] - height + 1)
        for left in range(canvas.shape[1] - width + 1)
        if (canvas[top, left] == pixels[0, 0]).all()
        and (canvas[top : top + height, left : left + width] == pixels).all()
    ]
    assert len(places) == 1
    return places[0]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_reconstruction_grid__places_every_image(channels: int) -> None:
    images = four_images(channels)
    picture = reconstruction_grid(*images)
    shown = 3 if channels >= 3 else 1
    places = np.array(
        [
            [find(picture, column[row, :shown].expand(3, -1, -1)) for column in images]
            for row in range(2)
        ]
    )
    tops, lefts = places[..., 0], places[..., 1]
    assert (tops == tops[:, :1]).all()  # rows are aligned
    assert (lefts == lefts[:1]).all()  # and columns
    assert (np.diff(lefts, axis=1) > 160).all()  # original, masked, ..., left to right
    assert (np.diff(tops, axis=0) > 120).all()


def test_reconstruction_grid__says_which_channels_are_shown() -> None:
    plain = reconstruction_grid(*four_images(3))
    noted = reconstruction_grid(*four_images(5))
    assert noted.height > plain.height
    bottom = np.asarray(noted)[plain.height :]
    assert bottom.min() < 128  # text
    assert np.asarray(plain)[:15].min() < 128  # captions


def test_reconstruction_grid__clamps_and_keeps_large_images() -> None:
    below, grey, above, white = (
        torch.full((1, 3, 8, 200), value) for value in (-1.0, 0.5, 2.0, 1.0)
    )
    pixels = np.asarray(reconstruction_grid(below, grey, above, white))
    row = pixels[-10, :, 0]
    assert [int((row == value).sum()) for value in (0, 128)] == [200, 200]
    assert row.max() == 255


def test_reconstruction_grid__half_precision_and_gradients() -> None:
    a, b, c, d = (image.bfloat16().requires_grad_() for image in four_images())
    assert reconstruction_grid(a, b, c, d).mode == "RGB"


def test_reconstruction_grid__writes_png(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "epoch_1.png"
    picture = reconstruction_grid(*four_images(), path=path)
    with Image.open(path) as written:
        assert written.format == "PNG"
        assert np.array_equal(np.asarray(written), np.asarray(picture))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, 24, 32, dtype=torch.uint8), "masked images are a float"),
        (torch.zeros(3, 24, 32), "masked images are a float tensor"),
        (torch.zeros(1, 3, 24, 32), "All four need the same shape"),
        (torch.full((2, 3, 24, 32), torch.nan), "masked images hold NaN"),
    ],
)
def test_reconstruction_grid__bad_input(bad: Tensor, message: str) -> None:
    original, _, reconstruction, pasted = four_images()
    with pytest.raises(ValueError, match=message):
        reconstruction_grid(original, bad, reconstruction, pasted)


def test_reconstruction_grid__no_images() -> None:
    empty = torch.zeros(0, 3, 24, 32)
    with pytest.raises(ValueError, match="original images are a float tensor"):
        reconstruction_grid(empty, empty, empty, empty)
