"""How a script begins and ends: the words it was called with, errors, Ctrl-C."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from lightning_fabric.utilities.exceptions import MisconfigurationException

from lightly_mim import interrupts
from lightly_mim.files import print_any_name
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.spelling import respell

Main = Callable[[argparse.Namespace, str], None]

_EXISTING = ("--resume", "--overwrite")


def script(
    parser: Callable[[], argparse.ArgumentParser],
) -> Callable[[Main], Callable[..., None]]:
    """Makes a script of a function of its arguments and the command that repeats it.

    What comes of the function takes the words after the script's name, None for those
    of the process. It exits with 2 and one message if an argument is wrong, with 1 if a
    run failed.

    Args:
        parser:
            Returns the script's parser.
    """

    def decorate(main: Main) -> Callable[..., None]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> None:
            _run(parser(), main, spell(sys.argv[1:] if argv is None else argv))

        return run

    return decorate


def _run(parser: argparse.ArgumentParser, main: Main, words: Sequence[str]) -> None:
    print_any_name()
    command = shlex.join(["python", f"benchmarks/{parser.prog}", *words])
    arguments = parser.parse_args(words)

    def fail(code: int, error: Exception) -> NoReturn:
        options = {name: f"--{name.replace('_', '-')}" for name in vars(arguments)}
        parser.exit(code, f"{parser.prog}: error: {respell(str(error), options)}\n")

    interrupts.raise_again()
    try:
        main(arguments, command)
    except (ValueError, MisconfigurationException) as error:
        fail(2, error)
    except (NonFiniteLossError, OSError) as error:
        fail(1, error)
    except KeyboardInterrupt:
        again = resuming(command) if "resume" in arguments else command
        parser.exit(interrupts.INTERRUPTED, f"\nInterrupted. Go on with: {again}\n")
    finally:
        interrupts.end_at_once()


def spell(words: Sequence[str]) -> list[str]:
    """Returns words in which an option such as --batch_size is --batch-size."""
    return [
        re.sub("^--[^=]+", lambda m: m[0].replace("_", "-"), word) for word in words
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
