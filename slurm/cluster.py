"""The cluster's options, and the sbatch scripts that come of them through submitit."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import submitit
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from slurm.commands import Machine
from slurm.status import release_command
from slurm.study import Study, TaskSpec
from slurm.task import Task

# What is not an option here is sbatch's, and goes on to it as it is. Of these, what the
# report gets too, what only the first jobs get, and what is the study's to choose.
_ALL_STAGES = (
    *("partition", "account", "qos", "constraint", "exclude", "comment"),
    *("mail-user", "mail-type"),
)
_FIRST = ("nodelist", "dependency")
_CHOSEN = {
    *("array", "chdir", "error", "export", "gpus", "gpus-per-task", "job-name"),
    *("kill-on-invalid-dep", "no-requeue", "ntasks", "ntasks-per-node", "open-mode"),
    *("output", "requeue", "signal", "wckey", "wrap"),
}
_MAIL = "END,FAIL,REQUEUE"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


class Gpus(int):
    """A number of GPUs, perhaps of a type: 8, or a100:8.

    Attributes:
        type:
            The type and a colon, or nothing.
    """

    type = ""

    @classmethod
    def read(cls, text: str) -> Gpus:
        """Reads sbatch's words."""
        match = re.fullmatch(r"([\w.-]+:)?(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(
                "expected a number, or a type and a number such as a100:8, got "
                f"{text!r}"
            )
        gpus = cls(match[2])
        gpus.type = match[1] or ""
        return gpus


