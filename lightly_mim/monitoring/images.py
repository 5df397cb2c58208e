"""Images that are decoded once and encoded many times while an encoder trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.data import KeyedLoader, keyed_random_state
from lightly_mim.data.notes import printable, some
from lightly_mim.encoders.base import MaskedEncoder
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    batch_images,
    collect_features,
    evaluating,
)
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.optim import NonFiniteLossError

_BATCH_SIZE = 64


class FixedImages(NamedTuple):
    """Images that were decoded once.

    Attributes:
        images:
            Tensor with shape (num_images, channels, height, width), uint8 or normalised
            floats.
        labels:
            int64 tensor with shape (num_images,).
    """

    images: Tensor
    labels: Tensor


def check_finite_images(images: Tensor, filenames: Sequence[str]) -> None:
    """Raises an error that names the images with values that are not finite.

    Args:
        images:
            Tensor with shape (num_images, channels, height, width).
        filenames:
            Their names.

    Raises:
        NonFiniteLossError: If there are such: the loss of them would be none.
    """
    if not images.is_floating_point():
        return
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        named = some([printable(str(filenames[index])) for index in bad])
        raise NonFiniteLossError(
            f"{len(bad)} of {len(images)} images that were looked at hold NaN or "
            f"infinite values, which would make the loss so: {named}. Mend them, or "
            "leave them out of the data set."
        )


def read_images(
    dataset: Dataset[Any], num_workers: int | None, labels: bool | None = True
) -> FixedImages:
    """Decodes all images of a data set, in its order.

    Args:
        dataset:
            Data set of (image, label, filename).
        num_workers:
            Processes that read the images. None lets the loader choose.
        labels:
            Whether targets are labels, see `KeyedDataset`.
    """
    loader = KeyedLoader(
        dataset,
        min(_BATCH_SIZE, len(dataset)),  # type: ignore[arg-type]
        training=False,
        num_workers=num_workers,
        labels=labels,
        persistent_workers=False,
    )
    images: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in loader:
        images.append(batch_images(batch))
        check_finite_images(images[-1], batch[2])
        targets.append(batch[1])
    return FixedImages(torch.cat(images), torch.cat(targets))


def encode_images(
    encoder: MaskedEncoder,
    function: EncoderFeatures,
    part: FixedImages,
    device: torch.device,
    precision: Any,
) -> Features:
    """Returns features of images.

    Args:
        encoder:
            The encoder, whose mean and standard deviation normalise uint8 images.
        function:
            The features to take.
        part:
            The images.
        device:
            Where to compute.
        precision:
            Lightning's precision: the encoder computes in bfloat16 if the training
            does.
    """
    batches = zip(
        torch.split(part.images, _BATCH_SIZE),
        torch.split(part.labels, _BATCH_SIZE),
        strict=True,
    )
    return collect_features(
        {"encoder": function},
        batches,
        device=device,
        precision="bf16" if precision == "bf16-mixed" else "32",
    )["encoder"]


def method_of(pl_module: pl.LightningModule) -> MaskedImageModel:
    """Returns the method that a `Pretraining` trains."""
    method = pl_module.method
    assert isinstance(method, MaskedImageModel)
    return method


@contextmanager
def undisturbed(method: MaskedImageModel) -> Iterator[torch.device]:
    """Puts a method in evaluation mode, and leaves its random states alone.

    Args:
        method:
            The method, which is back in its modes afterwards.

    Yields:
        The device that the method is on.
    """
    device = next(method.parameters()).device
    gpus = [device] if device.type == "cuda" else []
    with evaluating(method, device), torch.random.fork_rng(devices=gpus):
        yield device


@contextmanager
def looking_at(
    method: MaskedImageModel, seed: int, word: str
) -> Iterator[torch.device]:
    """Gives the method's device, and leaves its mode and all random states alone.

    Args:
        method:
            The method, in evaluation mode meanwhile.
        seed:
            Seed of what is drawn meanwhile.
        word:
            The rest of the key of that.
    """
    with undisturbed(method) as device, keyed_random_state(seed, word):
        yield device
