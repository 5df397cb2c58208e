"""A study on disk: what is in it, and who writes what.

study.json            the command, the tasks, the cluster's options, commit, versions,
                      the jobs; written by submit.py alone
code/                 lightly_mim/, benchmarks/ and slurm/ as they were: what jobs run
jobs/                 submitit's folder: sbatch scripts, pickles, and a log per job
tasks/NN-name/run/    what the command writes, its --out
tasks/NN-name/state.json   how far it is; written by rank 0 of the task's jobs alone
study.csv  study.md   every number, and the tables; written by report.py
report.html           all runs on one page, whose figures are in figures/, too
"""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightly_mim import files

ROOT = Path(__file__).resolve().parents[1]  # the clone, or the snapshot of it
CODE = ("lightly_mim", "benchmarks", "slurm")
STATE_FILE = "state.json"

# Statuses of state.json. A task without one has not begun.
RUNNING, REQUEUED, DONE, FAILED = "running", "requeued", "done", "failed"
INTERRUPTED = "interrupted"  # by Ctrl-C


@dataclass(frozen=True)
class TaskSpec:
    """One task of a study."""

    name: str  # of its directory, NN-key=value-...
    sweep: dict[str, str]  # the swept values that are its own
    # The words that are run, in order: by `train` and `evaluate`, or by `run` where
    # there is one stage.
    stages: dict[str, list[str]]


@dataclass(frozen=True)
class Study:
    """A study directory, and what its study.json holds."""

    path: Path  # absolute
    command: list[str]  # the words that every task shares
    tasks: list[TaskSpec]
    cwd: str  # where the user stood: relative paths in the command count from there
    cluster: dict[str, Any]  # its options, and the processes of a task
    origin: dict[str, Any]  # commit, versions, host and date of the submission
    # Of each: when, on what cluster, and the job of each task and stage.
    submissions: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)  # the words of --evaluate
    sealed: bool = True  # with a checksum, which an earlier version does not know

    @classmethod
    def load(cls, path: Path | str) -> Study:
        """Reads a study.

        Raises:
            ValueError: If there is none, or if its study.json is damaged.
        """
        path = Path(os.path.realpath(files.expanded(path)))
        file = path / "study.json"
        try:
            stored = files.read_sealed(file, _STUDY_REMEDY)
            sealed = "sha256" in json.loads(file.read_bytes())
        except OSError as error:
            raise ValueError(
                f"{path} is not a study (a directory with a study.json that "
                f"slurm/submit.py made): {error}"
            ) from error
        with named_if_damaged(file, _STUDY_REMEDY):
            tasks = [TaskSpec(**task) for task in stored.pop("tasks")]
            study = cls(path=path, tasks=tasks, sealed=sealed, **stored)
            study._check()
        return study

    def _check(self) -> None:
        """Raises a ValueError if a study does not hold what it is known to hold."""
        lists = [self.command, self.submissions, self.evaluation]
        dicts = [self.cluster, self.origin, *self.submissions]
        dicts += [d for task in self.tasks for d in (task.stages, task.sweep)]
        if not (
            isinstance(self.cwd, str)
            and all(isinstance(each, list) for each in lists)
            and all(isinstance(each, dict) for each in dicts)
        ):
            raise ValueError("a part of it is of another kind")
        if not self.tasks or not all(task.stages for task in self.tasks):
            raise ValueError("it has no tasks, or one without stages")
        for task in self.tasks:
            if Path(task.name).name != task.name:
                raise ValueError(f"{task.name!r} is no name of a task")
        if not all(each.keys() >= {"cluster", "jobs"} for each in self.submissions):
            raise ValueError("a submission has no jobs")

    def save(self) -> None:
        """Writes study.json."""
        stored = asdict(self)
        del stored["path"], stored["sealed"]
        _write(
            self.path / "study.json", files.sealed(stored) if self.sealed else stored
        )

    @property
    def code(self) -> Path:
        """The snapshot that the jobs run."""
        return self.path / "code"

    @property
    def jobs(self) -> Path:
        """Submitit's folder."""
        return self.path / "jobs"

    def swept(self) -> list[str]:
        """Returns the keys that tasks have values of their own of."""
        return list(dict.fromkeys(key for task in self.tasks for key in task.sweep))

    def run(self, task: TaskSpec) -> Path:
        """Returns the directory that a task's command writes to."""
        return self.path / "tasks" / task.name / "run"

    def words(self, task: TaskSpec, stage: str) -> list[str]:
        """Returns the words that a stage of a task runs."""
        out = str(self.run(task))
        return [word.replace("{out}", out) for word in task.stages[stage]]

    def state(self, task: TaskSpec) -> dict[str, Any]:
        """Returns what the task's jobs wrote of it; empty if none has begun.

        Raises:
            ValueError: If it is damaged.
        """
        file = self._state_file(task)
        try:
            state: dict[str, Any] = files.read_sealed(file, _STATE_REMEDY)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error}.") from error
        attempts = state.get("attempts", [])
        if not (
            isinstance(attempts, list)
            and isinstance(state.get("done", []), list)
            and all(isinstance(a, dict) and a.keys() >= _ATTEMPT for a in attempts)
        ):
            raise ValueError(f"{file} is damaged: no attempts. {_STATE_REMEDY}")
        return state

    def update_state(self, task: TaskSpec, **changes: Any) -> None:
        """Replaces entries of the task's state.json. For rank 0 of its job alone."""
        state: dict[str, Any] = {"stage": None, "status": None, "done": []}
        state |= {"error": None, "attempts": []} | self.state(task) | changes
        _write(self._state_file(task), files.sealed(state))

    def _state_file(self, task: TaskSpec) -> Path:
        return self.path / "tasks" / task.name / STATE_FILE

    def open_stages(self, task: TaskSpec) -> list[str]:
        """Returns the stages that have not come to their end, in order."""
        done = self.state(task).get("done", [])
        return [stage for stage in task.stages if stage not in done]

    def job(self, task: TaskSpec, stage: str) -> str | None:
        """Returns the id of the last job that was submitted for a stage of a task."""
        for submission in reversed(self.submissions):
            job: str | None = submission["jobs"].get(task.name, {}).get(stage)
            if job is not None:
                return job
        return None

    def attempts(self, task: TaskSpec, stage: str) -> list[dict[str, Any]]:
        """Returns the attempts at a stage by its last job: the first, and requeues."""
        job = self.job(task, stage)
        attempts = self.state(task).get("attempts", [])
        return [a for a in attempts if a["stage"] == stage and job in (None, a["job"])]

    def resume_command(self) -> str:
        """Returns the command that reruns what is not finished."""
        return shlex.join(["python", "slurm/submit.py", "--resume", str(self.path)])


