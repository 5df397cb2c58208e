"""The LightningModule beneath pretraining and fine-tuning."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lightly_mim.data import KeyedLoader
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.training.cuda import scales_gradients
from lightly_mim.training.logs import MetricsLogger


class TrainingModule(pl.LightningModule):
    """Clips, watches for NaN, tells the speed, and goes on within an epoch.

    Logs `train_loss_step`, `train_loss`, `lr`, `grad_norm` and `images_per_second`. A
    subclass calls `log_loss` in its `training_step` and `use` in its
    `configure_optimizers`.

    Attributes:
        trained:
            What is trained.
        train_loss:
            The mean loss of the epoch.
        takes_other_images:
            Whether a run that goes on may do so with other images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.takes_other_images = False
        self._loader_state: dict[str, Any] | None = None
        # In the checkpoint, so that an epoch that was cut has the mean of all of it.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_loss.persistent(True)

    @property
    def trained(self) -> nn.Module:
        """What is trained, and clipped as one."""
        raise NotImplementedError

    def log_loss(self, loss: Tensor, rows: int) -> None:
        """Logs the loss of a micro-batch, and notes whether it is finite.

        Args:
            loss:
                Tensor with shape ().
            rows:
                Number of images of this rank.
        """
        loss = loss.detach()
        self._note_non_finite(loss)
        self._images_seen += rows * self.trainer.world_size
        self.log("train_loss_step", loss, batch_size=rows)
        self.train_loss.update(loss)
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)

    # Optimiser.

    def use(
        self,
        optimizer: Optimizer,
        schedule: LambdaLR,
        total_steps: int,
        clip_grad: float | None,
    ) -> dict[str, Any]:
        """Returns what Lightning's `configure_optimizers` returns.

        Args:
            optimizer:
                The optimiser.
            schedule:
                Its schedule, which steps with it.
            total_steps:
                Optimiser steps in the run.
            clip_grad:
                Largest norm of the gradient. None or 0 for the Trainer's, or none.
        """
        self._schedule = schedule
        self._total_steps = total_steps
        self._clip_grad = clip_grad
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by our norm, or the Trainer's, and logs the norm before it."""
        if gradient_clip_algorithm == "value":
            raise ValueError("Gradients are clipped by norm, not by value.")
        largest = gradient_clip_val or self._clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), largest)
        if not scales_gradients(str(self.trainer.precision)):
            self._note_non_finite(norm)
        self.log("grad_norm", norm)
        # Not the bare number, which Lightning would copy and wait for.
        self.log("lr", torch.full_like(norm, optimizer.param_groups[0]["lr"]))

    # Non-finite losses are noted on the device and read when something is logged or
    # saved, so that no step waits for the device.

    def on_fit_start(self) -> None:
        """Prepares the note of non-finite losses and the clock."""
        self._bad_step = torch.tensor(-1, device=self.device)
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._log_every = log_every or sys.maxsize
        self._start_clock()

    def _note_non_finite(self, value: Tensor) -> None:
        bad = (self._bad_step < 0) & ~torch.isfinite(value)
        self._bad_step = self._bad_step.masked_fill(bad, self.global_step)

    def check_finite(self) -> None:
        """Ends the run if a loss or a gradient was not finite.

        Raises:
            NonFiniteLossError: If so, naming the step, the learning rate and the last
                good checkpoint.
        """
        step = int(self.trainer.strategy.reduce(self._bad_step, reduce_op="max"))
        if step < 0:
            return
        schedule = self._schedule
        lr = schedule.base_lrs[0] * schedule.lr_lambdas[0](step)
        callback = self.trainer.checkpoint_callback
        last_good = getattr(callback, "best_model_path", "") or "none was written yet"
        raise NonFiniteLossError(
            f"The loss or its gradient became NaN or infinite in optimiser step {step} "
            f"at a learning rate of {lr:.3g}. The last good checkpoint: {last_good}. "
            "Lower the learning rate, lengthen the warm-up, use float32 precision, or "
            "look for NaN among the images if they are floats of your own."
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Checks the loss when Lightning logs, and logs the speed of an epoch."""
        last = self.trainer.is_last_batch
        if last or self.global_step % self._log_every == 0:
            self.check_finite()
        if last:
            seconds = time.perf_counter() - self._epoch_start
            self.log(
                "images_per_second",
                self._images_seen / seconds,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                rank_zero_only=True,
            )

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's mean and count, unless the run goes on within it."""
        self.train_loss.reset()
        self._start_clock()

    def _start_clock(self) -> None:
        self._images_seen = 0
        self._epoch_start = time.perf_counter()

    # Resume.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps weights that a non-finite loss has spoilt out of a checkpoint.

        Adds where the loader is, and the row of `metrics.csv` that is still to come.
        """
        self.check_finite()
        for logger in self._metrics_loggers():
            checkpoint["metrics_row"] = logger.pending(self.trainer)
        loader = self.trainer.train_dataloader
        if isinstance(loader, KeyedLoader):
            checkpoint["train_loader"] = loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes where the loader was, and makes `metrics.csv` end at the checkpoint."""
        self._loader_state = checkpoint.get("train_loader")
        for logger in self._metrics_loggers():
            step, row = checkpoint["global_step"], checkpoint.get("metrics_row")
            logger.go_on(step, row, self.trainer.loggers)

    def _metrics_loggers(self) -> list[MetricsLogger]:
        # Without a Trainer the weights alone are loaded, by `load_from_checkpoint`.
        loggers = self._trainer.loggers if self._trainer else []
        return [logger for logger in loggers if isinstance(logger, MetricsLogger)]

    def on_train_start(self) -> None:
        """Puts the loader where it was, and checks that it has the same images.

        Lightning does so only if nothing asked for the loader before it restored the
        checkpoint, and only within an epoch.
        """
        loader = self.trainer.train_dataloader
        if self._loader_state is not None and isinstance(loader, KeyedLoader):
            state = dict(self._loader_state)
            if self.takes_other_images:
                new = loader.state_dict()
                state |= {name: new[name] for name in ("num_images", "filenames")}
                state["batch"] = min(state["batch"], len(loader))
            loader.load_state_dict(state)
