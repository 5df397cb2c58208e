"""What happens to a running study: warned, stopped, killed, and out of room.

Everything goes through `slurm/submit.py` on a real SLURM. The method of these tests is
SimMIM with a brake: each forward pass leaves a line in `beat` and takes its time while
there is a file `slow`, so that a test can act in the middle of an epoch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_mim.checkpoints import save_encoder
from lightly_mim.encoders import masked_encoder

from ..conftest import TINY_VIT
from .cluster import Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600.0  # seconds for anything: an import takes 20 on a busy machine
EPOCHS, STEPS = 3, 16  # 48 steps of 2 images

METHOD = f"""
import os, resource, time
from pathlib import Path
from lightly_mim.methods import SimMIM

class Slow(SimMIM):
    def __init__(self, drop_path_rate: float = 0.0):
        super().__init__(**{TINY_VIT!r}, drop_path_rate=drop_path_rate)

    def forward(self, images, mask=None):
        if self.training:
            rank = os.environ.get("SLURM_PROCID", "0")
            restart = os.environ.get("SLURM_RESTART_COUNT", "0")
            beat = Path(os.environ["BEAT"], "beat" + rank)
            with beat.open("a") as file:
                file.write(restart + "\\n")
            count = len(beat.read_text())
            if "FAIL_AT" in os.environ and count > 2 * int(os.environ["FAIL_AT"]):
                raise RuntimeError("the lamp went out")
            if "ROOM" in os.environ:
                # Files of this process may not become larger: real writes that fail.
                room = int(os.environ["ROOM"])
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            if beat.with_name("slow").exists():
                time.sleep(float(beat.with_name("slow").read_text()))
        return super().forward(images, mask)
"""


def words(data: Path, *options: str) -> list[str]:
    return [
        *("lightly-mim", "pretrain", "--data", str(data), "--method", "slow.Slow"),
        *("--epochs", str(EPOCHS), "--batch_size", "2", "--lr", "0.0004"),
        *("--precision", "32-true", "--accelerator", "cpu", "--num_workers", "1"),
        *("--log_every", "1", "--tensorboard", "false", *options),
    ]


DROPPING = ("--method.drop_path_rate", "0.3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user stands: with a method of their own."""
    path = tmp_path_factory.mktemp("place")
    (path / "slow.py").write_text(METHOD)
    return path


def environment(cluster: Cluster, beat: Path, **more: str) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return cluster.environment | threads | {"BEAT": str(beat)} | more


