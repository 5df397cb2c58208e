"""Features of a data set: one pass over the images for all layers and poolings.

What comes after, kNN and probes, reads features and labels and knows no encoder. What
makes the features is `EncoderFeatures`, for any encoder; several share one pass, so
that no image is decoded twice.

Shapes: N images, D features, B images in a batch, C channels, (H, W) pixels.
"""

from __future__ import annotations

import functools
import itertools
import reprlib
import time
from collections.abc import (
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightly_mim.arguments import Device, NonEmpty, PositiveInt, Workers, checked
from lightly_mim.data.loading import KeyedLoader
from lightly_mim.encoders import choose_attention
from lightly_mim.encoders.base import AnyPool
from lightly_mim.evaluation.foreign_encoders import AnyEncoder
from lightly_mim.training.machine import MixedPrecision, autocast

Precision = MixedPrecision
Key = tuple[int | None, str]  # layer and pooling; raw pixels have no layer
TOKENS = "tokens"  # in place of a pooling: all patch tokens


@dataclass(frozen=True)
class Features:
    """Features of all images of a data set.

    Attributes:
        values:
            For each (layer, pooling), a tensor with shape (num_images, dim) on the CPU,
            float32, or float16 if it is read from the disk, see
            `lightly_mim.evaluation.cache`: call `.float()` before computing. Layers
            count from 0. For the pooling "tokens", all patch tokens with shape
            (num_images, num_patches, dim).
        labels:
            int64 tensor with shape (num_images,).
        filenames:
            One name per image, empty if the data set has none.
        seconds:
            Time spent on the features, reading the images excluded.
    """

    values: dict[Key, Tensor]
    labels: Tensor
    filenames: list[str]
    seconds: float

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, tokens: bool) -> Features:
        """Returns the patch tokens alone, or the pooled features alone."""
        values = {
            key: value
            for key, value in self.values.items()
            if (key[1] == TOKENS) == tokens
        }
        return replace(self, values=values)


@checked
class EncoderFeatures:
    """Makes features of images: pools the tokens of several layers of an encoder.

    Attributes:
        encoder:
            The encoder.
        layers:
            Blocks of a ViT or stages of a Swin, from 0, each one once.
        pools:
            Names of poolings, see `lightly_mim.encoders.pool_tokens`.

    Raises:
        ValueError: If no layer or no pooling is given, or if there is no such layer.
            On a call, if there is no such pooling, or if it takes a class token and the
            encoder has none.
    """

    def __init__(
        self,
        encoder: AnyEncoder,
        layers: NonEmpty[int] = (-1,),
        pools: NonEmpty[AnyPool] = ("mean",),
    ) -> None:
        count = encoder.num_layers
        if not all(-count <= layer < count for layer in layers):
            raise ValueError(
                f"layers is one or more of 0 to {count - 1} (or -{count} to -1, from "
                f"the end), got {list(layers)}."
            )
        self.encoder = encoder
        self.layers = list(dict.fromkeys(layer % count for layer in layers))
        self.pools = list(dict.fromkeys(pools))

    @functools.cached_property
    def keys(self) -> list[Key]:
        """The (layer, pooling) of each feature: all combinations.

        Of an encoder that names its features, images of zeros tell them: it must be in
        evaluation mode by then.
        """
        if not getattr(self.encoder, "names_features", False):
            return [(n, pool) for n in self.layers for pool in self.pools]
        return list(self.shapes)

    @functools.cached_property
    def shapes(self) -> dict[Key, tuple[int, ...]]:
        """The shape of one image's features, told by images of zeros."""
        size = (2, self.encoder.in_chans, *self.encoder.img_size)
        with torch.no_grad():
            zeros = torch.zeros(size, device=_device_of(self.encoder))
            return {key: tuple(v.shape[1:]) for key, v in self(zeros).items()}

    def __call__(
        self, images: Tensor, keys: Collection[Key] | None = None
    ) -> dict[Key, Tensor]:
        """Returns features with shape (batch_size, dim) of normalised images.

        All of them, or those of some keys.
        """
        layers, pools = self.layers, self.pools
        if keys is not None:
            layers = [n for n in layers if any(n == layer for layer, _ in keys)]
            pools = [p for p in pools if any(p == pool for _, pool in keys)]
        found: Mapping[Any, Tensor] = self.encoder.embed_layers(images, layers, pools)
        return {k: value for k, value in found.items() if keys is None or k in keys}


