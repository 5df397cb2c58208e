"""The command line: the same functions, the same words.

`lightly-mim pretrain --out runs/a --data photos/ --method SimMIM --method.encoder
vit_base_patch16_224` is `pretrain(out="runs/a", data="photos/",
method=lambda: SimMIM("vit_base_patch16_224"))`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_type_hints

import rich
from jsonargparse import ArgumentParser, auto_cli, auto_parser
from torch import distributed

from lightly_mim.arguments import check_arguments
from lightly_mim.conversion import convert
from lightly_mim.data.opening import is_memory_error
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation import (
    PROTOCOLS,
    DenseResults,
    Predictions,
    Results,
    check_evaluation,
    embed,
    evaluate,
    evaluate_dense,
    load_encoder,
    predict,
    show,
)
from lightly_mim.evaluation.classifier_files import CLASSIFIERS
from lightly_mim.evaluation.dense.protocols import DENSE_PROTOCOLS
from lightly_mim.evaluation.provenance import to_json
from lightly_mim.files import print_any_name
from lightly_mim.interrupts import INTERRUPTED
from lightly_mim.methods import MaskedImageModel
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.pretraining import check_pretraining, pretrain
from lightly_mim.report import report
from lightly_mim.reporting.page import REPORT
from lightly_mim.settings import check_batch
from lightly_mim.shorthand import spell_out
from lightly_mim.spelling import as_options, shorten, spelled_warnings
from lightly_mim.training.signals import Preempted


def settle(
    arguments: Mapping[str, Any], protocols: Mapping[str, type] = PROTOCOLS
) -> dict[str, Any]:
    """Returns the arguments of an evaluation for those of its command.

    Args:
        arguments:
            Names of protocols, and the settings of each under its name.
        protocols:
            The protocols that it knows, by name.
    """
    named = list(arguments["protocols"])
    for name, kind in protocols.items():
        if name not in named and to_json(arguments[name]) != to_json(kind()):
            warnings.warn(
                f"{name} does nothing here: protocols={named} does not name it.",
                stacklevel=3,
            )
    given = {k: v for k, v in arguments.items() if k not in protocols}
    return given | {"protocols": [arguments[name] for name in named]}


def _with_settings(
    function: Callable[..., Any], protocols: Mapping[str, type] = MappingProxyType({})
) -> Callable[..., Any]:
    """Returns a function with the words of `load_encoder` and of every protocol.

    Args:
        function:
            One that hands arguments on to `load_encoder`, as `loading`.
        protocols:
            Classes of settings by the names that its `protocols` take.
    """

    def command(**arguments: Any) -> Any:
        return function(**(settle(arguments, protocols) if protocols else arguments))

    def taken(function: Callable[..., Any], *left_out: str) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters
        return {k: v for k, v in parameters.items() if k not in left_out}

    hints = get_type_hints(load_encoder) | get_type_hints(function) | dict(protocols)
    words = taken(function, "loading") | taken(load_encoder, "encoder")
    if protocols:
        hints["protocols"] = Sequence[Literal[tuple(protocols)]]  # type: ignore[misc]
    for name, kind in protocols.items():
        only = inspect.Parameter.KEYWORD_ONLY
        words[name] = inspect.Parameter(name, only, default=kind())
    parameters = [
        word.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, word in words.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {name: hints[name] for name in words}
    command.__name__ = function.__name__
    told, loading = inspect.getdoc(function) or "", inspect.getdoc(load_encoder) or ""
    settings = "".join(
        f"    {name}:\n        Settings of {name}.\n" for name in protocols
    )
    loading = loading[loading.index("    img_size:") : loading.index("\nReturns:")]
    start, end = told.index("    loading:"), told.index("\nReturns:")
    command.__doc__ = told[:start] + loading + settings + told[end:]
    return command


COMMANDS: dict[str, Any] = {
    "pretrain": pretrain,
    "evaluate": _with_settings(evaluate, PROTOCOLS),
    "evaluate-dense": _with_settings(evaluate_dense, DENSE_PROTOCOLS),
    "predict": predict,
    "embed": _with_settings(embed),
    "show": show,
    "convert": convert,
    "report": report,
}


class _Parser(ArgumentParser):
    """Reads words alone: no files behind other options, no environment variables."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})

    def add_function_arguments(self, *args: Any, **options: Any) -> list[str]:
        """Adds the options of a command."""
        return super().add_function_arguments(*args, **options | {"sub_configs": False})

    @property
    def default_env(self) -> bool:
        """Whether the environment may set options: JSONARGPARSE_DEFAULT_ENV may not."""
        return False

    @default_env.setter
    def default_env(self, default_env: bool) -> None:
        self._default_env = False