@pytest.fixture(scope="module")
def finished(
    cluster: Cluster,
    place: Path,
    photos: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[bool, dict[str, Tensor]]:
    """Weights of runs that nobody disturbed, by whether they have drop path."""
    out = tmp_path_factory.mktemp("finished")
    runs = {
        dropping: words(photos, *(DROPPING * dropping), "--out", str(out / name))
        for dropping, name in ((True, "dropping"), (False, "plain"))
    }
    lines = [f"main({command[1:]!r})" for command in runs.values()]
    subprocess.run(
        [sys.executable, "-c", "\n".join(["from lightly_mim.cli import main", *lines])],
        cwd=place,
        env=environment(cluster, out),
        check=True,
        timeout=TIMEOUT,
    )
    return {dropping: weights(Path(command[-1])) for dropping, command in runs.items()}


def weights(run: Path) -> dict[str, Tensor]:
    state: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt")
    return {n: t for n, t in state["state_dict"].items() if n.startswith("method.")}


def wait_until(what: str, done: Callable[[], Any], seconds: float = TIMEOUT) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


@dataclass
class StudyRun:
    """A study of one task that was submitted."""

    cluster: Cluster
    path: Path
    place: Path
    beat: Path
    environment: dict[str, str]

    @property
    def job(self) -> str:
        jobs = json.loads((self.path / "study.json").read_text())["submissions"][-1]
        return str(next(iter(next(iter(jobs["jobs"].values())).values())))

    @property
    def task(self) -> Path:
        return next((self.path / "tasks").iterdir())

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.task / "state.json").read_text())
        return found

    @property
    def log(self) -> str:
        logs = sorted((self.path / "jobs").rglob("*.out"), key=os.path.getmtime)
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def runs_for_the_time(self, restart: int) -> bool:
        """Returns whether the job runs after so many restarts."""
        running = self.cluster.jobs()[self.job] == "RUNNING"
        return running and self.cluster.job_field(self.job, "Restarts") == str(restart)

    def steps(self, restart: int, rank: int = 0) -> int:
        """Returns the forward passes of an attempt so far."""
        beat = self.beat / f"beat{rank}"
        lines = beat.read_text().splitlines() if beat.exists() else []
        return lines.count(str(restart))

    def wait_for_steps(self, restart: int, count: int) -> None:
        """Waits until an attempt is on its way, so many steps into what is left."""

        def there() -> bool:
            state = self.cluster.jobs().get(self.job, "gone")
            assert state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), (
                f"{state}: {self.log[-3000:]}"
            )
            return self.steps(restart) >= count

        wait_until(f"step {count} of attempt {restart}", there)

    def slow(self, seconds: float = 0.7) -> None:
        temporary = self.beat / "slower"
        temporary.write_text(str(seconds))
        temporary.replace(self.beat / "slow")

    def fast(self) -> None:
        (self.beat / "slow").unlink()

    @property
    def jobs(self) -> list[str]:
        """The training job and, after it, the report's."""
        study = json.loads((self.path / "study.json").read_text())
        return [self.job, study["submissions"][-1]["report"]]

    def end(self, report: bool = False) -> str:
        """Waits for the end of the training job, and the report, and returns how."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        for job in self.jobs if report else [self.job]:
            wait_until(f"the end of {job}", partial(self._is, job, over))
        return self.cluster.jobs()[self.job]

    def _is(self, job: str, states: tuple[str, ...]) -> bool:
        return self.cluster.jobs()[job] in states

    def tool(self, script: str, *options: str) -> None:
        """Runs a script of `slurm/` as the user would.

        In this process, which has imported what takes long.
        """
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - self.environment.keys():
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.place)
            patch.syspath_prepend(str(self.place))
            importlib.import_module(f"slurm.{script}").main(options)

    def status(self) -> str:
        """Returns what `status.py` shows of a study with a failed task."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
            self.tool("status", str(self.path))
        assert ended.value.code == 1
        return said.getvalue()

    def resume(self) -> None:
        self.tool("submit", "--resume", str(self.path))

    def check_finished(self, expected: dict[str, Tensor]) -> None:
        """Checks that the run is whole and has exactly these weights."""
        assert self.state["status"] == "done", self.log[-3000:]
        summary = json.loads((self.task / "run" / "finished.json").read_text())
        assert summary["steps"] == EPOCHS * STEPS
        ours = weights(self.task / "run")
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), name

    def continued(self) -> list[int]:
        """Returns the optimiser steps after which the log says the run went on."""
        found = re.findall(
            r"going on in epoch \d+/\d+ after optimiser step (\d+)", self.log
        )
        return [int(step) for step in found]


Submit = Callable[..., StudyRun]


@pytest.fixture
def submit(
    cluster: Cluster, place: Path, photos: Path, tmp_path: Path
) -> Iterator[Submit]:
    """Submits a study of one task: submit(cluster options, command options, env)."""
    numbers = itertools.count()
    submitted: list[StudyRun] = []

    def send(
        *options: str,
        command: tuple[str, ...] = DROPPING,
        slow: bool = True,
        **env: str,
    ) -> StudyRun:
        number = next(numbers)
        beat = tmp_path / f"beat{number}"
        beat.mkdir()
        study = StudyRun(
            cluster,
            tmp_path / f"s{number}",
            place,
            beat,
            environment(cluster, beat, **env),
        )
        if slow:
            study.slow()
        arguments = [*options, "--study", str(study.path), "--"]
        study.tool("submit", *arguments, *words(photos, *command))
        submitted.append(study)
        return study

    yield send
    for study in submitted:
        cluster.run("scancel", *study.jobs)


