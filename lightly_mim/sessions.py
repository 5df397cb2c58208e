"""What a run notes each time that it begins or goes on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from lightly_mim.evaluation.provenance import package_versions
from lightly_mim.runs import RunDirectory


class SessionNotes(Callback):
    """Notes in `history.json` when, where and how a run begins or goes on.

    A report shows it: the command to repeat, the machine, the versions, and at which
    optimiser steps the run went on.

    Attributes:
        run:
            The run.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Notes it, once the checkpoint has said at which step."""
        if trainer.is_global_zero:
            device = trainer.strategy.root_device
            self.run.note_session(describe_session(trainer.global_step, device))


def describe_session(step: int, device: torch.device) -> dict[str, Any]:
    """Returns what there is to note.

    Args:
        step:
            The optimiser steps that have been taken.
        device:
            Where the run computes.

    Returns:
        `time` (ISO 8601, UTC), `step`, `command` (of the process), `host`, `machine`,
        `versions` and, in a SLURM job, `job` and `restarts`, how often it was queued
        again.
    """
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {machine}"
    session: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.orig_argv),
        "host": platform.node(),
        "machine": machine,
        "versions": package_versions(),
    }
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        session["job"] = job
        session["restarts"] = int(restarts) if restarts.isdecimal() else 0
    return session
