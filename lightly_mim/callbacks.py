"""What watches a pretraining run: pictures, the metrics file, lines in a log."""

from __future__ import annotations

import csv
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from lightly_mim import preemption
from lightly_mim.checkpoints import load_whole
from lightly_mim.evaluation.features import evaluating
from lightly_mim.files import atomic_write
from lightly_mim.masking import Mask, average_distance
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.reporting.figures import reconstruction_grid

_GREY = 0.5


class ReconstructionPictures(Callback):
    """Writes a grid of original | masked | reconstruction | pasted pictures.

    The images and their masks stay the same from epoch to epoch. The reconstruction
    column shows what the model predicted alone, on grey; the pasted column shows it in
    its surroundings. A target that was normalised per patch or window is turned back
    into pixels with the true statistics of the image, which the model did not predict.

    Attributes:
        images:
            Float tensor with shape (num_images, channels, height, width), normalised.
        mask:
            The mask of each image.
        directory:
            Where the pictures go, as `epoch_0010.png`.
        every_n_epochs:
            How often, besides the last epoch. 0 for the last epoch only.
    """

    def __init__(
        self, images: Tensor, mask: Mask, directory: Path | str, every_n_epochs: int
    ) -> None:
        self.images = images
        self.mask = mask
        self.directory = Path(directory)
        self.every_n_epochs = every_n_epochs

    @rank_zero_only
    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Writes the pictures when it is time."""
        if is_due(trainer, self.every_n_epochs):
            path = self.directory / f"epoch_{trainer.current_epoch + 1:04d}.png"
            write_reconstructions(method_of(pl_module), self.images, self.mask, path)


def is_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Returns whether the epoch that ends is one of those, or the last one.

    Args:
        trainer:
            The Trainer.
        every_n_epochs:
            How often, besides the last epoch. 0 for the last epoch only.
    """
    epoch = trainer.current_epoch + 1
    last = epoch == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
    return last or bool(every_n_epochs and epoch % every_n_epochs == 0)


