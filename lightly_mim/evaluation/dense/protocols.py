"""How classes of pixels are predicted from patch tokens: kNN and a linear classifier.

The papers [0] and [1] are those of `evaluate_dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lightly_mim.arguments import NonEmpty, PositiveFloat, PositiveInt, checked, one_of
from lightly_mim.data.segmentation import IGNORED
from lightly_mim.evaluation.probes.knn import knn_predict_grid
from lightly_mim.evaluation.probes.linear import fit_linear_grid
from lightly_mim.evaluation.probes.standardize import Standardizer


class PatchBank(NamedTuple):
    """Training tokens of one layer, (num_patches, dim), and labels, (num_patches,)."""

    tokens: Tensor
    labels: Tensor


# From tokens with shape (num_images, h, w, dim) and (height, width) to classes, an
# int64 tensor with shape (num_images, height, width).
Predictor = Callable[[Tensor, tuple[int, int]], Tensor]


class DenseProtocol(Protocol):
    """How classes are predicted from patch tokens.

    Attributes:
        name:
            What `evaluate_dense`, the command line, tables and `dense.json` call it.
    """

    name: ClassVar[str]

    def predictors(
        self, bank: PatchBank, num_classes: int, *, seed: int = 0
    ) -> list[tuple[dict[str, float], Predictor]]:
        """Returns a predictor for each setting that may be chosen."""

    def predictor(
        self,
        bank: PatchBank,
        num_classes: int,
        chosen: Mapping[str, float],
        *,
        seed: int = 0,
    ) -> Predictor:
        """Returns the predictor of the chosen setting."""


@checked
@dataclass(frozen=True)
class DenseKNN:
    """kNN on patch tokens: every patch takes the vote of the nearest training patches.

    Attributes:
        ks:
            Numbers of neighbours to choose from. Default from CAPI. Those that are
            larger than the number of patches are left out.
        temperatures:
            Temperatures to choose from, see `knn_predict_grid`.
        chunk_size:
            Number of patches that look for neighbours at a time; bounds the memory.
    """

    name: ClassVar[str] = "knn"

    ks: NonEmpty[PositiveInt] = (1, 3, 10, 30)
    temperatures: NonEmpty[PositiveFloat] = (0.02, 0.07, 0.2)
    chunk_size: PositiveInt = 1024

    def predictors(
        self, bank: PatchBank, num_classes: int, *, seed: int = 0
    ) -> list[tuple[dict[str, float], Predictor]]:
        """See `DenseProtocol`. All settings share one search for neighbours."""
        ks = [k for k in self.ks if k <= len(bank.labels)] or [len(bank.labels)]
        last: list[Tensor] = []  # the tokens, and what was found for them

        def grid(tokens: Tensor) -> Tensor:
            if not last or last[0] is not tokens:
                found = knn_predict_grid(
                    tokens.flatten(0, 2),
                    *bank,
                    num_classes,
                    ks,
                    self.temperatures,
                    chunk_size=self.chunk_size,
                )
                last[:] = [tokens, found]
            return last[1]

        def predictor(i: int, j: int) -> Predictor:
            def predict(tokens: Tensor, size: tuple[int, int]) -> Tensor:
                return enlarge(grid(tokens)[i, j].view(tokens.shape[:3]), size)

            return predict

        return [
            ({"k": k, "temperature": temperature}, predictor(i, j))
            for i, k in enumerate(ks)
            for j, temperature in enumerate(self.temperatures)
        ]

    def predictor(
        self,
        bank: PatchBank,
        num_classes: int,
        chosen: Mapping[str, float],
        *,
        seed: int = 0,
    ) -> Predictor:
        """See `DenseProtocol`."""
        one = DenseKNN([int(chosen["k"])], [chosen["temperature"]], self.chunk_size)
        ((_, predictor),) = one.predictors(bank, num_classes)
        return predictor


@checked
@dataclass(frozen=True)
class DenseLinear:
    """A linear classifier on patch tokens, its logits upsampled bilinearly, as in [1].

    Attributes:
        learning_rates:
            Learning rates to choose from, see `fit_linear_grid`.
        epochs:
            Number of passes over the training patches.
        batch_size:
            Largest number of patches in a batch.
    """

    name: ClassVar[str] = "linear"

    learning_rates: NonEmpty[PositiveFloat] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 256

    def predictors(
        self, bank: PatchBank, num_classes: int, *, seed: int = 0
    ) -> list[tuple[dict[str, float], Predictor]]:
        """See `DenseProtocol`. All learning rates are trained at once."""
        standardize = Standardizer.fit(bank.tokens)
        weights, biases = fit_linear_grid(
            standardize(bank.tokens),
            bank.labels,
            num_classes,
            self.learning_rates,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
        )

        def predictor(weight: Tensor, bias: Tensor) -> Predictor:
            def predict(tokens: Tensor, size: tuple[int, int]) -> Tensor:
                logits = functional.linear(standardize(tokens), weight, bias)
                logits = functional.interpolate(
                    logits.movedim(-1, 1), size, mode="bilinear", align_corners=False
                )
                return logits.argmax(dim=1)

            return predict

        probes = zip(self.learning_rates, weights, biases, strict=True)
        return [({"learning_rate": rate}, predictor(w, b)) for rate, w, b in probes]

    def predictor(
        self,
        bank: PatchBank,
        num_classes: int,
        chosen: Mapping[str, float],
        *,
        seed: int = 0,
    ) -> Predictor:
        """See `DenseProtocol`."""
        one = DenseLinear([chosen["learning_rate"]], self.epochs, self.batch_size)
        ((_, predictor),) = one.predictors(bank, num_classes, seed=seed)
        return predictor


DENSE_PROTOCOLS: dict[str, type[Any]] = {
    each.name: each for each in (DenseKNN, DenseLinear)
}
DenseProtocolName = Annotated[str, one_of(DENSE_PROTOCOLS)]


def patch_labels(masks: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Returns the class that most pixels of each patch have, int64 (batch_size, h, w).

    Masks have shape (batch_size, height, width), with -1 where a pixel has no class and
    does not count; a patch without any has -1. Of equally many pixels the lowest number
    wins.

    Raises:
        ValueError: If the grid of h x w patches does not divide the masks.
    """
    batch_size, height, width = masks.shape
    h, w = grid
    if height % h or width % w:
        raise ValueError(
            f"{h} x {w} patches do not divide masks of {height} x {width} pixels."
        )
    cells = torch.arange(batch_size * h * w, device=masks.device).view(-1, h, w)
    cells = enlarge(cells, (height, width))
    valid = masks != IGNORED
    index = cells[valid] * num_classes + masks[valid]
    votes = torch.bincount(index, minlength=batch_size * h * w * num_classes)
    votes = votes.view(batch_size, h, w, num_classes)
    labels: Tensor = votes.argmax(dim=-1)  # the first of equals
    return labels.masked_fill(votes.sum(dim=-1) == 0, IGNORED)


def enlarge(classes: Tensor, size: tuple[int, int]) -> Tensor:
    """Gives all pixels of a patch, in (B, h, w), its class, in (B, *size)."""
    height, width = size[0] // classes.shape[1], size[1] // classes.shape[2]
    return classes.repeat_interleave(height, 1).repeat_interleave(width, 2)
