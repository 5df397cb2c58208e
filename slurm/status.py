"""Shows how far a study is, from its files and, where there is one, SLURM's queue.

python slurm/status.py STUDY [--watch]
"""

from __future__ import annotations

import argparse
import csv
import getpass
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, Python looks in slurm/ and not in the clone
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lightly_mim import files
from slurm.study import (
    DONE,
    FAILED,
    INTERRUPTED,
    REQUEUED,
    RUNNING,
    Study,
    TaskSpec,
    named_if_damaged,
    run_directories,
)

Queue = Mapping[str, tuple[str, str]]  # state and reason in SLURM's queue, by job

_COLOURS = {
    **{"done": "green", "running": "cyan"},
    **dict.fromkeys(("failed", "lost", "held", "damaged"), "red"),
}
UNFINISHED = ("failed", "interrupted", "lost")
ENDED = ("done", *UNFINISHED, "damaged", "not begun")
PROGRESS = ("epoch", "loss", "images/s")
_LOG_END = 2**16  # bytes in which the last line of a log is


@dataclass(frozen=True)
class Row:
    """How far a task is."""

    task: TaskSpec
    # queued, held (until somebody releases it), starting, running, requeued, trained,
    # done, failed, interrupted (by Ctrl-C), lost (its job ended without a word),
    # damaged (its state.json cannot be read) or not begun.
    state: str
    stage: str  # that it is at
    detail: str  # what the queue waits for, why it failed, or what is damaged
    requeues: int  # how often its jobs were started again
    progress: dict[str, str]  # PROGRESS as text, where there are any
    attempts: list[dict[str, Any]]  # those that its state.json has
    damaged: bool = False  # whether a file of it is


