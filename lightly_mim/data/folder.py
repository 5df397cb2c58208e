"""A folder of images as a data set of (sample, target, filename)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.arguments import PositiveInt, checked
from lightly_mim.data.decode import (
    ARRAY_EXTENSIONS,
    PICTURE_EXTENSIONS,
    decode_unchecked,
    say_unused_range,
)
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.listing import ImageFiles, find_images
from lightly_mim.data.notes import printable
from lightly_mim.data.opening import BrokenImageError, is_memory_error
from lightly_mim.patches import Size, to_pair

OnError = Literal["raise", "skip"]

# One keyed draw after another for a broken file. 100 failures in a row do not happen
# by chance unless nearly everything is broken: at 3 in 4 broken, once in 10^12 images.
_MAX_DRAWS = 100


class ReplacementName(str):
    """Name of a file that was read in place of one that cannot be used.

    Attributes:
        replaces:
            Name of the file that cannot be used.
        reason:
            Why not.
    """

    replaces: str
    reason: str


@checked
class ImageDataset(Dataset[tuple[Any, int, str]]):
    """Reads the images below a folder.

    Yields (sample, target, filename) as lightly's `LightlyDataset`. If every image lies
    in some sub-folder of the root, at any depth, the root's sub-folders are the
    classes, in alphabetical order. If images lie in the root itself, there are no
    classes, which is said, and images of sub-folders are taken too.

    Files are images by their extension (`PICTURE_EXTENSIONS`, upper or lower case) and
    come in alphabetical order; hidden files and those of systems and viewers
    (`@eaDir`, `__MACOSX`, thumbnails) are left out, links are followed, each folder is
    read once. What else is left out is counted and said. How files are decoded is told
    in `decode_image`. Where lightly's own data set differs: it saturates 16 bits,
    ignores EXIF orientation and, if there are sub-folders, leaves out the images beside
    them.

    Attributes:
        root:
            The folder.
        transform:
            Function from a PIL image of mode L or RGB (or a uint8 tensor with shape
            (channels, height, width) if `in_chans` is neither 1 nor 3) to a sample.
            None yields the image.
        in_chans:
            1 for grey, 3 for colour; other numbers read `.npy` files.
        on_error:
            What a file does that cannot be used: "raise" an error that names it, or
            "skip", which yields another image in its place, drawn by torch's random
            state (which `KeyedDataset` keys). Target and filename are then those of
            the other image, the filename is a `ReplacementName`, and
            `KeyedLoader.unreadable` collects which files were replaced, and why.
        min_size:
            Smallest (height, width) of an image; smaller ones cannot be used. None
            accepts all.
        value_range:
            The values of 16-bit pictures that become 0 and 255; see `decode_image`.
        in_memory:
            Keep each image once it is decoded. For sets that fit into memory, once per
            process: a loader reads them without workers by default.
        filenames:
            Paths of the images relative to the root.
        targets:
            One label per image, an index into the classes; all 0 without classes.
        classes:
            Names of the classes, empty if there are none.

    Raises:
        ValueError: If the folder does not exist or holds no image, or if an argument
            is not one of those allowed.
        BrokenImageError: A ValueError. On access to a file that cannot be used, or with
            `on_error="skip"` if 100 draws in a row hit only such files.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        in_chans: PositiveInt = 3,
        on_error: OnError = "raise",
        min_size: Size | None = None,
        value_range: ValueRange | None = None,
        in_memory: bool = False,
        files: ImageFiles | None = None,
    ) -> None:
        """Finds the images, or takes `files` instead of everything below the root."""
        self.root = Path(root)
        self.transform = transform
        self.in_chans = in_chans
        self.on_error = on_error
        self.min_size = None if min_size is None else to_pair(min_size, "min_size")
        self.value_range = value_range
        self.in_memory = in_memory
        self.filenames, self.targets, self.classes = files or find_images(
            root, PICTURE_EXTENSIONS if in_chans in (1, 3) else ARRAY_EXTENSIONS
        )
        self._decoded: dict[int, Image | Tensor] = {}
        if value_range is not None:
            say_unused_range(value_range, self.paths, self.root)

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [self.root / filename for filename in self.filenames]

    def take(self, indices: Sequence[int]) -> ImageDataset:
        """Returns a data set of some of the images, with the same transform.

        Args:
            indices:
                Their numbers.
        """
        taken = copy.copy(self)
        taken.filenames = [self.filenames[index] for index in indices]
        taken.targets = [self.targets[index] for index in indices]
        taken._decoded = {}
        return taken

    def __len__(self) -> int:
        return len(self.filenames)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        try:
            return self._read(index)
        except BrokenImageError as error:
            if self.on_error == "raise":
                raise
            sample, target, filename = self._read_another()
            name = ReplacementName(filename)
            name.replaces = printable(self.filenames[index])
            name.reason = str(error)
            return sample, target, name

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are spawned decode for themselves.
        return self.__dict__ | {"_decoded": {}}

    def _read_another(self) -> tuple[Any, int, str]:
        for _ in range(_MAX_DRAWS):
            try:
                return self._read(int(torch.randint(len(self), ())))
            except BrokenImageError as error:
                last_error = error
        raise BrokenImageError(
            f'With on_error="skip", {_MAX_DRAWS} files in a row, drawn from the '
            f"{len(self)} of {self.root}, could not be used. The last one: "
            f"{last_error}",
            last_error.path,
        )

    def _read(self, index: int) -> tuple[Any, int, str]:
        image = self._decode(index)
        try:
            sample = image if self.transform is None else self.transform(image)
        except Exception as error:
            if not is_memory_error(error):
                raise
            path = str(self.root / self.filenames[index])
            message = f"There is not enough memory to transform {printable(path)}."
            raise BrokenImageError(message, path) from error
        return sample, self.targets[index], self.filenames[index]

    def _decode(self, index: int) -> Image | Tensor:
        if index in self._decoded:
            return self._decoded[index]
        image = decode_unchecked(
            self.root / self.filenames[index],
            self.in_chans,
            self.min_size,
            # A picture that is kept must serve other transforms as well.
            None if self.in_memory else getattr(self.transform, "decode_size", None),
            self.value_range,
        )
        if self.in_memory:
            self._decoded[index] = image
        return image
