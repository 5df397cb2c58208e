"""Checkpoints: written between two batches, whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from lightly_mim.checkpoints import load_whole
from lightly_mim.files import atomic_write
from lightly_mim.training import signals

# The remedy for a damaged checkpoint of a run directory.
OVERWRITE = (
    "copy it again, or pass overwrite to begin the run anew. Of a finished run, "
    "encoder.safetensors holds the encoder."
)


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint, the last; leaves room for another `ModelCheckpoint`."""

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint."""
        return type(self).__qualname__


class SaveBetweenBatches(Callback):
    """Saves within an epoch: now and then, and when a signal asks for it.

    All ranks do it after the same batch, of a window of accumulated ones the last. If
    the process was asked to stop, the run ends by `Preempted` before the next batch,
    when the metrics of the last one are written. After the last batch of an epoch
    nothing is saved here, since the epoch's end saves, and the run ends before the next
    epoch.

    Attributes:
        path:
            The checkpoint, that of `LastCheckpoint`.
        every_minutes:
            Longest time between two checkpoints. 0 to save only when asked.
        every_n_steps:
            Optimiser steps after which several ranks ask each other, which makes the
            host wait for the device. One process looks after every step.
    """

    def __init__(
        self, path: Path | str, every_minutes: float, every_n_steps: int
    ) -> None:
        self.path = Path(path)
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self._stops = False

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Says where a run goes on, and takes the time."""
        self._saved = time.monotonic()
        if trainer.global_step:
            self._say(trainer, "going on")

    def on_train_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Ends the run if a signal asked for it since the last check."""
        self._saved = time.monotonic()
        if self._agreed(trainer, pl_module) == signals.Request.STOP:
            self._say(trainer, "told to stop")
            raise signals.preempted()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends the run if it was saved for that."""
        if self._stops:
            raise signals.preempted()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves if it is time or a signal asked for it."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1 and trainer.global_step % self.every_n_steps:
            return
        request = self._agreed(trainer, pl_module)
        if request == signals.Request.NOTHING:
            return
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()
        self._stops = request == signals.Request.STOP
        self._say(trainer, "saved and told to stop" if self._stops else "saved")

    def _agreed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> signals.Request:
        """Returns the most that any rank was asked for."""
        request = signals.take()
        minutes = (time.monotonic() - self._saved) / 60
        if self.every_minutes and minutes >= self.every_minutes:
            request = max(request, signals.Request.SAVE)
        if trainer.world_size > 1:
            asked = torch.tensor(int(request), device=pl_module.device)
            asked = trainer.strategy.reduce(asked, reduce_op="max")
            request = signals.Request(int(asked))
        return request

    @rank_zero_only
    def _say(self, trainer: pl.Trainer, what: str) -> None:
        print(
            f"{what} in epoch {trainer.current_epoch + 1}/{trainer.max_epochs} after "
            f"optimiser step {trainer.global_step}",
            flush=True,
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place and then renamed.

    Lightning's own go through the system's folder for temporary files, from where a
    rename is a copy when that is another file system. They are read as a whole or not
    at all, and never unpickled.

    Attributes:
        may_write:
            Called before each file; raises if it must not be written.
        previous:
            By the path of a checkpoint, where the one that was there is kept.
        remedy:
            What to do if one is damaged and there is none before it.
    """

    def __init__(
        self,
        may_write: Callable[[], None],
        previous: Mapping[Path, Path] = MappingProxyType({}),
        remedy: str = OVERWRITE,
    ) -> None:
        super().__init__()
        self.may_write = may_write
        self.previous = {_place(path): kept for path, kept in previous.items()}
        self.remedy = remedy

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint, see `TorchCheckpointIO.save_checkpoint`.

        Raises:
            OSError: If it cannot be written, for example to a full disk. The checkpoint
                that was there stays.
        """
        self.may_write()
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # What torch makes of a full disk does not say so.
                reason = error.__context__
                if isinstance(reason, OSError) and reason.errno is not None:
                    words = (reason.errno, os.strerror(reason.errno), str(path))
                    raise OSError(*words) from error
                raise
            self._keep(Path(path))

    def _keep(self, path: Path) -> None:
        """Keeps the checkpoint that is about to be replaced."""
        previous = self.previous.get(_place(path))
        if previous is None or not path.exists():
            return
        if previous.exists() and previous.samefile(path):  # killed just before this
            return
        with atomic_write(previous) as temporary:
            temporary.unlink()
            try:
                os.link(path, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)

    def load_checkpoint(
        self, path: Path | str, map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, on the CPU.

        Raises:
            ValueError: If it is damaged, or no checkpoint of a run.
        """
        path = Path(path)
        previous = self.previous.get(_place(path))
        remedy = (
            f"To go on from the one before it, rename {previous} to {path.name}."
            if previous is not None and previous.exists()
            else f"There is none before it: {self.remedy}"
        )
        foreign = (
            f"{path} is not a checkpoint that a run goes on from: something else wrote "
            "it, or callbacks of your own keep more in it than tensors and plain "
            f"values, which is not unpickled. {remedy}"
        )
        if not path.exists():
            raise ValueError(f"{path} is gone. {remedy}")
        checkpoint = load_whole(path, remedy=remedy, foreign=foreign)
        if not (isinstance(checkpoint, dict) and _PARTS <= checkpoint.keys()):
            raise ValueError(foreign)
        row = checkpoint.get("metrics_row") or {"step": 0}
        numbers = isinstance(row, dict) and all(
            isinstance(name, str) and isinstance(value, int | float)
            for name, value in row.items()
        )
        if not (numbers and isinstance(row.get("step"), int)):
            raise ValueError(foreign)
        return checkpoint


def _place(path: Path) -> Path:
    # Lightning follows links to the folder of a checkpoint.
    return path.parent.resolve() / path.name


_PARTS = {"state_dict", "loops", "optimizer_states", "lr_schedulers", "global_step"}
