"""Resamples tables of relative positions as SimMIM's code does for fine-tuning."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from scipy.optimize import brentq
from torch import Tensor

Tables = Literal["timm", "simmim"]

# Between these the code looks for the ratio of neighbouring distances.
_RATIOS = 1.01, 1.5


def spline_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Returns a window's table of relative positions for a window of another size.

    The old values are taken to lie at distances from the centre that grow by a constant
    ratio from step to step, as far out as the new ones, and a cubic spline is read at
    the new ones, whole numbers (https://github.com/microsoft/SimMIM, utils.py).

    Args:
        table:
            Float tensor with shape ((2 * height - 1) * (2 * width - 1), num_heads).
        old:
            (height, width) of the window of the table.
        new:
            (height, width) of the other window.

    Returns:
        Tensor with shape ((2 * new_height - 1) * (2 * new_width - 1), num_heads), of
        the table's type and on its device.

    Raises:
        ValueError: If a side of the old window is less than 3, too few for a cubic.
    """
    if min(old) < 3:
        raise ValueError(
            "A cubic spline needs windows of at least 3 x 3, got "
            f"{old[0]} x {old[1]}. Use tables='timm'."
        )
    at = [_distances(*sides) for sides in zip(old, new, strict=True)]
    to = [np.arange(1 - side, side) for side in new]
    heads = table.detach().double().cpu().numpy().T
    resampled = [
        RectBivariateSpline(*at, head.reshape(len(at[0]), -1))(*to).ravel()
        for head in heads
    ]
    return torch.from_numpy(np.stack(resampled, axis=1)).to(table)


def _distances(old: int, new: int) -> np.ndarray:
    """Returns where the 2 * old - 1 values of a side lie."""

    def reach(ratio: float) -> float:
        return float((ratio ** np.arange(old - 1)).sum()) - (new - 1)

    low, high = _RATIOS
    if reach(low) >= 0:
        ratio = low
    elif reach(high) <= 0:
        ratio = high
    else:
        ratio = brentq(reach, low, high)
    steps = np.cumsum(ratio ** np.arange(old - 1))
    return np.concatenate([-steps[::-1], [0.0], steps])
