"""The options of a cluster: those that a study reads, and sbatch's own beside them.

What is not an option here is sbatch's and goes on to it as it is written; what sbatch
does not take, it says itself.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# Of sbatch's own: what the report gets too, what only the first jobs get, and what is
# the study's to choose.
ALL_STAGES = (
    *("partition", "account", "qos", "constraint", "exclude", "comment"),
    *("mail-user", "mail-type"),
)
FIRST = ("nodelist", "dependency")
_CHOSEN = (
    *("array", "chdir", "error", "export", "gpus", "gpus-per-task", "job-name"),
    *("kill-on-invalid-dep", "no-requeue", "ntasks", "ntasks-per-node", "open-mode"),
    *("output", "requeue", "signal", "wckey", "wrap"),
)


class Machine(NamedTuple):
    """What a training job gets: nodes, and processes on each, with one GPU or none."""

    nodes: int
    devices: int


def machine(options: argparse.Namespace) -> Machine:
    """Returns what a training job gets.

    Raises:
        ValueError: If the options contradict each other.
    """
    if options.cpus_per_gpu and options.cpus_per_task:
        raise ValueError("Pass --cpus-per-gpu or --cpus-per-task, not both.")
    gpus = int(options.gpus_per_node)
    devices = options.tasks_per_node or gpus or 1
    if gpus and devices != gpus:
        raise ValueError(
            f"Every GPU has a process of its own: leave --tasks-per-node out, or make "
            f"it {gpus} as --gpus-per-node, got {devices}."
        )
    if options.cluster != "slurm" and options.nodes > 1:
        raise ValueError(f"--cluster {options.cluster} has one node.")
    if options.cluster == "debug" and devices > 1:
        raise ValueError("--cluster debug has one process.")
    return Machine(options.nodes, devices)


class Gpus(int):
    """A number of GPUs, which sbatch takes with a type before it: 8, or a100:8."""

    type = ""

    @classmethod
    def read(cls, text: str) -> Gpus:
        """Reads sbatch's words."""
        type_, colon, number = text.rpartition(":")
        if not number.isdecimal():
            raise argparse.ArgumentTypeError(
                "expected a number, or a type and a number such as a100:8, got "
                f"{text!r}"
            )
        gpus = cls(number)
        gpus.type = type_ + colon
        return gpus


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"expected a number from {least}, got {text!r}"
        )
    return int(text)


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*=.*", text):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that may also stand in a site's YAML file."""
    group = parser.add_argument_group(
        "the cluster (also from --config)",
        "All other options are sbatch's own: --partition gpu --account me --exclusive; "
        "--sbatch NAME=VALUE says the same.",
    )

    def add(name: str, metavar: str | None, text: str, **more: Any) -> None:
        group.add_argument(f"--{name}", metavar=metavar, help=text, **more)

    places = ["slurm", "local", "debug"]
    text = "slurm; this machine; this process, task by task (default: slurm)"
    add("cluster", None, text, choices=places, default="slurm")
    add("nodes", "N", "nodes per task (default: 1)", type=_count, default=1)
    text = "GPUs per node, each with a process of its own; or a100:8 (default: 0)"
    add("gpus-per-node", "N", text, type=Gpus.read, default=Gpus(0))
    text = "processes per node, if not one per GPU: the devices of the command"
    add("tasks-per-node", "N", text, type=_count)
    add("cpus-per-gpu", "N", "CPUs per GPU: sbatch's --cpus-per-task")
    add("cpus-per-task", "N", "CPUs per process")
    add("mem", "SIZE", "memory per node, such as 64G; an evaluation gets its share")
    text = "limit of a job; a task that needs longer is requeued (default: 24:00:00)"
    add("time", "TIME", text, default="24:00:00")
    add("evaluation-time", "TIME", "limit of an evaluation (default: as --time)")
    text = "partition of the report, which needs no GPU (default: as --partition)"
    add("cpu-partition", "NAME", text)
    add("parallel", "N", "tasks that run at the same time (default: all)", type=_count)
    text = "requeues after which a task counts as failed (default: 20)"
    add("max-requeues", "N", text, type=partial(_count, least=0), default=20)
    text = "seconds from a warning to the limit, for a batch and a save (default: 120)"
    add("signal-delay", "N", text, type=_count, default=120)
    text = "lines of shell before it; where they activate a Python, add --python python"
    add("setup", "LINE", text, nargs="+", default=[])
    text = "environment of the jobs, as it is written; $VARIABLES belong into --setup"
    add("env", "NAME=VALUE", text, nargs="+", default=[], type=_variable)
    text = "starts Python in a job, such as 'apptainer exec --nv /image.sif python'"
    add("python", "COMMAND", text)


