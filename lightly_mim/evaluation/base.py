"""What every evaluation protocol is: a name, settings, a check before, and one call.

There are two kinds. A `FeatureProtocol` needs nothing but features and labels, so that
all of them share one pass over the images. An `ImageProtocol` trains on augmented
images and takes the encoder. Both are structural: any class that has the attributes
and methods is one, and one that derives from `FeatureProtocol` need not write `check`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightly_mim.arguments import Device, Seed, Workers, checked
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation.features import Features, Key
from lightly_mim.training.machine import ONE, Layout, MixedPrecision

NUM_RANKS = 5  # classes per test image that a protocol predicts, for the top-5 accuracy


class Outcome(NamedTuple):
    """What a protocol has chosen on training images, and what it says of test images.

    Attributes:
        key:
            The chosen layer and pooling.
        hyperparameters:
            The chosen hyper-parameters by name.
        selection:
            For each layer and pooling the best hyper-parameters and their `accuracy` on
            the training images. Empty if nothing was to be chosen.
        ranked:
            int64 tensor with shape (num_test, num_ranks), the most probable classes of
            each test image, the first one first. num_ranks is 5, or the number of
            classes if there are fewer. With shape (num_draws, num_test, num_ranks) if
            the protocol was run on several draws of the training images.
        variant:
            What tells this outcome from others of the same protocol, such as "5 per
            class". Empty if there are no others.
        classifier:
            What has predicted, for `save_classifier`: a linear layer that reads the
            chosen features as they were extracted, or a `FineTuned`. None if it is not
            to be saved.
    """

    key: Key
    hyperparameters: dict[str, float]
    selection: list[dict[str, Any]]
    ranked: Tensor
    variant: str = ""
    classifier: nn.Module | None = None


class Choice(Protocol):
    """What was chosen on training images for one layer and pooling: a NamedTuple.

    Its fields are hyper-parameters, `accuracy` on the training images, and maybe
    `loss` there.
    """

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy on training images, in [0, 1]."""

    def _asdict(self) -> dict[str, Any]: ...


def merit(choice: Choice) -> tuple[float, float]:
    """Returns what choices are compared by: accuracy; ties go to the lower loss."""
    loss = getattr(choice, "loss", 0.0)
    # A probe that diverged has no loss, and NaN would win over whatever comes after it.
    return choice.accuracy, -math.inf if math.isnan(loss) else -loss


def best_key(choices: Mapping[Key, Choice]) -> Key:
    """Returns the layer and pooling with the best choice; ties go to the first one."""
    return max(choices, key=lambda key: merit(choices[key]))


def hyperparameters(choice: Choice) -> dict[str, float]:
    """Returns what was chosen, without what it was chosen by."""
    found = ("accuracy", "loss", "converged")
    return {k: value for k, value in choice._asdict().items() if k not in found}


def describe_choices(choices: Mapping[Key, Choice]) -> list[dict[str, Any]]:
    """Returns the choice of each layer and pooling, see `Outcome.selection`."""
    return [
        {"layer": layer, "pooling": pooling, **choice._asdict()}
        for (layer, pooling), choice in choices.items()
    ]


