"""Sends a study to SLURM: one job, or a sweep as an array, evaluated and reported.

python slurm/submit.py [options] [--sweep KEY=VALUE,... ...] -- COMMAND [its options]
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, Python looks in slurm/ and not in the clone
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from lightly_mim import interrupts

    if __name__ == "__main__":  # there is nothing to save yet
        interrupts.end_at_once()
    import submitit
except ModuleNotFoundError:
    sys.exit(
        "submit.py needs the packages of this project: start it by the Python of its "
        ".venv, or install them with: pip install '.[benchmarks,slurm]'"
    )
from rich.console import Console
from rich.table import Table
from rich.text import Text
from submitit.core.utils import FailedJobError, FailedSubmissionError

from lightly_mim import files
from slurm.changes import ask_queue, change_study
from slurm.cluster import (
    StudyExecutor,
    cancel,
    check_slurm,
    executor,
    outside_of_jobs,
    release,
    work,
)
from slurm.commands import read, read_sweep, tasks
from slurm.local import run_debug, run_local
from slurm.options import Machine, add_options, cut, machine, names, parse, read_config
from slurm.status import held_jobs, is_busy, queue, release_command
from slurm.study import Study, TaskSpec, alone, mend_snapshot, now, origin, snapshot
from slurm.task import Report

EPILOG = """\
example, which needs no SLURM and writes nothing; more are in slurm/README.md:
  python slurm/submit.py --dry-run --partition gpu --gpus-per-node 8 \\
      --sweep method=SimMIM,MAE seed=0,1,2 -- benchmarks/imagenette.py --epochs 800

Look at it with: python slurm/status.py STUDY
"""


def parser() -> tuple[argparse.ArgumentParser, set[str]]:
    """Returns the parser of this script, and the options that no site may set."""
    made = argparse.ArgumentParser(
        prog="submit.py",
        usage="submit.py [options] [--sweep KEY=VALUE,... ...] -- COMMAND [options]",
        description="Send a benchmark script or a lightly-mim command to SLURM.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = made.add_argument_group("the study")

    def add(name: str, text: str, **more: Any) -> None:
        group.add_argument(f"--{name}", help=text, **more)

    several: dict[str, Any] = {"nargs": "+", "default": []}
    text = "a task for each combination of these values of the command's options"
    add("sweep", text, **several, action="extend", metavar="KEY=VALUE,...")
    text = "options of lightly-mim evaluate, for what lightly-mim pretrain trains"
    add("evaluate", text, type=shlex.split, default=[], metavar="WORDS")
    text = "new directory for everything (default: studies/DATE-COMMAND)"
    add("study", text, type=files.expanded, metavar="DIR")
    text = (
        "send the tasks of a study that are not finished and not in the queue, with "
        "its own command, code and cluster options; those given here replace them"
    )
    add("resume", text, type=Path, metavar="STUDY")
    text = "with --resume: take tasks (names or numbers) out; their directories stay"
    add("drop", text, **several, action="extend", metavar="TASK")
    text = "with --resume: begin a task that is not finished anew, with other values"
    add("change", text, **several, action="append", metavar=("TASK", "KEY=VALUE"))
    text = "with --resume: release the study's jobs that SLURM holds in the queue"
    add("release", text, action="store_true")
    text = "YAML file with options of the cluster; the command line wins"
    add("config", text, type=files.expanded, metavar="FILE")
    text = "print the sbatch scripts and the tasks; write and send nothing"
    add("dry-run", text, action="store_true")
    own = {*names(made), "help"}
    add_options(made)
    return made, own


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script. Exits with 2 and one message if something is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut_at = words.index("--") if "--" in words else len(words)
    made, study = parser()
    interrupts.raise_again()
    try:
        _main(made, study, words[:cut_at], words[cut_at + 1 :])
    except (ValueError, OSError, FailedSubmissionError, FailedJobError) as error:
        made.exit(2, f"submit.py: error: {error}\n")
    except KeyboardInterrupt:
        made.exit(interrupts.INTERRUPTED, "\nsubmit.py: interrupted.\n")
    finally:
        interrupts.end_at_once()


def _main(
    made: argparse.ArgumentParser,
    study_options: set[str],
    own: list[str],
    command: list[str],
) -> None:
    first = parse(made, own)
    for name in ("release", "drop", "change"):
        if vars(first)[name] and not first.resume:
            raise ValueError(f"--{name} goes with --resume STUDY.")
    config = read_config(first.config, study_options) if first.config else []
    new = not first.resume
    if new:
        options = _applicable(parse(made, [*config, *own]))
        site = [w for name, said in cut(own) if name not in study_options for w in said]
        study = _plan(options, command, [*config, *site])
    else:
        if command or first.sweep or first.study:
            raise ValueError(
                "--resume takes command and sweep from the study: leave out --sweep, "
                "--study and what is behind --. --change and --drop are for its tasks."
            )
        study = Study.load(first.resume)
        stored = [str(word) for word in study.cluster["words"]]
        options = _applicable(parse(made, [*stored, *config, *own]))
        _check_same_machine(study, options)
    if options.dry_run:
        if not new:
            change_study(study, options)
        _show(study, options, new)
        return
    if options.cluster == "slurm":
        check_slurm(options)
    if new:
        _create(study)
    with alone(study):
        # As it is now: another submit.py may have added its jobs a moment ago.
        before, study = Study.load(study.path), Study.load(study.path)
        if not new and change_study(study, options):
            study.save()
        mend_snapshot(study)
        in_slurm = options.cluster == "slurm"
        pending = _pending(study, in_slurm, options.release)
        if not pending:
            where = "in the queue" if in_slurm else "running"
            print(f"Every task of {study.path} is finished or {where}.")
        elif not in_slurm:
            print(f"The study: {study.path}\n{_watch(study)}", flush=True)
            run = run_local if options.cluster == "local" else run_debug
            sys.exit(run(study, options, pending))
        else:
            try:
                _submit(study, options, pending)
            except BaseException:  # nothing was submitted: leave nothing behind
                if new:
                    shutil.rmtree(study.path)
                else:
                    before.save()
                raise
            print(f"The study: {study.path}\n{_watch(study)}")


def _applicable(options: argparse.Namespace) -> argparse.Namespace:
    """Leaves out what a site's file has and this study cannot use; says what lacks."""
    if options.cpus_per_gpu and not options.gpus_per_node:
        print("--cpus-per-gpu is left out: no --gpus-per-node.", file=sys.stderr)
        options.cpus_per_gpu = None
    alone = not (options.cpus_per_gpu or options.cpus_per_task)
    if options.cluster == "slurm" and options.gpus_per_node and alone:
        print(
            "Neither --cpus-per-gpu nor --cpus-per-task: most clusters give a process "
            "one CPU then, which reads images for a GPU too slowly.",
            file=sys.stderr,
        )
    return options


