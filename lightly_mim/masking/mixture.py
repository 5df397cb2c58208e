"""A mixture of ways to mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Generator

from lightly_mim.arguments import NonEmpty, NonNegativeFloat
from lightly_mim.masking.base import Masking, mark_lowest, scan_from_a_side
from lightly_mim.masking.mask import Mask


class MixtureMasking(Masking):
    """Masks each image of a batch in one of several ways, drawn by their weights.

    The masks lie on the coarsest grid that all of them fit. Every image gets the
    smallest of their counts there: where the drawn mask has more, the masked cells next
    to a side of the image, drawn for each image, become visible. Ways of the same ratio
    and mask_patch_size have the same count, and nothing is changed. Each way draws a
    mask for every image, whether it is used or not.

    Attributes:
        maskings:
            The ways to mask, one or more.
        weights:
            How often each one is drawn, in relation to the others: none of them
            negative and not all of them zero. None for equal ones.

    Raises:
        ValueError: If there is nothing to mix, or the weights do not fit.
    """

    def __init__(
        self,
        maskings: NonEmpty[Masking],
        weights: Sequence[NonNegativeFloat] | None = None,
    ) -> None:
        weights = [1.0] * len(maskings) if weights is None else weights
        if len(weights) != len(maskings):
            raise ValueError(
                "weights of a mixture has one for each masking, got "
                f"{len(weights)} for {len(maskings)} masking(s)."
            )
        if not any(weights):
            raise ValueError(
                f"Not all weights of a mixture are zero, got weights={weights}."
            )
        self.maskings = maskings
        self.weights = weights

    def __call__(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        device: torch.device | str | None = None,
        generator: Generator | None = None,
    ) -> Mask:
        """Draws the masks of a batch, see `Masking.__call__`.

        Raises:
            ValueError: If one of the maskings does not fit the images.
        """
        weighted = [
            (masking, weight)
            for masking, weight in zip(self.maskings, self.weights, strict=True)
            if weight > 0
        ]
        drawn = [
            Mask.of(masking(batch_size, image_size, device, generator))
            for masking, _ in weighted
        ]
        heights, widths = zip(*(mask.grid for mask in drawn), strict=True)
        grid = math.lcm(*heights), math.lcm(*widths)
        laid = [mask.on(grid) for mask in drawn]

        uniform = torch.rand((batch_size, 1, 1), device=device, generator=generator)
        edges = list(accumulate(weight for _, weight in weighted))
        cells = laid[0].cells
        for edge, mask in zip(edges, laid[1:], strict=False):
            cells = torch.where(uniform < edge / edges[-1], cells, mask.cells)

        count = min(mask.count for mask in laid)
        if any(mask.count > count for mask in laid):
            scan = scan_from_a_side((batch_size, *grid), device, generator)
            cells = mark_lowest(scan.masked_fill(~cells, cells[0].numel()), count)
        return Mask(cells, count)
