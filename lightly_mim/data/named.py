"""Data sets that go by a name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torchvision

from lightly_mim.arguments import PositiveInt, checked
from lightly_mim.data.folder import ImageDataset, OnError
from lightly_mim.data.listing import ImageFiles, find_images
from lightly_mim.patches import Size

Split = Literal["train", "val"]

NAMED_DATA = ("imagenette", "imagenette-320", "imagenette-160", "solar-cells")

_IMAGENETTE_FOLDERS = {
    "full": "imagenette2",
    "320px": "imagenette2-320",
    "160px": "imagenette2-160",
}
_IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


@checked
def open_named(
    name: str,
    split: Split,
    transform: Callable[[Any], Any] | None = None,
    *,
    data_dir: str | os.PathLike[str] = "datasets",
    download: bool = False,
    **options: Any,
) -> ImageDataset:
    """Opens one split of a data set by its name.

    Args:
        name:
            One of `NAMED_DATA`.
        split:
            "train" or "val".
        transform:
            See `ImageDataset`.
        data_dir:
            See `imagenette`.
        download:
            See `imagenette`.
        **options:
            See `ImageDataset`.

    Returns:
        Data set of (sample, target, filename).

    Raises:
        ValueError: If there is no such data set, or if its images are not there.
    """
    if name not in NAMED_DATA:
        raise ValueError(
            f"No data set is called {name!r}. Those with a name are: "
            f"{', '.join(NAMED_DATA)}."
        )
    if name == "solar-cells":
        return solar_cells(split, transform, **options)
    _, _, pixels = name.partition("-")
    size: Any = f"{pixels}px" if pixels else "full"
    return imagenette(
        split,
        transform,
        size=size,
        data_dir=data_dir,
        download=download,
        **options,
    )


@checked
def solar_cells(
    split: Split = "train",
    transform: Callable[[Any], Any] | None = None,
    *,
    in_chans: PositiveInt = 1,
    on_error: OnError = "raise",
    min_size: Size | None = None,
) -> ImageDataset:
    """Returns solar cells photographed by their own light, from `elpv-dataset` [0].

    2,624 grey electroluminescence images of 300 x 300 pixels in four classes: mono or
    poly crystalline, defective (probability 0.5 or more of those that experts gave: 0,
    1/3, 2/3 or 1) or functional. Each is decoded once and held in memory (90 kB with
    one channel). Licence: CC-BY-NC-SA-4.0.

    The split is fixed: cells are ordered by type, probability and the SHA-256 of their
    file name, and every fourth one is for validation. 1,968 and 656 images, with the
    same share of each type and probability. The labels come without the module that a
    cell was cut from, so cells of one module may lie on both sides.

    - [0]: Buerhop et al., 2018, https://github.com/zae-bayern/elpv-dataset

    Args:
        split:
            "train" or "val".
        transform:
            See `ImageDataset`.
        in_chans:
            See `ImageDataset`.
        on_error:
            See `ImageDataset`.
        min_size:
            See `ImageDataset`.

    Returns:
        Data set of (sample, target, filename).

    Raises:
        ValueError: If the package is not installed.
    """
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        raise ValueError(
            "The solar cells come with the package elpv-dataset, which is not "
            "installed. Install it with: pip install 'lightly-mim[benchmarks]'"
        )
    root = Path(package.origin).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    cells = sorted(
        (kind, float(probability), hashlib.sha256(name.encode()).hexdigest(), name)
        for name, probability, kind in rows
    )
    is_val = [number % 4 == 0 for number in range(len(cells))]
    classes = ["mono defective", "mono functional", "poly defective", "poly functional"]
    labels = {
        name: classes.index(f"{kind} {'defective' if p >= 0.5 else 'functional'}")
        for (kind, p, _, name), val in zip(cells, is_val, strict=True)
        if val == (split == "val")
    }
    filenames = sorted(labels)
    targets = [labels[name] for name in filenames]
    return ImageDataset(
        root,
        transform,
        in_chans=in_chans,
        on_error=on_error,
        min_size=min_size,
        in_memory=True,
        files=ImageFiles(filenames, targets, classes),
    )


@checked
def imagenette(
    split: Split = "train",
    transform: Callable[[Any], Any] | None = None,
    *,
    size: Literal["full", "320px", "160px"] = "full",
    data_dir: str | os.PathLike[str] = "datasets",
    download: bool = False,
    in_chans: PositiveInt = 3,
    on_error: OnError = "raise",
    min_size: Size | None = None,
) -> ImageDataset:
    """Returns Imagenette [0], ten classes of ImageNet: 9,469 and 3,925 photographs.

    Classes are in the order of their WordNet ids, as in `torchvision.datasets`.

    - [0]: Howard, 2019, https://github.com/fastai/imagenette

    Args:
        split:
            "train" or "val".
        transform:
            See `ImageDataset`.
        size:
            "full", "320px" or "160px" (the shorter side).
        data_dir:
            Folder that holds the unpacked archive (`imagenette2`, `imagenette2-320` or
            `imagenette2-160`), or that archive's folder itself: any folder with train/
            and val/ and class folders in them.
        download:
            Fetch the archive (1.5 GB, 330 MB or 95 MB) into `data_dir` if it is not
            there.
        in_chans:
            See `ImageDataset`.
        on_error:
            See `ImageDataset`.
        min_size:
            See `ImageDataset`.

    Returns:
        Data set of (sample, target, filename).

    Raises:
        ValueError: If the images are not there and cannot be fetched.
    """
    tree = Path(data_dir) / _IMAGENETTE_FOLDERS[size]
    if not tree.is_dir() and (Path(data_dir) / "train").is_dir():
        tree = Path(data_dir)
    if not tree.is_dir():
        problem = "it is not there"
        if download:
            problem = _download_imagenette(size, tree)
        if problem:
            raise ValueError(
                f"Cannot read Imagenette ({size}) from {tree}: {problem}. Get "
                f"https://s3.amazonaws.com/fast-ai-imageclas/{tree.name}.tgz, unpack "
                f"it, and give the unpacked folder as data, or the folder that it lies "
                f"in as --data-dir to benchmarks/imagenette.py, whose --download "
                f"fetches it too. benchmarks/solar_cells.py needs no download."
            )
    filenames, targets, classes = find_images(tree / split)
    classes = [_IMAGENETTE_CLASSES.get(name, name) for name in classes]
    return ImageDataset(
        tree / split,
        transform,
        in_chans=in_chans,
        on_error=on_error,
        min_size=min_size,
        files=ImageFiles(filenames, targets, classes),
    )


def _download_imagenette(size: str, tree: Path) -> str:
    """Fetches and unpacks the archive; returns what went wrong, if anything did."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked elsewhere and then renamed: a tree that was cut short would count as
    # whole. Another process may have come first.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=tree.parent) as folder:
        try:
            torchvision.datasets.Imagenette(folder, size=size, download=True)
            (Path(folder) / tree.name).rename(tree)
        except (OSError, RuntimeError) as error:
            return "" if tree.is_dir() else f"the download failed ({error})"
    return ""