def test_preempted_twice_it_ends_the_same(
    submit: Submit, cluster: Cluster, finished: dict[bool, dict[str, Tensor]]
) -> None:
    """By `scontrol requeue` and by the time limit, in the middle of epochs."""
    study = submit("--time", "60", "--signal-delay", "50")
    study.wait_for_steps(0, STEPS + 3)
    cluster.run("scontrol", "requeue", study.job, check=True)
    study.wait_for_steps(1, 3)
    study.slow(4)
    # SLURM looks at its limits every 30 s, and warns 50 s before this one.
    job = f"JobId={study.job}"
    cluster.run("scontrol", "update", job, "TimeLimit=1", check=True)
    wait_until("the warning", lambda: "saved and told to stop" in study.log)
    longer = ("scontrol", "update", job, "TimeLimit=60")
    wait_until("the requeue", lambda: cluster.run(*longer).returncode == 0)
    study.fast()
    assert study.end() == "COMPLETED"
    study.check_finished(finished[True])
    first, second = study.continued()
    # SIGTERM makes it save where it is; not only at the epoch's end.
    assert STEPS < first < 2 * STEPS
    assert first < second < EPOCHS * STEPS
    assert "saved and told to stop in epoch" in study.log
    assert [a["restart"] for a in study.state["attempts"]] == [0, 1, 2]
    assert cluster.job_field(study.job, "Restarts") == "2"
    # Neither a step twice nor one left out.
    assert study.steps(1) == second - first
    assert study.steps(2) == EPOCHS * STEPS - second


def test_place_taken_by_a_job_of_higher_priority(
    submit: Submit, cluster: Cluster, finished: dict[bool, dict[str, Tensor]]
) -> None:
    study = submit("--gpus-per-node", "2", "--tasks-per-node", "2", "--nodelist",
                   cluster.node_names[0], command=())  # fmt: skip
    study.wait_for_steps(0, 4)
    options = ("--partition=prio", "--gpus-per-node=2", "--output=/dev/null")
    place = f"--nodelist={cluster.node_names[0]}"
    other = cluster.run(
        "sbatch", "--parsable", *options, place, "--wrap=srun sleep 1", check=True
    ).stdout.strip()
    wait_until("the other job", lambda: cluster.jobs()[other] == "COMPLETED")
    study.fast()
    assert study.end() == "COMPLETED"
    assert cluster.job_field(study.job, "Restarts") == "1"
    (step,) = study.continued()
    assert step % STEPS, "not in the middle of an epoch"
    # Two ranks that were stopped and went on, against one that was not.
    ours = weights(study.task / "run")
    for name, tensor in finished[False].items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_two_nodes_give_the_weights_of_one_process(
    submit: Submit, finished: dict[bool, dict[str, Tensor]]
) -> None:
    study = submit("--nodes", "2", command=(), slow=False)
    assert study.end() == "COMPLETED", study.log[-3000:]
    assert len(set(study.state["attempts"][0]["nodes"])) == 2
    assert study.steps(0, rank=0) == study.steps(0, rank=1) == EPOCHS * STEPS
    ours = weights(study.task / "run")
    for name, tensor in finished[False].items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_requeued_again_before_it_has_begun(
    submit: Submit, cluster: Cluster, finished: dict[bool, dict[str, Tensor]]
) -> None:
    study = submit()
    study.wait_for_steps(0, 3)
    cluster.run("scontrol", "requeue", study.job, check=True)
    wait_until("the second start", lambda: study.runs_for_the_time(1))
    cluster.run("scontrol", "requeue", study.job, check=True)
    wait_until("the third start", lambda: study.runs_for_the_time(2))
    study.fast()
    assert study.end() == "COMPLETED"
    study.check_finished(finished[True])


