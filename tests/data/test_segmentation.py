from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from lightly_mim.data import KeyedLoader
from lightly_mim.data.segmentation import (
    SegmentationDataset,
    check_masks,
    find_masked,
    open_segmentation,
    read_mask,
)
from lightly_mim.transforms import EvalTransform


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images whose red is the value of the mask, times 20."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(5):
        values = np.kron(rng.integers(0, 6, (4, 6)), np.ones((10, 10))).astype(np.uint8)
        pixels = np.stack([values * 20] * 3, axis=-1)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(values).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("size", [(40, 60), (20, 30), (16, 16), (80, 40)])
def test_dataset__mask_follows_the_image(pictures: Path, size: tuple[int, int]) -> None:
    files = find_masked(pictures)
    values = [0, 1, 2, 4, 5]  # 3 is ignored
    data = SegmentationDataset(files, EvalTransform(size, 1.0, None), values)
    loader = KeyedLoader(data, 3, training=False, num_workers=0)
    for (images, masks), _, names in loader:
        assert images.shape == (len(names), 3, *size)
        assert masks.shape == (len(names), *size)
        assert (images.dtype, masks.dtype) == (torch.uint8, torch.int16)
        value_of = torch.tensor([*values, 3])  # -1 is the last
        same = (images[:, 0] / 20 - value_of[masks.long()]).abs() < 0.4
        assert same.double().mean() > (0.99 if size == (40, 60) else 0.6)
    assert names == ["images/3.png", "images/4.png"]


def test_open__splits(pictures: Path, tmp_path: Path) -> None:
    train, test, held_out = open_segmentation(pictures)
    assert held_out
    assert (len(train.stems), len(test.stems)) == (4, 1)
    assert set(train.stems) | set(test.stems) == set("01234")
    again = open_segmentation(pictures)[1]
    assert again == test
    assert {open_segmentation(pictures, seed=s)[1].stems[0] for s in range(9)} != {
        test.stems[0]
    }
    root = tmp_path / "root"
    root.mkdir()
    for name in ("train", "val"):
        (root / name).symlink_to(pictures, target_is_directory=True)
    train, test, held_out = open_segmentation(root)
    assert (train.root, test.root, held_out) == (root / "train", root / "val", False)
    test = open_segmentation(root, pictures)[1]
    assert test.root == pictures


def test_check_masks__values_and_orientation(pictures: Path) -> None:
    files = find_masked(pictures)
    assert check_masks(files) == set(range(6))
    with pytest.raises(ValueError, match="holds the value.s. 5, which name no class"):
        check_masks(files, known=range(5))
    # A camera that was held upright: the mask is as a viewer shows the image.
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 60)).save(pictures / "images" / "0.png", exif=exif)
    check_masks(files)
    Image.new("RGB", (60, 40)).save(pictures / "images" / "0.png", exif=exif)
    with pytest.raises(ValueError, match="40 x 60 pixels, and its image 60 x 40"):
        check_masks(files)


def test_read_mask__kinds(tmp_path: Path) -> None:
    values = np.arange(12).reshape(3, 4)
    path = tmp_path / "mask.png"
    Image.fromarray((values * 1000).astype(np.uint16)).save(path)
    np.testing.assert_array_equal(read_mask(path), values * 1000)
    palette = Image.fromarray(values.astype(np.uint8))
    palette = palette.convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(path)
    np.testing.assert_array_equal(read_mask(path), values)
    Image.fromarray(values > 5).save(path)
    np.testing.assert_array_equal(read_mask(path), values > 5)
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (4, 3)).save(path)
        with pytest.raises(ValueError, match=f"mask.png has colours .mode {mode}"):
            read_mask(path)
