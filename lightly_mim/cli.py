"""The command line: the same functions, the same words.

`lightly-mim pretrain --out runs/a --data photos/ --method SimMIM --method.encoder
vit_base_patch16_224` is `pretrain(out="runs/a", data="photos/",
method=lambda: SimMIM("vit_base_patch16_224"))`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_origin, get_type_hints

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
    lists = {
        f"--{name}"
        for name, hint in get_type_hints(command).items()
        if get_origin(hint) in (list, tuple) or get_origin(hint) is Sequence
    }
    joined: list[str] = []
    values: list[str] | None = None
    for word in [*words, "--"]:
        if word.startswith("--") and values is not None:
            joined.append(f"[{','.join(values)}]" if values else "")
            values = None
        if values is not None and not word.startswith("["):
            values.append(word)
            continue
        joined.append(word)
        values = [] if word in lists else None
    return joined[:-1]


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