def test_controller_restarts(
    submit: Submit, cluster: Cluster, finished: dict[bool, dict[str, Tensor]]
) -> None:
    """While it trains, and in the moment that the job asks to be requeued."""
    study = submit("--signal-delay", "60")
    study.wait_for_steps(0, 3)
    cluster.kill_controller()
    cluster.start_controller()
    cluster.kill_controller()
    # As slurmstepd sends it, which a controller had asked to.
    os.kill(task_process(cluster, study.job), signal.SIGUSR2)
    wait_until("the save", lambda: "saved and told to stop" in study.log)
    time.sleep(2)
    cluster.start_controller()
    study.fast()
    assert study.end() == "COMPLETED"
    study.check_finished(finished[True])


def task_process(cluster: Cluster, job: str) -> int:
    """Returns the process that trains: the first one of submitit's."""
    found = [
        pid
        for pid in cluster.processes(job)
        if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and "SLURM_STEP_ID"
        in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    ]
    return min(found)


def test_killed_step_is_listed_and_goes_on(
    submit: Submit, cluster: Cluster, finished: dict[bool, dict[str, Tensor]]
) -> None:
    study = submit()
    study.wait_for_steps(0, STEPS + 3)
    os.kill(task_process(cluster, study.job), signal.SIGKILL)
    assert study.end(report=True) == "FAILED"
    assert cluster.job_field(study.job, "Restarts") == "0"
    assert not (study.task / "run" / "finished.json").exists()
    listed = study.status()
    assert re.search("lost|failed", listed), listed
    assert "failed" in (study.path / "study.md").read_text().lower()
    study.fast()
    study.resume()
    assert study.end() == "COMPLETED"
    study.check_finished(finished[True])
    assert study.continued() == [STEPS]


def test_lost_node(
    submit: Submit, cluster: Cluster, finished: dict[bool, dict[str, Tensor]]
) -> None:
    """Its slurmd is gone; the processes live on, beside those that take their place."""
    study = submit()
    study.wait_for_steps(0, STEPS + 3)
    name = cluster.job_field(study.job, "NodeList")
    old = task_process(cluster, study.job)
    study.slow(5)  # SLURM misses the node after 15 s or more
    cluster.kill_node(name)
    try:
        study.wait_for_steps(1, 1)
        study.fast()
        assert study.end() == "COMPLETED"
        study.check_finished(finished[True])
        wait_until("the old process' end", lambda: not _alive(old))
    finally:
        cluster.start_node(name)
        cluster.wait_for_nodes()


def test_power_cut_of_a_node(
    submit: Submit, cluster: Cluster, finished: dict[bool, dict[str, Tensor]]
) -> None:
    study = submit()
    study.wait_for_steps(0, 3)
    name = cluster.job_field(study.job, "NodeList")
    cluster.kill_node(name, with_jobs=True)
    try:
        study.fast()
        study.wait_for_steps(1, 1)
        assert study.end() == "COMPLETED"
        study.check_finished(finished[True])
    finally:
        cluster.start_node(name)
        cluster.wait_for_nodes()


def _alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"FAIL_AT": "10"}, "the lamp went out"), ({"ROOM": "100000"}, "File too large")],
    ids=["exception", "no room on the disk"],
)
def test_failure_is_listed_and_not_requeued(
    submit: Submit, cluster: Cluster, fault: dict[str, str], message: str
) -> None:
    study = submit(slow=False, **fault)
    assert study.end() == "FAILED"
    assert cluster.job_field(study.job, "Restarts") == "0"
    assert study.state["status"] == "failed"
    assert message in study.state["error"]["line"]
    assert len(study.state["attempts"]) == 1
    listed = " ".join(study.status().split())
    assert "failed" in listed
    assert message.split()[0] in listed
    assert not (study.task / "run" / "finished.json").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there are real GPUs")