def queue() -> Queue | None:
    """Returns SLURM's queue of this user; None where SLURM cannot be asked."""
    answer = _ask("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r")
    if answer is None:
        return None
    lines = [line.split("|") for line in answer.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def held_jobs(study: Study, task: TaskSpec, queued: Queue) -> list[str]:
    """Returns the jobs of a task that wait until somebody releases them."""
    jobs = [study.job(task, stage) for stage in study.open_stages(task)]
    return [job for job in jobs if job and job in queued and _is_held(*queued[job])]


def _is_held(state: str, reason: str) -> bool:
    """Returns whether SLURM starts a job by itself no more.

    The reasons are JobHeldUser, JobHeldAdmin, JobHoldMaxRequeue and, after a node's
    daemon died, "launch failed requeued held".
    """
    held = re.search("JobHold|[Hh]eld", reason) is not None
    return state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or (state == "PENDING" and held)


def release_command(jobs: Sequence[str]) -> list[str]:
    """Returns the command that releases held jobs."""
    return ["scontrol", "release", ",".join(jobs)]


def _ask(*words: str) -> str | None:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def rows(study: Study, queued: Queue | None) -> list[Row]:
    """Returns how far each task is, as `queue` and its own files tell."""
    return [_row(study, task, queued) for task in study.tasks]


def _row(study: Study, task: TaskSpec, queued: Queue | None) -> Row:
    try:
        open_stages = study.open_stages(task)
    except ValueError as error:
        return Row(task, "damaged", "", str(error), 0, {}, [], damaged=True)
    stage = [*open_stages, list(task.stages)[-1]][0]
    state, detail = "done", ""
    if open_stages:
        state, detail = _state(study, task, stage, queued)
    of_stages = [study.attempts(task, name) for name in task.stages]
    requeues = sum(max(0, len(found) - 1) for found in of_stages)
    attempts = study.state(task).get("attempts", [])
    try:
        shown, damage = progress(study.run(task)), ""
    except ValueError as error:
        shown, damage = {}, str(error)
    detail = ". ".join(filter(None, [detail, damage]))
    return Row(task, state, stage, detail, requeues, shown, attempts, bool(damage))


def _state(
    study: Study, task: TaskSpec, stage: str, queued: Queue | None
) -> tuple[str, str]:
    """Returns the state of a task at an open stage, and its detail."""
    recorded = study.state(task)
    status: str | None = recorded.get("status")
    job = study.job(task, stage)
    attempts = study.attempts(task, stage)
    cluster = study.submissions[-1]["cluster"] if study.submissions else None
    reached = "trained" if recorded.get("done") else "queued"
    if cluster == "slurm" and queued and job and job in queued:
        slurm, reason = queued[job]
        if _is_held(slurm, reason):
            release = shlex.join(release_command([job]))
            return "held", f"{reason}: it stays so until you say {release}"
        if slurm == "PENDING":
            return ("requeued" if attempts else reached), reason
        if not attempts or status == REQUEUED:  # the next attempt has not begun
            return "starting", slurm
        if status in (FAILED, INTERRUPTED):
            return status, _error(recorded)
        return "running", "" if slurm == "RUNNING" else slurm
    last = (recorded.get("attempts") or [{}])[-1].get("job")
    # Of a local job that was started since, nothing is known yet.
    if status in (FAILED, INTERRUPTED) and (
        cluster != "local" or job in (None, last) or last == "debug"
    ):
        return status, _error(recorded)
    if cluster == "slurm" and queued is None:
        told = "SLURM cannot be asked here"
        return ("running" if status == RUNNING else reached), told
    if cluster == "slurm" and job is not None:
        return "lost", _why_gone(study, job)
    ended = f"its process ended without a word. {_last_line(study, job)}"
    if status == RUNNING and attempts:
        alive = _is_alive(attempts[-1]["host"], attempts[-1]["pid"])
        return ("running", "") if alive else ("lost", ended)
    if job is not None and status != DONE:
        alive = job.isdecimal() and _is_alive(platform.node(), int(job))
        return ("starting", "") if alive else ("lost", ended)
    return (reached, "") if recorded else ("not begun", "")


def _error(recorded: Mapping[str, Any]) -> str:
    error = recorded.get("error") or {}
    return str(error.get("line", "no reason was recorded"))


def _why_gone(study: Study, job: str) -> str:
    """Says what SLURM remembers of a job that has left the queue without a word."""
    said = _ask("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode")
    if not (said and said.strip()):
        said = _ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T %r")
    last = (said or "").strip().splitlines()[-1:]
    slurm = f"SLURM says {last[0]}" if last else "SLURM has forgotten it"
    return f"job {job} ended without a word; {slurm}. {_last_line(study, job)}".strip()


def log_file(study: Study, job: str) -> Path:
    """Returns the log of a job's rank 0."""
    return study.jobs / job / f"{job}_0_log.out"


def _last_line(study: Study, job: str | None) -> str:
    if job is None:
        return ""
    log = log_file(study, job)
    if not log.is_file():
        return "There is no log."
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_END))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"Last line of its log: {lines[-1]}" if lines else "Its log is empty."


def _is_alive(host: str, pid: int) -> bool:
    """Returns whether a process of this machine is alive; of others, it counts as."""
    if host != platform.node():
        return True
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():  # a zombie has ended
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return not Path("/proc/self").exists()


def is_running_here(study: Study, task: TaskSpec) -> bool:
    """Returns whether the last process of a task is alive on this machine."""
    recorded = study.state(task)
    attempts = recorded.get("attempts") or []
    if recorded.get("status") != RUNNING or not attempts:
        return False
    host, pid = attempts[-1]["host"], attempts[-1]["pid"]
    if host != platform.node() or not _is_alive(host, pid):
        return False
    command = Path(f"/proc/{pid}/cmdline")
    # A number may have come to another process since.
    return not command.exists() or b"submitit" in command.read_bytes()


def is_busy(study: Study, task: TaskSpec, queued: Queue) -> bool:
    """Returns whether a task runs or is in the queue."""
    # Processes of this machine outlive a submit.py that is killed.
    return is_running_here(study, task) or any(
        study.job(task, stage) in queued for stage in task.stages
    )


