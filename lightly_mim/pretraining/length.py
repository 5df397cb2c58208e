"""`minutes` instead of epochs: how many fit into them, by a few steps of a copy."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from lightly_mim.data import keyed_random_state
from lightly_mim.data.notes import counted
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.optim import Recipe
from lightly_mim.pretraining.images import PretrainingImages
from lightly_mim.pretraining.module import Pretraining
from lightly_mim.training.machine import Layout, Precision
from lightly_mim.training.trainer import calling, make_trainer


class _Speed(Callback):
    """Measures how long a step takes, and ends the Trainer when it knows."""

    WARM, ENOUGH, SECONDS = 2, 20, 10.0

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Notes the time."""
        self._ends.append(time.perf_counter())
        timed = len(self._ends) - 1 - self.WARM
        long = timed > 2 and self._ends[-1] - self._ends[self.WARM] > self.SECONDS
        trainer.should_stop = long or timed >= self.ENOUGH

    @property
    def seconds(self) -> float:
        """Mean seconds between the ends of two batches, after the first ones."""
        timed = self._ends[min(self.WARM, len(self._ends) - 2) :]
        return (timed[-1] - timed[0]) / (len(timed) - 1)


def _refuse_several(found: str) -> None:
    raise ValueError(
        "minutes is measured in one process, and each of several would find another "
        f"speed; this run has {found}: pass epochs instead, or devices=1."
    )


def epochs_in(
    minutes: float,
    method: MaskedImageModel,
    settings: Recipe,
    images: PretrainingImages,
    arguments: Mapping[str, Any],
    precision: Precision,
) -> int:
    """Returns how many epochs fit into some minutes, by a few steps of a copy."""
    devices = arguments["devices"]
    several = devices > 1 if isinstance(devices, int) else len(devices) > 1
    if (devices != "auto" and several) or arguments["num_nodes"] > 1:
        _refuse_several(f"devices={devices} on {arguments['num_nodes']} machine(s)")
    speed = _Speed()
    trainer = make_trainer(
        Layout(devices, arguments["num_nodes"], None),
        max_epochs=_Speed.WARM + _Speed.ENOUGH,  # an epoch has a batch at least
        accelerator=arguments["accelerator"],
        strategy=arguments["strategy"],
        precision=precision,
        accumulate_grad_batches=arguments["accumulate"],
        limit_val_batches=0.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[speed],
    )
    if trainer.world_size > 1:
        _refuse_several(f"{trainer.world_size} of them")
    images.check(trainer)
    copied = copy.deepcopy(method)
    copied.choose_attention(trainer.strategy.root_device, precision == "bf16-mixed")
    copied.fit_target(images.sample)
    seed, compile = arguments["seed"], arguments["compile"]
    module = Pretraining(copied, settings, settings.batch_size, seed, compile)
    with keyed_random_state(seed, "speed"), calling(trainer):
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, datamodule=images)
    per_epoch = speed.seconds * images.steps_per_epoch * arguments["accumulate"]
    rate = images.steps_per_epoch * settings.batch_size / per_epoch
    epochs = max(int(minutes * 60 / per_epoch), 1)
    print(
        f"{rate:.0f} images/s: {counted(epochs, 'epoch')} in "
        f"{epochs * per_epoch / 60:.3g} minutes"
    )
    return epochs
