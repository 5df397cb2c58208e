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
from collections.abc import Sequence
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
    add_options,
    cancel,
    check_slurm,
    executor,
    is_option,
    machine,
    outside_of_jobs,
    parse,
    release,
    work,
)
from slurm.commands import read, read_sweep, tasks
from slurm.sites import read_config
from slurm.status import held_jobs, is_busy, queue, release_command
from slurm.study import Study, TaskSpec, alone, origin, snapshot
from slurm.task import Report

EPILOG = """\
examples:
  # what would be sent; needs no SLURM and writes nothing
  python slurm/submit.py --dry-run --partition gpu --gpus-per-node 8 \\
      --sweep method=SimMIM,MAE seed=0,1,2 -- benchmarks/imagenette.py --epochs 800

  # the same study on this machine, two tasks at a time
  python slurm/submit.py --cluster local --parallel 2 \\
      --sweep method=SimMIM,MAE seed=0,1,2 -- benchmarks/solar_cells.py --quick

  # images of your own; the evaluation follows as a job of its own
  python slurm/submit.py --config site.yaml --sweep seed=0,1,2 \\
      --evaluate "--data photos --layers 8 11 --baselines random pixels" \\
      -- lightly-mim pretrain --data photos --method SimMIM \\
      --method.encoder vit_small_patch16_224 --epochs 100

  # once more what failed, and nothing else
  python slurm/submit.py --resume studies/2026-11-22-imagenette

  # without task 3, and with other values for task 4
  python slurm/submit.py --resume studies/2026-11-22-imagenette \\
      --drop 03 --change 04 batch_size=256

Look at it with: python slurm/status.py STUDY
"""


def _path(text: str) -> Path:
    path: Path = files.expanded(text)
    return path


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
    study = made.add_argument_group("the study")
    study.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE,...",
        help="a task for each combination of these values of the command's options",
    )
    study.add_argument(
        "--evaluate",
        type=shlex.split,
        default=[],
        metavar="WORDS",
        help="options of lightly-mim evaluate, for the encoders that lightly-mim "
        "pretrain trains (without: no evaluation; benchmark scripts have their own); "
        "with --resume, for those that are not evaluated yet",
    )
    study.add_argument(
        "--study",
        type=_path,
        metavar="DIR",
        help="new directory for everything (default: studies/DATE-COMMAND)",
    )
    study.add_argument(
        "--resume",
        type=Path,
        metavar="STUDY",
        help="send the tasks of a study that are not finished and not in the queue, "
        "with its own command, code and cluster options; those given here replace them",
    )
    study.add_argument(
        "--drop",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="with --resume: take tasks (their names or numbers) out of the study; "
        "their directories stay",
    )
    study.add_argument(
        "--change",
        nargs="+",
        action="append",
        default=[],
        metavar=("TASK", "KEY=VALUE"),
        help="with --resume: put a task with other values in the place of one that is "
        "not finished; it begins anew, in a directory of its own",
    )
    study.add_argument(
        "--release",
        action="store_true",
        help="with --resume: release the study's jobs that SLURM holds in the queue",
    )
    study.add_argument(
        "--config",
        type=_path,
        metavar="FILE",
        help="YAML file with options of the cluster; the command line wins",
    )
    study.add_argument(
        "--dry-run",
        action="store_true",
        help="print the sbatch scripts and the tasks; write and send nothing",
    )
    own = {option.removeprefix("--") for option in made._option_string_actions}
    add_options(made)
    return made, own


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script. Exits with 2 and one message if something is wrong.

    Args:
        argv:
            The words after the script's name. None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    own, command = spell(words[:cut]), words[cut + 1 :]
    made, study = parser()
    interrupts.raise_again()
    try:
        _main(made, study, own, command)
    except (ValueError, OSError, FailedSubmissionError, FailedJobError) as error:
        made.exit(2, f"submit.py: error: {error}\n")
    except KeyboardInterrupt:
        made.exit(interrupts.INTERRUPTED, "\nsubmit.py: interrupted.\n")
    finally:
        interrupts.end_at_once()


def spell(words: Sequence[str]) -> list[str]:
    """Returns words in which an option such as --gpus_per_node has hyphens."""
    parts = [word.partition("=") for word in words]
    return [
        f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else word
        for word, (name, equals, value) in zip(words, parts, strict=True)
    ]


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
    if first.resume:
        if command or first.sweep or first.study:
            raise ValueError(
                "--resume takes command and sweep from the study: leave out --sweep, "
                "--study and what is behind --. --change and --drop are for its tasks."
            )
        study = Study.load(first.resume)
        stored = [str(word) for word in study.cluster["words"]]
        options = _applicable(parse(made, [*stored, *config, *own]))
        _check_same_machine(study, options)
    else:
        options = _applicable(parse(made, [*config, *own]))
        words = [*config, *_site_words(own, study_options)]
        study = _plan(options, command, words)
    new = not first.resume
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
        study = Study.load(study.path)
        if not new and change_study(study, options):
            study.save()
        if options.cluster != "slurm":
            sys.exit(_run_here(study, options))
        _send(study, options, new)


def _send(study: Study, options: argparse.Namespace, new: bool) -> None:
    """Sends what is left of a study to SLURM."""
    pending = _pending(study, True, options.release)
    if not pending:
        print(f"Every task of {study.path} is finished or in the queue.")
        return
    try:
        _submit(study, options, pending)
    except BaseException:
        if new:  # nothing was submitted: leave nothing behind
            shutil.rmtree(study.path)
        raise
    print(_watch(study))


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