def _watch(study: Study) -> str:
    words = ["python", "slurm/status.py", str(study.path), "--watch"]
    return f"Watch it with: {shlex.join(words)}"


def _plan(options: argparse.Namespace, words: list[str], cluster: list[str]) -> Study:
    """Returns the study that was described. Writes nothing."""
    command = read(words, options.evaluate)
    specs = tasks(command, read_sweep(options.sweep), machine(options))
    path = options.study or Path("studies") / (
        f"{time.strftime('%Y-%m-%d-%H%M%S')}-{command.name}"
    )
    if path.exists():
        raise ValueError(
            f"{path} is there already: pass another directory as --study, or --resume "
            f"{shlex.quote(str(path))} to go on with it."
        )
    return Study(
        path=Path(os.path.realpath(path)),
        command=words,
        tasks=specs,
        cwd=str(Path.cwd()),
        cluster={"words": cluster, "nodes": options.nodes,
                 "devices": machine(options).devices},
        origin=origin(),
        evaluation=options.evaluate,
    )  # fmt: skip


def _check_same_machine(study: Study, options: argparse.Namespace) -> None:
    """Refuses another number of processes: the study's tasks have theirs by now."""
    got = machine(options)
    had = Machine(study.cluster["nodes"], study.cluster["devices"])
    if got != had:
        raise ValueError(
            f"The study's tasks have {had.nodes} node(s) with {had.devices} process(es)"
            f" each, which cannot change half-way; got {got.nodes} and {got.devices}."
        )


def _create(study: Study) -> None:
    """Makes the study directory with the snapshot in it: whole, or not at all."""
    path = study.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as d:
            made = replace(study, path=Path(d) / path.name)
            made.jobs.mkdir(parents=True)
            snapshot(made.code)
            made.save()
            made.path.rename(path)
    except OSError as error:
        raise ValueError(
            f"The study directory {path} cannot be written: {error.strerror}. "
            "Pass another one as --study; it has to be visible on the nodes, too."
        ) from error


