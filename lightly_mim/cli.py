"""The command line: the same functions, the same words.

`lightly-mim pretrain --out runs/a --data photos/ --method SimMIM --method.encoder
vit_base_patch16_224` is `pretrain(out="runs/a", data="photos/",
method=lambda: SimMIM("vit_base_patch16_224"))`.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import rich
from jsonargparse import auto_cli

import lightly_mim.methods
from lightly_mim.evaluation import Results, evaluate
from lightly_mim.methods import MaskedImageModel
from lightly_mim.pretraining import NonFiniteLossError, pretrain

COMMANDS: dict[str, Any] = {"pretrain": pretrain, "evaluate": evaluate}


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command.

    Exits with 2 and one message if an argument is wrong, with 1 if a run failed.

    Args:
        args:
            The words after the program's name. None for those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        if words and words[0] in COMMANDS:
            words = _join_lists(words, COMMANDS[words[0]])
            words = _say_true(words, COMMANDS[words[0]])
            words = _encoder_options(words)
        result = auto_cli(COMMANDS, args=words, as_positional=False, prog="lightly-mim")
    except ValueError as error:
        _fail(2, error)
    except (NonFiniteLossError, OSError) as error:
        _fail(1, error)
    except KeyboardInterrupt:
        sys.exit(130)
    if isinstance(result, Results):
        rich.print(result)


def _fail(code: int, error: Exception) -> None:
    print(f"lightly-mim: error: {error}", file=sys.stderr)
    sys.exit(code)


def _join_lists(words: list[str], command: Callable[..., Any]) -> list[str]:
    """Turns `--layers 4 8 -1` into `--layers [4,8,-1]`, which jsonargparse reads."""
    lists = set(_list_options(command, "--"))
    joined: list[str] = []
    for word in words:
        inside = len(joined) > 1 and joined[-2] in lists
        if joined and joined[-1] in lists and not word.startswith(("--", "[")):
            joined.append(f"[{word}]")
        elif inside and not word.startswith("--"):
            joined[-1] = f"{joined[-1][:-1]},{word}]"
        else:
            joined.append(word)
    return joined


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


def _list_options(function: Any, prefix: str) -> Iterator[str]:
    """Yields the options that take several values, those of settings included."""
    for name, hint in get_type_hints(function).items():
        for part in (hint, *get_args(hint)):
            if get_origin(part) in (list, tuple, Sequence):
                yield prefix + name
            elif dataclasses.is_dataclass(part):
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
    own = {"help", "dict_kwargs", *inspect.signature(method).parameters}

    def spell_out(word: str) -> str:
        option = word.removeprefix("--method.").partition("=")[0].partition(".")[0]
        if not word.startswith("--method.") or option in own:
            return word
        return word.replace("--method.", "--method.dict_kwargs.", 1)

    return [spell_out(word) for word in words]
