from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
)

from lightly_mim.training.machine import (
    Layout,
    autocast,
    check_precision,
    choose_layout,
    start,
)

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "study"}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    # What the layout sets is taken back with the rest.
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")


def pretend(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_choose_layout__outside_slurm() -> None:
    assert choose_layout("auto", None) == ("auto", 1, None)
    assert choose_layout(2, 3) == (2, 3, None)


@pytest.mark.parametrize("name", ["study", "bash", "interactive"])
@pytest.mark.parametrize(
    ("devices", "num_nodes"), [("auto", None), (2, None), ("2", 2), ([0, 1], None)]
)
def test_choose_layout__takes_slurms_processes(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    devices: int | str | list[int],
    num_nodes: int | None,
) -> None:
    tasks = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2"}
    pretend(monkeypatch, **STEP | tasks | {"SLURM_JOB_NAME": name})
    layout = choose_layout(devices, num_nodes)
    assert layout.devices == (2 if devices == "auto" else devices)
    assert layout.num_nodes == 2
    assert isinstance(layout.environment, SLURMEnvironment)
    assert not layout.environment.auto_requeue
    layout.environment.validate_settings(2, layout.num_nodes)


def test_choose_layout__tells_lightning_the_tasks_per_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # `srun --ntasks=2`, at which Lightning's own environment gives up.
    pretend(monkeypatch, **STEP, SLURM_NTASKS="2", SLURM_NNODES="1")
    layout = choose_layout("auto", None)
    assert isinstance(layout.environment, SLURMEnvironment)
    assert (layout.devices, layout.num_nodes) == (2, 1)


@pytest.mark.parametrize(
    ("devices", "num_nodes"), [(1, None), ("0,1,2", None), ([0], 1), ("auto", 2)]
)
def test_choose_layout__refuses_other_numbers(
    monkeypatch: pytest.MonkeyPatch,
    devices: int | str | list[int],
    num_nodes: int | None,
) -> None:
    pretend(monkeypatch, **STEP, SLURM_NTASKS="2", SLURM_NNODES="1")
    with pytest.raises(ValueError, match=r"SLURM started 2 task\(s\) on 1 node"):
        choose_layout(devices, num_nodes)


def test_choose_layout__shells_and_scripts_are_ordinary_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A batch script that calls python without srun.
    pretend(monkeypatch, SLURM_JOB_ID="7", SLURM_PROCID="0")
    layout = choose_layout(2, None)
    assert layout[:2] == (2, 1)
    assert isinstance(layout.environment, LightningEnvironment)
    # `srun --pty bash`
    pretend(monkeypatch, **STEP | {"SLURM_JOB_NAME": "bash"}, SLURM_NTASKS="1")
    layout = choose_layout("auto", None)
    assert layout[:2] == ("auto", 1)
    assert isinstance(layout.environment, LightningEnvironment)


def test_choose_layout__refuses_several_tasks_without_srun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="2")
    with pytest.raises(ValueError, match="put srun before the command"):
        choose_layout("auto", None)


def test_choose_layout__leaves_torchrun_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **STEP, SLURM_NTASKS="2", SLURM_NNODES="2")
    pretend(monkeypatch, TORCHELASTIC_RUN_ID="x", RANK="0", GROUP_RANK="0")
    assert choose_layout(4, 2) == (4, 2, None)


def test_start__one_process_finds_no_others() -> None:
    layout = Layout(1, 1, LightningEnvironment())
    assert start(layout, "cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert (layout.world_size, layout.rank) == (1, 0)


@pytest.mark.parametrize("devices", [0, "many", [-1]])
def test_start__refuses_devices_that_are_not_there(devices: Any) -> None:
    layout = Layout(devices, 1, LightningEnvironment())
    with pytest.raises(ValueError, match=f"devices={re.escape(repr(devices))}"):
        start(layout, "cpu")


def test_autocast() -> None:
    cpu = torch.device("cpu")
    matrix = torch.ones(2, 2)
    with autocast(cpu, "32"):
        assert (matrix @ matrix).dtype == torch.float32
    with autocast(cpu, "bf16"):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast(cpu, "16"):
        assert (matrix @ matrix).dtype == torch.float16
    check_precision("16", torch.device("cuda"))
    with pytest.raises(ValueError, match='"16" is for GPUs'):
        check_precision("16", cpu)


@pytest.mark.parametrize("begins", [True, False])
def test_exit__waits_behind_collectives(begins: bool, tmp_path: Path) -> None:
    # Seen in a core file: gloo's thread asked for the GIL as Python ended, and aborted.
    program = (
        "import time\n"
        "from torch import distributed\n"
        "import lightly_mim.training.machine\n"
        f"if {begins}:\n"
        f"    place = distributed.FileStore({str(tmp_path / 'store')!r}, 1)\n"
        "    options = {'store': place, 'rank': 0, 'world_size': 1}\n"
        "    distributed.init_process_group('gloo', **options)\n"
        "time.sleep = lambda seconds: print('waits', seconds)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "waits 0.1\n" * begins
