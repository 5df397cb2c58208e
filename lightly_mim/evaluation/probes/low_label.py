"""Low-label evaluation: a classifier from a few labelled images per class.

- [0]: MSN, 2022, https://arxiv.org/abs/2204.07141 (section 5: L2-regularised logistic
  regression on frozen features, a few images per class, mean of several draws)

A number of images of each class is drawn from the training set, several times, and
logistic regression is fitted to each draw. Which images are drawn matters more than
anything else with so few, so the spread over the draws belongs to the result.

Labels are scarce here, images are not: the features are standardised with the
statistics of all training images. Layer, pooling and C are chosen by cross-validation
inside each draw, with no other label. With one image per class there is nothing to hold
out, so that the settings are fixed ones.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn import functional

from lightly_mim.arguments import (
    AtLeastTwo,
    NonEmpty,
    PositiveFloat,
    PositiveInt,
    checked,
)
from lightly_mim.data.seeding import seed_from
from lightly_mim.evaluation.base import (
    Outcome,
    best_key,
    describe_choices,
    rank_classes,
)
from lightly_mim.evaluation.features import Features, Key
from lightly_mim.evaluation.probes.logistic import Logistic, choose_logistic
from lightly_mim.evaluation.probes.standardize import Standardizer
from lightly_mim.evaluation.splits import check_counts, draw_per_class


@checked
@dataclass(frozen=True)
class LowLabel:
    """Logistic regression from a few labelled images per class.

    Attributes:
        shots:
            Numbers of images per class, each of which gives an outcome of its own. A
            draw with more images of a class contains the draw with fewer.
        draws:
            Number of draws.
        cs:
            Values of C to choose from, see `lightly_mim.evaluation.Logistic`.
        num_folds:
            Largest number of parts of a draw of which each is held out once; with fewer
            images per class, as many as there are.
        fixed_c:
            C where there is one image per class. Default from scikit-learn. Layer and
            pooling are then the last layer and the first pooling that are given.
        tolerance:
            See `lightly_mim.evaluation.probes.logistic.fit_logistic_path`.
        max_iterations:
            See `lightly_mim.evaluation.probes.logistic.fit_logistic_path`.
    """

    name: ClassVar[str] = "low_label"
    reads: ClassVar[str] = "pooled"

    shots: NonEmpty[PositiveInt] = (1, 5, 10)
    draws: PositiveInt = 5
    cs: NonEmpty[PositiveFloat] = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    num_folds: AtLeastTwo = 5
    fixed_c: PositiveFloat = 1.0
    tolerance: PositiveFloat = 1e-4
    max_iterations: PositiveInt = 1000

    def check(self, num_train: int) -> list[str]:
        """See `FeatureProtocol`."""
        if max(self.shots) > num_train:
            raise ValueError(
                "shots is one or more numbers of images per class, from 1 to the "
                f"{num_train} training image(s), got {list(self.shots)}."
            )
        return []

    def check_labels(self, labels: Tensor, classes: Sequence[str]) -> None:
        """See `ChecksLabels`: there are enough images of each class to draw from."""
        check_counts(labels, classes, max(self.shots))

    def __call__(
        self,
        train: Features,
        test: Features,
        num_classes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> list[Outcome]:
        """See `FeatureProtocol`. The seed decides the draws and their parts.

        Returns:
            One outcome per number of images per class, with all draws in `ranked`. Its
            layer, pooling and C are those that most draws have chosen; `selection` has
            what each draw has chosen.

        Warns:
            ConvergenceWarning: If a final fit ended at `max_iterations`.
        """
        seeds = [seed_from(seed, "low_label", draw) for draw in range(self.draws)]
        rows = [
            draw_per_class(train.labels, num_classes, max(self.shots), each)
            for each in seeds
        ]
        scalers = {
            key: Standardizer.fit(values) for key, values in train.values.items()
        }
        return [
            self._outcome(train, test, num_classes, shots, rows, scalers, seed, device)
            for shots in self.shots
        ]

    def _outcome(
        self,
        train: Features,
        test: Features,
        num_classes: int,
        shots: int,
        rows: list[Tensor],
        scalers: dict[Key, Standardizer],
        seed: int,
        device: torch.device | str,
    ) -> Outcome:
        logistic = Logistic(
            self.cs,
            max(min(shots, self.num_folds), 2),
            self.tolerance,
            self.max_iterations,
        )
        chosen: list[tuple[Key, float]] = []
        selection: list[dict[str, Any]] = []
        ranked = []
        cut = 0
        for draw, numbers in enumerate(rows):
            index = numbers[:, :shots].flatten()
            labels = train.labels[index]
            features = {
                key: scalers[key](values[index]) for key, values in train.values.items()
            }
            # The first pooling of the last layer; a baseline's features have no layer.
            key = max(features, key=lambda key: -1 if key[0] is None else key[0])
            c = self.fixed_c
            if shots > 1:
                found = choose_logistic(
                    list(features.values()),
                    labels,
                    num_classes,
                    logistic,
                    standardized=True,
                    seed=seed_from(seed, "low_label", "parts", draw),
                    device=device,
                )
                choices = dict(zip(features, found, strict=True))
                key = best_key(choices)
                c = choices[key].c
                [best] = describe_choices({key: choices[key]})
                selection.append({"draw": draw, **best})
            chosen.append((key, c))
            path = logistic.fit(
                features[key].to(device), labels.to(device), num_classes, [c]
            )
            cut += not path.converged[0]
            logits = functional.linear(
                scalers[key](test.values[key]).to(device), path.weight[0], path.bias[0]
            )
            ranked.append(rank_classes(logits).cpu())
        if cut:
            warnings.warn(
                f"Of {self.draws} fits to {shots} images per class, {cut} did not "
                f"converge in {self.max_iterations} iterations. Their accuracy may "
                "change with a larger max_iterations.",
                ConvergenceWarning,
                stacklevel=3,
            )
        (key, c), _ = Counter(chosen).most_common(1)[0]
        variant = f"{shots} per class"
        return Outcome(key, {"c": c}, selection, torch.stack(ranked), variant)
