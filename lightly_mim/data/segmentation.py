"""A folder of images and of masks that say the class of every pixel."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import Dataset

from lightly_mim.data.decode import (
    ARRAY_EXTENSIONS,
    PICTURE_EXTENSIONS,
    TRANSPOSED,
    decode_unchecked,
    load_picture,
    open_picture,
    picture_formats,
    read_orientation,
    say_unused_range,
)
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.listing import find_images
from lightly_mim.data.notes import printable, some
from lightly_mim.data.opening import BrokenImageError, or_skip, read_regular
from lightly_mim.data.seeding import seed_from
from lightly_mim.data.split_folders import find_splits
from lightly_mim.transforms import EvalTransform

IGNORED = -1  # what a pixel without a class becomes

_MASK_MODES = ("1", "L", "P", "I;16", "I")
_LARGEST_VALUE = 65535
_SHOWN = 5  # files that an error names


class MaskedFiles(NamedTuple):
    """Images and their masks.

    Attributes:
        root:
            The folder that holds images/ and masks/.
        stems:
            Paths of both relative to these, without ending.
        images:
            Paths of the images relative to the root.
        masks:
            Paths of the masks relative to the root.
    """

    root: Path
    stems: list[str]
    images: list[str]
    masks: list[str]

    def take(self, indices: Sequence[int]) -> MaskedFiles:
        """Returns some of the files."""
        lists = (self.stems, self.images, self.masks)
        return MaskedFiles(self.root, *([part[i] for i in indices] for part in lists))


class SegmentationDataset(Dataset[tuple[list[Tensor], int, str]]):
    """Reads images and their masks at the same size.

    Yields ([image, mask], 0, filename): a uint8 tensor with shape (channels, height,
    width), and an int16 tensor with shape (height, width) with the number of the class
    of each pixel, `IGNORED` where there is none. A `KeyedLoader` makes batches of them.

    The mask is resized and cropped as the image is, each pixel taking the value of the
    nearest one.

    Attributes:
        files:
            The images and masks.
        transform:
            Which part of the image is taken, and at which size.
        values:
            Value in the masks of each class.
        in_chans:
            See `ImageDataset`.
        value_range:
            See `ImageDataset`.

    Raises:
        BrokenImageError: A ValueError. On access to a file that cannot be used.
    """

    def __init__(
        self,
        files: MaskedFiles,
        transform: EvalTransform,
        values: Sequence[int],
        in_chans: int = 3,
        value_range: ValueRange | None = None,
    ) -> None:
        self.files = files
        self.transform = transform
        self.values = list(values)
        self.in_chans = in_chans
        self.value_range = value_range
        self._class_of = np.full(_LARGEST_VALUE + 1, IGNORED, dtype=np.int16)
        self._class_of[self.values] = np.arange(len(self.values))
        if value_range is not None:
            images = [files.root / name for name in files.images]
            say_unused_range(value_range, images, files.root)

    def __len__(self) -> int:
        return len(self.files.stems)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, str]:
        return [self.image(index), self.mask(index)], 0, self.files.images[index]

    def image(self, index: int) -> Tensor:
        """Returns an image alone."""
        image = decode_unchecked(
            self.files.root / self.files.images[index],
            self.in_chans,
            decode_size=self.transform.decode_size,
            value_range=self.value_range,
        )
        return self.transform(image)

    def mask(self, index: int) -> Tensor:
        """Returns a mask alone."""
        classes = self._class_of[read_mask(self.files.root / self.files.masks[index])]
        return self.transform.crop_mask(torch.from_numpy(classes))


def open_segmentation(
    data: str | os.PathLike[str],
    val: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    in_chans: int = 3,
) -> tuple[MaskedFiles, MaskedFiles, bool]:
    """Finds training and test images with their masks.

    Args:
        data:
            A folder that holds train/ and val/, or the training images; each of these
            holds images/ and masks/. An image and its mask have the same path in them
            but for the ending; masks are PNG files.
        val:
            The test images, instead of those that come with `data`.
        seed:
            Decides which fifth of the images is for testing if there is neither val/
            nor `val`.
        in_chans:
            See `ImageDataset`.

    Returns:
        Training images, test images, and whether the latter were held out of `data`.

    Raises:
        ValueError: If there are no such folders, if an image has no mask or a mask no
            image, or if there are too few images.
    """
    root, own_val = Path(data), None
    if root.is_dir():  # otherwise `find_masked` says what is missing
        root, own_val = find_splits(root)
    val = own_val if val is None else Path(val)
    places = [root] if val is None else [root, val]
    found = [find_masked(place, in_chans) for place in places]
    if len(found) == 2:
        return found[0], found[1], False
    count = len(found[0].stems)
    if count < 5:
        raise ValueError(
            f"{root} has {count} image(s), of which a fifth is to be held out for "
            "testing. Give more images, or the test images as val."
        )
    generator = Generator().manual_seed(seed_from(seed, "segmentation", "test"))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    test, train = sorted(order[: count // 5]), sorted(order[count // 5 :])
    return found[0].take(train), found[0].take(test), True


def find_masked(root: Path, in_chans: int = 3) -> MaskedFiles:
    """Finds the images and masks of a folder; see `open_segmentation`."""
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise ValueError(
                f"{root} holds no folder {name}: give a folder that holds images/ and "
                "masks/, or train/ and val/ with these in each."
            )
    extensions = PICTURE_EXTENSIONS if in_chans in (1, 3) else ARRAY_EXTENSIONS
    images = _by_stem(root, "images", extensions)
    masks = _by_stem(root, "masks", (".png",))
    for name, here, there in (("mask", images, masks), ("image", masks, images)):
        alone = [path for stem, path in here.items() if stem not in there]
        if alone:
            shown = [printable(path) for path in alone]
            raise ValueError(
                f"There is no {name} in {printable(str(root))} for {some(shown)}: "
                "an image and its mask have the same name but for the ending, and "
                "masks are PNG files."
            )
    stems = list(images)
    return MaskedFiles(
        root, stems, [images[stem] for stem in stems], [masks[stem] for stem in stems]
    )


def _by_stem(root: Path, name: str, extensions: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for filename in find_images(root / name, extensions).filenames:
        path = Path(name) / filename
        stem = Path(filename).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(
                f"{printable(found[stem])} and {printable(str(path))} in "
                f"{printable(str(root))} have the same name but for the "
                "ending, so which mask belongs to which is not clear. Rename one."
            )
        found[stem] = str(path)
    return found


def read_mask(path: str | os.PathLike[str]) -> NDArray[np.integer[Any]]:
    """Reads a mask whose pixel values are numbers of classes.

    Args:
        path:
            PNG file with one channel of 1, 8 or 16 bits, or with a palette, whose
            colours do not count.

    Returns:
        Array of whole numbers from 0 with shape (height, width).

    Raises:
        BrokenImageError: A ValueError, if the file cannot be read or has colours.
    """

    def read(file: BinaryIO) -> tuple[str, NDArray[Any]]:
        with open_picture(file, ["PNG"]) as image:
            load_picture(image, file)
            return image.mode, np.asarray(image)

    mode, values = read_regular(os.fspath(path), "mask", read)
    if mode not in _MASK_MODES:
        raise BrokenImageError(
            f"The mask {printable(str(path))} has colours (mode {mode}). A mask has "
            "one channel, or a palette, and the value of a pixel is the number of its "
            "class.",
            str(path),
        )
    return values.astype(np.uint8) if mode == "1" else values


def check_masks(
    files: MaskedFiles, in_chans: int = 3, known: Collection[int] | None = None
) -> set[int]:
    """Reads all masks, and makes sure that they fit their images.

    Args:
        files:
            Images and masks.
        in_chans:
            See `ImageDataset`.
        known:
            Values that may occur. None allows all.

    Returns:
        The values that occur.

    Raises:
        ValueError: If a mask cannot be read, has colours, has not the size of its
            image, or holds an unknown value.
    """
    found: set[int] = set()
    for image, name in zip(files.images, files.masks, strict=True):
        try:
            mask = read_mask(files.root / name)
            size = _image_size(files.root / image, in_chans)
        except BrokenImageError as error:
            raise or_skip(error) from error
        if mask.shape != size:
            raise ValueError(
                f"The mask {printable(str(files.root / name))} has {mask.shape[0]} x "
                f"{mask.shape[1]} pixels, and its image {size[0]} x {size[1]} (height "
                "x width)."
            )
        values = set(np.bincount(mask.ravel()).nonzero()[0].tolist())
        unknown = sorted(values - set(values if known is None else known))
        if unknown:
            raise ValueError(
                f"The mask {printable(str(files.root / name))} holds the value(s) "
                f"{', '.join(map(str, unknown[:_SHOWN]))}, which name no class: "
                "classes are numbered from 0 in the order of their names. Name more "
                "classes, or ignore these values with ignore_index."
            )
        found |= values
    return found


def _image_size(path: Path, in_chans: int) -> tuple[int, int]:
    """Returns (height, width) as a viewer shows the image, from its header alone."""

    def read(file: BinaryIO) -> tuple[int, int]:
        if in_chans not in (1, 3):
            height, width = np.lib.format.open_memmap(path, mode="r").shape[-2:]
            return height, width
        with open_picture(file, picture_formats()) as image:
            width, height = image.size
            turned = read_orientation(image) in TRANSPOSED
        return (width, height) if turned else (height, width)

    return read_regular(str(path), "image", read)
