"""What may be given as `data`: a folder, a name, or a data set."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightly_mim.arguments import (
    AnyDataset,
    NonNegativeInt,
    PositiveInt,
    Rule,
    checked,
    fits,
)
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import ImageDataset, OnError
from lightly_mim.data.items import Item, as_item
from lightly_mim.data.named import NAMED_DATA, Split, open_named
from lightly_mim.data.notes import printable, say
from lightly_mim.data.split_folders import (
    check_no_splits_below,
    find_splits,
    find_val,
)
from lightly_mim.patches import Size


def _is_data(data: Any) -> bool:
    if isinstance(data, str):
        return bool(data)
    return fits(data, os.PathLike | Dataset)


if TYPE_CHECKING:
    Data = str | os.PathLike[str] | AnyDataset
else:
    # What a command line can pass: its help would list every Dataset of PyTorch.
    Data = Annotated[
        str,
        Rule(
            "a folder, the name of a data set, or one with __len__ and __getitem__",
            _is_data,
            alone=True,
        ),
    ]
Transform = Callable[[Any], Any]


@checked
class TransformedDataset(Dataset[Item]):
    """Brings a data set from elsewhere, such as lightly's, into our form.

    Yields (sample, target, filename). Samples that are still images (PIL images or
    uint8 tensors with shape (channels, height, width)) are transformed; lists of views
    and float tensors are left as they are, since the data set has its own transform.

    Attributes:
        dataset:
            Data set of (sample, target, filename), (sample, target) or samples. What is
            missing becomes target 0 and the index as filename, as in lightly.
        transform:
            Function from an image to a sample. None transforms nothing.
        classes:
            Names of the classes if the data set tells them, else empty.
        numbers:
            What each label becomes, see `match_classes`. None keeps them.
    """

    def __init__(self, dataset: AnyDataset, transform: Transform | None) -> None:
        self.dataset: Any = dataset
        self.transform = transform
        inner = getattr(dataset, "dataset", dataset)  # of a LightlyDataset or a Subset
        classes = getattr(dataset, "classes", None) or getattr(inner, "classes", None)
        self.numbers: list[int] | None = None
        self.classes: list[str] = [str(name) for name in classes or ()]

    def take(self, indices: Sequence[int]) -> TransformedDataset:
        """Returns a data set of some of the samples, with the same transform.

        Args:
            indices:
                Their numbers.
        """
        taken = copy.copy(self)
        taken.dataset = Subset(self.dataset, list(indices))
        return taken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        sample, target, filename = as_item(self.dataset[index], index)
        if self.transform is not None and is_image(sample):
            sample = self.transform(sample)
        if self.numbers is not None:
            target = self.numbers[target]
        return sample, target, filename


def is_image(sample: Any) -> bool:
    """Returns whether a sample is still an image: a PIL image or a uint8 tensor.

    Args:
        sample:
            What a data set yields first.
    """
    return isinstance(sample, Image) or (
        isinstance(sample, Tensor) and sample.dtype == torch.uint8
    )


@checked
def spread_out(dataset: Dataset[Any], count: NonNegativeInt) -> Subset[Any]:
    """Returns images from all over a data set: neighbours are often of one class.

    Args:
        dataset:
            Data set with a length.
        count:
            How many images to take, all of them if there are fewer.
    """
    total = len(dataset)  # type: ignore[arg-type]
    count = min(count, total)
    return Subset(dataset, [number * total // count for number in range(count)])


@checked
def open_data(
    data: Data,
    val: Data | None = None,
    *,
    transform: Transform | None = None,
    val_transform: Transform | None = None,
    in_chans: PositiveInt = 3,
    on_error: OnError = "raise",
    min_size: Size | None = None,
    value_range: ValueRange | None = None,
    data_dir: str | os.PathLike[str] = "datasets",
    download: bool = False,
    with_val: bool = True,
    labels: bool = True,
) -> tuple[Dataset[Item], Dataset[Item] | None]:
    """Opens images for training and, if there are any, for validation.

    Args:
        data:
            One of:

            - a folder that holds train/ and val/, or train/ alone, in the usual
              spellings (Train, training, validation)
            - a folder of class folders, or of images; see `ImageDataset`
            - a name: "imagenette", "imagenette-320", "imagenette-160" or "solar-cells"
              (a folder of that name is written "./imagenette")
            - a data set with a length, such as lightly's; see `TransformedDataset`
        val:
            Validation images: a folder of them, a name or a data set, instead of those
            that come with `data`.
        transform:
            Function from an image to a sample; see `ImageDataset`.
        val_transform:
            The same for validation. None takes `transform`.
        in_chans:
            1 for grey, 3 for colour; see `ImageDataset`.
        on_error:
            What a broken file does, "raise" or "skip"; see `ImageDataset`.
        min_size:
            Smallest size of an image; see `ImageDataset`.
        value_range:
            The values of 16-bit pictures that become 0 and 255; see `decode_image`.
            For folders: those with a name have 8 bits.
        data_dir:
            Where Imagenette lies, or is put by `download`.
        download:
            Fetch Imagenette if it is not there.
        with_val:
            Whether to open validation images. False does not look at them.
        labels:
            Whether labels count: validation images then get the numbers of the training
            images' classes, see `match_classes`. False takes any classes.

    Returns:
        Training and validation data sets of (sample, target, filename) with `classes`,
        the names of the classes, empty if there are none. The second is None if there
        are no validation images.

    Raises:
        ValueError: If there are no such images, if it is not clear which ones are for
            training, or if labels count and there are validation images of other
            classes.
    """
    train_source, val_source = _train_and_val(data)
    if val is not None:
        val_source = _val_only(val)

    def open_split(source: Data, split: Split, transform: Transform | None) -> Any:
        if not isinstance(source, str | os.PathLike):
            _refuse_options(on_error, value_range)
            return TransformedDataset(source, transform)
        options: dict[str, Any] = {
            "in_chans": in_chans,
            "on_error": on_error,
            "min_size": min_size,
        }
        if source in NAMED_DATA:
            if value_range is not None:
                raise ValueError(
                    f"value_range is for pictures of 16 bits, those of {source} have 8."
                )
            options |= {"data_dir": data_dir, "download": download}
            return open_named(str(source), split, transform, **options)
        images = ImageDataset(source, transform, value_range=value_range, **options)
        check_no_splits_below(images.root, images.filenames)
        return images

    train = open_split(train_source, "train", transform)
    if val_source is None or not with_val:
        return train, None
    validation = open_split(val_source, "val", val_transform or transform)
    if labels:
        match_classes(train, validation)
    return train, validation


def _refuse_options(on_error: OnError, value_range: ValueRange | None) -> None:
    """Refuses for a Dataset what is said of files."""
    if on_error == "skip":
        raise ValueError(
            'on_error="skip" is for folders and named data sets: what a Dataset of '
            "your own does with a broken file is its own to say."
        )
    if value_range is not None:
        raise ValueError(
            f"value_range={value_range} is for folders: a Dataset of your own yields "
            "8 bits. Leave it out."
        )


def _train_and_val(data: Data) -> tuple[Data, Data | None]:
    """Returns where training and validation images come from."""
    if not isinstance(data, str | os.PathLike):
        return data, None
    if data in NAMED_DATA:
        return data, data
    return find_splits(_check_folder(data))


def _val_only(val: Data) -> Data:
    if not isinstance(val, str | os.PathLike):
        return val
    if val in NAMED_DATA:
        return val
    return find_val(_check_folder(val))


def _check_folder(path: str | os.PathLike[str]) -> Path:
    root = Path(path)
    if root.is_dir():
        return root
    kind = "is a file" if root.exists() else "does not exist"
    raise ValueError(
        f"{root} {kind}. Give a folder of images, a data set, or one of these names: "
        f"{', '.join(NAMED_DATA)}."
    )


@checked
def match_classes(train: Dataset[Item], val: Dataset[Item]) -> None:
    """Gives the validation images the numbers that the training images' classes have.

    Classes are matched by name; what the validation images lack is said. Nothing is
    done if one of them names no classes.

    Args:
        train:
            Training images, from `open_data`.
        val:
            Validation images, from `open_data`. Changed in place.

    Raises:
        ValueError: If there are validation images of a class without training images.
    """
    names: list[str] = getattr(train, "classes", [])
    others: list[str] = getattr(val, "classes", [])
    if not names or not others or names == others:
        return
    lacking = [printable(name) for name in names if name not in others]
    unknown = [printable(name) for name in others if name not in names]
    if unknown:
        raise ValueError(
            f"Training and validation images have different classes. Only in training: "
            f"{', '.join(lacking) or 'none'}; only in validation: "
            f"{', '.join(unknown)}. Give both the same folders, or no class folders to "
            "one of them."
        )
    if lacking:
        say(f"No validation images of {', '.join(lacking)}.")
    number = [names.index(name) for name in others]
    if isinstance(val, ImageDataset):
        val.targets = [number[target] for target in val.targets]
    else:
        assert isinstance(val, TransformedDataset)
        val.numbers = number
    val.classes = names
