"""The same study on this machine: `--cluster local` and `--cluster debug`."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from slurm.cluster import machine, variables, work
from slurm.report import write_report
from slurm.study import Study, TaskSpec

INTERRUPTED = 130  # exit code, as a shell's
_YEAR = 365 * 24 * 60  # minutes; a laptop has no time limit
_GRACE = 5  # seconds in which jobs end after Ctrl-C


@dataclass
class _Slot:
    """One of the `--parallel` places, with the GPUs that are its own."""

    gpus: list[int]
    job: submitit.Job[Any] | None = None
    running: tuple[TaskSpec, str] | None = None
    rest: list[tuple[TaskSpec, str]] | None = None  # stages that follow


def run_local(
    study: Study, options: argparse.Namespace, pending: Sequence[TaskSpec]
) -> int:
    """Runs the tasks through submitit's local executor, and waits for them.

    It has no arrays: this function starts a task when another one has ended.

    Returns:
        The exit code: 0, 1 if a task failed, 130 after Ctrl-C or SIGTERM.

    Raises:
        ValueError: If there are fewer GPUs than `--parallel` tasks need.
    """
    per_task = options.gpus_per_node
    parallel = min(options.parallel or 1, len(pending))
    _check_gpus(parallel * per_task)
    if options.setup:
        print("--setup is for SLURM: its lines are not run.")
    slots = [
        _Slot(list(range(number * per_task, (number + 1) * per_task)))
        for number in range(parallel)
    ]
    waiting = [(task, study.open_stages(task)) for task in pending]
    study.submissions.append(
        {"date": time.strftime("%Y-%m-%d %H:%M:%S%z"), "cluster": "local", "jobs": {}}
    )
    # `kill` ends the jobs, too, which would run on unseen.
    # So does Ctrl-C, which jobs of a script that a shell started behind & would ignore.
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        while waiting or any(slot.job for slot in slots):
            for slot in slots:
                if slot.job is not None and slot.job.done():
                    print(_ended(study, slot), flush=True)
                    slot.job = None
                if slot.job is not None:
                    continue
                if not slot.rest and waiting:
                    task, stages = waiting.pop(0)
                    slot.rest = [(task, stage) for stage in stages]
                if slot.rest:
                    task, stage = slot.rest.pop(0)
                    if study.open_stages(task)[0] != stage:
                        slot.rest = None  # the stage before it failed
                        continue
                    slot.job = _start(study, options, task, stage, slot.gpus)
                    slot.running = (task, stage)
            time.sleep(0.2)
    except BaseException as error:
        _stop([slot.job for slot in slots if slot.job is not None])
        if not isinstance(error, KeyboardInterrupt):  # a state.json that is damaged
            raise
        print(f"\nInterrupted. Go on with: {study.resume_command()}")
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with suppress(OSError):
        (study.jobs / "%j").rmdir()  # submitit makes it, with nothing in it
    print(write_report(study))
    return int(any(study.open_stages(task) for task in study.tasks))


def _ended(study: Study, slot: _Slot) -> str:
    """Says how the job of a slot has ended."""
    assert slot.running is not None and slot.job is not None
    task, stage = slot.running
    if stage not in study.open_stages(task):
        return f"{task.name}, {stage}: done"
    state = study.state(task)
    jobs = {attempt["job"] for attempt in state.get("attempts", [])}
    own = str(slot.job.job_id) in jobs  # or the reason is that of a job before
    error = (state.get("error") if own else None) or {}
    reason = error.get("line", "its process ended without a word")
    return f"{task.name}, {stage}: failed, {reason}"


def _check_gpus(needed: int) -> None:
    import torch

    if needed > torch.cuda.device_count():
        raise ValueError(
            f"--parallel times --gpus-per-node is {needed}, and this machine has "
            f"{torch.cuda.device_count()} GPU(s)."
        )


def _start(
    study: Study,
    options: argparse.Namespace,
    task: TaskSpec,
    stage: str,
    gpus: list[int],
) -> submitit.Job[Any]:
    training = stage in ("train", "run")
    visible = gpus if training else gpus[:1]
    executor = submitit.LocalExecutor(
        study.jobs / "%j", options.max_requeues + 1, python=options.python
    )
    executor.update_parameters(
        timeout_min=_YEAR,
        tasks_per_node=machine(options).devices if training else 1,
        gpus_per_node=len(visible),
        visible_gpus=visible,
        stderr_to_stdout=True,
    )
    with _snapshot(study, options):
        job = executor.submit(work(study, options, task, stage))
    jobs = study.submissions[-1]["jobs"]
    jobs.setdefault(task.name, {})[stage] = str(job.job_id)
    study.save()
    print(f"{task.name}, {stage}: {job.paths.stdout}", flush=True)
    return job


@contextmanager
def _snapshot(study: Study, options: argparse.Namespace) -> Iterator[None]:
    """Starts processes where they import the snapshot, with the study's environment.

    Not through submitit's `setup`: its shell would stand between Ctrl-C and the job.
    """
    before, cwd = dict(os.environ), Path.cwd()
    paths = filter(None, [str(study.code), os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ |= {name: value for name, _, value in variables(options)}
    os.chdir(study.code)
    try:
        yield
    finally:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(before)


def _stop(jobs: Sequence[submitit.Job[Any]]) -> None:
    """Ends jobs and waits for their end, so that nothing runs on unseen."""
    deadline = time.monotonic() + _GRACE
    asked = False
    while not all(job.done() for job in jobs):
        # A terminal's Ctrl-C has reached them, too; a second one would disturb their
        # orderly end.
        if time.monotonic() > deadline and not asked:
            asked = True
            for job in jobs:
                job.cancel()
        time.sleep(0.1)


def run_debug(
    study: Study, options: argparse.Namespace, pending: Sequence[TaskSpec]
) -> int:
    """Runs the tasks in this process, one after the other, and stops at an error.

    As submitit's debug executor, but without its post-mortem debugger.

    Returns:
        The exit code 0.
    """
    for task in pending:
        for stage in study.open_stages(task):
            _in_place(work(study, options, task, stage))
    print(write_report(study))
    return 0


def _in_place(function: Callable[[], None]) -> None:
    os.environ["SUBMITIT_DEBUG_JOB_ID"] = "debug"
    try:
        function()
    finally:
        del os.environ["SUBMITIT_DEBUG_JOB_ID"]