def names(parser: argparse.ArgumentParser) -> set[str]:
    """Returns the options of a parser, without the hyphens in front of them."""
    return {name.replace("_", "-") for name in vars(parser.parse_args([]))}


def cut(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields the options among some words: the name, and all that was said of it.

    In the first word of each, `--gpus_per_node=2`, the name has hyphens. What stands
    before any option comes as one without a name.
    """
    name = ""
    said: list[str] = []
    for word in words:
        # No value such as '--data x', nor that of --evaluate, such as '--data=x'.
        if re.match(r"--[\w-]+(=|$)", word) and said != ["--evaluate"]:
            if said:
                yield name, said
            option, equals, value = word.partition("=")
            option = option.replace("_", "-")
            name, said = option[2:], [option + equals + value]
        else:
            said.append(word)
    if said:
        yield name, said


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Reads words of which those that the parser does not know are sbatch's own.

    They are the entry `sbatch`, value by name, True of those without one. The last one
    of two with the same name counts.

    Raises:
        ValueError: If one of sbatch's is the study's to choose, or nearly an option
            that there is.
    """
    known = {*names(parser), "help"}
    ours: list[str] = []
    passed: dict[str, str | bool] = {}
    for name, (first, *rest) in _spelled_out(words):
        if first == "--evaluate" and rest:  # its value may look like an option
            first, *rest = [f"{first}={rest[0]}", *rest[1:]]
        if name in known or first == "-h":
            ours += [first, *rest]
            continue
        given = [*first.split("=", 1)[1:], *rest]
        if not name or len(given) > 1:
            word = given[1] if name else first
            raise ValueError(f"{word!r} stands behind no option; COMMAND, behind --.")
        offered = [*known, *ALL_STAGES, *FIRST, *_CHOSEN]
        near = difflib.get_close_matches(name, offered, n=1, cutoff=0.85)
        if near and near[0] != name:
            raise ValueError(f"There is no --{name}. Did you mean --{near[0]}?")
        if name in _CHOSEN:
            raise ValueError(f"--{name} of sbatch is the study's to choose.")
        passed[name] = given[0] if given else True
    options = parser.parse_args(ours)
    options.sbatch = passed
    return options


def _spelled_out(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields options, with `--sbatch reservation=night` as `--reservation=night`."""
    for name, said in cut(words):
        if name == "sbatch":
            for each in said:
                if each != "--sbatch":
                    yield from cut([f"--{each.removeprefix('--sbatch=')}"])
        else:
            yield name, said


def read_config(path: Path, refused: Collection[str]) -> list[str]:
    """Reads a site's YAML file, `--config site.yaml`, as words of the command line.

    Values are taken as they are written: 0123 is no 83, `no` is no truth value. One
    that is empty, null or `true` makes an option without a value.

    Raises:
        ValueError: If it cannot be read, or has an option that is `refused`.
    """
    from lightly_mim.config import read_yaml

    try:
        stored = read_yaml(path, lambda text: yaml.load(text, yaml.BaseLoader))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"--config {path} holds no mapping of option: value.")
    if isinstance(stored.get("sbatch"), dict):
        stored |= stored.pop("sbatch")
    words = []
    for key, value in stored.items():
        option = str(key).replace("_", "-")
        if option in refused:
            raise ValueError(
                f"--config {path} has {key!r}, which is an option of a study, not of a "
                "cluster."
            )
        if isinstance(value, dict):
            value = [f"{n}={v}" if isinstance(v, str) else v for n, v in value.items()]
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(
                    f"--config {path}, {key}: YAML reads a {type(text).__name__} here, "
                    f"{text}: put quotes around the text."
                )
        alone = isinstance(value, str) and value.lower() in ("", "~", "null", "true")
        words += [f"--{option}", *([] if alone else texts)]
    return words
