"""The labelled images of an evaluation: training images, and those that are scored."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightly.transforms.torchvision_v2_compatibility import (
    torchvision_transforms as T,
)
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.arguments import InnerShare, checked
from lightly_mim.data import (
    ImageDataset,
    KeyedLoader,
    TransformedDataset,
    open_data,
    seed_from,
)
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.folder import OnError
from lightly_mim.data.named import NAMED_DATA
from lightly_mim.data.notes import printable, some
from lightly_mim.data.opening import BrokenImageError
from lightly_mim.data.overlap import overlap_notes
from lightly_mim.data.sources import Data, is_image, spread_out
from lightly_mim.encoders.statistics import imagenet_statistics
from lightly_mim.evaluation.base import LabelledImages
from lightly_mim.evaluation.broken import Part, find_readable
from lightly_mim.evaluation.features import check_labels
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.evaluation.processes import World
from lightly_mim.evaluation.provenance import describe_data
from lightly_mim.evaluation.splits import hold_out
from lightly_mim.transforms import EvalTransform

_IMAGES_TO_LOOK_AT = 32


@checked
class EvaluationImages:
    """Opens training and test images, and makes sure that there are both, with labels.

    The arguments are those of `evaluate`, with its transform and its processes. A data
    set in Python may have labels without naming classes; `class_names` sees to that
    once the labels have been read.

    Raises:
        ValueError: If an argument is out of range, or if the data has no labels or no
            test images.
    """

    train: Dataset[Any]  # of (image, label, filename)
    test: Dataset[Any]  # what is scored: test images, or training images held out
    notes: list[str]  # what a reader of results should know of the images
    value_range: ValueRange | None  # see `lightly_mim.data.open_data`

    def __init__(
        self,
        data: Data,
        val: Data | None,
        transform: Callable[[Any], Any],
        in_chans: int,
        holdout: InnerShare | None = None,
        seed: int = 0,
        num_workers: int | None = None,
        on_error: OnError = "raise",
        value_range: ValueRange | None = None,
        world: World = World(),  # noqa: B008, frozen
        progress: bool = False,
    ) -> None:
        self._data = data
        self.value_range = value_range
        self.notes = []
        train: Any
        test: Any
        train, test = open_data(
            data,
            val,
            transform=transform,
            in_chans=in_chans,
            on_error=on_error,
            value_range=value_range,
            with_val=holdout is None,  # as they are not looked at, any will do
        )
        _check_classes(train, data)
        if holdout is None and test is None:
            raise ValueError(
                f"There are no test images for {describe_data(data)}. Give a folder "
                "that holds train/ and val/, or the test images as val, or hold out "
                "training images, such as holdout=0.2."
            )
        if test is not None:
            _check_classes(test, data if val is None else val)

        def whole(images: Any, part: Part) -> Any:
            if on_error == "raise" or images is None:
                return images
            images.on_error = "raise"  # another one would take its place
            found = world.from_first(
                lambda: find_readable(images, part, num_workers, progress)
            )
            self.notes += found.notes
            return images.take(found.indices)

        train, test = whole(train, "training"), whole(test, "test")
        if holdout is not None:
            labels = read_labels(train, num_workers)
            draw = seed_from(seed, "evaluation", "holdout")
            held_out = hold_out(labels, holdout, draw)
            self.train, self.test = (
                train.take(part.nonzero().flatten().tolist())
                for part in (~held_out, held_out)
            )
            return
        self.train, self.test = train, test

    def labelled(self) -> LabelledImages:
        """Returns the images for protocols that read them with their own transform."""
        return LabelledImages(self._transformed, self.test)

    def _transformed(self, transform: Callable[[Any], Any]) -> Dataset[Any]:
        """Returns the same training images with another transform."""
        train: Any = copy.copy(self.train)
        train.transform = transform
        if isinstance(train, TransformedDataset):
            sample = train.dataset[0]
            sample = sample[0] if isinstance(sample, tuple) else sample
            if not is_image(sample):
                raise ValueError(
                    f"{describe_data(self._data)} has a transform of its own, and this "
                    "protocol trains on images that it augments itself. Give a data "
                    "set of PIL images or uint8 tensors."
                )
        return train  # type: ignore[no-any-return]


def image_notes(
    images: Dataset[Any], transform: EvalTransform, encoder: AnyEncoder
) -> list[str]:
    """Returns what a reader should know of how images reach the encoder.

    Some of the images are looked at, none of them if they have been made tensors of
    floats already. What cannot be read is for the evaluation to say.
    """
    notes = []
    statistics = encoder.mean, encoder.std
    if encoder.name is None or statistics != imagenet_statistics(encoder.in_chans):
        mean, std = (
            ", ".join(f"{value:.4g}" for value in values) for values in statistics
        )
        notes.append(f"Images are normalised with mean {mean} and deviation {std}.")
    sizes = _image_sizes(images)
    height, width = transform.input_size
    long = sum(not 0.5 <= h * width / (w * height) <= 2 for h, w in sizes)
    if long:
        notes.append(
            f"{long} of {len(sizes)} test images that were looked at lose more than "
            f"half of what they show: their shape is more than 2:1 away from the "
            f"{height} x {width} pixels of the central crop. crop_ratio=1 cuts nothing "
            "from the short side, and img_size=(height, width) takes images of another "
            "shape."
        )
    return notes


def own_value_range(
    encoder: AnyEncoder, data: Data, val: Data | None
) -> ValueRange | None:
    """Returns the value range that a run was pretrained with, for folders of images."""
    sources = [data] if val is None else [data, val]
    if not all(isinstance(s, str | os.PathLike) for s in sources):
        return None  # a data set decodes for itself
    if set(map(os.fspath, sources)) & set(NAMED_DATA):  # type: ignore[arg-type]
        return None  # those have 8 bits
    return getattr(encoder, "value_range", None)


def shared_notes(train: Dataset[Any], test: Dataset[Any]) -> list[str]:
    """Returns what a reader must know of test images that are training images.

    Only files can be compared with others.
    """
    if isinstance(train, ImageDataset) and isinstance(test, ImageDataset):
        return overlap_notes(train.paths, test.paths)
    if isinstance(train, TransformedDataset) and isinstance(test, TransformedDataset):
        if train.dataset is test.dataset:
            return [
                "The test images are the training images, one data set. The results "
                "say too much."
            ]
    return []


def _image_sizes(images: Any) -> list[tuple[int, int]]:
    """Returns (height, width) of some images, from all over a data set."""
    images = copy.copy(images)
    images.transform = lambda image: T.functional.get_size(image)
    if isinstance(images, ImageDataset):
        images.on_error = "raise"  # another image would be drawn at random
    sizes = []
    for index in spread_out(images, _IMAGES_TO_LOOK_AT).indices:
        with suppress(BrokenImageError):
            size = images[index][0]
            if isinstance(size, list) and len(size) == 2:
                sizes.append((size[0], size[1]))
    return sizes


def _check_classes(images: Dataset[Any], source: Data) -> None:
    if isinstance(images, ImageDataset) and not images.classes:
        raise ValueError(
            f"The images of {describe_data(source)} have no labels: an evaluation "
            "needs one folder per class."
        )


def read_labels(images: Dataset[Any], num_workers: int | None) -> Tensor:
    """Returns the labels, int64 with shape (num_images,), of images not encoded."""
    if isinstance(images, ImageDataset):
        return torch.tensor(images.targets)
    loader = KeyedLoader(images, 64, training=False, num_workers=num_workers)
    return torch.cat([check_labels(batch[1]) for batch in loader])


def class_names(train: Dataset[Any], labels: Sequence[Tensor]) -> list[str]:
    """Returns the names of the classes, numbers if the data does not tell.

    Raises:
        ValueError: If the labels of both parts hold nothing but class 0, or a label
            beyond the names.
    """
    names: list[str] = list(getattr(train, "classes", []))
    largest = max(int(part.max()) for part in labels)
    if not names and largest == 0:
        raise ValueError(
            "The images have no labels: all are of class 0, and the data set names no "
            "classes. Give a data set of (image, label, filename)."
        )
    if names and largest >= len(names):
        raise ValueError(
            f"The labels go up to {largest}, but the data set names {len(names)} "
            f"classes: {some([printable(name) for name in names])}."
        )
    return names or [str(number) for number in range(largest + 1)]
