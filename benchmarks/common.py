"""The code beneath the benchmark scripts: their options, the study, its one table.

A study pretrains every method with every seed and evaluates each run beside the same
encoder at random initialisation and raw pixels:

OUT/SimMIM-seed0/   a run directory, see `lightly_mim.runs`, with its results.json
OUT/summary.csv     one line per run, model and protocol
OUT/table.md        the table that is printed at the end
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import inspect
import io
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, NoReturn, get_args

import lightly_mim.methods  # isort: skip  # before PyTorch, whose threads it sets up
import torch
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from lightly_mim import heads, losses, masking, targets
from lightly_mim.config import Recorded
from lightly_mim.encoders import Pool
from lightly_mim.evaluation import PIXELS, RANDOM, evaluate
from lightly_mim.evaluation.results import RESULTS_FILE
from lightly_mim.files import (
    atomic_write,
    print_any_name,
    printable,
    read_sealed,
)
from lightly_mim.methods import MaskedImageModel
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.pretraining import (
    Precision,
    check_pretraining,
    default_precision,
    pretrain,
)
from lightly_mim.runs import RunDirectory
from lightly_mim.settings import check_batch
from lightly_mim.words import respell

METHODS: dict[str, type[MaskedImageModel]] = {
    name: method
    for name in lightly_mim.methods.__all__
    if inspect.isclass(method := getattr(lightly_mim.methods, name))
    and issubclass(method, MaskedImageModel)
    and method is not MaskedImageModel
}

# What --method-option takes as a masking, a target, a head or a loss.
PARTS: dict[str, type[Recorded]] = {
    name: part
    for room in (masking, targets, heads, losses)
    for name, part in vars(room).items()
    if inspect.isclass(part) and issubclass(part, Recorded) and part is not Recorded
}

PROTOCOLS = {"knn": "kNN", "linear": "linear"}

# The poolings to choose from, by method; of others what the encoder has. SimMIM does
# not train the class token, MAE's own probe reads it.
POOLS: dict[str, tuple[Pool, ...]] = {
    "SimMIM": ("mean",),
    "MAE": ("mean", "cls", "cls+mean"),
}

# The model beside the baselines, which are `RANDOM` and `PIXELS`.
PRETRAINED = "pretrained"

_EXISTING = ("--resume", "--overwrite")
LOG_WIDTH = 120  # columns of the table where there is no terminal

# Columns that are aligned to the right.
_NUMBERS = ("training", "images/s", "masked %", "AvgDist px", "M params", "GFLOPs")

say = rank_zero_only(print)

Row = Mapping[str, Any]  # a row of results.json


# The options that the scripts share.


def build_parser(
    prog: str,
    description: str,
    epilog: str,
    defaults: Mapping[str, Any],
    methods: bool = True,
) -> argparse.ArgumentParser:
    """Makes a parser with the options that all scripts share.

    Args:
        prog:
            Name of the script.
        description:
            What it does.
        epilog:
            Examples.
        defaults:
            The script's default of `out`, and what its help says of those of `encoder`,
            `img_size`, `epochs`, `batch_size` and `lr`, which are None here: they may
            depend on other options.
        methods:
            Whether the script trains the methods that `--method` names, with the
            options of `--method-option`. One that has plans of its own has neither.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    study = parser.add_argument_group("the study")
    study.add_argument(
        "--out",
        type=Path,
        default=Path(defaults["out"]),
        metavar="DIR",
        help="folder for everything that is written (default: %(default)s)",
    )
    if methods:
        study.add_argument(
            "--method",
            nargs="+",
            choices=METHODS,
            default=["SimMIM"],
            metavar="NAME",
            help=f"one or more of {', '.join(METHODS)} (default: SimMIM)",
        )
    study.add_argument(
        "--seed",
        "--seeds",
        nargs="+",
        type=whole_number(0),
        default=[0],
        metavar="N",
        help="one or more seeds; with several, the table shows mean and standard "
        "deviation, and paired differences with their interval (default: 0)",
    )
    study.add_argument(
        "--stage",
        choices=["all", "train", "evaluate"],
        default="all",
        help="train: pretrain and end there, so that several GPUs do not wait for one; "
        "evaluate: evaluate what --stage train made in DIR, by one process whatever "
        "--devices says (default: all, one after the other)",
    )
    existing = study.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the study in DIR where it was cut; what is finished is read",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the runs of this study in DIR"
    )

    training = parser.add_argument_group("encoder and training")
    training.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"timm name of a ViT, BEiT, Swin or SwinV2 (default: "
        f"{defaults['encoder']}); the default's own options go with it alone",
    )
    training.add_argument(
        "--encoder-option",
        nargs="+",
        action="extend",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help="further options of the timm model, such as depth=2 embed_dim=32",
    )
    if methods:
        training.add_argument(
            "--method-option",
            nargs="+",
            action="extend",
            type=key_value,
            default=[],
            metavar="KEY=VALUE",
            help="further options of the method, such as mask_ratio=0.5 or "
            "'masking=BlockMasking(16, 0.5)'",
        )
    training.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="begin with these weights, interpolated for the encoder: a run directory, "
        "a file or folder of published ones, or the name of a timm model (default: new "
        "weights); not --resume, which goes on with the runs in DIR",
    )
    training.add_argument(
        "--img-size",
        type=whole_number(1),
        metavar="PIXELS",
        help=f"side of the images that the encoder sees (default: "
        f"{defaults['img_size']})",
    )
    training.add_argument(
        "--epochs",
        type=whole_number(1),
        metavar="N",
        help=f"passes over the training images (default: {defaults['epochs']})",
    )
    training.add_argument(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help=f"images per optimiser step, over all devices (default: "
        f"{defaults['batch_size']})",
    )
    training.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="highest learning rate; where settings are a published recipe's, per as "
        f"many images as it counts by, 512 for SimMIM (default: {defaults['lr']})",
    )

    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--accelerator",
        default="auto",
        choices=["auto", "cpu", "gpu", "mps"],
        help="where to compute (default: a GPU if there is one)",
    )
    machine.add_argument(
        "--devices",
        default="auto",
        type=_devices,
        metavar="N",
        help="how many GPUs, or which ones: 0,1 (default: all; of CPUs, one process)",
    )
    machine.add_argument(
        "--num-nodes",
        type=whole_number(1),
        metavar="N",
        help="machines that train together (default: those of the SLURM step, or 1)",
    )
    machine.add_argument(
        "--accumulate",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="parts that a batch is cut into when it does not fit into memory "
        "(default: 1)",
    )
    machine.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="Lightning's precision (default: bf16-mixed where the hardware computes "
        "in it, else 32-true)",
    )
    machine.add_argument(
        "--num-workers",
        type=whole_number(0),
        metavar="N",
        help="processes that read images (default: one per CPU, 8 at most, and none "
        "for images that are held in memory)",
    )
    return parser


