"""The images of a pretraining run, and what tells them from others."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from lightly_mim.data import (
    ImageDataset,
    KeyedLoader,
    open_data,
    seed_from,
    spread_out,
)
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.opening import BrokenImageError, read_regular
from lightly_mim.data.sources import Data
from lightly_mim.data.survey import Survey, survey
from lightly_mim.evaluation.features import batch_images, normalize_images
from lightly_mim.masking import Mask, UnitMasking
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.monitoring import check_finite_images
from lightly_mim.optim import Recipe
from lightly_mim.transforms import EvalTransform

NUM_PICTURES = 8
NUM_TO_FIT = 512  # images for a target that learns from them
NUM_SIZES = 1000  # files whose sizes and times tell a list of images
NUM_CONTENTS = 64  # files whose bytes do


class PretrainingImages(pl.LightningDataModule):
    """Makes the loaders once Lightning has told each process its rank."""

    def __init__(
        self,
        method: MaskedImageModel,
        data: Data,
        val: Data | None,
        validate: bool,
        num_workers: int | None,
        on_error: Literal["raise", "skip"],
        value_range: ValueRange | None,
        seed: int,
    ) -> None:
        super().__init__()
        encoder = method.encoder
        self.method = method
        self.num_workers = num_workers
        self.seed = seed
        self.eval_transform = EvalTransform(encoder.img_size, normalize=None)
        smallest = _smallest(method)
        self.train, self.val = open_data(
            data,
            val,
            transform=self.eval_transform,
            in_chans=encoder.in_chans,
            on_error=on_error,
            value_range=value_range,
            min_size=smallest,
            with_val=validate,
            labels=False,  # only what watches the run needs them
        )
        if self.val is not None and not len(self.val):  # type: ignore[arg-type]
            raise ValueError(f"val holds no images, got val={val!r}. Leave it out.")
        self.num_images: int = len(self.train)  # type: ignore[arg-type]
        if on_error == "raise" and isinstance(self.train, ImageDataset):
            _check_sizes(survey(self.train), smallest)

    def follow(self, recipe: Recipe) -> None:
        """Takes the batch size and the crops of a recipe.

        Raises:
            ValueError: If a batch has more images than there are.
        """
        self.batch_size = recipe.batch_size
        if not 0 < self.batch_size <= self.num_images:
            raise ValueError(
                f"A batch has 1 to all {self.num_images} images of the data set, got "
                f"batch_size={self.batch_size}. Incomplete batches are dropped."
            )
        self.steps_per_epoch = self.num_images // self.batch_size
        self.train.transform = self.method.transform(  # type: ignore[attr-defined]
            normalize=None, min_scale=recipe.min_scale
        )

    def pixels(self) -> Tensor | None:
        """Returns some of the images as uint8, None for floats and views."""
        images = self._batch_of(self.plain(), NUM_TO_FIT)[0]
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            return None
        encoder = self.method.encoder
        normalize_images(images[:1], encoder.mean, encoder.std)  # do channels fit?
        return images

    def check(self, trainer: pl.Trainer) -> None:
        """Raises a ValueError if batch and processes do not fit the images."""
        check_shares(
            self.batch_size, trainer.world_size, trainer.accumulate_grad_batches
        )

    def facts(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Returns what the result depends on and the arguments do not say."""
        return {
            **image_facts(self.train),
            "processes": trainer.world_size,
            "device": trainer.strategy.root_device.type,
        }

    def pictures(self) -> tuple[Tensor, Mask]:
        """Returns a few images, normalised, and their masks: the same in every run."""
        images = self._some(
            self.val if self.val is not None else self.train, NUM_PICTURES
        )
        generator = Generator().manual_seed(seed_from(self.seed, "pictures"))
        return images, Mask.of(self.method.draw_mask(images, generator))

    def sample(self) -> Tensor:
        """Returns training images for a target to learn from, normalised."""
        return self._some(self.plain(), NUM_TO_FIT)

    def _batch_of(self, dataset: Dataset[Any], number: int) -> Any:
        few = spread_out(dataset, number)
        return next(iter(self._loader(few, len(few), num_workers=0)))

    def _some(self, dataset: Dataset[Any], number: int) -> Tensor:
        encoder = self.method.encoder
        batch = self._batch_of(dataset, number)
        images = batch_images(batch)
        check_finite_images(images, batch[2])
        return normalize_images(images, encoder.mean, encoder.std)

    def plain(self) -> Dataset[Any]:
        """Returns the training images without augmentation."""
        dataset = copy.copy(self.train)
        dataset.transform = self.eval_transform  # type: ignore[attr-defined]
        return dataset

    def shown(self) -> tuple[Dataset[Any], str]:
        """Returns the images that a report shows features of, and what they are."""
        if self.val is not None:
            return self.val, "validation images"
        return self.plain(), "training images"

    def unreadable(self) -> dict[str, str]:
        """Returns the files that were replaced, on all devices, and why."""
        trainer = self.trainer
        assert trainer is not None
        loader = trainer.train_dataloader
        if not isinstance(loader, KeyedLoader):  # the checkpoint was the last one
            return {}
        found = dict(loader.unreadable)
        if isinstance(trainer.val_dataloaders, KeyedLoader):
            found |= trainer.val_dataloaders.unreadable
        parts: list[dict[str, str]] = [found] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, found)
        return {name: reason for part in parts for name, reason in part.items()}

    def train_dataloader(self) -> KeyedLoader:
        """Returns the training images, this rank's rows of each global batch."""
        assert self.trainer is not None
        micro_batch = self.batch_size // self.trainer.accumulate_grad_batches
        return self._loader(self.train, micro_batch, training=True)

    def val_dataloader(self) -> KeyedLoader | list[Any]:
        """Returns the validation images, in order; nothing if there are none."""
        assert self.trainer is not None
        if self.val is None:
            return []
        micro_batch = self.batch_size // self.trainer.accumulate_grad_batches
        return self._loader(self.val, micro_batch)

    def _loader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        training: bool = False,
        num_workers: int | None = None,
    ) -> KeyedLoader:
        trainer = self.trainer
        return KeyedLoader(
            dataset,
            batch_size,
            training=training,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            num_workers=self.num_workers if num_workers is None else num_workers,
            labels=False,  # what watches the run reads them for itself
        )


