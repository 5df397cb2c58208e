"""What runs on the node: one stage of one task, which survives being requeued.

Submitit unpickles a `Task` before it listens to signals, so this file imports nothing
that takes long.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import submitit
from submitit.helpers import (
    Checkpointable,
    DelayedSubmission,
    TorchDistributedEnvironment,
)

if TYPE_CHECKING:
    from slurm.study import Study, TaskSpec

# Seconds between two looks for an attempt that has taken this one's place: the node may
# be lost to SLURM, which starts the job elsewhere, while its processes go on.
FENCE_SECONDS = 10
SUPERSEDED = 75  # exit code

REQUEUE_PAUSE = 5  # seconds between two attempts to reach a controller that restarts


@dataclass
class Task(Checkpointable):
    """A stage of a task, as submitit sends it."""

    study: str  # the directory
    name: str  # of the task
    stage: str
    max_requeues: int  # how often its job may be requeued
    patience: int  # seconds in which a requeue has to succeed
    gpus: int = 0  # per node, that the job asks for

    def __call__(self) -> None:
        """Runs the stage, or what is left of it.

        Raises:
            Exception: What the command raised. SLURM does not requeue the job then.
        """
        env = submitit.JobEnvironment()
        if env.cluster == "local" and env.num_tasks > 1:
            # Before Lightning is imported, which looks for its rank.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            os.environ["NODE_RANK"] = "0"
        from lightly_mim.runs import RunDirectory
        from slurm.study import DONE, FAILED, INTERRUPTED, RUNNING, run_directories

        study, task = self._load()
        os.chdir(study.cwd)
        main = env.global_rank == 0
        open_stages = study.open_stages(task)
        if self.stage not in open_stages:  # requeued after its end
            print(f"{task.name}: {self.stage} is done already.", flush=True)
            return
        if (before := open_stages[0]) != self.stage:
            line = f"{self.stage} was not begun: {before} has no finished marker."
            print(f"{task.name}: {line}", flush=True)
            if main and not study.state(task).get("error"):
                self._fail(RuntimeError(line), stage=before)
            return
        if main:
            attempts = [*study.state(task).get("attempts", []), _attempt(env, self)]
            begun = {"stage": self.stage, "status": RUNNING, "error": None}
            study.update_state(task, **begun, attempts=attempts)
            if self._requeues() > self.max_requeues:
                raise self._given_up()
        self._fence(study, task)
        try:
            self._run(study, task, env)
            runs = list(run_directories(study.run(task)))
            unfinished = [str(run) for run in runs if not RunDirectory(run).finished]
            if main and (unfinished or (self.stage == "train" and not runs)):
                where = ", ".join(unfinished) or study.run(task)
                raise RuntimeError(
                    f"The command ended without the finished marker in {where}."
                )
        except Exception as error:
            if main and study.state(task)["status"] != FAILED:
                interrupted = isinstance(error, CommandInterrupted)
                self._fail(error, status=INTERRUPTED if interrupted else FAILED)
            raise
        if main:
            self._end(DONE, done=[*study.state(task)["done"], self.stage])

    def checkpoint(  # type: ignore[override]  # submitit takes None
        self,
    ) -> DelayedSubmission | None:
        """Returns what a requeued job runs: the same, which goes on by itself.

        Submitit calls it before it requeues the job; None keeps it from doing so.
        """
        from slurm.study import REQUEUED

        if self._requeues() >= self.max_requeues:
            self._given_up()
            return None
        self._end(REQUEUED)
        return DelayedSubmission(self)

    def _load(self) -> tuple[Study, TaskSpec]:
        from slurm.study import Study

        study = Study.load(self.study)
        return study, next(task for task in study.tasks if task.name == self.name)

    # What is run.

    def _run(self, study: Study, task: TaskSpec, env: submitit.JobEnvironment) -> None:
        """Runs the command and, if it is preempted, has its job requeued."""
        words = study.words(task, self.stage)
        print(f"{task.name}, {self.stage}: {shlex.join(words)}", flush=True)
        self._check_gpus(task)
        if "SUBMITIT_DEBUG_JOB_ID" in os.environ:  # nobody requeues, Ctrl-C ends it
            _call(words, study)
            return
        from lightly_mim.training.signals import Preempted, listening

        save = [signal.SIGTERM] if "SLURM_JOB_ID" in os.environ else []
        with listening(stop=[signal.SIGUSR2], save=save) as handlers:
            try:
                _call(words, study)
            except Preempted:
                if env.global_rank == 0:
                    self._requeue(handlers[signal.SIGUSR2])
                if env.cluster == "local":  # whose controller waits for all ranks
                    sys.exit(0)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                while True:  # until SLURM ends the step
                    time.sleep(1)

    def _check_gpus(self, task: TaskSpec) -> None:
        """Keeps a job that asked for GPUs from running on CPUs without a word.

        Raises:
            RuntimeError: If PyTorch sees none, and the task names no CPU.
        """
        import torch

        if not self.gpus or torch.accelerator.is_available():
            return
        for words in task.stages.values():
            named = " ".join(words).replace("=", " ").lower()
            values = re.findall(r" --(?:accelerator|device) (\S+)", named)
            if values and values[-1].startswith("cpu"):  # the last word counts
                return
        raise RuntimeError(
            f"The job asked for {self.gpus} GPU(s) and PyTorch {torch.__version__} on "
            f"{platform.node()} sees none: a build without CUDA, a driver that is too "
            "old for it, or a lost device. Mend the environment (setup, python) or "
            "leave the node out (--exclude), then --resume. To run without GPUs, ask "
            "for none, or say --accelerator cpu."
        )

    def _requeue(self, submitit_handler: Any) -> NoReturn:
        """Has submitit requeue the job, also while the controller restarts."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                submitit_handler(signal.SIGUSR2, None)  # does not return
            except subprocess.SubprocessError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"The job was preempted and SLURM did not requeue it: {error}"
                    ) from error
                time.sleep(REQUEUE_PAUSE)

    # What is recorded. Rank 0 only.

    def _requeues(self) -> int:
        """Returns how often the job was requeued, by SLURM or by itself."""
        study, task = self._load()
        mine = submitit.JobEnvironment().job_id
        before = [a for a in study.state(task)["attempts"] if a["job"] == mine]
        return max(len(before) - 1, int(os.environ.get("SLURM_RESTART_COUNT", 0)))

    def _end(self, status: str, **changes: Any) -> None:
        study, task = self._load()
        attempts = study.state(task).get("attempts", [])
        if attempts:
            attempts[-1] |= {"ended": time.time(), "outcome": status}
        study.update_state(task, status=status, attempts=attempts, **changes)

    def _fail(
        self, error: Exception, stage: str | None = None, status: str = "failed"
    ) -> None:
        lines = traceback.format_exception(error)
        record = {"stage": stage or self.stage, "line": lines[-1].strip()}
        self._end(status, error=record | {"traceback": "".join(lines)})

    def _given_up(self) -> RuntimeError:
        """Records, and returns, that the job was requeued too often."""
        error = RuntimeError(
            f"The job was requeued {self.max_requeues} times and not once more "
            "(--max-requeues)."
        )
        self._fail(error)
        return error

    def _fence(self, study: Study, task: TaskSpec) -> None:
        """Ends this process when another attempt at the stage has begun."""
        if "SLURM_JOB_ID" not in os.environ:
            return
        begun = time.time()
        job = submitit.JobEnvironment().job_id
        mine = (job, int(os.environ.get("SLURM_RESTART_COUNT", 0)))

        def superseded() -> bool:
            try:
                attempts = study.state(task).get("attempts")
            except (OSError, ValueError):  # a file system that is away
                return False
            last = attempts[-1] if attempts else {"started": 0}
            return last["started"] > begun and (last["job"], last["restart"]) != mine

        def watch() -> None:
            while not superseded():
                time.sleep(FENCE_SECONDS)
            print(f"Another job has taken the place of {job}.", flush=True)
            os._exit(SUPERSEDED)

        threading.Thread(target=watch, daemon=True).start()


