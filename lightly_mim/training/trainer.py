"""One way to make Lightning's Trainer, and to fit with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from lightly_mim.data.seeding import repeatable
from lightly_mim.runs import TakenOverError
from lightly_mim.training.cuda import float32_products
from lightly_mim.training.logs import EpochLines, MetricsLogger, ProgressBar, quiet
from lightly_mim.training.machine import Layout
from lightly_mim.training.saving import (
    OVERWRITE,
    AtomicCheckpointIO,
    LastCheckpoint,
    SaveBetweenBatches,
)
from lightly_mim.training.signals import Preempted


def make_trainer(layout: Layout, **options: Any) -> pl.Trainer:
    """Makes a Trainer that leaves loaders, checks and summaries to us.

    Args:
        layout:
            The processes.
        **options:
            Further arguments of `pytorch_lightning.Trainer`.

    Raises:
        ValueError: If Lightning cannot train like that on this machine.
    """
    options = {
        "devices": layout.devices,
        "num_nodes": layout.num_nodes,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        **options,
    }
    if layout.environment is not None:
        options["plugins"] = [*options.get("plugins", []), layout.environment]
    try:
        with quiet(layout.world_size):
            return pl.Trainer(**options)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(
            f"Lightning cannot train with accelerator={options['accelerator']!r}, "
            f"devices={options['devices']!r}, strategy={options['strategy']!r}: {error}"
        ) from error


def resumable_trainer(
    layout: Layout,
    checkpoint: Path,
    *,
    ask_every: int,
    save_every_minutes: float,
    show_bar: bool,
    lines: tuple[str, ...] = ("train_loss", "images_per_second"),
    previous: Mapping[Path, Path] = MappingProxyType({}),
    may_write: Callable[[], None] = lambda: None,
    remedy: str = OVERWRITE,
    loggers: list[Logger] | None = None,
    watching: list[Callback] | None = None,
    callbacks: list[Callback] | None = None,
    **options: Any,
) -> pl.Trainer:
    """Makes a Trainer whose run can be cut between any two batches and go on.

    Args:
        layout:
            The processes.
        checkpoint:
            Where the run is saved: at the end of each epoch, now and then, and when a
            signal asks for it.
        ask_every:
            Optimiser steps after which several processes ask each other for signals.
        save_every_minutes:
            Longest time between two checkpoints. 0 for the ends of epochs alone.
        show_bar:
            Whether to show a bar, rather than print a line for each epoch.
        lines:
            Names of the metrics in those lines.
        previous:
            See `AtomicCheckpointIO`.
        remedy:
            What to do if the checkpoint is damaged and there is none before it.
        may_write:
            Called before each file is written; raises if it must not be.
        loggers:
            Loggers beside `metrics.csv`, which lies in the default root directory.
        watching:
            Callbacks that come before the bar.
        callbacks:
            Callbacks that come behind it.
        **options:
            Further arguments of `pytorch_lightning.Trainer`, `default_root_dir` among
            them.
    """
    metrics = MetricsLogger(options["default_root_dir"], may_write)
    display = ProgressBar(refresh_rate=10) if show_bar else EpochLines(*lines)
    return make_trainer(
        layout,
        plugins=[AtomicCheckpointIO(may_write, previous, remedy)],
        logger=[metrics, *(loggers or [])],
        enable_progress_bar=show_bar,
        callbacks=[
            LastCheckpoint(
                checkpoint.parent.absolute(),
                checkpoint.stem,
                every_n_epochs=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            ),
            SaveBetweenBatches(checkpoint, save_every_minutes, ask_every),
            *(watching or []),
            display,
            *(callbacks or []),
        ],
        **options,
    )


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    checkpoint: Path | None = None,
    **data: Any,
) -> None:
    """Trains, and tells Lightning's ways to end apart.

    Args:
        trainer:
            The Trainer.
        module:
            What is trained.
        checkpoint:
            Where to go on from.
        **data:
            `Trainer.fit`'s loaders or data module.

    Raises:
        Preempted: If a signal told the process to stop, when the run is saved.
        KeyboardInterrupt: If Ctrl-C did.
    """
    device = trainer.strategy.root_device
    # Its handler of SIGTERM would talk to the other ranks from within a step of theirs.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore
    with (
        calling(trainer),
        repeatable(device),
        float32_products(device, str(trainer.precision)),
    ):
        # A run that goes on writes to the directory that it wrote to before.
        warnings.filterwarnings("ignore", "Checkpoint directory .* not empty")
        warnings.filterwarnings("ignore", "The dirpath has changed")
        # What is frozen stays in evaluation mode.
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
        # Lightning takes names that begin with "http" for addresses.
        where = None if checkpoint is None else checkpoint.absolute()
        trainer.fit(module, ckpt_path=where, **data)


@contextmanager
def calling(trainer: pl.Trainer) -> Iterator[None]:
    """Keeps a Trainer quiet within the block, and tells its ways to end apart.

    Args:
        trainer:
            The Trainer, which fits, validates or tests.

    Raises:
        Preempted: If a signal told the process to stop.
        KeyboardInterrupt: If Ctrl-C did.
    """
    with quiet(trainer.world_size):
        try:
            yield
        except Preempted as preempted:
            launcher = getattr(trainer.strategy, "cluster_environment", None)
            if trainer.local_rank and isinstance(launcher, LightningEnvironment):
                # Lightning kills a first process whose children fail.
                preempted.code = 0
            raise
        except TakenOverError:
            raise
        except SystemExit:
            if trainer.interrupted:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            raise
