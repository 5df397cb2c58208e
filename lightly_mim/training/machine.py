"""What the machine offers: processes, also those that SLURM started, and precision."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lightly_mim.training import cuda

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

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
