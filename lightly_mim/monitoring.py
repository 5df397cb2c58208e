"""What looks at the encoder while it is pretrained: a probe, and a collapse alarm.

Both encode a fixed set of whole images, never masked ones, at the end of an epoch, in
evaluation mode and without gradients. Neither changes the run: weights, random numbers,
the mode of every module and what a resumed run does stay what they are without them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Generator, Tensor
from torch.utils.data import Dataset, Subset

from lightly_mim.callbacks import is_due, method_of, undisturbed
from lightly_mim.data import (
    KeyedLoader,
    keyed_random_state,
    seed_from,
    spread_out,
)
from lightly_mim.encoders.base import AnyPool
from lightly_mim.evaluation.attentive import Attentive
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    batch_images,
    collect_features,
)
from lightly_mim.evaluation.linear import Linear
from lightly_mim.evaluation.protocol import FeatureProtocol
from lightly_mim.evaluation.rank import rank_me, uniformity
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.optim import NonFiniteLossError

Probe = Literal["linear", "attentive"]

MAX_IMAGES = 5000
MAX_IMAGES_BY_TOKENS = 1000

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


class OnlineProbe(Callback):
    """Logs the accuracy of a probe on the features of the moment, `probe_top1`.

    The images are decoded once, with the transform of their data set, and kept as
    uint8. Every few epochs they are encoded whole; a probe is fitted from scratch on
    training images, its learning rate chosen among them, and scored on other images. It
    shows where a run is heading; what is reported should come from
    `lightly_mim.evaluate`, with all its choices.

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
            How often, besides the last epoch. 0 for the last epoch only.
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
        by_tokens = self.protocol.tokens
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
            _read_images(Subset(dataset, indices[: self.max_images]), self.num_workers)
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

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Fits and scores the probe when it is time."""
        if not is_due(trainer, self.every_n_epochs):
            return
        accuracy = 0.0
        if trainer.is_global_zero:
            accuracy = self.score(method_of(pl_module), trainer.precision)
        accuracy = trainer.strategy.broadcast(accuracy)
        pl_module.log("probe_top1", accuracy, prog_bar=True)

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
        with _undisturbed(method, self.seed, "probe") as device:
            train, test = (
                _encode(function, part, encoder.mean, encoder.std, device, precision)
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


class CollapseAlarm(Callback):
    """Warns when the encoder gives nearly the same feature to all images.

    Logs `rankme` and `uniformity`, see `lightly_mim.evaluation.rank`, of the mean patch
    token of the last layer. They are an alarm, not a score: of two healthy encoders the
    one with the higher rank need not be the better one.

    The alarm goes off once, when RankMe falls below `floor`, or below `share` of the
    highest value seen so far, that before the first step included. For comparison: on
    solar cells (README) RankMe was 9.9 to 10.9 at three random initialisations and 13.4
    after SimMIM, of 192 dimensions.

    On several devices the first one computes.

    Args:
        images:
            Data set of (image, ...) of the encoder's size, uint8 or normalised.
        every_n_epochs:
            How often, besides the last epoch. 0 for never.
        num_images:
            How many images are taken, from all over the data set. They are decoded
            once; with fewer than two nothing is measured.
        share:
            Share of the highest value below which the alarm goes off.
        floor:
            Value below which it goes off. A rank of 1 is one feature for all images.
        num_workers:
            Processes that read the images. By default chosen by the loader.
    """

    def __init__(
        self,
        images: Dataset[Any],
        *,
        every_n_epochs: int = 10,
        num_images: int = 512,
        share: float = 0.2,
        floor: float = 1.5,
        num_workers: int | None = None,
    ) -> None:
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.num_images = num_images
        self.share = share
        self.floor = floor
        self.num_workers = num_workers
        self._highest = 0.0
        self._warned = False
        self._read: FixedImages | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run must know: the highest value, and the warning."""
        return {"highest": self._highest, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self._highest = state_dict["highest"]
        self._warned = state_dict["warned"]

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Measures the encoder before the first step."""
        first = trainer.global_step == 0 and self._highest == 0
        if first and self._active and trainer.is_global_zero:
            measured = self.measure(method_of(pl_module), trainer.precision)
            self._highest = measured["rankme"]

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Measures the encoder when it is time, and warns."""
        if not self._active or not is_due(trainer, self.every_n_epochs):
            return
        measured: dict[str, float] = {}
        if trainer.is_global_zero:
            measured = self.measure(method_of(pl_module), trainer.precision)
        measured = trainer.strategy.broadcast(measured)
        pl_module.log_dict(measured)
        rank = measured["rankme"]
        lowest = max(self.floor, self.share * self._highest)
        if rank < lowest and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The encoder seems to have collapsed: in epoch "
                f"{trainer.current_epoch + 1} its features fill {rank:.1f} directions "
                f"(RankMe), {self._highest:.1f} at most before; the alarm goes off "
                f"below {lowest:.1f}. All images get nearly the same feature. Lower "
                "the learning rate, lengthen the warm-up, or look at the "
                "reconstructions."
            )
        self._highest = max(self._highest, rank)

    @property
    def _active(self) -> bool:
        enough = len(self.images) > 1  # type: ignore[arg-type]
        return self.every_n_epochs > 0 and enough

    def measure(
        self, method: MaskedImageModel, precision: Any = "32-true"
    ) -> dict[str, float]:
        """Returns `rankme` and `uniformity` of the encoder.

        Args:
            method:
                The method whose encoder is measured. Nothing of it is changed.
            precision:
                Lightning's precision, see `OnlineProbe.score`.
        """
        if self._read is None:
            few = spread_out(self.images, self.num_images)
            self._read = _read_images(few, self.num_workers, labels=False)
        encoder = method.encoder
        function = EncoderFeatures(encoder, [-1], ["mean"])
        with _undisturbed(method, 0, "rank") as device:
            features = _encode(
                function, self._read, encoder.mean, encoder.std, device, precision
            )
        (values,) = features.values.values()
        return {"rankme": rank_me(values), "uniformity": uniformity(values)}


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
        named = ", ".join(str(filenames[index]) for index in bad[:5])
        raise NonFiniteLossError(
            f"{len(bad)} of {len(images)} images that were looked at hold NaN or "
            f"infinite values, which would make the loss so: {named}. Mend them, or "
            "leave them out of the data set."
        )


def _read_images(
    dataset: Dataset[Any], num_workers: int | None, labels: bool = True
) -> FixedImages:
    """Decodes all images of a data set, in its order."""
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


def _encode(
    function: EncoderFeatures,
    part: FixedImages,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: Any,
) -> Features:
    batches = zip(
        torch.split(part.images, _BATCH_SIZE),
        torch.split(part.labels, _BATCH_SIZE),
        strict=True,
    )
    return collect_features(
        {"encoder": function},
        batches,
        mean,
        std,
        device=device,
        precision="bf16" if precision == "bf16-mixed" else "32",
    )["encoder"]


@contextmanager
def _undisturbed(
    method: MaskedImageModel, seed: int, word: str
) -> Iterator[torch.device]:
    """Gives the method's device, and leaves its mode and all random states alone."""
    with undisturbed(method) as device, keyed_random_state(seed, word):
        yield device
