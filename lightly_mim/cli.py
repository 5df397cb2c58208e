"""The command line: the same functions, the same words.

`lightly-mim pretrain --out runs/a --data photos/ --method SimMIM --method.encoder
vit_base_patch16_224` is `pretrain(out="runs/a", data="photos/",
method=lambda: SimMIM("vit_base_patch16_224"))`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import rich
from jsonargparse import auto_cli, auto_parser

import lightly_mim.methods
from lightly_mim.config import constructor_arguments
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation import (
    DenseResults,
    Results,
    check_evaluation,
    evaluate,
    evaluate_dense,
)
from lightly_mim.methods import MaskedImageModel
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.preemption import Preempted
from lightly_mim.pretraining import check_pretraining, pretrain

COMMANDS: dict[str, Any] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "evaluate-dense": evaluate_dense,
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command.

    Exits with 2 and one message if an argument is wrong, with 1 if a run failed.

    Args:
        args:
            The words after the program's name. None for those of the process.
    """
    words: list[str] = []
    try:
        words = _spell_out(sys.argv[1:] if args is None else args)
        result = auto_cli(COMMANDS, args=words, as_positional=False, prog="lightly-mim")
    except ValueError as error:
        _fail(2, error)
    except (NonFiniteLossError, OSError) as error:
        _fail(1, error)
    except KeyboardInterrupt:
        _say_interrupted(words)
        sys.exit(130)
    except Preempted:
        if "SLURM_JOB_ID" not in os.environ:  # where the job is queued again
            _say_interrupted(words)
        raise
    if isinstance(result, Results | DenseResults):
        rich.print(result)


def check(
    args: Sequence[str], encoder: MaskedEncoder | None = None
) -> MaskedImageModel | None:
    """Finds what is wrong with the words of a command without running it.

    Args:
        args:
            The words after the program's name.
        encoder:
            For `evaluate`: what stands for the encoder, which is changed. None checks
            the words alone.

    Returns:
        The method of `pretrain`, see `check_pretraining`.

    Raises:
        ValueError: If the parser refuses them, or `check_pretraining` or
            `check_evaluation`. What only the data or the machine can tell is found when
            the command runs.
    """
    parser = auto_parser(COMMANDS, as_positional=False, prog="lightly-mim")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            found = parser.parse_args(_spell_out(args))
    except SystemExit as error:
        if error.code:
            text = message.getvalue().strip()  # the usage, and error: what is wrong
            raise ValueError(text.partition("error: ")[2] or text) from error
        raise
    if found.subcommand == "pretrain":
        # Only the method is made: loggers begin experiments, and callbacks and images
        # may need what the nodes alone have.
        for name in ("data", "val", "loggers", "callbacks"):
            found.pretrain[name] = None
        return check_pretraining(parser.instantiate(found).pretrain.as_dict())
    if found.subcommand == "evaluate" and encoder is not None:
        check_evaluation(encoder, parser.instantiate(found).evaluate.as_dict())
    return None


def _spell_out(args: Sequence[str]) -> list[str]:
    """Turns the words that are easy to type into those that jsonargparse reads."""
    # A method of one's own, by its dotted path, may lie where one stands.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    words = _split(args)
    if words and words[0] in COMMANDS:
        words = _join_lists(words, COMMANDS[words[0]])
        words = _say_true(words, COMMANDS[words[0]])
        words = _encoder_options(words)
    return words


def _split(words: Sequence[str]) -> list[str]:
    """Turns `--allow-changes=x` into `--allow_changes x`: one form to read."""
    parts: list[str] = []
    for word in words:
        if not word.startswith("--"):
            parts.append(word)
            continue
        option, *value = word.split("=", 1)
        parts += ["--" + option[2:].replace("-", "_"), *value]
    return parts


def _say_interrupted(words: Sequence[str]) -> None:
    how = {
        "pretrain": " Go on with it by --resume.",
        "evaluate": " The same command goes on with what is missing.",
    }
    what = how.get(words[0], "") if "--out" in words else ""
    print(f"lightly-mim: interrupted.{what}", file=sys.stderr)


def _fail(code: int, error: Exception) -> None:
    print(f"lightly-mim: error: {error}", file=sys.stderr)
    sys.exit(code)


def _join_lists(words: list[str], command: Callable[..., Any]) -> list[str]:
    """Turns `--layers 4 8 -1` into `--layers [4,8,-1]`, which jsonargparse reads.

    A single word becomes a list only where nothing but a list is taken: `--layers 4`,
    but not `--devices 2`.
    """
    only_lists = dict(_list_options(command, "--"))
    joined: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        joined.append(word)
        position += 1
        if word not in only_lists:
            continue
        values = list(itertools.takewhile(_is_value, words[position:]))
        position += len(values)
        listed = len(values) > 1 or (values and only_lists[word])
        if listed and not values[0].startswith("["):
            values = [f"[{','.join(values)}]"]
        joined += values
    return joined


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


def _encoder_options(words: list[str]) -> list[str]:
    """Lets `--method.window_size 6` reach timm: jsonargparse wants it spelled out."""
    if "--method" not in words[:-1]:
        return words
    name = words[words.index("--method") + 1]
    method = getattr(lightly_mim.methods, name.rpartition(".")[2], None)
    if not (inspect.isclass(method) and issubclass(method, MaskedImageModel)):
        if "." in name:
            return words
        known = [
            known
            for known in lightly_mim.methods.__all__
            if known not in ("MIMOutput", "MaskedImageModel")
        ]
        raise ValueError(
            f"There is no method {name!r}. There are: {', '.join(known)}; or give the "
            "dotted path of a MaskedImageModel of your own."
        )
    own = {"help", "dict_kwargs", *constructor_arguments(method)}

    def spell_out(word: str) -> str:
        option = word.removeprefix("--method.").partition(".")[0]
        if not word.startswith("--method.") or option in own:
            return word
        return word.replace("--method.", "--method.dict_kwargs.", 1)

    return [spell_out(word) for word in words]