def _run_here(study: Study, options: argparse.Namespace) -> int:
    """Runs what is left of a study on this machine, and returns the exit code."""
    from slurm.local import run_debug, run_local

    pending = _pending(study, False, options.release)
    if not pending:
        print(f"Every task of {study.path} is finished or running.")
        return 0
    print(f"The study: {study.path}\n{_watch(study)}", flush=True)
    run = run_local if options.cluster == "local" else run_debug
    return run(study, options, pending)


def _site_words(own: Sequence[str], study: set[str]) -> list[str]:
    """Returns the words of the command line that are the cluster's."""
    kept: list[str] = []
    keep = False
    for word in own:
        if is_option(word):
            keep = word[2:].partition("=")[0] not in study
        if keep:
            kept.append(word)
    return kept


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
    had = (study.cluster["nodes"], study.cluster["devices"])
    if (got.nodes, got.devices) != had:
        raise ValueError(
            f"The study's tasks have {had[0]} node(s) with {had[1]} process(es) each, "
            f"which cannot change half-way; got {got.nodes} and {got.devices}."
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


def waves(study: Study, pending: Sequence[TaskSpec]) -> list[list[list[Any]]]:
    """Returns the arrays to send: chains of stages, each a list of (task, stage).

    The elements of a chain's second array wait for those of its first one, so both have
    the same tasks in the same order.

    Args:
        study:
            The study.
        pending:
            Tasks with open stages.
    """
    chains: dict[tuple[str, ...], list[TaskSpec]] = {}
    for task in pending:
        chains.setdefault(tuple(study.open_stages(task)), []).append(task)
    return [
        [[(task, stage) for task in members] for stage in stages]
        for stages, members in chains.items()
    ]


def _submit(
    study: Study, options: argparse.Namespace, pending: Sequence[TaskSpec]
) -> None:
    """Sends the arrays, each waiting for the one before it, and the report."""
    jobs: dict[str, dict[str, str]] = {}
    sent: list[submitit.Job[Any]] = []
    try:
        with outside_of_jobs():
            for chain in waves(study, pending):
                before: Sequence[submitit.Job[Any]] = []
                for members in chain:
                    stage = members[0][1]
                    array = executor(study, options, stage, len(members))
                    if before:
                        wait_for(array, before[0].job_id, len(before))
                    functions = [work(study, options, *member) for member in members]
                    before = array.submit_array(functions)
                    sent += before
                    for (task, _), job in zip(members, before, strict=True):
                        jobs.setdefault(task.name, {})[stage] = str(job.job_id)
                    name, count = before[0].job_id.partition("_")[0], len(members)
                    print(f"{stage}: {count} task(s), job {name}")
            report = executor(study, options, "report", 1)
            ids = sorted({str(job.job_id).partition("_")[0] for job in sent})
            report.update_parameters(dependency=f"afterany:{':'.join(ids)}")
            sent.append(report.submit(Report(str(study.path))))
            print(f"report: job {sent[-1].job_id}")
    except BaseException:
        cancel(sent)
        raise
    study.submissions.append(
        {
            "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "cluster": "slurm",
            "jobs": jobs,
            "report": str(sent[-1].job_id),
        }
    )
    study.save()
    print(f"The study: {study.path}")


def wait_for(array: Any, job: str, num_tasks: int) -> None:
    """Makes each element of an array wait for the same one of the array before it.

    An element whose turn cannot come any more, as the one before it failed, leaves the
    queue instead of staying in it for ever.
    """
    kind = "aftercorr" if num_tasks > 1 else "afterok"
    more = {**array.parameters["additional_parameters"], "kill-on-invalid-dep": "yes"}
    array.update_parameters(
        dependency=f"{kind}:{job.partition('_')[0]}",
        additional_parameters=more,
    )


def _show_scripts(
    study: Study, options: argparse.Namespace, pending: Sequence[TaskSpec]
) -> None:
    """Prints the sbatch scripts."""
    for number, chain in enumerate(waves(study, pending)):
        for position, members in enumerate(chain):
            stage = members[0][1]
            array = executor(study, options, stage, len(members))
            if position:
                job = f"<job of {chain[position - 1][0][1]}>"
                wait_for(array, job, len(members))
            print(f"### {stage}{f', chain {number + 1}' if number else ''}\n")
            print(array.script(len(members)))
    report = executor(study, options, "report", 1)
    report.update_parameters(dependency="afterany:<all jobs above>")
    print("### report\n")
    print(report.script(1))


def _show(study: Study, options: argparse.Namespace, new: bool) -> None:
    """Prints the scripts, if there are any, and the tasks."""
    pending = [task for task in study.tasks if study.open_stages(task)]
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if options.cluster == "slurm":
        _show_scripts(study, options, pending)
    table = Table(title=f"{len(pending)} task(s)", title_justify="left", box=None)
    keys = study.swept()
    for name in ("array index", *keys, "directory"):
        table.add_column(name, overflow="fold")
    for chain in waves(study, pending):
        for index, (task, _) in enumerate(chain[0]):
            values = [task.sweep.get(key, "") for key in keys]
            where = study.run(task).relative_to(study.path)
            table.add_row(*map(Text, (str(index), *values, str(where))))
    console.print(table)
    for stage, words in (pending or study.tasks)[0].stages.items():
        out = str(study.run((pending or study.tasks)[0]))
        shown = [word.replace("{out}", out) for word in words]
        print(f"\n{stage} of the first task:\n  {shlex.join(shown)}")
    what = (
        f"The study would be {study.path}."
        if new
        else f"Of {len(study.tasks)} task(s) of {study.path}, {len(pending)} are not "
        "finished; those in the queue would stay there."
    )
    print(f"\nNothing was written or submitted. {what}")


if __name__ == "__main__":
    main()