def log_now(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Logs values at the step of the moment, also where `LightningModule.log` cannot.

    Args:
        trainer:
            The Trainer.
        metrics:
            The values by name.
    """
    for logger in trainer.loggers:
        row = {**metrics, "epoch": trainer.current_epoch}
        logger.log_metrics(row, step=trainer.global_step)
        logger.save()


def method_of(pl_module: pl.LightningModule) -> MaskedImageModel:
    """Returns the method that a `Pretraining` trains."""
    method = pl_module.method
    assert isinstance(method, MaskedImageModel)
    return method


@contextmanager
def undisturbed(method: MaskedImageModel) -> Iterator[torch.device]:
    """Puts a method in evaluation mode, and leaves its random states alone.

    Args:
        method:
            The method, which is back in its modes afterwards.

    Yields:
        The device that the method is on.
    """
    device = next(method.parameters()).device
    gpus = [device] if device.type == "cuda" else []
    with evaluating(method, device), torch.random.fork_rng(devices=gpus):
        yield device


def write_reconstructions(
    method: MaskedImageModel, images: Tensor, mask: Mask, path: Path | str
) -> None:
    """Writes a grid of original | masked | reconstruction | pasted pictures.

    Args:
        method:
            The method that predicts. Its mode, and the random numbers of the run, stay
            as they were.
        images:
            Float tensor with shape (num_images, channels, height, width), normalised.
        mask:
            The mask of each image.
        path:
            The PNG file.
    """
    with undisturbed(method) as device:
        images, mask = images.to(device), mask.to(device)
        pasted = method.reconstruct(images, mask)
    masked = mask.pixels((images.shape[-2], images.shape[-1]))
    mean = torch.tensor(method.encoder.mean, device=device)[:, None, None]
    std = torch.tensor(method.encoder.std, device=device)[:, None, None]
    original, pasted = (images * std + mean).cpu(), (pasted * std + mean).cpu()
    masked = masked.cpu()
    reconstruction_grid(
        original,
        original.masked_fill(masked, _GREY),
        pasted.masked_fill(~masked, _GREY),
        pasted,
        path,
    )


class MaskDistance(Callback):
    """Logs `avg_dist`, the mean distance from a masked pixel to a visible one."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs it when Lightning logs."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        part = (batch_idx + 1) % trainer.accumulate_grad_batches  # of a step
        if every and part == 0 and trainer.global_step % every == 0:
            distance = average_distance(outputs["mask"], outputs["image_size"]).mean()
            pl_module.log("avg_dist", distance, sync_dist=trainer.world_size > 1)


class ProgressBar(RichProgressBar):
    """Lightning's rich bar with the loss of the last log.

    A metric that is logged with `prog_bar=True` makes Lightning wait for the device in
    every step.
    """

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Returns what stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        if "train_loss_step" in trainer.logged_metrics:
            loss = trainer.logged_metrics["train_loss_step"]
            if loss is not getattr(self, "_shown", None):
                self._shown, self._text = loss, f"{float(loss):.4f}"
            metrics["train_loss"] = self._text
        return metrics


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
        if self._agreed(trainer, pl_module) == preemption.Request.STOP:
            self._say(trainer, "told to stop")
            raise preemption.preempted()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ends the run if it was saved for that."""
        if self._stops:
            raise preemption.preempted()

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
        if request == preemption.Request.NOTHING:
            return
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()
        self._stops = request == preemption.Request.STOP
        self._say(trainer, "saved and told to stop" if self._stops else "saved")

    def _agreed(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> preemption.Request:
        """Returns the most that any rank was asked for."""
        request = preemption.take()
        minutes = (time.monotonic() - self._saved) / 60
        if self.every_minutes and minutes >= self.every_minutes:
            request = max(request, preemption.Request.SAVE)
        if trainer.world_size > 1:
            asked = torch.tensor(int(request), device=pl_module.device)
            asked = trainer.strategy.reduce(asked, reduce_op="max")
            request = preemption.Request(int(asked))
        return request

    @rank_zero_only
    def _say(self, trainer: pl.Trainer, what: str) -> None:
        print(
            f"{what} in epoch {trainer.current_epoch + 1}/{trainer.max_epochs} after "
            f"optimiser step {trainer.global_step}",
            flush=True,
        )


class EpochLines(Callback):
    """Prints a line after every epoch: for logs, where a progress bar is noise."""

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Takes the time, if the run goes on within an epoch."""
        self._start = time.perf_counter()
        # What another epoch logged stays there.
        self._before = dict(trainer.callback_metrics)

    def on_train_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Takes the time."""
        self._start = time.perf_counter()
        # What another epoch logged stays there.
        self._before = dict(trainer.callback_metrics)

    @rank_zero_only
    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Prints the line."""
        metrics = trainer.callback_metrics
        losses = ("train_loss", "val_loss")
        looks = ("probe_top1", "knn_top1", "alignment", "rankme")
        names = (*losses, *looks, "avg_dist", "images_per_second")
        values = "  ".join(
            f"{name} {float(metrics[name]):.4g}"
            for name in names
            if name in metrics and metrics[name] is not self._before.get(name)
        )
        seconds = time.perf_counter() - self._start
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {values}  "
            f"{seconds:.1f} s",
            flush=True,
        )


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger, but a run that goes on keeps its `metrics.csv`.

    Lightning's own deletes the file when a run is resumed.

    Attributes:
        may_write:
            Called before rows are written; raises if they must not be.
    """

    def __init__(self, out: Path | str, may_write: Callable[[], None]) -> None:
        super().__init__(save_dir=str(out), name="", version="")
        self.may_write = may_write

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file, made on rank zero when it is first needed."""
        if self._experiment is None:
            self._experiment = _MetricsFile(self.log_dir, self.may_write)
        return self._experiment

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Drops the rows that a resumed run is going to write again.

        Args:
            step:
                Number of optimiser steps in the checkpoint that the run resumes from.
        """
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        if not path.exists():
            return
        header, rows = _read_rows(path, step)
        _write_rows(path, header, rows)


def _read_rows(
    path: Path, step: float = math.inf
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the header of a `metrics.csv` and its whole rows, those before a step.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            # A killed run may leave half a row at the end.
            return header, [row for row in reader if _step(row) < step]
    except (ValueError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Delete it: the run goes on, and writes the "
            "rest of it."
        ) from error


def _step(row: Mapping[str, str | None]) -> float:
    whole = None not in row and all(value is not None for value in row.values())
    return int(row["step"] or 0) if whole and row["step"] else math.inf


class _MetricsFile(ExperimentWriter):
    def __init__(self, log_dir: str, may_write: Callable[[], None]) -> None:
        self.may_write = may_write
        super().__init__(log_dir)

    def save(self) -> None:
        if self.metrics:
            rows, self.metrics = self.metrics, []  # not tried again if it raises
            self.may_write()
            self.metrics = rows
        super().save()

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            self.metrics_keys, _ = _read_rows(path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write_rows(path, fieldnames, _read_rows(path)[1])


def _write_rows(path: Path, header: list[str], rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=header)
        writer.writeheader()
        writer.writerows(rows)


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
    """

    def __init__(
        self,
        may_write: Callable[[], None],
        previous: Mapping[Path, Path] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.may_write = may_write
        self.previous = previous

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
        previous = self.previous.get(path.absolute())
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
        previous = self.previous.get(path.absolute())
        remedy = (
            f"To go on from the one before it, rename {previous} to {path.name}."
            if previous is not None and previous.exists()
            else "There is none before it: copy it again, or pass overwrite to begin "
            "the run anew. Of a finished run, encoder.safetensors holds the encoder."
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
        return checkpoint


_PARTS = {"state_dict", "loops", "optimizer_states", "lr_schedulers", "global_step"}