def test_gpus_that_pytorch_does_not_see(submit: Submit) -> None:
    options = ("--accelerator", "auto")
    study = submit("--gpus-per-node", "2", command=options, slow=False)
    assert study.end() == "FAILED"
    assert "The job asked for 2 GPU(s)" in study.state["error"]["line"]
    assert len(study.state["attempts"]) == 1
    assert not (study.task / "run").exists()


def test_bound_of_requeues(submit: Submit, cluster: Cluster) -> None:
    study = submit("--max-requeues", "1")
    for restart in (0, 1):
        study.wait_for_steps(restart, 3)
        cluster.run("scancel", "--signal=USR2", study.job, check=True)
    assert study.end() == "FAILED"
    assert cluster.job_field(study.job, "Restarts") == "1"
    assert "requeued 1 times" in study.state["error"]["line"]
    assert "failed" in study.status()
    # What it had reached is saved all the same.
    assert len(re.findall("saved and told to stop", study.log)) == 2


def test_preempted_fine_tuning_goes_on(
    cluster: Cluster, place: Path, photos: Path, tmp_path: Path
) -> None:
    """Two processes, cut within an epoch, end with the losses of two that were not."""
    torch.manual_seed(0)
    sizes = {name: TINY_VIT[name] for name in ("embed_dim", "depth", "num_heads")}
    encoder = masked_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, **sizes)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    command = [
        *("evaluate", "--encoder", str(tmp_path / "encoder.safetensors")),
        *("--data", str(photos), "--protocols", "finetune", "--device", "cpu"),
        *("--finetune.epochs", "20", "--finetune.batch_size", "4"),
        *("--finetune.lr", "0.01", "--num_workers", "1"),
    ]
    whole = subprocess.run(
        [
            *(sys.executable, "-m", "lightly_mim", *command),
            *("--devices", "2", "--out", str(tmp_path / "whole")),
        ],
        cwd=place,
        env=environment(cluster, tmp_path),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
    ).stdout

    beat = environment(cluster, tmp_path)
    study = StudyRun(cluster, tmp_path / "s", place, tmp_path, beat)
    node = cluster.node_names[0]
    words = ("--gpus-per-node", "2", "--tasks-per-node", "2", "--nodelist", node)
    study.tool(
        *("submit", *words, "--study", str(study.path), "--", "lightly-mim", *command)
    )
    try:
        wait_until("epoch 3", lambda: "epoch 3/20" in study.log)
        options = ("--partition=prio", "--gpus-per-node=2", "--output=/dev/null")
        cluster.run(
            *("sbatch", *options, f"--nodelist={node}", "--wrap=srun sleep 1"),
            check=True,
        )
        assert study.end() == "COMPLETED", study.log[-3000:]
    finally:
        cluster.run("scancel", *study.jobs)
    assert cluster.job_field(study.job, "Restarts") == "1"
    (went_on,) = re.findall(r"going on in epoch (\d+)/20 .* (\d+)", study.log)
    cut, step = map(int, went_on)
    assert "told to stop" in study.log
    # They ask each other after every tenth step, and before an epoch of 8.
    assert (cut - 1) * 8 <= step < cut * 8
    assert step % 10 == 0 or step % 8 == 0
    expected, found = (
        dict(re.findall(r"epoch (\d+)/20  train_loss (\S+)", text))
        for text in (whole, study.log)
    )
    assert len(expected) == 20
    # Of the epoch that was cut, a process knows the first part of another's mean.
    expected[str(cut)] = found[str(cut)]
    assert found == expected
    rows = [
        json.loads((out / "results.json").read_text())["rows"]
        for out in (tmp_path / "whole", study.task / "run")
    ]
    for row in itertools.chain(*rows):
        del row["seconds"]
    assert rows[0] == rows[1]
