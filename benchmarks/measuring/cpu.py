"""CPU time of variants that take turns, memory of this process, and operations."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightly_mim.methods import MaskedImageModel


class Timing(NamedTuple):
    """CPU seconds of a variant, one entry per round."""

    seconds: list[float]

    def ratio(self, other: Timing) -> str:
        """Returns how many times as fast this is as another one, with the range."""
        ratios = [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]
        return f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"

    def __str__(self) -> str:
        return f"{median(self.seconds):.2f}"


def take_turns(variants: Mapping[str, Callable[[], Any]], rounds: int) -> list[Timing]:
    """Runs variants one after the other, round by round, after one round of warm-up.

    Args:
        variants:
            What is to be timed.
        rounds:
            How often.

    Returns:
        One timing per variant.
    """
    seconds: list[list[float]] = [[] for _ in variants]
    for number in range(rounds + 1):
        for taken, run in zip(seconds, variants.values(), strict=True):
            start = time.process_time()
            run()
            if number > 0:
                taken.append(time.process_time() - start)
    return [Timing(taken) for taken in seconds]


def added_memory(run: Callable[[], Any]) -> float:
    """Returns the MiB at the peak of a call over those before, as Linux counts them.

    Args:
        run:
            What is called, three times.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present use again
    before = _status("VmRSS")
    for _ in range(3):
        run()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """Reads a size from Linux's record of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def forward_flops(method: MaskedImageModel, forward: Callable[[], Any]) -> int:
    """Returns the operations of a forward pass, two for a product and its sum.

    Args:
        method:
            The method.
        forward:
            Calls it, or a part of it.
    """
    # The counter does not know the fused kernel of a CPU.
    method.choose_attention(torch.device("cpu"), bf16=True)
    with FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops())


def processor() -> str:
    """Returns the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return models[0].strip() if models else platform.processor()
