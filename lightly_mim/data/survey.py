"""Looks at the pictures of a data set before anything is made for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.data.decode import (
    TRANSPOSED,
    open_picture,
    picture_formats,
    read_orientation,
)
from lightly_mim.data.folder import ImageDataset
from lightly_mim.data.opening import BrokenImageError, read_regular
from lightly_mim.data.sources import TransformedDataset, is_image, spread_out

MAX_FILES = 5000  # of which the headers are read, 0.25 ms each of small PNGs
MAX_SAMPLES = 64  # of a data set that must decode them


class Survey(NamedTuple):
    """What the pictures of a data set are like.

    Attributes:
        num_images:
            How many there are.
        sizes:
            Their (height, width) in pixels and names, of a sample from all over the
            data set; empty if it does not yield pictures.
        grey:
            Whether all of the sample have one channel.
    """

    num_images: int
    sizes: list[tuple[int, int, str]]
    grey: bool

    @property
    def side(self) -> int | None:
        """The median of the shorter sides in pixels, None if they are not known."""
        sides = sorted(min(height, width) for height, width, _ in self.sizes)
        return sides[len(sides) // 2] if sides else None


def survey(dataset: Dataset[Any]) -> Survey:
    """Looks at up to 5,000 files' headers, or at 64 samples of another data set.

    What cannot be read is left to those who will read it.

    Args:
        dataset:
            A data set that `open_data` returned.
    """
    if isinstance(dataset, ImageDataset):
        paths = dataset.paths
        few = spread_out(dataset, MAX_FILES).indices
        found = list(_headers(paths[index] for index in few))
    else:
        found = list(_samples(dataset))
    return Survey(
        len(dataset),  # type: ignore[arg-type]
        [(height, width, name) for height, width, name, _ in found],
        bool(found) and all(grey for *_, grey in found),
    )


def _headers(paths: Iterable[Path]) -> Iterable[tuple[int, int, str, bool]]:
    for path in paths:
        if path.suffix == ".npy":
            continue
        try:
            height, width, grey = read_regular(str(path), "image", _header)
        except BrokenImageError:
            continue
        yield height, width, str(path), grey


def _header(file: BinaryIO) -> tuple[int, int, bool]:
    with open_picture(file, picture_formats()) as image:
        width, height = image.size
        if read_orientation(image) in TRANSPOSED:
            width, height = height, width
        return height, width, Image.getmodebase(image.mode) == "L"


def _samples(dataset: Dataset[Any]) -> Iterable[tuple[int, int, str, bool]]:
    inner = dataset.dataset if isinstance(dataset, TransformedDataset) else dataset
    for index in spread_out(inner, MAX_SAMPLES).indices:
        item = inner[index]
        sample = item[0] if isinstance(item, (tuple, list)) else item
        if not is_image(sample):
            continue
        if isinstance(sample, Tensor) and (
            sample.ndim != 3 or sample.shape[0] not in (1, 3)
        ):
            continue
        if isinstance(sample, Image.Image):
            width, height = sample.size
            grey = Image.getmodebase(sample.mode) == "L"
        else:
            channels, height, width = sample.shape
            grey = channels == 1
        yield height, width, f"image {index}", grey