def _attempt(env: submitit.JobEnvironment, work: Task) -> dict[str, Any]:
    """Returns what is known of an attempt that begins."""
    import torch

    from slurm.study import versions

    count = torch.cuda.device_count()
    return {
        "stage": work.stage,
        "job": env.job_id,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "host": platform.node(),
        "nodes": list(env.hostnames),
        "pid": os.getpid(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(count)],
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "versions": versions(),
        "started": time.time(),
        "ended": None,
        "outcome": None,
    }


class CommandInterrupted(RuntimeError):
    """Somebody pressed Ctrl-C."""


def _call(words: list[str], study: Study) -> None:
    """Runs the snapshot's command in this process, where signals reach it.

    Raises:
        Exception: What made the command end, also behind an exit code.
    """
    from lightly_mim.runs import TakenOverError
    from lightly_mim.training.signals import Preempted

    argv, path = sys.argv, list(sys.path)
    sys.argv = words
    try:
        if words[0] == "lightly-mim":
            from lightly_mim.cli import main

            main(words[1:])
        else:
            script = study.code / words[0]
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    except (Preempted, TakenOverError):  # no failures: the run goes on elsewhere
        raise
    except SystemExit as error:
        if error.code in (0, None):
            return
        cause = error.__context__
        if isinstance(cause, Exception):  # what the command made a message of
            raise cause from None
        name = Path(words[0]).name
        if error.code == 130:
            raise CommandInterrupted(f"{name} was interrupted") from error
        ended = f"ended with exit code {error.code}; its log says why"
        raise RuntimeError(f"{name} {ended}") from error
    finally:
        sys.argv = argv
        sys.path[:] = path


@dataclass
class Report:
    """The report of a study directory, as submitit sends it."""

    study: str

    def __call__(self) -> None:
        """Writes what a study found, see `report.write_report`."""
        from slurm.report import write_report
        from slurm.study import Study

        print(write_report(Study.load(self.study)))