# Errors are exceptions, which are told in fewer words.
_PARSER: dict[str, Any] = {
    "parser_class": _Parser,
    "config_help": "A YAML file of options, such as a run's config.yaml. It is data: "
    "methods and their parts are those of lightly_mim, or named on the command line; "
    "with --trust, also those that the file alone names are imported.",
    "as_positional": False,
    "prog": "lightly-mim",
    "exit_on_error": False,
    "allow_abbrev": False,
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command.

    Exits with 2 and one message if an argument is wrong, with 1 if a run failed.

    Args:
        args:
            The words after the program's name. None for those of the process.
    """
    words: list[str] = []
    print_any_name()
    try:
        words = spell_out(sys.argv[1:] if args is None else args, COMMANDS)
        if words[:1] == ["--completion"]:
            print(completion(" ".join(words[1:])))
            return
        command = COMMANDS.get(words[0] if words else "")
        with spelled_warnings(command, words):
            result = auto_cli(COMMANDS, args=words, **_PARSER)
        first = not distributed.is_initialized() or distributed.get_rank() == 0
        if isinstance(result, Results | DenseResults | Predictions) and first:
            notes = [as_options(note, command, words) for note in result.notes]
            rich.print(dataclasses.replace(result, notes=notes))
            print(_where(result, words))
    except (ValueError, argparse.ArgumentError) as error:
        _fail(2, _spelled(error, words))
    except (NonFiniteLossError, OSError) as error:
        _fail(1, error)
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        _fail(1, f"There is not enough memory: {error}")
    except KeyboardInterrupt:
        _say_interrupted(words)
        sys.exit(INTERRUPTED)
    except Preempted:
        if "SLURM_JOB_ID" not in os.environ:  # where the job is queued again
            _say_interrupted(words)
        raise


def read(args: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments that the words of a command give, without defaults.

    Args:
        args:
            The words after the program's name.

    Raises:
        ValueError: If the parser refuses them, or if a value is out of range.
    """
    words = spell_out(args, COMMANDS)
    try:
        found = auto_parser(COMMANDS, **_PARSER).parse_args(words, defaults=False)
        given: dict[str, Any] = found[found.subcommand].as_dict()
        return check_arguments(COMMANDS[found.subcommand], given)
    except (ValueError, argparse.ArgumentError) as error:
        raise ValueError(_spelled(error, words)) from error


def completion(shell: str) -> str:
    """Returns a script that completes commands and options in a shell.

    Args:
        shell:
            "bash", "zsh" or "tcsh".

    Raises:
        ValueError: If it is another one.
    """
    if shell not in (shells := ("bash", "zsh", "tcsh")):
        raise ValueError(f"--completion takes one of {', '.join(shells)}, got {shell}.")
    parser = auto_parser(COMMANDS, **_PARSER)
    script: str = parser.get_completion_script(f"shtab-{shell}")
    return script


def check(
    args: Sequence[str], encoder: MaskedEncoder | None = None
) -> MaskedImageModel | None:
    """Finds what is wrong with the words of a command without running it.

    Args:
        args:
            The words after the program's name.
        encoder:
            For `evaluate`: what stands for the encoder, which is changed. None checks
            the rest.

    Returns:
        The method of `pretrain`, see `check_pretraining`.

    Raises:
        ValueError: If the parser refuses them, or `check_pretraining` or
            `check_evaluation`. What only the data or the machine can tell is found when
            the command runs.
    """
    words = spell_out(args, COMMANDS)
    try:
        return _check(words, encoder)
    except (ValueError, argparse.ArgumentError) as error:
        raise ValueError(_spelled(error, words)) from error


def _check(
    words: Sequence[str], encoder: MaskedEncoder | None
) -> MaskedImageModel | None:
    parser = auto_parser(COMMANDS, **_PARSER)
    found = parser.parse_args(words)
    if found.subcommand == "pretrain":
        data = found.pretrain.data
        # Only the method is made: loggers begin experiments, and callbacks and images
        # may need what the nodes alone have.
        for name in ("data", "val", "loggers", "callbacks"):
            found.pretrain[name] = None
        arguments = parser.instantiate(found).pretrain.as_dict()
        method = check_pretraining(arguments)
        check_batch(data, method, arguments)
        return method
    if found.subcommand == "evaluate":
        arguments = parser.instantiate(found).evaluate.as_dict()
        del arguments["config"]
        check_evaluation(encoder, settle(arguments))
    return None


def _say_interrupted(words: Sequence[str]) -> None:
    how = {
        "pretrain": " Go on with it by --resume.",
        "evaluate": " The same command goes on with what is missing.",
    }
    what = how.get(words[0], "") if "--out" in words[:-1] else ""
    if words[0] == "pretrain" and what:
        out = Path(words[words.index("--out") + 1])
        what = what if (out / "config.yaml").is_file() else " There is no run yet."
    print(f"lightly-mim: interrupted.{what}", file=sys.stderr)


def _where(result: Results | DenseResults | Predictions, words: Sequence[str]) -> str:
    """Says where everything is that a command has written, and what to type next."""
    if words[0] == "show":
        results = Path(words[words.index("--results") + 1])
        folder = results if results.is_dir() else results.parent
        return f"The same as a page: {_command('report', folder)}"
    if isinstance(result, Predictions):
        return (
            f"All classes of every image: {words[words.index('--out') + 1]}"
            if "--out" in words
            else "Nothing was written: add --out classes.csv to keep them."
        )
    out = result.record["arguments"].get("out")
    if out is None:
        return (
            "Nothing was written: add --out FOLDER to keep the results and their page."
        )
    said = f"Everything is in {out}; open {Path(out) / REPORT} with a browser."
    if any((Path(out) / CLASSIFIERS).glob("*.safetensors")):
        said += f" The classes of other images: {_command('predict', out)} IMAGES"
    return said


def _command(*words: str | Path) -> str:
    return shlex.join(["lightly-mim", *map(str, words)])


def _fail(code: int, message: object) -> NoReturn:
    print(f"lightly-mim: error: {message}", file=sys.stderr)
    sys.exit(code)


def _spelled(error: Exception, words: Sequence[str]) -> str:
    """Returns a message in the words of the command line."""
    command = COMMANDS.get(words[0] if words else "")
    if isinstance(error, argparse.ArgumentError):
        options = _options(command) if command else ()
        return shorten(error.message, words[0] if command else "", options)
    return as_options(str(error), command, words)


def _options(function: Any, prefix: str = "") -> Iterator[str]:
    """Yields the options of a command, those of its settings (`linear.epochs`) too."""
    for name, hint in get_type_hints(function).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _options(hint, f"{prefix}{name}.")
