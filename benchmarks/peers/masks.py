"""Masks image by image, as the transform of a data set draws them in NumPy."""

from __future__ import annotations

import math
import random

import numpy as np

_GENERATOR = np.random.default_rng(0)


def numpy_random(grid: int, count: int) -> np.ndarray:
    """Returns a mask of patches at random, by a permutation.

    Args:
        grid:
            Side of the grid in patches.
        count:
            How many are masked.
    """
    mask = np.zeros(grid * grid, dtype=bool)
    mask[_GENERATOR.permutation(grid * grid)[:count]] = True
    return mask.reshape(grid, grid)


def numpy_block(grid: int, count: int) -> np.ndarray:
    """Returns a mask by BEiT's algorithm 1, with slices for its loops over patches.

    Args:
        grid:
            Side of the grid in patches.
        count:
            How many are masked, or a few less.
    """
    mask = np.zeros((grid, grid), dtype=bool)
    left_to_mask = count
    while left_to_mask > 0:
        for _ in range(10):  # tries of a rectangle that adds some, and not too many
            area = random.uniform(16, left_to_mask)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= grid or w >= grid:
                continue
            y, x = random.randint(0, grid - h), random.randint(0, grid - w)
            part = mask[y : y + h, x : x + w]
            added = h * w - int(np.count_nonzero(part))
            if 0 < added <= left_to_mask:
                part[:] = True
                left_to_mask -= added
                break
        else:
            break
    return mask