def _pending(study: Study, in_slurm: bool, release_held: bool) -> list[TaskSpec]:
    """Returns the tasks that are neither finished nor in the queue.

    What SLURM holds there is released, or said.
    """
    queued = ask_queue(study) if in_slurm else queue() or {}
    left = [task for task in study.tasks if study.open_stages(task)]
    pending = [task for task in left if not is_busy(study, task, queued)]
    if len(left) > len(pending):
        count = len(left) - len(pending)
        print(f"{count} task(s) are running or in the queue and stay there.")
    held = [job for task in left for job in held_jobs(study, task, queued)]
    if held and release_held:
        release(held)
        print(f"Released: {', '.join(held)}")
    elif held:
        reasons = ", ".join(dict.fromkeys(queued[job][1] for job in held))
        print(
            f"SLURM holds {len(held)} of their jobs ({reasons}) until they are "
            f"released: {shlex.join(release_command(held))}, which "
            f"{study.resume_command()} --release does."
        )
    return pending


def waves(study: Study, pending: Sequence[TaskSpec]) -> list[list[TaskSpec]]:
    """Returns tasks with open stages, those with the same ones together."""
    chains: dict[tuple[str, ...], list[TaskSpec]] = {}
    for task in pending:
        chains.setdefault(tuple(study.open_stages(task)), []).append(task)
    return list(chains.values())


# Takes a stage, its executor and its tasks, and returns the number of their job.
Send = Callable[[str, StudyExecutor, Sequence[TaskSpec]], str]


def _send(
    study: Study, options: argparse.Namespace, pending: Sequence[TaskSpec], send: Send
) -> None:
    """Sends arrays, whose elements wait for those of the array before, and the report.

    An element whose turn cannot come any more, as the one before it failed, leaves the
    queue instead of staying in it for ever.
    """
    jobs = set()
    for members in waves(study, pending):
        kind = "aftercorr" if len(members) > 1 else "afterok"
        before = ""
        for stage in study.open_stages(members[0]):
            array = executor(study, options, stage, len(members))
            if before:
                more = array.parameters["additional_parameters"]
                array.update_parameters(
                    dependency=f"{kind}:{before}",
                    additional_parameters=more | {"kill-on-invalid-dep": "yes"},
                )
            before = send(stage, array, members)
            jobs.add(before)
    report = executor(study, options, "report", 1)
    report.update_parameters(dependency=f"afterany:{':'.join(sorted(jobs))}")
    send("report", report, [])


def _submit(
    study: Study, options: argparse.Namespace, pending: Sequence[TaskSpec]
) -> None:
    """Submits what is left of a study; all of it, or nothing."""
    submission: dict[str, Any] = {"date": now(), "cluster": "slurm", "jobs": {}}
    sent: list[submitit.Job[Any]] = []

    def send(stage: str, array: StudyExecutor, members: Sequence[TaskSpec]) -> str:
        functions = [work(study, options, task, stage) for task in members]
        found = array.submit_array(functions or [Report(str(study.path))])
        sent.extend(found)
        for task, job in zip(members, found, strict=False):
            submission["jobs"].setdefault(task.name, {})[stage] = str(job.job_id)
        name = str(found[0].job_id).partition("_")[0]
        count = f"{len(members)} task(s), " if members else ""
        print(f"{stage}: {count}job {name}")
        return name

    try:
        with outside_of_jobs():
            _send(study, options, pending, send)
    except BaseException:
        cancel(sent)
        raise
    study.submissions.append(submission | {"report": str(sent[-1].job_id)})
    study.save()


def _show_script(stage: str, array: StudyExecutor, members: Sequence[TaskSpec]) -> str:
    """Prints an sbatch script."""
    print(f"### {stage}\n\n{array.script(len(members))}")
    return f"<job of {stage}>"


def _show(study: Study, options: argparse.Namespace, new: bool) -> None:
    """Prints the scripts, if there are any, and the tasks."""
    pending = [task for task in study.tasks if study.open_stages(task)]
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if options.cluster == "slurm" and pending:
        _send(study, options, pending, _show_script)
    table = Table(title=f"{len(pending)} task(s)", title_justify="left", box=None)
    keys = study.swept()
    for name in ("array index", *keys, "directory"):
        table.add_column(name, overflow="fold")
    for members in waves(study, pending):
        for index, task in enumerate(members):
            values = [task.sweep.get(key, "") for key in keys]
            where = study.run(task).relative_to(study.path)
            table.add_row(*map(Text, (str(index), *values, str(where))))
    console.print(table)
    first = (pending or study.tasks)[0]
    for stage in first.stages:
        words = shlex.join(study.words(first, stage))
        print(f"\n{stage} of the first task:\n  {words}")
    what = (
        f"The study would be {study.path}."
        if new
        else f"Of {len(study.tasks)} task(s) of {study.path}, {len(pending)} are not "
        "finished; those in the queue would stay there."
    )
    print(f"\nNothing was written or submitted. {what}")


if __name__ == "__main__":
    main()
