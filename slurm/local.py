"""The same study on this machine: `--cluster local` and `--cluster debug`."""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import submitit

from lightly_mim.interrupts import INTERRUPTED
from slurm.cluster import variables, work
from slurm.options import machine
from slurm.report import write_report
from slurm.study import Study, TaskSpec, now

_YEAR = 365 * 24 * 60  # minutes; a laptop has no time limit
_GRACE = 5  # seconds in which jobs end after Ctrl-C


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
    study.submissions.append({"date": now(), "cluster": "local", "jobs": {}})
    jobs: dict[int, submitit.Job[Any]] = {}  # those that run, by place

    def work_off(place: int, waiting: Iterator[TaskSpec]) -> Iterator[None]:
        gpus = list(range(place * per_task, (place + 1) * per_task))
        for task in waiting:
            for stage in study.open_stages(task):
                jobs[place] = _start(study, options, task, stage, gpus)
                while not jobs[place].done():
                    yield
                print(_ended(study, task, stage, jobs.pop(place)), flush=True)
                if stage in study.open_stages(task):
                    break  # it failed, and the next one would read what it wrote

    # `kill` ends the jobs, too, which would run on unseen.
    # So does Ctrl-C, which jobs of a script that a shell started behind & would ignore.
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        waiting = iter(pending)
        places = [work_off(place, waiting) for place in range(parallel)]
        # Each `next` lets a place look whether its job has ended.
        while places := [place for place in places if next(place, True) is None]:
            time.sleep(0.2)
    except BaseException as error:
        _stop(list(jobs.values()))
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


def _ended(study: Study, task: TaskSpec, stage: str, job: submitit.Job[Any]) -> str:
    """Says how a job has ended."""
    if stage not in study.open_stages(task):
        return f"{task.name}, {stage}: done"
    state = study.state(task)
    jobs = {attempt["job"] for attempt in state.get("attempts", [])}
    own = str(job.job_id) in jobs  # or the reason is that of a job before
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
    os.environ |= variables(options)
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
    while running := [job for job in jobs if not job.done()]:
        # A terminal's Ctrl-C has reached them, too; a second one would disturb their
        # orderly end.
        if time.monotonic() > deadline:
            deadline = math.inf
            for job in running:
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
            os.environ["SUBMITIT_DEBUG_JOB_ID"] = "debug"
            try:
                work(study, options, task, stage)()
            finally:
                del os.environ["SUBMITIT_DEBUG_JOB_ID"]
    print(write_report(study))
    return 0
