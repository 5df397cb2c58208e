"""A probe that shows where a pretraining run is heading."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Generator
from torch.utils.data import Dataset, Subset

from lightly_mim.data import seed_from
from lightly_mim.encoders.base import AnyPool
from lightly_mim.evaluation.base import FeatureProtocol
from lightly_mim.evaluation.features import EncoderFeatures
from lightly_mim.evaluation.probes.attentive import Attentive
from lightly_mim.evaluation.probes.linear import Linear
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.monitoring.images import (
    FixedImages,
    encode_images,
    looking_at,
    method_of,
    read_images,
)
from lightly_mim.training.logs import is_due, log_now

Probe = Literal["linear", "attentive"]

MAX_IMAGES = 5000
MAX_IMAGES_BY_TOKENS = 1000


class OnlineProbe(Callback):
    """Logs the accuracy of a probe on the features of the moment, `probe_top1`.

    The images are decoded once, with the transform of their data set, and kept as
    uint8. Before the first step and every few epochs they are encoded whole; a probe is
    fitted from scratch on training images, its learning rate chosen among them, and
    scored on other images. It shows where a run is heading; what is reported should
    come from `lightly_mim.evaluate`, with all its choices.

    On several devices the first one computes, and the others wait for the number.

    A call encodes `max_images` twice at most, which is nearly all of its cost: on the
    solar cells of the README (1,968 and 656 images of 64 x 64 pixels, a ViT of 6 blocks
    of 192) it took one thread of a busy CPU 14 to 17 s, of which 0.2 s went into the
    linear probe, or 8.6 s into the attentive one on 1,000 images. With 5,000 images of
    768 features the linear probe takes 1.1 s for 10 classes and 22 s for 1,000.

    Attributes:
        seconds:
            How long the last call took.

    Args:
        train:
            Data set of (image, label, filename) to fit on: uint8 images of the
            encoder's size, without augmentation.
        test:
            The same to score on. None holds out a fifth of the training images, drawn
            by the seed. The encoder has been pretrained on them, but not on their
            labels.
        probe:
            "linear", on the mean of the patch tokens of the last layer; "attentive", on
            these tokens; or any protocol on features.
        every_n_epochs:
            How often, besides before the first step and in the last epoch. 0 for those
            two only.
        layers:
            Layers to choose from, see `EncoderFeatures`.
        pools:
            Poolings to choose from, see `EncoderFeatures`. By default what the probe
            reads, "mean" or "tokens".
        max_images:
            Of each part at most so many images are taken, drawn by the seed. They take
            channels * height * width bytes each. By default 5,000, and 1,000 for a
            protocol that reads tokens, which take 600 kB per image in a ViT-B/16.
        seed:
            Seed of what is drawn.
        num_workers:
            Processes that read the images. By default chosen by the loader.

    Raises:
        ValueError: When the images are read, which is before the training starts, if
            they have no labels, are not uint8, or are too few.
    """

    def __init__(
        self,
        train: Dataset[Any],
        test: Dataset[Any] | None = None,
        probe: Probe | FeatureProtocol = "linear",
        *,
        every_n_epochs: int = 10,
        layers: Sequence[int] = (-1,),
        pools: Sequence[AnyPool] | None = None,
        max_images: int | None = None,
        seed: int = 0,
        num_workers: int | None = None,
    ) -> None:
        if isinstance(probe, str) and probe not in get_args(Probe):
            known = " or ".join(f"'{name}'" for name in get_args(Probe))
            raise ValueError(f"probe is {known}, or a protocol, got '{probe}'.")
        self.protocol = _PROTOCOLS[probe] if isinstance(probe, str) else probe
        self.train = train
        self.test = test
        self.every_n_epochs = every_n_epochs
        self.layers = layers
        by_tokens = self.protocol.reads == "tokens"
        pool: AnyPool = "tokens" if by_tokens else "mean"
        self.pools = pools or (pool,)
        limit = MAX_IMAGES_BY_TOKENS if by_tokens else MAX_IMAGES
        self.max_images = limit if max_images is None else max_images
        self.seed = seed
        self.num_workers = num_workers
        self.seconds = 0.0
        self._parts: tuple[FixedImages, FixedImages] | None = None

    def read(self) -> None:
        """Reads the images, if that has not been done, and checks them."""
        if self._parts is not None:
            return
        drawn = self._draw(self.train, "train")
        if self.test is None:
            held_out = min(len(drawn) // 5, self.max_images)
            places = [(self.train, drawn[held_out:]), (self.train, drawn[:held_out])]
        else:
            places = [(self.train, drawn), (self.test, self._draw(self.test, "test"))]
        if not all(indices for _, indices in places):
            raise ValueError(
                f"The probe needs images to fit on and others to score on, got "
                f"{len(drawn)} training images and no validation images. Leave the "
                "probe out, or give validation images."
            )
        train, test = (
            read_images(Subset(dataset, indices[: self.max_images]), self.num_workers)
            for dataset, indices in places
        )
        for part in (train, test):
            if part.images.dtype != torch.uint8:
                raise ValueError(
                    "The probe reads images without augmentation, but the data set has "
                    "a transform of its own. Let it yield PIL images or uint8 tensors, "
                    "or leave the probe out."
                )
        if train.labels.min() == train.labels.max():
            raise ValueError(
                "The probe needs labelled images of two classes or more, and all "
                f"{len(train.labels)} that it would be fitted on are of one: give a "
                "folder with one folder per class, or leave the probe out."
            )
        self.protocol.check(len(train.labels))
        self._parts = train, test

    def _draw(self, dataset: Dataset[Any], part: str) -> list[int]:
        generator = Generator().manual_seed(seed_from(self.seed, "probe", part))
        count = len(dataset)  # type: ignore[arg-type]
        limit = self.max_images * (2 if self.test is None else 1)
        drawn: list[int] = torch.randperm(count, generator=generator).tolist()
        return drawn[:limit]

    def setup(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        """Reads the images."""
        if trainer.is_global_zero:
            self.read()

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Logs and prints the accuracy before the first step, unless a run goes on."""
        if trainer.global_step:
            return
        accuracy = self._score(trainer, pl_module)
        log_now(trainer, {"probe_top1": accuracy})
        if trainer.is_global_zero:
            print(f"before training: probe_top1 {accuracy:.4g}", flush=True)

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Fits and scores the probe when it is time."""
        if is_due(trainer, self.every_n_epochs):
            accuracy = self._score(trainer, pl_module)
            pl_module.log("probe_top1", accuracy, prog_bar=True)

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """Returns the accuracy on all devices."""
        accuracy = 0.0
        if trainer.is_global_zero:
            accuracy = self.score(method_of(pl_module), trainer.precision)
        return trainer.strategy.broadcast(accuracy)

    def score(self, method: MaskedImageModel, precision: Any = "32-true") -> float:
        """Returns the accuracy of the probe, in [0, 1].

        Args:
            method:
                The method whose encoder is probed. Nothing of it is changed.
            precision:
                Lightning's precision: the encoder computes in bfloat16 if the training
                does.
        """
        self.read()
        assert self._parts is not None
        start = time.perf_counter()
        encoder = method.encoder
        function = EncoderFeatures(encoder, self.layers, self.pools)
        with looking_at(method, self.seed, "probe") as device:
            train, test = (
                encode_images(encoder, function, part, device, precision)
                for part in self._parts
            )
            (outcome,) = self.protocol(
                train,
                test,
                1 + int(max(train.labels.max(), test.labels.max())),
                seed=seed_from(self.seed, "probe"),
                # Probes compute in float64 in places; Apple's accelerator does not.
                device=device if device.type == "cuda" else "cpu",
            )
        self.seconds = time.perf_counter() - start
        return float((outcome.ranked[:, 0] == test.labels).double().mean())


_PROTOCOLS: Mapping[str, FeatureProtocol] = {
    # A short fit on few rates: the number is watched, not reported.
    "linear": Linear(learning_rates=(1e-3, 1e-2, 1e-1), epochs=20, num_folds=2),
    "attentive": Attentive(
        learning_rates=(3e-3, 1e-2),
        weight_decays=(0.1,),
        epochs=20,
        batch_size=64,
        num_parts=5,
    ),
}
