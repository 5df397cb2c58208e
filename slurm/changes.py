"""What `--resume` may change of a study: tasks that are not finished."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from slurm.commands import Program, make_task, read, read_sweep
from slurm.options import machine
from slurm.status import Queue, is_busy, queue
from slurm.study import Study, TaskSpec


def change_study(study: Study, options: argparse.Namespace) -> bool:
    """Drops and changes tasks, and gives them another evaluation, as was asked for.

    Returns:
        Whether anything was changed, which is not saved.

    Raises:
        ValueError: If there is no such task, if it runs, is in the queue or has come to
            its end, or if what is asked for does not fit it.
    """
    if not (options.drop or options.change or options.evaluate):
        return False
    if study.cwd not in sys.path:
        sys.path.append(study.cwd)  # where a method of one's own lies
    queued = {} if options.dry_run else ask_queue(study)
    for name in options.drop:
        study.tasks.remove(_find(study, name, queued))
    if not study.tasks:
        raise ValueError(f"--drop leaves no task in {study.path}.")
    if options.evaluate:
        _change_evaluation(study, options)
    for name, *words in options.change:
        _change(study, _find(study, name, queued), words, options)
    return True


def ask_queue(study: Study) -> Queue:
    """Returns SLURM's queue, see `queue`; an empty one for a study that has no jobs.

    Raises:
        ValueError: If SLURM does not answer.
    """
    queued = queue()
    if queued is None and any(s["cluster"] == "slurm" for s in study.submissions):
        raise ValueError(
            "squeue does not say which tasks are in the queue, and a task must not run "
            "twice: try again when SLURM answers."
        )
    return queued or {}


def _find(study: Study, name: str, queued: Queue) -> TaskSpec:
    """Returns the task of a name or number, which must be at rest."""
    number = int(name) if name.isdecimal() else None
    found = [t for t in study.tasks if name == t.name or number == _number(t)]
    if len(found) != 1:
        raise ValueError(
            f"{study.path} has no task {name!r}. It has: "
            f"{', '.join(task.name for task in study.tasks)}."
        )
    task = found[0]
    if is_busy(study, task, queued):
        jobs = {study.job(task, stage) for stage in task.stages} & set(queued)
        words = ["scancel", *sorted(filter(None, jobs))]
        raise ValueError(
            f"{task.name} runs or is in the queue: end it first, "
            + (shlex.join(words) if len(words) > 1 else "by Ctrl-C.")
        )
    return task


def _number(task: TaskSpec) -> int:
    return int(task.name.partition("-")[0])


def _change(
    study: Study, task: TaskSpec, words: Sequence[str], options: argparse.Namespace
) -> None:
    """Puts a task with other values in the place of one."""
    sweep = read_sweep(words)
    if not sweep or any(len(values) > 1 for values in sweep.values()):
        raise ValueError(
            f"--change takes a task and one value for each KEY=VALUE, got "
            f"{shlex.join([task.name, *words])}."
        )
    if not study.open_stages(task):
        raise ValueError(f"{task.name} is finished: send another study instead.")
    own = task.sweep | {key: value for key, (value,) in sweep.items()}
    command = read(study.command, study.evaluation)
    made = make_task(command, _number(task), own, machine(options))
    if same := [other for other in study.tasks if other.sweep == own]:
        raise ValueError(f"--change {task.name}: {same[0].name} has these values.")
    study.tasks[study.tasks.index(task)] = made


def _change_evaluation(study: Study, options: argparse.Namespace) -> None:
    """Gives the tasks that are not evaluated yet the evaluation that was asked for.

    Raises:
        ValueError: If there is no such task, or if the evaluation does not fit one.
    """
    command = read(study.command, options.evaluate)
    assert isinstance(command, Program)  # or it was refused
    done = {task.name: study.state(task).get("done", []) for task in study.tasks}
    left = [task for task in study.tasks if "evaluate" not in done[task.name]]
    if not left:
        raise ValueError(
            f"Every task of {study.path} is evaluated: leave --evaluate out, and "
            "evaluate their run directories with lightly-mim evaluate."
        )
    for task in left:
        task.stages.update(command.evaluation(task.stages["train"]))
        command.check(task.stages["train"][1:], machine(options))
    study.evaluation[:] = options.evaluate
