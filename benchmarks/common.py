"""The code beneath the benchmark scripts: their options, and the study.

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
import inspect
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# Of a script of this folder, Ctrl-C needs no traceback while it imports PyTorch.
if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:
    from lightly_mim.interrupts import end_at_once

    end_at_once()

import lightly_mim.methods  # isort: skip  # before PyTorch, whose threads it sets up
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

from lightly_mim import cli, heads, interrupts, losses, masking, targets
from lightly_mim.config import Recorded
from lightly_mim.encoders import Pool
from lightly_mim.evaluation import PIXELS, RANDOM, evaluate
from lightly_mim.files import atomic_write, print_any_name, printable, read_sealed
from lightly_mim.methods import MaskedImageModel
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.pretraining import check_pretraining, default_precision, pretrain
from lightly_mim.reporting.page import write_page_or_warn
from lightly_mim.reporting.study import (
    PROTOCOLS,
    RESULTS_FILE,
    Run,
    by_method,
    captions,
    duration,
    markdown_table,
    print_table,
    table_lines,
    verdict,
    write_summary,
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

# The poolings to choose from, by method; of others what the encoder has. SimMIM does
# not train the class token, MAE's own probe reads it.
POOLS: dict[str, tuple[Pool, ...]] = {
    "SimMIM": ("mean",),
    "MAE": ("mean", "cls", "cls+mean"),
}

# Arguments of `pretrain` that are a script's or a study's own. All others are options.
OWN = {
    *("out", "data", "method", "val", "validate", "recipe", "minutes", "seed"),
    *("loggers", "callbacks", "resume", "overwrite"),
}
TRAINING = {
    name: parameter.default
    for name, parameter in inspect.signature(pretrain).parameters.items()
    if name not in OWN
}

_EXISTING = ("--resume", "--overwrite")

say = rank_zero_only(print)


# The options that the scripts share.


class ScriptParser(argparse.ArgumentParser):
    """Reads a script's own options, and has those of `TRAINING` read by lightly-mim.

    The arguments get the latter by the names of `pretrain`, at its defaults where they
    are not given, and as `given` those that are.
    """

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Reads the words after the script's name, None for the process's."""
        arguments = super().parse_args(args, namespace)
        said = {name: vars(arguments)[name] for name in TRAINING if name in arguments}
        words = [word for name in said for word in (f"--{name}", *said[name])]
        try:
            given = cli.read(["pretrain", "--out", str(arguments.out), *words])
        except ValueError as error:
            self.error(str(error))
        arguments.given = {name: given[name] for name in said}
        vars(arguments).update(TRAINING | arguments.given)
        return arguments


def build_parser(
    prog: str,
    description: str,
    epilog: str,
    defaults: Mapping[str, Any],
    methods: bool = True,
) -> ScriptParser:
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
            `img_size` and `TRAINING`, which may depend on other options.
        methods:
            Whether the script trains the methods that `--method` names, with the
            options of `--method-option`. One that has plans of its own has neither.
    """
    parser = ScriptParser(
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
        "--img-size",
        type=whole_number(1),
        metavar="PIXELS",
        help=f"side of the images that the encoder sees (default: "
        f"{defaults['img_size']})",
    )

    others = parser.add_argument_group(
        "training and machine, as lightly-mim pretrain --help explains them"
    )
    for name in TRAINING:
        option = f"--{name.replace('_', '-')}"
        said = f"(default: {defaults[name]})" if name in defaults else None
        others.add_argument(
            option, nargs="*", default=argparse.SUPPRESS, metavar="VALUE", help=said
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

    interrupts.raise_again()
    try:
        main(arguments, command)
    except (ValueError, MisconfigurationException) as error:
        fail(2, error)
    except (NonFiniteLossError, OSError) as error:
        fail(1, error)
    except KeyboardInterrupt:
        parser.exit(
            interrupts.INTERRUPTED,
            f"\nInterrupted. Go on with: {resuming(command)}\n",
        )
    finally:
        interrupts.end_at_once()


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
        print(f"The command took {duration(time.perf_counter() - start)}.")
        say_files(table, summary, write_page_or_warn(arguments.out))
    return runs


def say_files(table: Path, summary: Path, page: Path | None) -> None:
    """Says where the files of a study are.

    Args:
        table:
            Its tables, in Markdown.
        summary:
            Every number.
        page:
            Its page, None if it could not be written.
    """
    shown = "" if page is None else f"; open {page} with a browser"
    print(f"The table: {table}; every number: {summary}{shown}.", flush=True)


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
                    seed=seed,
                    resume=arguments.resume,
                    overwrite=arguments.overwrite,
                    **{**plan.pretraining, **arguments.given},
                )
            if arguments.stage == "train" or not is_main_process():
                continue
            settings = {**choices[name], **evaluation, **plan.evaluation}
            _evaluate(directory, data, seed, settings, arguments)
            runs.append(Run.read(directory.path, name, seed))
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
            settings = dict(plan.pretraining)
            for option, value in arguments.given.items():
                # An evaluation asks nothing of the machine that trained.
                if arguments.stage != "evaluate" or option in settings:
                    settings[option] = value
            method = check_pretraining({"method": plan.build, **settings})
            check_batch(data, method, settings)
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
                own = {name: settings[name] for name in plan.pretraining}
                own |= {"data": data, "seed": seed, "init": arguments.init}
                _check_trained(directory, own)
            elif not arguments.resume:
                directory.check({}, resume=False, overwrite=arguments.overwrite)
    return choices


def _check_trained(directory: RunDirectory, settings: Mapping[str, Any]) -> None:
    """Refuses to evaluate a run that has not ended or that has other settings."""
    if not directory.finished:
        raise ValueError(
            f"There is no finished run in {directory.path}: begin with --stage train, "
            "or go on with --stage train --resume."
        )
    stored = directory.stored_config() or {}
    differences = [
        f"{name}: {stored.get(name)!r} in the run, {value!r} now"
        for name, value in settings.items()
        # What was recorded of a recipe is not its name.
        if name != "recipe" and stored.get(name) != value
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
) -> None:
    """Evaluates a run and its baselines, unless a resumed study has done so before."""
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
            return
        print(f"Evaluating again: {file} was made with other settings.")
    # `results.json` has settings under the names of their protocols.
    protocols = [settings.pop(name, name) for name in settings.pop("protocols")]
    evaluate(
        directory.path,
        data,
        protocols,
        out=directory.path,
        overwrite=True,
        seed=seed,
        num_workers=arguments.num_workers,
        device=_evaluation_device(arguments),
        **settings,
    )


def _evaluation_device(arguments: argparse.Namespace) -> str | None:
    """Returns the first device that trained; None leaves the choice to `evaluate`."""
    if arguments.accelerator == "cpu":
        return "cpu"
    named = re.match(r"\[(\d+)|(\d+),", str(arguments.devices))
    if named and torch.cuda.is_available():
        return f"cuda:{named[1] or named[2]}"
    return None


def _report(
    runs: Sequence[Run], title: str, notes: Sequence[str], command: str, path: Path
) -> None:
    """Prints the table with all that belongs to it, and writes it as Markdown."""
    header, lines = table_lines(runs)
    methods = by_method(runs).values()
    verdicts = [
        verdict(own, baseline) for own in methods for baseline in (RANDOM, PIXELS)
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
    for own in methods:
        pictures = sorted(RunDirectory(own[0].path).reconstructions.glob("*.png"))
        print(f"{own[0].method}'s reconstructions: {pictures[-1]}")