def _natural(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _minutes(text: str) -> int:
    """Reads sbatch's times: 90, 90:00, 24:00:00, 2-0, 2-00:00, 2-00:00:00."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            "expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            f"days-hours:minutes or days-hours:minutes:seconds, got {text!r}"
        )
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = int(days or 0) * 1440 + hours * 60 + minutes + math.ceil(seconds / 60)
    if total < 1:
        raise argparse.ArgumentTypeError(f"expected at least a minute, got {text!r}")
    return total


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+[KMGT]?B?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"expected a size such as 64G, got {text!r}")
    return text


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*=.*", text):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return text


def is_option(word: str) -> bool:
    """Returns whether a word is an option, and not a value such as '--data x'."""
    return re.match(r"--[\w-]+(=|$)", word) is not None


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Reads words of which those that the parser does not know are sbatch's own.

    Args:
        parser:
            The parser, with the options of `add_options`.
        words:
            Its words. The last one of two with the same name counts.

    Raises:
        ValueError: If one of sbatch's is the study's to choose, or nearly an option
            that there is.
    """
    options, rest = parser.parse_known_args(_spelled_out(words))
    known = [name[2:] for name in parser._option_string_actions]
    passed: list[str] = []
    for word in rest:
        if is_option(word):
            name = word[2:].partition("=")[0]
            near = difflib.get_close_matches(
                name, [*known, *_ALL_STAGES, *_FIRST, *_CHOSEN], n=1, cutoff=0.85
            )
            if near and near[0] != name:
                raise ValueError(f"There is no --{name}. Did you mean --{near[0]}?")
            if name in _CHOSEN:
                raise ValueError(f"--{name} of sbatch is the study's to choose.")
            passed.append(word)
        elif passed and "=" not in passed[-1]:
            passed[-1] += f"={word}"
        else:
            raise ValueError(f"{word!r} stands behind no option; COMMAND, behind --.")
    cut = (word[2:].partition("=") for word in passed)
    options.sbatch = {name: value if equals else True for name, equals, value in cut}
    return options


def _spelled_out(words: Sequence[str]) -> Iterator[str]:
    """Yields words with `--sbatch reservation=night` as `--reservation=night`."""
    inside = False
    for word in words:
        if is_option(word):
            inside = word.partition("=")[0] == "--sbatch"
            word = word.removeprefix("--sbatch=") if inside else word
        if word == "--sbatch":
            continue
        word = f"--{word}" if inside else word
        if is_option(word) and " " in word:  # which argparse takes for a value
            name, _, value = word.partition("=")
            yield from (name, value)
        else:
            yield word


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that may also stand in a site's YAML file."""
    group = parser.add_argument_group(
        "the cluster (also from --config)",
        "All other options are sbatch's own: --partition gpu --account me --exclusive; "
        "--sbatch NAME=VALUE says the same.",
    )
    group.add_argument(
        "--cluster",
        choices=["slurm", "local", "debug"],
        default="slurm",
        help="slurm; local: this machine, --parallel tasks at a time; debug: this "
        "process, one task after the other (default: slurm)",
    )
    numbers = {
        "nodes": ("nodes per task (default: 1)", _count, 1),
        "gpus-per-node": (
            "GPUs per node and task, each with a process of its own; with a type: "
            "a100:8 (default: 0)",
            Gpus.read,
            Gpus(0),
        ),
        "tasks-per-node": (
            "processes per node, which the command gets as its devices (default: one "
            "per GPU, one without GPUs)",
            _count,
            None,
        ),
        "cpus-per-gpu": (
            "CPUs per GPU; sbatch gets it as --cpus-per-task, since every GPU has its "
            "process",
            _count,
            None,
        ),
        "cpus-per-task": ("CPUs per process", _count, None),
        "parallel": ("tasks that run at the same time (default: all)", _count, None),
        "max-requeues": (
            "how often a job may be requeued before its task counts as failed "
            "(default: 20)",
            _natural,
            20,
        ),
        "signal-delay": (
            "seconds between the warning of a time limit and the limit; a save and a "
            "batch must fit in (default: 120)",
            _count,
            120,
        ),
    }
    for name, (text, type_, default) in numbers.items():
        group.add_argument(
            f"--{name}", type=type_, default=default, metavar="N", help=text
        )
    for name, text, limit in (
        ("time", "limit of a job in sbatch's words; a task that needs longer is "
         "requeued (default: 24:00:00)", "24:00:00"),
        ("evaluation-time", "limit of an evaluation (default: as --time)", None),
    ):  # fmt: skip
        group.add_argument(
            f"--{name}", type=_minutes, default=limit, metavar="TIME", help=text
        )
    group.add_argument(
        "--mem", type=_memory, metavar="SIZE", help="memory per node, such as 64G"
    )
    group.add_argument(
        "--cpu-partition",
        metavar="NAME",
        help="partition of the report, which needs no GPU (default: as --partition)",
    )
    group.add_argument(
        "--setup",
        nargs="+",
        default=[],
        metavar="LINE",
        help="lines of shell before the command, such as 'module load cuda'; if they "
        "activate a Python, pass --python python",
    )
    group.add_argument(
        "--env",
        nargs="+",
        type=_variable,
        default=[],
        metavar="NAME=VALUE",
        help="environment of the jobs; values are taken as they are, those with "
        "$VARIABLES belong into a line of --setup: 'export NAME=$VALUE'",
    )
    group.add_argument(
        "--python",
        metavar="COMMAND",
        help="what starts Python in a job, such as 'apptainer exec --nv "
        "/shared/image.sif python'; jobs start in the study, so paths are absolute "
        "(default: the Python of this command)",
    )


def machine(options: argparse.Namespace) -> Machine:
    """Returns what a training job gets.

    Raises:
        ValueError: If the options contradict each other.
    """
    if options.cpus_per_gpu and options.cpus_per_task:
        raise ValueError("Pass --cpus-per-gpu or --cpus-per-task, not both.")
    shortest = min(options.time, options.evaluation_time or options.time)
    if options.cluster == "slurm" and options.signal_delay >= 60 * shortest:
        raise ValueError(
            f"A job of {shortest} minute(s) is warned --signal-delay seconds before "
            f"its end, got {options.signal_delay}: it would do nothing but start."
        )
    devices = options.tasks_per_node or options.gpus_per_node or 1
    if options.gpus_per_node and devices != options.gpus_per_node:
        raise ValueError(
            f"Every GPU has a process of its own: leave --tasks-per-node out, or make "
            f"it {options.gpus_per_node} as --gpus-per-node, got {devices}."
        )
    if options.cluster != "slurm" and options.nodes > 1:
        raise ValueError(f"--cluster {options.cluster} has one node.")
    if options.cluster == "debug" and devices > 1:
        raise ValueError("--cluster debug has one process.")
    return Machine(options.nodes, devices)


def parameters(
    study: Study, options: argparse.Namespace, stage: str, num_tasks: int
) -> dict[str, Any]:
    """Returns what sbatch gets for the jobs of a stage, in submitit's words.

    Args:
        study:
            The study.
        options:
            Those of `add_options`.
        stage:
            `train`, `run`, `evaluate` or `report`.
        num_tasks:
            Number of tasks, which `--parallel` may lie above.
    """
    training = stage in ("train", "run")
    devices = machine(options).devices
    passed = {
        name: value
        for name, value in options.sbatch.items()
        if training
        or (name in _ALL_STAGES if stage == "report" else name not in _FIRST)
    }
    found: dict[str, Any] = {
        "job_name": f"{study.path.name}-{stage}",
        "time": options.time,
        "nodes": options.nodes if training else 1,
        "ntasks_per_node": devices if training else 1,
        "cpus_per_task": options.cpus_per_gpu or options.cpus_per_task,
        "mem": options.mem if training else _share(options.mem, devices),
        "signal_delay_s": options.signal_delay,
        "array_parallelism": options.parallel or num_tasks,
        "stderr_to_stdout": True,
        "setup": _setup(study, options, stage),
        # A rank that fails ends the others, which would wait for it for ever.
        "srun_args": ["--kill-on-bad-exit=1"],
    }
    if number := _gpus(options, stage):
        found["gpus_per_node"] = f"{options.gpus_per_node.type}{number}"
    if stage == "evaluate":
        found["time"] = options.evaluation_time or options.time
    if stage == "report":
        found |= {"time": 30, "cpus_per_task": None, "mem": None}
        found["signal_delay_s"] = 60  # it has nothing to save
        if options.cpu_partition:
            passed.pop("constraint", None)
            passed["partition"] = options.cpu_partition
    if "mail-user" in passed:
        passed.setdefault("mail-type", _MAIL)
    found = {name: value for name, value in found.items() if value is not None}
    found["additional_parameters"] = {"requeue": True, **passed}
    # None: submitit's own key is refused by clusters that track keys.
    return found | {"wckey": None}


def _gpus(options: argparse.Namespace, stage: str) -> int:
    """Returns how many GPUs the jobs of a stage get per node."""
    if not options.gpus_per_node or stage == "report":
        return 0
    return int(options.gpus_per_node) if stage in ("train", "run") else 1


def _share(mem: str | None, devices: int) -> str | None:
    """Returns the part of a node's memory that a single process gets."""
    if mem is None or re.fullmatch(r"0+\D*", mem):
        return None  # 0 is all of the node: the cluster's default does for one
    number, unit = re.fullmatch(r"(\d+)(\D*)", mem).groups()  # type: ignore[union-attr]
    factor = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    megabytes = int(number) * factor[unit.upper().removesuffix("B")] / devices
    return f"{math.ceil(megabytes)}M"


def variables(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Returns the environment of `--env`, cut at the equals signs."""
    return [variable.partition("=") for variable in options.env]


def _setup(study: Study, options: argparse.Namespace, stage: str) -> list[str]:
    lines = [
        f"export {name}={shlex.quote(value)}" for name, _, value in variables(options)
    ]
    lines += options.setup
    if stage != "report" and (options.cpus_per_gpu or options.cpus_per_task):
        # srun of Slurm 22.05 to 23.02 does not take it from sbatch.
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    return [*lines, *snapshot_lines(study)]


def snapshot_lines(study: Study) -> list[str]:
    """Returns the lines of shell that make Python import the snapshot.

    `python -m` looks where it stands first, then in PYTHONPATH, then among the
    installed packages. The task goes back to where the user stood.
    """
    code = shlex.quote(str(study.code))
    return [f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}", f"cd {code}"]


class StudyExecutor(SlurmExecutor):
    """Submitit's executor, which also shows its script where there is no SLURM."""

    @classmethod
    def name(cls) -> str:
        """The name that a job finds its environment by."""
        return "slurm"

    @classmethod
    def affinity(cls) -> int:
        """Enough: `check_slurm` says what is missing."""
        return 2

    def script(self, num_tasks: int) -> str:
        """Returns the sbatch script as it is submitted for a number of tasks."""
        parameters = self.parameters
        if num_tasks > 1:
            self.parameters = {**parameters, "map_count": num_tasks}
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters = parameters


def executor(
    study: Study, options: argparse.Namespace, stage: str, num_tasks: int
) -> StudyExecutor:
    """Returns the executor of a stage. Writes nothing."""
    # Submitit counts time limits alone; Task.checkpoint() counts every requeue.
    limit = options.max_requeues + 1
    made = StudyExecutor(study.jobs / "%j", limit, python=options.python)
    made.update_parameters(**parameters(study, options, stage, num_tasks))
    return made


def work(study: Study, options: argparse.Namespace, task: TaskSpec, stage: str) -> Task:
    """Returns what a job runs."""
    return Task(
        str(study.path),
        task.name,
        stage,
        options.max_requeues,
        options.signal_delay,
        _gpus(options, stage),
    )


def check_slurm(options: argparse.Namespace) -> None:
    """Raises a ValueError if there is no SLURM here, or no such partition."""
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise ValueError(
                f"There is no {program} on this machine: submit from a login node of "
                "the cluster, or pass --cluster local, or --dry-run to see the script."
            )
    if shutil.which("sinfo") is None:
        return
    asked = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(
            "SLURM does not answer: submit from a login node of the cluster, or pass "
            f"--cluster local. sinfo says: {asked.stderr.strip()}"
        )
    known = sorted(set(asked.stdout.split()))
    for asked_for in (options.sbatch.get("partition"), options.cpu_partition):
        for name in str(asked_for or "").split(","):
            if name and name not in known:
                raise ValueError(
                    f"There is no partition {name!r}. There are: {', '.join(known)}."
                )


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hides the job that a submission may be made in, but not the cluster."""
    config = os.environ.get("SLURM_CONF")
    with clean_env():
        if config is not None:
            os.environ["SLURM_CONF"] = config
        yield


def cancel(jobs: Sequence[submitit.Job[Any]]) -> None:
    """Cancels jobs of a submission that could not be completed."""
    for job in {str(job.job_id).partition("_")[0] for job in jobs}:
        subprocess.run(["scancel", job], check=False)


def release(jobs: Sequence[str]) -> None:
    """Releases jobs that SLURM holds.

    Raises:
        ValueError: If SLURM refuses.
    """
    words = release_command(jobs)
    try:
        subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise ValueError(f"{shlex.join(words)} failed: {said}") from error
