"""What training steps take on a GPU, and whether they wait for it."""

from __future__ import annotations

import subprocess
import threading
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

WARM_UP = 3  # steps in which kernels are loaded and chosen


class Watch(pl.Callback):
    """Measures steps, and refuses those that wait for the device.

    Attributes:
        losses:
            The loss of each step, on the device.
        seconds:
            Time of the steps after `WARM_UP`.
        peak:
            Most bytes that were allocated at a time.
        utilisation:
            Mean share of time in which the GPU computed, in per cent, or why it is not
            known.

    Args:
        steps:
            Number of steps.
        device:
            Where they are taken.
        scaled:
            Whether the optimiser's step may wait, for float16's scaler.
        refuses:
            Whether another wait is an error.
    """

    def __init__(
        self, steps: int, device: torch.device, scaled: bool, refuses: bool
    ) -> None:
        self.losses: list[Tensor] = []
        self.seconds = 0.0
        self.peak = 0
        self.utilisation = "too short"
        self._steps, self._scaled = steps, scaled
        self._cuda = device.type == "cuda"
        self._refuses = refuses and self._cuda
        self._ended = threading.Event()

    def on_train_batch_start(self, *args: Any) -> None:
        """Begins to measure, and to refuse waits."""
        step: int = args[-1]
        if step == WARM_UP:
            if self._cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                threading.Thread(target=self._look, daemon=True).start()
            self._start = time.perf_counter()
        # The last one ends the epoch, where the losses are looked at.
        if self._refuses and WARM_UP <= step < self._steps - 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Lets float16's scaler look for infinite gradients."""
        if self._refuses and self._scaled:
            torch.cuda.set_sync_debug_mode("default")

    def on_train_batch_end(self, *args: Any) -> None:
        """Keeps the loss, and ends the measurement."""
        if self._refuses:
            torch.cuda.set_sync_debug_mode("default")
        _, _, outputs, _, step = args
        self.losses.append(outputs["loss"].detach())
        if step == self._steps - 1:
            if self._cuda:
                torch.cuda.synchronize()
                self.peak = torch.cuda.max_memory_allocated()
            self.seconds = time.perf_counter() - self._start
            self._ended.set()

    def _look(self) -> None:
        """Samples the utilisation until the last step."""
        found: list[int] = []
        while not self._ended.wait(0.2):
            try:
                found.append(utilisation())
                self.utilisation = f"{sum(found) / len(found):.0f}"
            except (OSError, ValueError, subprocess.SubprocessError):
                self.utilisation = "no NVML, no nvidia-smi"
                return


def utilisation() -> int:
    """Returns the share of the last moment in which the GPU computed, in per cent.

    Raises:
        OSError: If there is neither the package nvidia-ml-py nor nvidia-smi.
        SubprocessError: If nvidia-smi does not know.
        ValueError: If it says something else.
    """
    try:
        return torch.cuda.utilization()
    except (ModuleNotFoundError, RuntimeError):
        device = f"GPU-{torch.cuda.get_device_properties().uuid}"
        words = ["nvidia-smi", "-i", device, "--query-gpu=utilization.gpu"]
        words.append("--format=csv,noheader,nounits")
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return int(done.stdout)
