"""What a run tells while it trains: `metrics.csv`, a bar, lines in a log."""

from __future__ import annotations

import csv
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.utilities.apply_func import convert_tensors_to_scalars
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from lightly_mim.files import atomic_write, check_regular


@contextmanager
def quiet(world_size: int) -> Iterator[None]:
    """Keeps Lightning from saying what our own lines say, or what nobody can change.

    Args:
        world_size:
            Number of processes. With several, what it says while they look for each
            other stays: it tells where a run hangs.
    """
    talkers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in _LIGHTNING]
    levels = [logger.level for logger in talkers]
    with warnings.catch_warnings():
        # `choose_layout` refuses a SLURM job in which this matters.
        warnings.filterwarnings("ignore", "The `srun` command is available")
        # `accelerator="cpu"` says so.
        warnings.filterwarnings("ignore", "GPU available but not used")
        # Of Lightning's own call of PyTorch.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`")
        for logger in talkers:
            if world_size == 1:
                logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(talkers, levels, strict=True):
                logger.setLevel(level)


_LIGHTNING = "pytorch_lightning", "lightning_fabric"


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


class EpochLines(Callback):
    """Prints a line after every epoch: for logs, where a progress bar is noise.

    Args:
        *names:
            The metrics in it, of which those are shown that the epoch has logged.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

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
        self.on_train_start(trainer, pl_module)

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Prints the line."""
        metrics = trainer.callback_metrics  # of all processes, which all ask for them
        if not trainer.is_global_zero:
            return
        values = "  ".join(
            f"{name} {float(metrics[name]):.4g}"
            for name in self.names
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

    def pending(self, trainer: pl.Trainer) -> dict[str, Any] | None:
        """Returns the row that Lightning is about to write, None if there is none.

        Lightning writes the metrics of a batch, and of an epoch, after the hooks in
        which a checkpoint is made: a run that is killed in between has a checkpoint
        behind its last row. Every rank has to call this.

        Args:
            trainer:
                The Trainer, within a hook at the end of a batch or an epoch.
        """
        if not trainer.training:
            return None
        # Nothing public tells the metrics of the moment from those of earlier ones.
        connector = trainer._logger_connector
        if connector._first_loop_iter is not None:  # within an epoch
            rows = trainer.fit_loop.epoch_loop._batches_that_stepped
            if trainer.global_step != rows + 1 or not connector.should_update_logs:
                return None
        row: dict[str, Any] = convert_tensors_to_scalars(connector.metrics["log"])
        if not row:
            return None
        if "step" in row:  # by which a user's callback chooses the axis
            return row | {"step": int(row["step"])}
        return {"epoch": trainer.current_epoch, **row, "step": trainer.global_step - 1}

    @rank_zero_only
    def go_on(
        self, step: int, pending: Mapping[str, Any] | None, loggers: list[Logger]
    ) -> None:
        """Makes the file end at the checkpoint that a run goes on from.

        Args:
            step:
                Number of optimiser steps in the checkpoint. Later rows are dropped.
            pending:
                The row that was about to be written, see `pending`. It is logged if the
                file does not have it.
            loggers:
                Where to log it, this one among them.
        """
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        rows: list[dict[str, Any]] = []
        if path.exists():
            header, rows = _read_rows(path, step)
            _write_rows(path, header, rows)
        else:  # somebody has deleted it: the other loggers have the row
            loggers = [self]
        if pending is None or any(
            int(row["step"]) == pending["step"] and all(map(row.get, pending))
            for row in rows
        ):
            return
        metrics = {name: value for name, value in pending.items() if name != "step"}
        for logger in loggers:
            logger.log_metrics(metrics, step=pending["step"])
            logger.save()


def _read_rows(
    path: Path, step: float = math.inf
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the header of a `metrics.csv` and its whole rows, those before a step.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        check_regular(path)
        with path.open(newline="") as file:
            # A killed run may leave half a row at the end.
            reader = csv.DictReader(line for line in file if line.endswith("\n"))
            header = list(reader.fieldnames or [])
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
