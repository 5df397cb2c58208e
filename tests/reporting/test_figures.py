from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightly_mim.reporting.figures import LAYOUT_KEY, reconstruction_grid


def grid_input(
    channels: int = 3, size: tuple[int, int] = (24, 32)
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns original and pasted images, and a mask: the upper half."""
    generator = torch.Generator().manual_seed(0)
    original, painted = (
        torch.rand(2, channels, *size, generator=generator) for _ in range(2)
    )
    masked = torch.zeros(2, 1, *size, dtype=torch.bool)
    masked[:, :, : size[0] // 2] = True
    return original, torch.where(masked, painted, original), masked


def find(picture: Image.Image, image: Tensor) -> list[tuple[int, int]]:
    """Returns (top, left) of the places where the image stands, enlarged."""
    scale = 5  # 32 pixels enlarged to at least 160
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    canvas = np.asarray(picture)
    height, width = pixels.shape[:2]
    corners = np.argwhere((canvas == pixels[0, 0]).all(axis=-1))
    return [
        (top, left)
        for top, left in corners.tolist()
        if canvas[top : top + height, left : left + width].shape == pixels.shape
        and (canvas[top : top + height, left : left + width] == pixels).all()
    ]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_reconstruction_grid__places_every_image(channels: int) -> None:
    original, pasted, masked = grid_input(channels)
    picture = reconstruction_grid(original, pasted, masked)
    shown = 3 if channels >= 3 else 1

    def places(image: Tensor) -> list[tuple[int, int]]:
        return find(picture, image[:shown].expand(3, -1, -1))

    lefts = []
    for row in range(2):
        whole = places(original[row]), places(pasted[row])
        grey = torch.full_like(original[row, :, :12], 128 / 255)
        parts = [
            places(original[row, :, 12:]),  # visible in all but the prediction
            places(pasted[row, :, :12]),  # painted
            places(grey),
        ]
        assert [len(found) for found in whole] == [1, 1]
        assert [len(set(x for _, x in found)) for found in parts] == [3, 2, 1]
        assert len({y for found in whole for y, _ in found}) == 1
        lefts.append([x for _, x in parts[0]] + [parts[1][0][1]])
    assert lefts[0] == lefts[1]  # columns are aligned
    original_left, masked_left, pasted_left, prediction_left = lefts[0]
    order = [original_left, masked_left, prediction_left, pasted_left]
    assert (np.diff(order) > 160).all()


def test_reconstruction_grid__visible_is_not_grey_in_the_prediction() -> None:
    original, pasted, masked = grid_input()
    picture = np.asarray(reconstruction_grid(original, pasted, masked))
    tops, lefts = zip(*find(Image.fromarray(picture), original[0]), strict=True)
    step = 160 + 6
    cell = picture[tops[0] : tops[0] + 120, lefts[0] + 2 * step :][:, :160]
    visible = cell[60:]
    assert set(np.unique(visible)) == {236, 255}
    assert not (cell[:60] == 128).all()


def test_reconstruction_grid__says_which_channels_are_shown() -> None:
    plain = reconstruction_grid(*grid_input(3))
    noted = reconstruction_grid(*grid_input(5))
    assert noted.height > plain.height
    bottom = np.asarray(noted)[plain.height :]
    assert bottom.min() < 128  # text
    assert np.asarray(plain)[:15].min() < 128  # captions


def test_reconstruction_grid__title_and_note_make_room(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    plain = reconstruction_grid(*grid_input())
    title, note = "epoch 3 of 9 · loss 0.5 · runs/é\n<b>", "a word " * 40
    said = reconstruction_grid(*grid_input(), path, title=title, note=note)
    assert said.width == plain.width
    assert said.height > plain.height + 60  # one line above, several below
    assert np.asarray(said)[:15].min() < 128
    with Image.open(path) as written:
        layout = json.loads(written.text[LAYOUT_KEY])  # type: ignore[attr-defined]
        left, top = layout["left"], layout["top"]
        width, height = layout["cell"]
        cell = written.crop((left, top, left + width, top + height))
    original = grid_input()[0][0]
    wanted = (original * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(cell)[::5, ::5], wanted)
    assert (layout["rows"], layout["title"]) == (2, title)


def test_reconstruction_grid__clamps_and_keeps_large_images() -> None:
    original = torch.full((1, 3, 8, 200), -1.0)
    pasted = torch.full((1, 3, 8, 200), 2.0)
    masked = torch.ones(1, 1, 8, 200, dtype=torch.bool)
    pixels = np.asarray(reconstruction_grid(original, pasted, masked))
    row = pixels[-10, :, 0]
    assert [int((row == value).sum()) for value in (0, 128)] == [200, 200]
    assert row.max() == 255


def test_reconstruction_grid__half_precision_and_gradients() -> None:
    original, pasted, masked = grid_input()
    original, pasted = (
        image.bfloat16().requires_grad_() for image in (original, pasted)
    )
    assert reconstruction_grid(original, pasted, masked).mode == "RGB"


def test_reconstruction_grid__writes_png(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "epoch_1.png"
    picture = reconstruction_grid(*grid_input(), path=path)
    with Image.open(path) as written:
        assert written.format == "PNG"
        assert np.array_equal(np.asarray(written), np.asarray(picture))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, 24, 32, dtype=torch.uint8), "pasted images are a float"),
        (torch.zeros(3, 24, 32), "pasted images are a float tensor"),
        (torch.zeros(1, 3, 24, 32), "Both need the same shape"),
        (torch.full((2, 3, 24, 32), torch.nan), "pasted images hold NaN"),
    ],
)
def test_reconstruction_grid__bad_input(bad: Tensor, message: str) -> None:
    original, _, masked = grid_input()
    with pytest.raises(ValueError, match=message):
        reconstruction_grid(original, bad, masked)


def test_reconstruction_grid__bad_mask() -> None:
    original, pasted, masked = grid_input()
    for bad in (masked.float(), masked[:1], masked.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match="masked is a bool tensor with shape"):
            reconstruction_grid(original, pasted, bad)


def test_reconstruction_grid__no_images() -> None:
    empty = torch.zeros(0, 3, 24, 32)
    with pytest.raises(ValueError, match="original images are a float tensor"):
        reconstruction_grid(empty, empty, empty.bool())