def whole_number(smallest: int) -> Callable[[str], int]:
    """Returns what argparse reads a whole number by.

    Args:
        smallest:
            The smallest one that is allowed.
    """

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {smallest}, got {text!r}"
            )
        return int(text)

    return integer


def _devices(text: str) -> int | str | list[int]:
    parts = text.split(",")
    if text == "auto":
        return text
    if not all(part.isdecimal() for part in parts) or parts == ["0"]:
        raise argparse.ArgumentTypeError(
            f"expected 'auto', a number of devices from 1, or a list such as 0,1; got "
            f"{text!r}"
        )
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def key_value(text: str) -> tuple[str, Any]:
    """Reads an option of an encoder or a method, for argparse.

    Args:
        text:
            KEY=VALUE: a literal, a part of a method, or text.
    """
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    # true and True, 6, 1e-3, [6,6], RandomMasking(16, 0.5); anything else is a string.
    for read in (json.loads, _read):
        with contextlib.suppress(ValueError, SyntaxError):
            return key, read(value)
    return key, value


def _read(text: str | ast.expr) -> Any:
    """Reads literals, and parts of a method: `RandomMasking(16, ratio=0.5)`.

    Raises:
        ArgumentTypeError: If there is no such part or it refuses its arguments.
        ValueError: If it is something else.
        SyntaxError: If it is no Python.
    """
    tree = ast.parse(text, mode="eval").body if isinstance(text, str) else text
    if isinstance(tree, ast.List):
        return [_read(element) for element in tree.elts]
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
        return ast.literal_eval(tree)
    if tree.func.id not in PARTS:
        raise argparse.ArgumentTypeError(
            f"there is no part {tree.func.id!r}; there are: {', '.join(PARTS)}"
        )
    arguments = [_read(argument) for argument in tree.args]
    options = {str(word.arg): _read(word.value) for word in tree.keywords}
    try:
        return PARTS[tree.func.id](*arguments, **options)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_script(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace, str], None],
    argv: Sequence[str] | None,
) -> None:
    """Parses the words and runs a script.

    Exits with 2 and one message if an argument is wrong, with 1 if a run failed.

    Args:
        parser:
            The script's parser.
        main:
            The script, from its arguments and the command that runs it again.
        argv:
            The words after the script's name. None for those of the process.
    """
    print_any_name()
    words = spell(parser, sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", f"benchmarks/{parser.prog}", *words])
    arguments = parser.parse_args(words)

    options = {
        action.dest: action.option_strings[0]
        for action in parser._actions
        if action.option_strings
    }

    def fail(code: int, error: Exception) -> NoReturn:
        said = respell(str(error), options)
        parser.exit(code, f"{parser.prog}: error: {said}\n")

    try:
        main(arguments, command)
    except (ValueError, MisconfigurationException) as error:
        fail(2, error)
    except (NonFiniteLossError, OSError) as error:
        fail(1, error)
    except KeyboardInterrupt:
        parser.exit(130, f"\nInterrupted. Go on with: {resuming(command)}\n")


def spell(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Returns words in which an option such as --batch_size is --batch-size.

    Args:
        parser:
            Tells which options there are.
        words:
            The words after the script's name.
    """
    parts = [word.partition("=") for word in words]
    hyphens = [name.replace("_", "-") + "".join(rest) for name, *rest in parts]
    known = parser._option_string_actions
    return [
        new if name.startswith("--") and new.partition("=")[0] in known else word
        for word, new, (name, *_) in zip(words, hyphens, parts, strict=True)
    ]


def resuming(command: str, *words: str) -> str:
    """Returns the command that goes on with a study.

    Args:
        command:
            The command that began it.
        words:
            Options that differ.
    """
    kept = [word for word in shlex.split(command) if word not in _EXISTING]
    return shlex.join([*kept, *words, "--resume"])


# The study.


@dataclass(frozen=True)
class Plan:
    """How a study builds and trains one method.

    Attributes:
        build:
            Makes the method, with weights from torch's random state.
        pretraining:
            Arguments of `pretrain`. Those of the machine are added to them.
        evaluation:
            Arguments of `evaluate` that are this method's own.
    """

    build: Callable[[], MaskedImageModel]
    pretraining: Mapping[str, Any]
    evaluation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        method:
            Name of the method.
        seed:
            Its seed.
        path:
            Its directory.
        seconds:
            Time that it trained, validation and pictures excluded.
        images_per_second:
            Training images per second, over all devices.
        results:
            What results.json holds.
    """

    method: str
    seed: int
    path: Path
    seconds: float
    images_per_second: float
    results: dict[str, Any]

    def scores(self, model: str) -> dict[str, Row]:
        """Returns the rows of `PRETRAINED`, `RANDOM` or `PIXELS` by protocol."""
        return {
            row["protocol"]: row
            for row in self.results["rows"]
            if model == _model_of(row)
        }


def run_study(
    arguments: argparse.Namespace,
    data: str,
    plans: Mapping[str, Plan],
    *,
    last_layers: int,
    evaluation: Mapping[str, Any],
    title: str,
    notes: Sequence[str],
    command: str,
) -> list[Run]:
    """Pretrains and evaluates each method with each seed, and prints one table.

    Args:
        arguments:
            What the parser of `build_parser` gave.
        data:
            Name or folder of the labelled images.
        plans:
            The methods by name.
        last_layers:
            The layer that is evaluated is chosen from this number of last ones, or from
            all if the encoder has fewer.
        evaluation:
            Further arguments of `evaluate`.
        title:
            What stands above the table.
        notes:
            What a reader should know about the images.
        command:
            The command that runs the study again.

    Returns:
        The runs. None of them in processes that only help to train, or if training is
        all that was asked for.

    Raises:
        ValueError: If an argument is wrong, or if `out` may not be written, or if there
            is nothing to evaluate. Unless it is found in the images themselves, nothing
            has been written then.
    """
    start = time.perf_counter()
    runs = train_and_evaluate(
        arguments, data, plans, last_layers=last_layers, evaluation=evaluation
    )
    if runs:
        summary, table = arguments.out / "summary.csv", arguments.out / "table.md"
        write_summary(runs, command, summary)
        _report(runs, title, notes, command, table)
        print(f"The table: {table}; every number: {summary}")
        print(f"The command took {duration(time.perf_counter() - start)}.")
    return runs


def train_and_evaluate(
    arguments: argparse.Namespace,
    data: str,
    plans: Mapping[str, Plan],
    *,
    last_layers: int,
    evaluation: Mapping[str, Any],
    finished: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Pretrains and evaluates each method with each seed, without a table.

    Args:
        arguments:
            See `run_study`.
        data:
            See `run_study`.
        plans:
            See `run_study`.
        last_layers:
            See `run_study`.
        evaluation:
            See `run_study`.
        finished:
            Called with each run as soon as it is evaluated.

    Returns:
        See `run_study`.

    Raises:
        ValueError: See `run_study`.
    """
    if is_main_process():
        choices = check_study(arguments, data, plans, last_layers)
        if arguments.overwrite:
            for name in ("summary.csv", "table.md"):
                (arguments.out / name).unlink(missing_ok=True)
    runs: list[Run] = []
    for seed in arguments.seed:
        for name, plan in plans.items():
            directory = RunDirectory(arguments.out / f"{name}-seed{seed}")
            say(f"\n{name}, seed {seed}: {directory.path}", flush=True)
            if arguments.stage != "evaluate":
                pretrain(
                    directory.path,
                    data,
                    plan.build,
                    init=arguments.init,
                    seed=seed,
                    accelerator=arguments.accelerator,
                    devices=arguments.devices,
                    num_nodes=arguments.num_nodes,
                    accumulate=arguments.accumulate,
                    precision=arguments.precision,
                    num_workers=arguments.num_workers,
                    resume=arguments.resume,
                    overwrite=arguments.overwrite,
                    **plan.pretraining,
                )
            if arguments.stage == "train" or not is_main_process():
                continue
            settings = {**choices[name], **evaluation, **plan.evaluation}
            results = _evaluate(directory, data, seed, settings, arguments)
            batch_size = directory.stored_arguments()["recipe"]["batch_size"]
            speed = training_speed(directory, batch_size)
            runs.append(Run(name, seed, directory.path, *speed, results))
            finished(runs[-1])
    return runs


def is_main_process() -> bool:
    """Returns whether this process is the one that evaluates and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0


def check_study(
    arguments: argparse.Namespace,
    data: str,
    plans: Mapping[str, Plan],
    last_layers: int,
) -> dict[str, dict[str, Any]]:
    """Finds what is wrong before the first run, not hours later before the last.

    Args:
        arguments:
            See `run_study`.
        data:
            See `run_study`.
        plans:
            See `run_study`.
        last_layers:
            See `run_study`.

    Returns:
        The layers and poolings that the evaluation of each method chooses from.

    Raises:
        ValueError: See `run_study`.
    """
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: pass another folder as --out.")
    if (out / "summary.csv").exists() and not (arguments.resume or arguments.overwrite):
        raise ValueError(
            f"There is a study in {out} already: pass --resume to go on with it, "
            "--overwrite to replace it, or another folder as --out."
        )
    for name in ("seed", "method"):
        given = getattr(arguments, name, [])
        if len(set(given)) < len(given):
            raise ValueError(f"--{name} names each one once, got {given}.")
    choices: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        try:
            method = check_pretraining({"method": plan.build, **plan.pretraining})
            check_batch(data, method, plan.pretraining)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        method = method or plan.build()  # where it cannot be built without memory
        encoder, kind = method.encoder, type(method).__name__
        pools = POOLS.get(kind) if encoder.has_class_token else ("mean",)
        count = min(last_layers, encoder.num_layers)
        choices[name] = {"layers": list(range(-count, 0)), "pools": pools}
        for seed in arguments.seed:
            directory = RunDirectory(out / f"{name}-seed{seed}")
            if arguments.stage == "evaluate":
                settings = {"data": data, "seed": seed, "init": arguments.init}
                _check_trained(directory, settings, plan)
            elif not arguments.resume:
                directory.check({}, resume=False, overwrite=arguments.overwrite)
    return choices


def _check_trained(
    directory: RunDirectory, settings: Mapping[str, Any], plan: Plan
) -> None:
    """Refuses to evaluate a run that has not ended or that is not of this plan."""
    if not directory.finished:
        raise ValueError(
            f"There is no finished run in {directory.path}: begin with --stage train, "
            "or go on with --stage train --resume."
        )
    stored = yaml.safe_load(directory.config.read_text())
    wanted = {**settings, **plan.pretraining}
    wanted.pop("recipe", None)  # what was recorded is not its name
    differences = [
        f"{name}: {stored.get(name)!r} in the run, {value!r} now"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"The run in {directory.path} was trained with other arguments:\n  "
            + "\n  ".join(differences)
        )


def _evaluate(
    directory: RunDirectory,
    data: str,
    seed: int,
    settings: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Evaluates a run and its baselines; a resumed study reads what was found before.

    Returns:
        What results.json holds.
    """
    file = directory.path / RESULTS_FILE
    precision = arguments.precision or default_precision(arguments.accelerator)
    settings = {
        "protocols": list(PROTOCOLS),
        "baselines": ["random", "pixels"],
        "precision": "bf16" if precision.startswith("bf16") else "32",
        **settings,
    }
    if arguments.resume and file.exists():
        results = read_sealed(file, "Delete it: the run is then evaluated again.")
        wanted = json.loads(json.dumps(settings, default=vars))
        if all(results["arguments"].get(name) == wanted[name] for name in wanted):
            print(f"Evaluated before: {file}")
            return results
        print(f"Evaluating again: {file} was made with other settings.")
    found = evaluate(
        directory.path,
        data,
        out=directory.path,
        overwrite=True,
        seed=seed,
        num_workers=arguments.num_workers,
        device=_evaluation_device(arguments),
        **settings,
    )
    return found.to_dict()


def _evaluation_device(arguments: argparse.Namespace) -> str | None:
    """Returns the first device that trained; None leaves the choice to `evaluate`."""
    if arguments.accelerator == "cpu":
        return "cpu"
    if isinstance(arguments.devices, list) and torch.cuda.is_available():
        return f"cuda:{arguments.devices[0]}"
    return None


def training_speed(directory: RunDirectory, batch_size: int) -> tuple[float, float]:
    """Reads how fast a run trained, also one that was cut and went on.

    Args:
        directory:
            A finished run.
        batch_size:
            Images per optimiser step.

    Returns:
        (seconds, images per second), validation and pictures excluded.
    """
    finished = read_sealed(directory.marker, "Train the run again.")
    images = finished["steps"] * batch_size / finished["epochs"]
    with (directory.path / "metrics.csv").open(newline="") as file:
        speeds = [row["images_per_second"] for row in csv.DictReader(file)]
    epochs = [images / float(speed) for speed in speeds if speed]
    return sum(epochs), images * len(epochs) / sum(epochs)


# What came out.


def write_summary(
    runs: Sequence[Run],
    command: str,
    path: Path,
    about: Callable[[Run], Mapping[str, Any]] = lambda run: {"method": run.method},
) -> None:
    """Writes one line per run, model and protocol.

    Args:
        runs:
            The runs.
        command:
            The command that made them.
        path:
            The CSV file.
        about:
            Returns the first columns of a run.
    """
    lines = [
        {
            **about(run),
            "encoder": run.results["encoder"]["name"],
            "encoder_options": json.dumps(run.results["encoder"]["options"]),
            "img_size": "x".join(map(str, run.results["encoder"]["img_size"])),
            "seed": run.seed,
            "model": _model_of(row),
            "protocol": row["protocol"],
            "layer": row["layer"],
            "pooling": row["pooling"],
            "hyperparameters": json.dumps(row["hyperparameters"]),
            "top1": row["top1"],
            "top1_low": row["top1_low"],
            "top1_high": row["top1_high"],
            "num_train": row["num_train"],
            "num_test": row["num_test"],
            "pretraining_seconds": round(run.seconds, 1),
            "images_per_second": round(run.images_per_second, 1),
            "evaluation_seconds": round(row["feature_seconds"] + row["seconds"], 1),
            "versions": json.dumps(run.results["versions"]),
            "run": str(run.path),
            "command": command,
        }
        for run in runs
        for row in run.results["rows"]
    ]
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


class Difference(NamedTuple):
    """The mean of paired differences and its interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> Difference:
    """Returns the mean of a - b and the interval that Student's t gives.

    The interval covers what changes with the seed; not the draw of the test images,
    which all seeds share.

    Args:
        a:
            One value per seed, two seeds or more.
        b:
            The same of the other model.
        confidence:
            Share of such intervals that hold the true mean.

    Raises:
        ValueError: If there are fewer than two pairs.
    """
    if len(a) < 2:
        raise ValueError(f"An interval needs two seeds or more, got {len(a)}.")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = fmean(differences)
    quantile = float(student_t.ppf((1 + confidence) / 2, len(differences) - 1))
    half = quantile * stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


def table_lines(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the lines of the table.

    Args:
        runs:
            The runs, with the same seeds for each method.

    Returns:
        The names of the columns, and a line per method and baseline. With several
        seeds, lines with paired differences follow.
    """
    by_method = _by_method(runs)
    columns = [
        name for title in PROTOCOLS.values() for name in (f"{title} top-1 %", "layer")
    ]
    lines = [
        [
            f"{name}, pretrained",
            *_score_cells([run.scores(PRETRAINED) for run in own]),
            duration(fmean(run.seconds for run in own)),
            f"{fmean(run.images_per_second for run in own):.0f}",
        ]
        for name, own in by_method.items()
    ]
    lines += [
        [label, *_score_cells(scores), "", ""] for label, scores in _baselines(runs)
    ]
    if len({run.seed for run in runs}) > 1:
        for name, own in by_method.items():
            for baseline in (RANDOM, PIXELS):
                cells = [
                    cell
                    for protocol in PROTOCOLS
                    for cell in (_difference_cell(own, baseline, protocol), "")
                ]
                lines.append([f"{name} - {baseline}", *cells, "", ""])
    return ["", *columns, "training", "images/s"], lines


def captions(runs: Sequence[Run]) -> list[str]:
    """Returns how to read the table, one sentence each.

    Args:
        runs:
            The runs.
    """
    row = runs[0].results["rows"][0]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    if len(seeds) == 1:
        first = (
            f"Accuracy on {row['num_test']} test images with its 95 % interval over "
            f"the draw of those images (bootstrap), seed {seeds[0]}."
        )
    else:
        first = (
            f"Accuracy on {row['num_test']} test images: mean ± standard deviation "
            f"over the seeds {', '.join(map(str, seeds))}. Differences are paired by "
            "seed, in points, with the 95 % interval of their mean over seeds "
            "(Student's t)."
        )
    return [
        first,
        "Layers count from 0; features are means of patch tokens unless a pooling is "
        "named. Layer, pooling and hyper-parameters were chosen on the "
        f"{row['num_train']} training images.",
        "Time and images/s are those of pretraining, evaluation excluded.",
    ]


def verdict(runs: Sequence[Run], baseline: str) -> str:
    """Says in a sentence whether a method beats a baseline wherever they met.

    Args:
        runs:
            The runs of one method.
        baseline:
            `RANDOM` or `PIXELS`.
    """
    method = runs[0].method
    failed = [
        f"{title} with seed {run.seed} ({100 * margin:+.1f} points)"
        for run in runs
        for protocol, title in PROTOCOLS.items()
        if (margin := _margin(run, baseline, protocol)) <= 0
    ]
    seeds = ", ".join(str(run.seed) for run in runs)
    if failed:
        return f"{method} does not beat {baseline} everywhere: {'; '.join(failed)}."
    which = f"with seed {seeds}" if len(runs) == 1 else f"on every seed ({seeds})"
    return f"{method} beats {baseline} on both protocols {which}."


def rich_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Returns the table for a terminal.

    Args:
        header:
            Names of the columns.
        lines:
            Text of the cells.
    """
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for number, name in enumerate(header):
        right = name in _NUMBERS
        table.add_column(
            Text(name),
            justify="right" if right else "left",
            no_wrap=number > 0,
            overflow="fold",
        )
    for line in lines:  # Text, since rich takes brackets in a string for markup
        table.add_row(*(Text(printable(cell)) for cell in line))
    return table


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns the table in Markdown.

    Args:
        header:
            Names of the columns.
        lines:
            Text of the cells.
    """
    rule = ["---"] * len(header)
    cells = [
        [printable(cell).replace("|", "\\|") for cell in line]
        for line in [header, rule, *lines]
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def print_table(
    title: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    width: int = LOG_WIDTH,
) -> None:
    """Prints the table, as wide as the terminal is.

    Args:
        title:
            What stands above it.
        header:
            Names of the columns.
        lines:
            Text of the cells.
        width:
            Its width where there is no terminal.
    """
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), width=None if terminal else width)
    with console.capture() as capture:
        console.print(rich_table(header, lines))
    print(f"\n{title}\n{capture.get().rstrip()}\n")


def _report(
    runs: Sequence[Run], title: str, notes: Sequence[str], command: str, path: Path
) -> None:
    """Prints the table with all that belongs to it, and writes it as Markdown."""
    header, lines = table_lines(runs)
    by_method = _by_method(runs)
    verdicts = [
        verdict(own, baseline)
        for own in by_method.values()
        for baseline in (RANDOM, PIXELS)
    ]
    found = dict.fromkeys(note for run in runs for note in run.results["notes"])
    notes = [*found, *notes]
    with atomic_write(path) as temporary:
        temporary.write_text(
            f"**{title}**\n\n{markdown_table(header, lines)}\n"
            + "".join(f"{text}\n\n" for text in [*captions(runs), *verdicts, *notes])
            + f"Made with `{printable(command)}`\n"
        )
    print_table(title, header, lines)
    print("\n".join([*captions(runs), *notes, "", *verdicts, ""]))
    for own in by_method.values():
        pictures = sorted(RunDirectory(own[0].path).reconstructions.glob("*.png"))
        print(f"{own[0].method}'s reconstructions: {pictures[-1]}")


def _model_of(row: Row) -> str:
    model: str = row["model"]
    return model if model in (RANDOM, PIXELS) else PRETRAINED


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    names = dict.fromkeys(run.method for run in runs)
    return {name: [run for run in runs if run.method == name] for name in names}


def _baselines(runs: Sequence[Run]) -> Iterator[tuple[str, list[dict[str, Row]]]]:
    """Yields the baselines: one for all methods, if they have the same numbers."""
    for baseline in (RANDOM, PIXELS):
        found: dict[str, list[dict[str, Row]]] = {}
        for name, own in _by_method(runs).items():
            scores = [run.scores(baseline) for run in own]
            if all(_numbers(scores) != _numbers(other) for other in found.values()):
                found[name] = scores
        for name, scores in found.items():
            yield baseline if len(found) == 1 else f"{baseline} ({name})", scores


def _numbers(scores: Sequence[Mapping[str, Row]]) -> list[Any]:
    keys = ("layer", "pooling", "hyperparameters", "top1")
    return [[row[key] for key in keys] for by in scores for row in by.values()]


def _score_cells(scores: Sequence[Mapping[str, Row]]) -> list[str]:
    """Returns the cells of accuracy and layer for each protocol, from all seeds."""
    cells = []
    for protocol in PROTOCOLS:
        rows = [by_protocol[protocol] for by_protocol in scores]
        cells += [accuracy_cell(rows), _layers(rows)]
    return cells


def accuracy_cell(rows: Sequence[Row]) -> str:
    """Returns the accuracy with its interval or, of several seeds, its deviation.

    Args:
        rows:
            A row of results.json for each seed.
    """
    top1 = [100 * row["top1"] for row in rows]
    if len(rows) == 1:
        low, high = 100 * rows[0]["top1_low"], 100 * rows[0]["top1_high"]
        return f"{top1[0]:.1f} [{low:.1f}, {high:.1f}]"
    return f"{fmean(top1):.1f} ± {stdev(top1):.1f}"


def _layers(rows: Sequence[Row]) -> str:
    """Returns the chosen layers, those of one pooling together: `1, 3; 4 cls`."""
    layers: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["layer"] is not None:
            layers.setdefault(row["pooling"], {})[str(row["layer"])] = None
    return "; ".join(
        ", ".join(chosen) + ("" if pooling == "mean" else f" {pooling}")
        for pooling, chosen in layers.items()
    )


def _margin(run: Run, baseline: str, protocol: str) -> float:
    pretrained, other = run.scores(PRETRAINED), run.scores(baseline)
    return float(pretrained[protocol]["top1"] - other[protocol]["top1"])


def _difference_cell(runs: Sequence[Run], baseline: str, protocol: str) -> str:
    values = paired_difference(
        [100 * run.scores(PRETRAINED)[protocol]["top1"] for run in runs],
        [100 * run.scores(baseline)[protocol]["top1"] for run in runs],
    )
    return f"{values.mean:+.1f} [{values.low:+.1f}, {values.high:+.1f}]"


def duration(seconds: float) -> str:
    """Returns a time in words: 12.3 s, 4 min 5 s, 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
