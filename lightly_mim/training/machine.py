"""What the machine offers: processes, also those that SLURM started, and precision."""

from __future__ import annotations

import atexit
import os
from typing import Any, Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from lightly_mim.data.loading import wait_behind_collectives
from lightly_mim.training import cuda

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
MixedPrecision = Literal["32", "bf16", "16"]

# With these names of a job Lightning does not look for SLURM's processes.
_INTERACTIVE = ("bash", "interactive")


class Layout(NamedTuple):
    """The processes of a run.

    Attributes:
        devices:
            Lightning's devices of each machine.
        num_nodes:
            Number of machines.
        environment:
            Who started the processes, None to let Lightning find out.
    """

    devices: int | str | list[int]
    num_nodes: int
    environment: ClusterEnvironment | None

    @property
    def world_size(self) -> int:
        """Number of processes that run together, 1 before they have been started."""
        alone = self.num_nodes == 1 and _count(self.devices) == 1
        return 1 if alone or not _together() else distributed.get_world_size()

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return distributed.get_rank() if self.world_size > 1 else 0


# One process on one device, wherever it was started.
ONE = Layout(1, 1, LightningEnvironment())


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


atexit.register(wait_behind_collectives)


def choose_layout(devices: int | str | list[int], num_nodes: int | None) -> Layout:
    """Fits devices and machines to the tasks that SLURM started.

    Within `srun` there is one process per task, and `devices="auto"` and
    `num_nodes=None` are what SLURM started; a job step of a shell with one task, and a
    batch script without `srun`, are like any other machine. Lightning is told not to
    queue the job again: whoever submitted it does (`lightly_mim.training.signals`).

    Args:
        devices:
            Lightning's devices per machine.
        num_nodes:
            Number of machines. None for SLURM's, elsewhere 1.

    Raises:
        ValueError: If SLURM started another number of processes than asked for, or if
            it has several tasks and the program was started without `srun`.
    """
    if "SLURM_JOB_ID" not in os.environ or TorchElasticEnvironment.detect():
        return Layout(devices, num_nodes or 1, None)
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if "SLURM_STEP_ID" not in os.environ:
        if tasks > 1:
            raise ValueError(
                f"The SLURM job has {tasks} tasks, and this process was started "
                "without srun, so that the others would be waited for in vain: put "
                "srun before the command."
            )
        return Layout(devices, num_nodes or 1, LightningEnvironment())
    if tasks == 1 and os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return Layout(devices, num_nodes or 1, LightningEnvironment())
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    if devices == "auto":
        devices = max(tasks // nodes, 1)
    num_nodes = num_nodes or nodes
    count = _count(devices)
    if num_nodes != nodes or (count is not None and count * nodes != tasks):
        raise ValueError(
            f"SLURM started {tasks} task(s) on {nodes} node(s), and the run is to have "
            f"devices={devices!r} and num_nodes={num_nodes}: leave both out, or make "
            "--ntasks-per-node the number of devices and --nodes that of machines."
        )
    # srun without --ntasks-per-node does not say it, and Lightning asks for it.
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(tasks // nodes))
    return Layout(devices, num_nodes, SLURMEnvironment(auto_requeue=False))


def start(layout: Layout, accelerator: str) -> torch.device:
    """Starts the processes of a layout, unless SLURM or torchrun have.

    Each of them runs the program from its beginning, as with Lightning's Trainer, and
    returns from here once all are there: what follows may be shared out between them
    before, while and after a Trainer of the same layout trains.

    Args:
        layout:
            The processes.
        accelerator:
            Lightning's name of the accelerator.

    Returns:
        The device of this process.

    Raises:
        ValueError: If this machine has no such devices.
    """
    plugins: list[Any] = [layout.environment] if layout.environment else []
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=layout.devices,
            num_nodes=layout.num_nodes,
            strategy="ddp",
            plugins=plugins,
        )
    except (
        *(MisconfigurationException, TypeError, ValueError),
        *(MemoryError, OverflowError),  # of very many devices
    ) as error:
        raise ValueError(
            f"Lightning cannot start processes with accelerator={accelerator!r}, "
            f"devices={layout.devices!r}, num_nodes={layout.num_nodes}: {error}"
        ) from error
    if fabric.world_size > 1:
        fabric.launch()
    return fabric.device


def autocast(device: torch.device, precision: MixedPrecision) -> torch.autocast:
    """Returns the context that computes in a precision.

    Args:
        device:
            Where is computed.
        precision:
            "32" for nothing, "bf16" or "16".
    """
    dtype = torch.float16 if precision == "16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "32")


def check_precision(precision: MixedPrecision, device: torch.device) -> None:
    """Raises a ValueError for float16 on a CPU, which Lightning does not train in."""
    if precision == "16" and device.type == "cpu":
        raise ValueError(
            'precision="16" is for GPUs, and this computes on the CPU: pass "bf16" or '
            '"32".'
        )


def lightning_precision(precision: MixedPrecision) -> Precision:
    """Returns Lightning's word for a precision."""
    words: dict[MixedPrecision, Precision] = {
        "32": "32-true",
        "bf16": "bf16-mixed",
        "16": "16-mixed",
    }
    return words[precision]


def _count(devices: int | str | list[int]) -> int | None:
    """Returns the number of devices, None if the machine has to be asked."""
    if isinstance(devices, str):
        if not devices.isdecimal():
            return len(devices.split(",")) if "," in devices else None
        devices = int(devices)
    if isinstance(devices, list):
        return len(devices)
    return devices if devices >= 0 else None


def default_precision(accelerator: str) -> Precision:
    """Returns 'bf16-mixed' where the hardware computes in bfloat16, else '32-true'.

    Args:
        accelerator:
            Lightning's name of the accelerator; 'auto' prefers a GPU.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        supported = cuda.computes_bf16()
    elif accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        # Without these instructions a CPU emulates bfloat16, slower than float32.
        supported = any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    else:
        supported = False
    return "bf16-mixed" if supported else "32-true"
