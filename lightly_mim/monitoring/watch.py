"""A watch over the features of an encoder while it is pretrained.

- [0]: Wang and Isola, 2020, https://arxiv.org/abs/2005.10242 (section 4.1: alignment,
  how near the features of two views of one image are)
- [1]: McNemar, 1947, https://doi.org/10.1007/BF02295996 (two results on the same
  samples are compared on those that differ)
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightly.transforms.torchvision_v2_compatibility import (
    torchvision_transforms as T,
)
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from lightly_mim.data import ImageDataset, keyed_random_state, spread_out
from lightly_mim.evaluation.features import EncoderFeatures
from lightly_mim.evaluation.label_free_measures import rank_me, uniformity
from lightly_mim.evaluation.probes.knn import knn_predict_grid
from lightly_mim.evaluation.probes.standardize import Standardizer
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.monitoring.images import (
    FixedImages,
    encode_images,
    looking_at,
    method_of,
    read_images,
)
from lightly_mim.training.logs import is_due, log_now

MAX_NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the neighbours' votes, see `lightly_mim.evaluation.probes.knn`
PER_CLASS = 10  # images of a class, where the classes are many
VIEW_SCALE = (0.6, 1.0)  # share of the image that a view covers
SIGNIFICANCE = 0.05
RANK_SHARE = 0.6


class Look(NamedTuple):
    """What one look at an encoder found.

    Attributes:
        values:
            What is logged.
        scores:
            Float tensor with shape (num_images,), how good the feature of each image
            is. Their mean is among the values.
        images:
            Checksum of images and labels: only looks at the same ones can be compared.
        step:
            Number of optimiser steps before the look.
    """

    values: dict[str, float]
    scores: Tensor
    images: int
    step: int


class FeatureWatch(Callback):
    """Watches whether pretraining makes features better, or all of them the same.

    Looks at the mean patch token of the last layer before the first step, every few
    epochs and at the end, and logs `rankme` and `uniformity`, see
    `lightly_mim.evaluation.label_free_measures`, and one measure of single images:

    - `knn_top1`, if the images have labels of two classes or more, and two images per
      class on average: the share of images whose class the other ones tell (kNN by
      leave-one-out, cosine of standardised features, k = 20 or less if the classes are
      small).
    - `alignment` otherwise: how near two fixed crops of an image are, relative to other
      images. It is the share of other images whose second crop is farther from the
      first one of an image than its own, averaged over the images: 1 if all find their
      own, 0.5 by chance. [0] measures the distance itself, which features that are the
      same for all images make 0.

    At the end of the training one sentence says how it was before and how it is after,
    or a warning if it is worse beyond chance: of the images that are better or worse,
    more are worse than a fair coin allows (a one-sided sign test at 5 %; for kNN, which
    is right or wrong, it is McNemar's [1] in its exact form). Without labels RankMe
    must have fallen below 60 % of its value as well: in trial runs of 84 to 240 steps
    on scikit-learn's digits and solar cells, a good one (MAE, kNN from 54.5 to 65.8 %)
    left 71 % of it, and two with a rate far too high (kNN from 42.8 to 16.6 % and from
    54.5 to 27.5 %) 47 % and 13 %, with an alignment that fell from 0.77 to 0.63 and
    from 0.81 to 0.70. A fall of one of the two alone is no sign: good runs have it.
    Without labels, then, only bad damage is found: on solar cells a kNN that fell from
    59.8 to 45.7 % stayed unnoticed, as alignment rose while RankMe fell to a third.

    Besides, an alarm goes off once when the features are worse in that sense and RankMe
    is below `floor`, or below `share` of the highest value seen so far, that before the
    first step included. RankMe alone is no alarm: weights drawn as MAE draws them begin
    at 1.2 on scikit-learn's digits and at 27 on drawings in colour, where it was 2.8
    after 47 steps with kNN as good as before. Nor does it rank encoders: of two healthy
    ones the one with the higher rank need not be the better one.

    On several devices the first one computes, and the others wait. A look at 512 images
    of 64 x 64 pixels with a ViT of 6 blocks of 192 takes one CPU thread 2.1 s, nearly
    all of it in the encoder, and 9.0 s without labels, for which two crops of each
    image are made and encoded too.

    Args:
        images:
            Data set of (image, ...) of the encoder's size, uint8 or normalised. Second
            in an item may be a label; anything else than whole numbers from 0 is
            ignored.
        every_n_epochs:
            How often, besides before the first step and at the end. 0 for never, also
            then.
        num_images:
            How many images are taken, from all over the data set; from a folder of more
            than a tenth as many classes, those of some classes. They are decoded once;
            with fewer than two nothing is measured.
        share:
            Share of the highest RankMe below which the alarm goes off.
        floor:
            RankMe below which it goes off. 1 is one feature for all images.
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
        self._start: Look | None = None
        self._last: Look | None = None
        self._read: FixedImages | None = None

    @property
    def state_key(self) -> str:
        """The name in a checkpoint: what the class was called at first."""
        return "CollapseAlarm"

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run must know: looks, highest rank and the warning."""
        looks = {"start": self._start, "last": self._last}
        return {
            "highest": self._highest,
            "warned": self._warned,
            **{name: look and look._asdict() for name, look in looks.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self._highest = state_dict["highest"]
        self._warned = state_dict["warned"]
        # Earlier versions did not keep them.
        start, last = state_dict.get("start"), state_dict.get("last")
        self._start = start and Look(**start)
        self._last = last and Look(**last)

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Looks at the encoder before the first step, and logs it."""
        if self._active and trainer.global_step == 0:
            self._start = self._look(trainer, pl_module)
            self._highest = max(self._highest, self._start.values["rankme"])
            log_now(trainer, self._start.values)

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Looks at the encoder when it is time, and warns of a collapse."""
        if not self._active or not is_due(trainer, self.every_n_epochs):
            return
        look = self._look(trainer, pl_module)
        pl_module.log_dict(look.values)
        rank = look.values["rankme"]
        lowest = max(self.floor, self.share * self._highest)
        known = self._start is not None and self._start.images == look.images
        worse = not known or is_worse(self._start, look)  # type: ignore[arg-type]
        if rank < lowest and worse and not self._warned:
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

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the encoder at the end, if the last epoch's end did not."""
        if self._active and (
            self._last is None or self._last.step < trainer.global_step
        ):
            log_now(trainer, self._look(trainer, pl_module).values)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says how the features were before the training and how they are after it.

        Also when a run goes on of which nothing was left but to end.
        """
        if not self._active or self._last is None or not trainer.is_global_zero:
            return
        start, last = self._start, self._last
        if start is not None and start.images != last.images:
            start = None
        said = describe_change(start, last)
        if start is None or not is_worse(start, last):
            print(f"{said}.", flush=True)
            return
        rank_zero_warn(
            f"The encoder's features are worse than before the training, beyond "
            f"chance. {said}. Try a lower learning rate or a higher one, train for "
            "more steps, leave out recipe=... if you gave one, and look at the "
            "reconstructions."
        )

    @property
    def _active(self) -> bool:
        enough = len(self.images) > 1  # type: ignore[arg-type]
        return self.every_n_epochs > 0 and enough

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Look:
        """Returns the first device's look on all devices, and remembers it."""
        look = None
        if trainer.is_global_zero:
            look = self.measure(method_of(pl_module), trainer.precision)
            look = look._replace(step=trainer.global_step)
        self._last = trainer.strategy.broadcast(look)
        assert self._last is not None
        return self._last

    def measure(self, method: MaskedImageModel, precision: Any = "32-true") -> Look:
        """Looks at an encoder.

        Args:
            method:
                The method whose encoder is measured. Nothing of it is changed.
            precision:
                Lightning's precision, see `encode_images`.

        Returns:
            What was found, at step 0.
        """
        if self._read is None:
            chosen = _choose_images(self.images, self.num_images)
            self._read = read_images(chosen, self.num_workers, labels=None)
        images, labels = self._read
        encoder = method.encoder
        function = EncoderFeatures(encoder, [-1], ["mean"])
        with looking_at(method, 0, "rank") as device:

            def encode(images: Tensor) -> Tensor:
                part = FixedImages(images, torch.zeros_like(labels))
                features = encode_images(encoder, function, part, device, precision)
                (values,) = features.values.values()
                return values

            values = encode(images)
            if _are_classes(labels):
                name, scores = "knn_top1", knn_scores(values, labels)
            else:
                views = [encode(crop(images, number)) for number in range(2)]
                name, scores = "alignment", alignment_scores(*views)
        measured = {
            "rankme": rank_me(values),
            "uniformity": uniformity(values),
            name: float(scores.double().mean()),
        }
        checksum = 0
        for tensor in self._read:
            checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
        return Look(measured, scores, checksum, step=0)


def knn_scores(features: Tensor, labels: Tensor) -> Tensor:
    """Returns for each image whether the others tell its class.

    Args:
        features:
            Tensor with shape (num_images, dim).
        labels:
            int64 tensor with shape (num_images,), for which there are two images per
            class on average.

    Returns:
        Float tensor with shape (num_images,), 1 for a right answer and 0 for a wrong
        one, by leave-one-out.
    """
    classes, labels = torch.unique(labels, return_inverse=True)
    k = min(MAX_NEIGHBOURS, len(labels) // len(classes) - 1)
    features = Standardizer.fit(features)(features)
    predicted = knn_predict_grid(
        None, features, labels, len(classes), [k], [TEMPERATURE]
    )
    return (predicted[0, 0, :, 0] == labels).float()


def alignment_scores(first: Tensor, second: Tensor) -> Tensor:
    """Returns for each image how near its two views are relative to other images.

    Args:
        first:
            Tensor with shape (num_images, dim), features of a view of each image.
        second:
            The same of another view.

    Returns:
        Float tensor with shape (num_images,): the share of the other images whose
        second view is less similar (cosine of standardised features) to the first view
        of the image than its own second view is.
    """
    standardize = Standardizer.fit(torch.cat([first, second]))
    first, second = (
        functional.normalize(standardize(view).double()) for view in (first, second)
    )
    similarity = first @ second.T
    farther = similarity < similarity.diagonal()[:, None]
    return farther.sum(dim=1) / (len(first) - 1)


def crop(images: Tensor, number: int) -> Tensor:
    """Returns a view of each image: a crop, resized to the size of the image.

    Args:
        images:
            Tensor with shape (num_images, channels, height, width).
        number:
            Which view. It is the same whenever it is made.
    """
    size = [images.shape[-2], images.shape[-1]]
    transform = T.RandomResizedCrop(size, VIEW_SCALE, antialias=True)
    with keyed_random_state("view", number):
        return torch.stack([transform(image) for image in images])


def is_worse(start: Look, last: Look) -> bool:
    """Returns whether the features are worse than at the start, beyond chance.

    Args:
        start:
            The look before the training.
        last:
            The look after it, at the same images.
    """
    worse = int((last.scores < start.scores).sum())
    better = int((last.scores > start.scores).sum())
    if worse <= better:
        return False
    chance = binomtest(worse, worse + better, alternative="greater").pvalue
    if chance >= SIGNIFICANCE:
        return False
    fell = last.values["rankme"] < RANK_SHARE * start.values["rankme"]
    return "knn_top1" in last.values or fell


def describe_change(start: Look | None, last: Look) -> str:
    """Returns what the looks have found, without a full stop.

    Args:
        start:
            The look before the training. None if there is none.
        last:
            The look after it.
    """
    number = len(last.scores)

    def values(name: str, unit: str, factor: float, digits: int) -> str:
        after = f"{factor * last.values[name]:.{digits}f}{unit}"
        if start is None:
            return f"{after} after training"
        before = f"{factor * start.values[name]:.{digits}f}{unit}"
        return f"{before} before training, {after} after"

    if "knn_top1" in last.values:
        said = f"kNN on {number} training images: {values('knn_top1', ' %', 100, 1)}"
    else:
        said = (
            f"Features of {number} training images: RankMe "
            f"{values('rankme', '', 1, 1)}; alignment {values('alignment', '', 1, 3)}"
        )
    return said if start else f"{said} (before it was not measured)"


def _are_classes(labels: Tensor) -> bool:
    """Returns whether labels are of two classes or more, two images each on average."""
    return (
        bool(labels.min() >= 0) and 2 <= len(set(labels.tolist())) <= len(labels) // 2
    )


def _choose_images(dataset: Dataset[Any], count: int) -> Subset[Any]:
    """Returns images from all over a data set, of some classes if they are many."""
    if not isinstance(dataset, ImageDataset):
        return spread_out(dataset, count)
    classes = sorted(set(dataset.targets))
    few = max(2, count // PER_CLASS)
    if len(classes) <= few:
        return spread_out(dataset, count)
    chosen = {classes[number * len(classes) // few] for number in range(few)}
    members = [i for i, label in enumerate(dataset.targets) if label in chosen]
    return spread_out(Subset(dataset, members), count)
