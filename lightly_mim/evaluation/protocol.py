"""What every evaluation protocol on cached features is: settings, and one call."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightly_mim.evaluation.features import Features, Key


class Outcome(NamedTuple):
    """What a protocol has chosen on training images, and what it says of test images.

    Attributes:
        key:
            The chosen layer and pooling.
        hyperparameters:
            The chosen hyper-parameters by name.
        selection:
            For each layer and pooling the best hyper-parameters and their `accuracy` on
            the training images.
        ranked:
            int64 tensor with shape (num_test, num_ranks), the most probable classes of
            each test image, the first one first. num_ranks is 5, or the number of
            classes if there are fewer.
    """

    key: Key
    hyperparameters: dict[str, float]
    selection: list[dict[str, Any]]
    ranked: Tensor


class FeatureProtocol(Protocol):
    """A protocol that needs nothing but features and labels."""

    def check(self, num_train: int) -> list[str]:
        """Checks the settings before any image is read.

        Args:
            num_train:
                Number of training images.

        Returns:
            What a reader of the results should know, one sentence each.

        Raises:
            ValueError: If a setting is out of range.
        """

    def __call__(
        self,
        train: Features,
        test: Features,
        num_classes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Outcome:
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
        """


def rank_classes(scores: Tensor, num_ranks: int) -> Tensor:
    """Returns the classes with the highest scores, of equals the lowest number first.

    Args:
        scores:
            Tensor with shape (num_images, num_classes).
        num_ranks:
            How many classes to return.

    Returns:
        int64 tensor with shape (num_images, num_ranks).
    """
    ranked = []
    for _ in range(num_ranks):  # argmax returns the first of equals, topk any of them
        best = scores.argmax(dim=1, keepdim=True)
        scores = scores.scatter(1, best, -torch.inf)
        ranked.append(best)
    return torch.cat(ranked, dim=1)