_STUDY_REMEDY = (
    "Copy it back from where the study has been kept; without it, the runs in tasks/ "
    "go on and are evaluated one by one. Where it was changed by hand, remove its "
    "line sha256."
)
_STATE_REMEDY = "Delete it: the task's directory tells how far it came."
_ATTEMPT = {"stage", "job", "host", "pid", "started", "ended", "gpus"}


@contextmanager
def named_if_damaged(file: Path, remedy: str) -> Iterator[None]:
    """Raises a ValueError that names a file and what to do if it cannot be read."""
    try:
        yield
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError),
        *(csv.Error, yaml.YAMLError),
    ) as error:
        reason = " ".join(f"{error}".split())
        raise ValueError(f"{file} is damaged: {reason}. {remedy}") from error


def _write(path: Path, stored: dict[str, Any]) -> None:
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(stored, indent=2) + "\n")


def run_directories(run: Path) -> Iterator[Path]:
    """Yields the run directories that a task's command made.

    `lightly-mim pretrain` makes one, a script one per method and seed in its folder.
    """
    for config in sorted([*run.glob("config.yaml"), *run.glob("*/config.yaml")]):
        yield config.parent


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """Keeps other submit.py of this machine from the study.

    Raises:
        ValueError: If one is at work, or if the lock is no file.
    """
    lock = study.path / ".lock"
    if lock.exists() and not lock.is_file():
        raise ValueError(f"{lock} is no file, which it has been. Remove it.")
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"Another submit.py is at work on {study.path}: wait for its end, or "
                "interrupt it by Ctrl-C."
            ) from error
        yield


def snapshot(destination: Path) -> None:
    """Copies the code that jobs run: what git tracks, as it stands, and new files."""
    for name in _source_files():
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def mend_snapshot(study: Study) -> None:
    """Makes a package of the modules of a study that an earlier version has made.

    They import each other by bare names.
    """
    package = study.code / "slurm"
    if package.is_dir() and not (package / "__init__.py").exists():
        (package / "__init__.py").write_text("import sys\n\nsys.path[:0] = __path__\n")


def _source_files() -> list[str]:
    words = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listed = _git(*words, *CODE)
    found = (
        [file for folder in CODE for file in (ROOT / folder).rglob("*")]
        if listed is None
        else [ROOT / name for name in listed.split("\0") if name]
    )
    return [
        str(file.relative_to(ROOT))
        for file in found
        if file.is_file() and "__pycache__" not in file.parts  # git lists the deleted
    ]


def origin() -> dict[str, Any]:
    """Returns commit, versions, host and date, as they are now."""
    status = _git("status", "--porcelain", "--", *CODE)
    return {
        "commit": (_git("rev-parse", "HEAD") or "unknown").strip(),
        "modified": bool(status) if status is not None else None,
        "versions": versions(),
        "host": platform.node(),
        "date": now(),
    }


def now() -> str:
    """Returns the date and the time as studies have it."""
    return time.strftime("%Y-%m-%d %H:%M:%S%z")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what the numbers depend on."""
    packages = ("torch", "pytorch-lightning", "timm", "lightly", "submitit")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def _git(*words: str) -> str | None:
    """Returns what git says of the clone; None where there is no git or no clone."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
