"""Random numbers as a function of a key, such as (seed, epoch, index).

What is keyed does not depend on the number of workers or processes, on what was drawn
before, or on where a run was cut and resumed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils import deterministic

from lightly_mim.arguments import NonNegativeInt, fits


def _seed_sequence(*key: int | str) -> np.random.SeedSequence:
    # SeedSequence pads with zeros and cuts integers into 32-bit words, so that on its
    # own (1, 2) and (1, 2, 0), or (2**32,) and (0, 1), are the same. Each element is
    # therefore led by its type and its number of words.
    words: list[int] = []
    for element in key:
        if isinstance(element, str):
            words += [0, zlib.crc32(element.encode())]
            continue
        if not fits(element, NonNegativeInt):
            raise ValueError(
                "The key of a seed is made of strings and of whole numbers from 0, got "
                f"{element!r} in {key}."
            )
        number = int(element)
        parts = [number & 0xFFFFFFFF]
        while number := number >> 32:
            parts.append(number & 0xFFFFFFFF)
        words += [len(parts), *parts]
    return np.random.SeedSequence([len(key), *words])


def seed_from(*key: int | str) -> int:
    """Returns a seed that is a function of the key and of nothing else.

    Every element counts, and so does their order. Only 32 bits, since torch's CPU
    generator uses no more of its seed.

    Args:
        key:
            Strings, and whole numbers of any size from 0.

    Returns:
        A whole number in [0, 2**32).

    Raises:
        ValueError: If a number is negative or not whole.
    """
    return int(_seed_sequence(*key).generate_state(1)[0])


@contextmanager
def keyed_random_state(*key: int | str) -> Iterator[None]:
    """Seeds torch (CPU), numpy and Python's random inside, and restores them after.

    The three get different seeds: torch and numpy use the same generator (MT19937), and
    under one seed would draw the same bits.

    Args:
        key:
            As in `seed_from`.

    Raises:
        ValueError: If a number of the key is negative or not whole.
    """
    seeds = [int(seed) for seed in _seed_sequence(*key).generate_state(3)]
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002, transforms use this one
    python_state = random.getstate()
    try:
        # Not torch.manual_seed, which seeds the accelerators as well.
        torch.default_generator.manual_seed(seeds[0])
        np.random.seed(seeds[1])  # noqa: NPY002
        random.seed(seeds[2])
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Takes the operations on a CPU that give the same result every time.

    A look-up in a large table, such as Swin's relative positions, sums its gradient in
    the order in which threads arrive otherwise.

    Args:
        device:
            Where is computed. Nothing changes on other devices than the CPU.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A debugging aid that fills every new tensor with NaN.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