@checked
def extract_features(
    encoder: AnyEncoder,
    data: Dataset[Any] | DataLoader[Any],
    layers: NonEmpty[int] = (-1,),
    pools: NonEmpty[AnyPool] = ("mean",),
    *,
    batch_size: PositiveInt = 64,
    num_workers: Workers | None = None,
    device: Device | None = None,
    precision: Precision = "32",
) -> Features:
    """Encodes every image once and pools the tokens of several layers.

    Args:
        encoder:
            The encoder; `lightly_mim.evaluation.load_encoder` makes one of many things.
            It runs in evaluation mode without gradients, and is given back
            in the mode and on the device where it was.
        data:
            A data set of (image, label, filename), as lightly's, with images of the
            encoder's size; or a loader of such batches. An image is a tensor with shape
            (channels, height, width) or a list whose first entry is one. uint8 is
            normalised with the encoder's mean and standard deviation, floats count as
            normalised already.
        layers:
            Blocks of a ViT or stages of a Swin, counted from 0, or from the end if
            negative.
        pools:
            Any of "mean", "cls", "cls+mean" and "tokens", see
            `lightly_mim.encoders.pool_tokens`.
        batch_size:
            Number of images at a time, if `data` is not a loader.
        num_workers:
            Number of processes that read images, if `data` is not a loader. By default
            chosen by `lightly_mim.data.loading.default_num_workers`.
        device:
            Where to encode. By default where the encoder is.
        precision:
            "32", or "bf16" for bfloat16 autocast: several times as fast where the
            hardware computes in it, with features that differ in the third digit.

    Returns:
        The features, in float32, labels and filenames in the order of the data.

    Raises:
        ValueError: If there is no such layer or pooling, if the images do not fit the
            encoder, if the labels are not classes, or if a feature is not finite.
    """
    function = EncoderFeatures(encoder, layers, pools)
    if not isinstance(data, DataLoader):
        if not len(data):  # type: ignore[arg-type]
            raise ValueError("data holds no images to take features of.")
        data = KeyedLoader(data, batch_size, training=False, num_workers=num_workers)
    device = _device_of(encoder) if device is None else torch.device(device)
    with evaluating(encoder, device):
        made = collect_features(
            {"encoder": function}, data, device=device, precision=precision
        )
    return made["encoder"]


@checked
def collect_features(
    functions: Mapping[str, EncoderFeatures],
    batches: Iterable[Any],
    *,
    keys: Mapping[str, Sequence[Key]] | None = None,
    device: Device = "cpu",
    precision: Precision = "32",
) -> dict[str, Features]:
    """Passes over the images once and makes all features of every batch.

    Args:
        functions:
            What makes features, by name; the encoders are on the device.
        batches:
            Tuples (images or list of views, labels, filenames). Of the views the first
            one is taken; the filenames may be missing. uint8 images are normalised as
            each encoder asks for.
        keys:
            Which features of each function. None for all of them.
        device:
            Where to compute.
        precision:
            See `extract_features`.

    Returns:
        The features of each function, with labels and filenames, in the order of the
        batches.

    Raises:
        ValueError: If there are no images, if the labels are not classes, or if a
            feature is not finite.
    """
    device = torch.device(device)
    parts: dict[str, dict[Key, list[Tensor]]] = {name: {} for name in functions}
    seconds = dict.fromkeys(functions, 0.0)
    labels: list[Tensor] = []
    filenames: list[str] = []
    for batch in batches:
        images = batch_images(batch).to(device, non_blocking=True)
        if images.ndim != 4:
            raise ValueError(
                "The images of the data are tensors with shape (channels, height, "
                f"width), got {tuple(images.shape[1:])}."
            )
        labels.append(check_labels(batch[1]))
        filenames.extend(batch[2] if len(batch) > 2 else ())
        for name, function in functions.items():
            start = time.perf_counter()
            pixels = normalize_images(
                images, function.encoder.mean, function.encoder.std
            )
            with torch.no_grad(), autocast(device, precision):
                features = function(pixels, None if keys is None else keys[name])
            for key, value in features.items():
                parts[name].setdefault(key, []).append(value.float().cpu())
            seconds[name] += time.perf_counter() - start
    if not labels:
        raise ValueError("batches holds no images to take features of.")
    joined = torch.cat(labels)
    return {
        name: Features(_join(parts[name]), joined, filenames, seconds[name])
        for name in functions
    }