class FeatureProtocol(Protocol):
    """A protocol that needs nothing but features and labels.

    Attributes:
        name:
            What `evaluate`, the command line, tables and `results.json` call it.
        reads:
            "pooled" for one feature per image and pooling, or "tokens" for all patch
            tokens of an image.
    """

    name: ClassVar[str]
    reads: ClassVar[str]

    def check(self, num_train: int) -> list[str]:
        """Checks the settings before any image is read.

        Returns:
            What a reader of the results should know, one sentence each.

        Raises:
            ValueError: If a setting is out of range for that many training images.
        """
        return []

    @abstractmethod
    def __call__(
        self,
        train: Features,
        test: Features,
        num_classes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> list[Outcome]:
        """Chooses on the training images and predicts the test images once.

        Args:
            train:
                Features of the training images.
            test:
                The same of the test images.
            num_classes:
                Number of classes.
            seed:
                Seed of everything that is random.
            device:
                Where to compute; it must know float64.

        Returns:
            One outcome, or one per variant.
        """


@runtime_checkable
class ChecksLabels(Protocol):
    """A protocol that looks at the labels before any protocol has run."""

    def check_labels(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Raises a ValueError if the training set is not fit for the settings.

        Args:
            labels:
                int64 tensor with shape (num_train,) with values in [0, num_classes).
            classes:
                Names of the classes.
        """


class LabelledImages(NamedTuple):
    """Training and test images that an `ImageProtocol` reads with its own transform.

    Attributes:
        train:
            Function from a transform (of a PIL image or uint8 tensor to a uint8 tensor
            with shape (channels, height, width)) to the training images, a data set of
            (image, label, filename). Raises a ValueError if the data set has a
            transform of its own.
        test:
            Data set of the test images with the transform of the evaluation: uint8
            tensors of the encoder's size, which the protocol normalises with
            `encoder.mean` and `encoder.std`.
    """

    train: Callable[[Callable[[Any], Any]], Dataset[Any]]
    test: Dataset[Any]


@checked
@dataclass(frozen=True)
class TrainingRun:
    """Where and how an `ImageProtocol` trains.

    Attributes:
        out:
            Directory for checkpoints, which a training that was cut goes on from, such
            as Path("runs/finetune").
        seed:
            Seed of everything that is random.
        device:
            Where to compute.
        precision:
            "32", "bf16" for bfloat16 autocast, or "16" for float16 autocast with a
            gradient scaler on a GPU.
        num_workers:
            Number of processes that read images, per device.
        progress:
            Whether to show a progress bar, rather than a line for each epoch.
        layout:
            The processes that train together and call the protocol all at once.
        compile:
            Whether to compile what is trained with `torch.compile`.

    Raises:
        ValueError: If one of them is out of range.
    """

    out: Path
    seed: Seed = 0
    device: Device = "cpu"
    precision: MixedPrecision = "32"
    num_workers: Workers | None = None
    progress: bool = False
    layout: Layout = ONE
    compile: bool = False


class ImageProtocol(Protocol):
    """A protocol that trains on augmented images through the encoder.

    `name` and `check` are as in `FeatureProtocol`, and `reads` is "images". `LinearMAE`
    is one to begin from.
    """

    name: ClassVar[str]
    reads: ClassVar[str]

    def check(self, num_train: int) -> list[str]:
        """See `FeatureProtocol`."""
        return []

    def check_encoder(self, encoder: MaskedEncoder) -> None:
        """Raises a ValueError if the settings do not fit the encoder."""
        return

    def __call__(
        self,
        encoder: MaskedEncoder,
        images: LabelledImages,
        num_classes: int,
        run: TrainingRun,
    ) -> list[Outcome]:
        """Trains on the training images and predicts the test images once.

        Args:
            encoder:
                The encoder. Train a copy of it: others use it, too.
            images:
                Training and test images.
            num_classes:
                Number of classes.
            run:
                Where and how to train.

        Returns:
            One outcome, whose key is the layer and the pooling that the classes were
            read from, such as (encoder.num_layers - 1, "mean").
        """


def rank_classes(scores: Tensor, num_ranks: int | None = None) -> Tensor:
    """Returns the classes with the highest scores; ties go to the lowest number.

    Scores have shape (num_images, num_classes), and what is returned is int64 with
    shape (num_images, num_ranks): 5 by default, or all classes if there are fewer.
    """
    if num_ranks is None:
        num_ranks = min(NUM_RANKS, scores.shape[1])
    ranked = []
    for _ in range(num_ranks):  # of ties, argmax returns the first, topk any
        best = scores.argmax(dim=1, keepdim=True)
        scores = scores.scatter(1, best, -torch.inf)
        ranked.append(best)
    return torch.cat(ranked, dim=1)
