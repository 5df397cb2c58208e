"""The command line: the same functions, the same words.

`lightly-mim pretrain --out runs/a --data photos/ --method SimMIM --method.encoder
vit_base_patch16_224` is `pretrain(out="runs/a", data="photos/",
method=lambda: SimMIM("vit_base_patch16_224"))`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import rich
import yaml
from jsonargparse import ArgumentParser, auto_cli, auto_parser
from torch import distributed

import lightly_mim.methods
from lightly_mim.arguments import check_arguments
from lightly_mim.config_files import ConfigFile
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
from lightly_mim.files import is_file, print_any_name
from lightly_mim.interrupts import INTERRUPTED
from lightly_mim.methods import MaskedImageModel
from lightly_mim.methods.base import refuse_replaced
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.pretraining import check_pretraining, pretrain
from lightly_mim.report import report
from lightly_mim.reporting.page import REPORT
from lightly_mim.settings import check_batch
from lightly_mim.training.signals import Preempted
from lightly_mim.words import as_options, shorten, spell_method, spelled_warnings


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
    settings = "".join(f"    {name}:\n        Settings of it.\n" for name in protocols)
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
# Their first words stand for the first arguments: predict MODEL IMAGES.
_IN_ORDER = ("predict", "embed", "show", "report")


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
        words = _spell_out(sys.argv[1:] if args is None else args)
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
    words = _spell_out(args)
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
    words = _spell_out(args)
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


def _spell_out(args: Sequence[str]) -> list[str]:
    """Turns the words that are easy to type into those that jsonargparse reads."""
    words = _split(args)
    if words:
        words[0] = words[0].replace("_", "-")
    if words and words[0] == "--config":
        raise ValueError(
            "--config stands behind the command: lightly-mim pretrain --config FILE."
        )
    if words and words[0] in COMMANDS:
        words = _read_files(words, COMMANDS[words[0]])
        if words[0] in _IN_ORDER:
            words = _name_first(words, COMMANDS[words[0]])
        words = _join_lists(words, COMMANDS[words[0]])
        words = _say_true(words, COMMANDS[words[0]])
        words = spell_method(words)
        _check_unused(words, COMMANDS[words[0]])
    return words


def _name_first(words: Sequence[str], command: Callable[..., Any]) -> list[str]:
    """Turns `predict MODEL IMAGES` into `predict --model MODEL --images IMAGES`.

    A last argument that may be a list takes what is left: `report RUN RUN`.
    """
    first = list(itertools.takewhile(_is_value, words[1:]))
    parameters = inspect.signature(command).parameters.values()
    required = [each.name for each in parameters if each.default is each.empty]
    lists = dict(_list_options(command, "--"))
    if len(first) > len(required) and f"--{required[-1]}" not in lists:
        given = " ".join(first[len(required) :])
        raise ValueError(f"{given!r} stands behind no option, such as --out.")
    named = zip(required, first, strict=False)
    pairs = [word for name, value in named for word in (f"--{name}", value)]
    left = first[len(required) :]
    return [words[0], *pairs, *left, *words[1 + len(first) :]]


def _split(words: Sequence[str]) -> list[str]:
    """Turns `--batch-size=3` into `--batch_size 3`: there is one form to read."""
    split: list[str] = []
    for word in words:
        if not word.startswith("--"):
            split.append(word)
            continue
        option, equals, value = word.partition("=")
        split.append(f"--{option[2:].replace('-', '_')}")
        if equals:
            split.append(value)
    return split


def _check_unused(words: Sequence[str], command: Callable[..., Any]) -> None:
    """Refuses settings of protocols that are not asked for, which do nothing.

    Raises:
        ValueError: If there are any.
    """
    parameters = inspect.signature(command).parameters
    if "protocols" not in parameters or "--config" in words:
        return
    given = {
        name: yaml.safe_load(words[words.index(f"--{name}") + 1])
        if f"--{name}" in words[:-1]
        else list(parameters[name].default)
        for name in ("protocols", "baselines")
        if name in parameters
    }
    hints = get_type_hints(command)
    needs = {
        name: ("protocols", name)
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint)
    }
    needs |= {"pixel_size": ("baselines", "pixels")}
    for word in words[1:]:
        option, what = needs.get(word[2:].partition(".")[0], ("", ""))
        named = given.get(option)
        if word.startswith("--") and isinstance(named, list) and what not in named:
            names = " ".join(map(str, named)) or "none"
            raise ValueError(
                f"{word} does nothing: --{option} is {names}. Add {what} to it, or "
                f"leave {word} out."
            )


def _read_files(words: Sequence[str], command: Callable[..., Any]) -> list[str]:
    """Puts what a file behind `--config` says, once it is checked, in its place.

    Raises:
        ValueError: If a file says what it may not say, see `ConfigFile`, or is of a
            version with other arguments; if another option names a file of settings.
    """
    trust = "--trust" in words
    if trust and "--config" not in words:
        raise ValueError("--trust does nothing without --config.")
    named = frozenset(words)
    words = [word for word in words if word != "--trust"]
    settings = {
        f"--{name}"
        for name, hint in get_type_hints(command).items()
        if dataclasses.is_dataclass(hint)
    }
    for place, (option, value) in enumerate(itertools.pairwise(words)):
        if option == "--config" and not value.startswith("--"):
            file = ConfigFile(value, command, named, trust)
            _refuse_replaced(file.options)
            words[place + 1] = json.dumps(file.options)
        elif option in settings and is_file(value):
            raise ValueError(f"{option} {value} is a file: pass one as --config alone.")
    return words


def _refuse_replaced(options: Mapping[str, Any]) -> None:
    """Raises a ValueError if a configuration is of a version with other arguments."""
    method = options.get("method")
    if isinstance(method, dict):
        package, _, last = method["class_path"].rpartition(".")
        known = getattr(lightly_mim.methods, last, None)
        if known is not None and package.partition(".")[0] in ("", "lightly_mim"):
            refuse_replaced(known, {**(method.get("init_args") or {})})


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


def _join_lists(words: list[str], command: Callable[..., Any]) -> list[str]:
    """Turns `--layers 4 8 -1` into `--layers [4,8,-1]`, which jsonargparse reads.

    Several words are a list behind every option, `--method.depths 2 2` too, as none
    stands by itself. A single word becomes one only where nothing but a list is taken:
    `--layers 4`, but not `--devices 2`.
    """
    only_lists = dict(_list_options(command, "--"))
    joined: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        joined.append(word)
        position += 1
        if _is_value(word):  # the command
            continue
        values = list(itertools.takewhile(_is_value, words[position:]))
        position += len(values)
        if len(values) > 1:
            values = [f"[{','.join(map(_quote, values))}]"]
        elif values and only_lists.get(word) and not values[0].startswith("["):
            values = [f"[{_quote(values[0])}]"]
        joined += values
    return joined


def _quote(word: str) -> str:
    """Returns a word as an element of a list in YAML."""
    plain = re.fullmatch(r"[\w.+/-]+|[\[{].*[\]}]", word)
    return word if plain else json.dumps(word)


def _is_value(word: str) -> bool:
    return not word.startswith("--")


def _say_true(words: list[str], command: Callable[..., Any]) -> list[str]:
    """Turns `--resume` into `--resume true`, which jsonargparse reads."""
    hints = get_type_hints(command).items()
    flags = {f"--{name}" for name, hint in hints if bool in (hint, *get_args(hint))}
    said: list[str] = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        said.append(word)
        if word in flags and following.startswith("--"):
            said.append("true")
    return said


def _list_options(function: Any, prefix: str) -> Iterator[tuple[str, bool]]:
    """Yields the options that take lists, and whether they take nothing else."""
    for name, hint in get_type_hints(function).items():
        union = get_origin(hint) in (Union, UnionType)
        parts = [p for p in (get_args(hint) if union else (hint,)) if p is not NoneType]
        lists = [get_origin(part) in (list, tuple, Sequence) for part in parts]
        if any(lists):
            yield prefix + name, all(lists)
        for part in parts:
            if dataclasses.is_dataclass(part):
                yield from _list_options(part, f"{prefix}{name}.")