def _check_sizes(found: Survey, smallest: tuple[int, int]) -> None:
    """Raises a ValueError if pictures are smaller than what is masked as a whole."""
    small = [s for s in found.sizes if s[0] < smallest[0] or s[1] < smallest[1]]
    if small:
        height, width, name = small[0]
        raise ValueError(
            f"{len(small)} of {len(found.sizes)} images that were looked at are "
            f"smaller than {smallest[0]} x {smallest[1]} pixels; the first of them, "
            f"{name}, has {height} x {width} (height x width). Remove them, leave "
            'them out with on_error="skip", or take a smaller mask_patch_size or patch.'
        )


def _smallest(method: MaskedImageModel) -> tuple[int, int]:
    """Returns the size of the smallest images that are worth training on."""
    masking = method.masking
    unit = masking.mask_patch_size if isinstance(masking, UnitMasking) else None
    return unit or method.encoder.patch_size


def image_facts(dataset: Dataset[Any]) -> dict[str, Any]:
    """Returns what tells images from others, wherever they lie.

    Their number, the hash of their names, and that of the sizes of a thousand files:
    asking a network's file system for those of a million takes minutes. When these
    files were written, and what 64 of them begin with: copies have other times, all of
    them, and the same bytes; of images that were changed in place some keep their time.
    """
    told = [f"{len(dataset)} images"]  # type: ignore[arg-type]
    names: Sequence[str] = getattr(dataset, "filenames", ())
    if names:
        text = "\n".join(names).encode(errors="surrogateescape")
        told.append(f"names {zlib.crc32(text):08x}")
    paths: Sequence[Path] = getattr(dataset, "paths", ())
    if not paths:
        return {"images": ", ".join(told)}
    some = [paths[index] for index in spread_out(dataset, NUM_SIZES).indices]
    stats = [path.stat() if path.exists() else None for path in some]
    sizes = [stat.st_size if stat else -1 for stat in stats]
    told.append(f"sizes {zlib.crc32(str(sizes).encode()):08x}")
    crc = 0
    for index in spread_out(dataset, NUM_CONTENTS).indices:
        with suppress(BrokenImageError):  # is what the run will say
            path = str(paths[index])
            crc = zlib.crc32(read_regular(path, "image", _beginning), crc)
    return {
        "images": ", ".join(told),
        "contents": f"{crc:08x}",
        "times": [int(stat.st_mtime) if stat else -1 for stat in stats],
    }


def _beginning(file: BinaryIO) -> bytes:
    return file.read(1 << 20)


def check_shares(batch_size: int, devices: int, accumulate: int) -> None:
    """Raises a ValueError if a batch cannot be shared out evenly."""
    parts = devices * accumulate
    if batch_size % parts:
        raise ValueError(
            f"batch_size is the number of images per optimiser step, {parts} = "
            f"{devices} device(s) x {accumulate} accumulated micro-batch(es) share it, "
            f"and {batch_size} does not divide by that: pass another batch_size."
        )