def batch_images(batch: Any) -> Tensor:
    """Returns the images of a batch, of several views the first one.

    Raises:
        ValueError: If it does not begin with images or with a list of views.
    """
    views = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    images = views[0] if isinstance(views, (list, tuple)) and views else views
    if not isinstance(images, Tensor):
        raise ValueError(
            "Batches are tuples or lists that begin with the images, such as (images, "
            f"labels, filenames), got {reprlib.repr(batch)}."
        )
    return images


def normalize_images(
    images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Normalises uint8 images, (B, C, H, W); float images count as normalised already.

    `mean` is subtracted from images in [0, 1], which are then divided by `std`.

    Raises:
        ValueError: If there is not one mean and one standard deviation per channel.
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise ValueError(
            "Images are uint8 in 0..255 or floats that are normalised already, got "
            f"{images.dtype}. Scale them to one of the two."
        )
    if not images.shape[1] == len(mean) == len(std):
        raise ValueError(
            f"The images have {images.shape[1]} channel(s), but {len(mean)} are to be "
            f"normalised. Build the encoder with in_chans={images.shape[1]}."
        )
    shift = _on_device(tuple(mean), images.device)
    scale = _on_device(tuple(std), images.device)
    return (images / 255 - shift) / scale


@functools.lru_cache(maxsize=32)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copies a statistic to the device once: a copy waits for the device."""
    return torch.tensor(values, device=device)[:, None, None]


@contextmanager
def evaluating(encoder: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Puts a module in evaluation mode on a device, and back as it was afterwards."""
    home = _device_of(encoder)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval().to(device)
    try:
        yield
    finally:
        encoder.to(home)
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Encoding:
    """How images go through encoders, as `evaluate` has it."""

    batch_size: int
    num_workers: int | None
    device: torch.device
    precision: Precision
    progress: bool

    @contextmanager
    def ready(self, functions: Iterable[EncoderFeatures]) -> Iterator[None]:
        """Makes encoders ready on the device, and puts them back as they were."""
        with ExitStack() as stack:
            for encoder in (function.encoder for function in functions):
                choose_attention(encoder, self.device, self.precision == "bf16")
                stack.enter_context(evaluating(encoder, self.device))
            yield

    def collect(
        self,
        functions: Mapping[str, EncoderFeatures],
        images: Dataset[Any],
        description: str,
    ) -> dict[str, Features]:
        """Returns `collect_features` of all images of a data set."""
        loader = KeyedLoader(
            images, self.batch_size, training=False, num_workers=self.num_workers
        )
        batches = track(loader, description, disable=not self.progress)
        return collect_features(
            functions, batches, device=self.device, precision=self.precision
        )


def _device_of(module: nn.Module) -> torch.device:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _join(parts: Mapping[Key, list[Tensor]]) -> dict[Key, Tensor]:
    joined = {key: torch.cat(values) for key, values in parts.items()}
    for (layer, pool), value in joined.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"The features of layer {layer}, pooling '{pool}' hold NaN or infinite "
                "values: the weights of the encoder are broken, or the images are."
            )
    return joined


def check_labels(labels: Any) -> Tensor:
    """Returns the labels of a batch as int64 on the CPU.

    Raises:
        ValueError: If they are not one class per image.
    """
    is_class = isinstance(labels, Tensor) and labels.ndim == 1
    if not is_class or labels.is_floating_point() or bool((labels < 0).any()):
        raise ValueError(
            "An evaluation needs one class per image, a whole number from 0, got "
            f"labels {labels}."
        )
    return torch.as_tensor(labels, dtype=torch.int64, device="cpu")