def progress(run: Path) -> dict[str, str]:
    """Reads `PROGRESS` of the run in a task's directory that was written last.

    Raises:
        ValueError: If its metrics.csv or config.yaml is damaged.
    """
    logs = [path / "metrics.csv" for path in run_directories(run)]
    logs = [log for log in logs if log.exists()]
    if not logs:
        return {}
    newest = max(logs, key=lambda log: log.stat().st_mtime)
    config = newest.parent / "config.yaml"
    shown = {}
    with named_if_damaged(newest, "Delete it: the run goes on, and writes its rest."):
        last = _last_values(newest)
        if "epoch" in last:
            shown["epoch"] = f"{int(last['epoch']) + 1}"
        if loss := last.get("train_loss_step") or last.get("train_loss"):
            shown["loss"] = f"{float(loss):.4f}"
        if "images_per_second" in last:
            shown["images/s"] = f"{float(last['images_per_second']):.0f}"
    with named_if_damaged(config, "Restore it: the run cannot go on without it."):
        if "epoch" in shown:
            shown["epoch"] += f"/{_epochs(config)}"
    return shown


def _last_values(log: Path) -> dict[str, str]:
    """Returns the last value of every column of a metrics.csv."""
    files.check_regular(log)
    last: dict[str, str] = {}
    with log.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and "step" not in reader.fieldnames:
            raise ValueError("it has no column step")
        for row in reader:
            # A row that is being written may be short.
            last |= {key: value for key, value in row.items() if key and value}
    return last


def _epochs(config: Path) -> Any:
    """Returns the number of epochs that a config.yaml says."""
    files.check_regular(config)
    text = config.read_text()
    files.check_text(text)
    said = yaml.safe_load(text)
    if not isinstance(said, dict):
        raise ValueError("it has no arguments of a run")
    recipe = said.get("recipe")
    epochs = recipe.get("epochs") if isinstance(recipe, dict) else None
    return epochs or said.get("epochs")


def table(study: Study, found: Sequence[Row]) -> Table:
    """Returns the table for a terminal."""
    counts = Counter(row.state for row in found)
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    title = Text(f"{study.path.name}: {summary}")
    made = Table(title=title, title_justify="left", box=None)
    for name in ("task", "state", "stage", *PROGRESS, "requeued", ""):
        made.add_column(
            name,
            justify="right" if name in (*PROGRESS, "requeued") else "left",
            overflow="fold",
            no_wrap=name not in ("task", ""),
        )
    for row in found:
        made.add_row(
            Text(row.task.name),
            Text(row.state, style=_COLOURS.get(row.state, "")),
            row.stage,
            *(row.progress.get(name, "") for name in PROGRESS),
            str(row.requeues or ""),
            Text(row.detail),
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script.

    Exits with 1 if a task failed or a file of one is damaged, with 2 if there is no
    study.
    """
    parser = argparse.ArgumentParser(
        prog="status.py", description="Show how far a study is.", allow_abbrev=False
    )
    parser.add_argument("study", type=Path, metavar="STUDY")
    text = "again and again, until all has ended"
    parser.add_argument("--watch", action="store_true", help=text)
    text = "between two looks with --watch (default: 10)"
    parser.add_argument("--every", type=float, default=10, metavar="SECONDS", help=text)
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        found = _look(options.study)
        if options.watch:
            with Live(table(*found), console=console, auto_refresh=False) as live:
                while not all(row.state in ENDED for row in found[1]):
                    time.sleep(options.every)
                    found = _look(options.study)
                    live.update(table(*found), refresh=True)
        else:
            console.print(table(*found))
    except ValueError as error:
        parser.exit(2, f"status.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130)
    study, listed = found
    states = {row.state for row in listed}
    if states & set(UNFINISHED):
        text = f"\nGo on with what has not ended: {study.resume_command()}"
        console.print(text, soft_wrap=True)
        parser.exit(1)
    if "held" in states:
        release = f"{study.resume_command()} --release"
        console.print(f"\nRelease all that SLURM holds: {release}", soft_wrap=True)
    if any(row.damaged for row in listed):
        parser.exit(1)


def _look(path: Path) -> tuple[Study, list[Row]]:
    study = Study.load(path)
    return study, rows(study, queue())


if __name__ == "__main__":
    main()
