"""What is said while images are found and read: once, and so that it can be printed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pytorch_lightning.utilities import rank_zero_only

from lightly_mim.files import printable as printable

_said: set[str] = set()
_SHOWN = 5  # names or reasons in a message


def is_first(key: str) -> bool:
    """Returns whether it is the first time in this process that this is asked.

    Args:
        key:
            What is to be said once.
    """
    is_new = key not in _said
    _said.add(key)
    return is_new


@rank_zero_only
def say(text: str) -> None:
    """Prints a text, on the first device only and not twice."""
    if is_first(text):
        print(text)


def counted(number: int, noun: str) -> str:
    """Returns "1 epoch" or "2 epochs"."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def some(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are.

    Args:
        names:
            Names that can be printed.
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Returns what is wrong with files: a line for each kind of reason, most first.

    Each has the number of files and the reason of one of them. Reasons that differ in
    nothing but the file and in numbers are of one kind.

    Args:
        reasons:
            Why files cannot be used, by their names, which the reasons may tell.
    """
    kinds: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kind = re.sub(r"\d+", "", reason.replace(name, ""))
        kinds.setdefault(kind, []).append(reason)
    most = sorted(kinds.values(), key=len, reverse=True)
    lines = [
        f"{len(kind)}{', such as' if len(kind) > 1 else ''}: {kind[0]}"
        for kind in most[:_SHOWN]
    ]
    if rest := sum(map(len, most[_SHOWN:])):
        lines.append(f"{rest} for other reasons.")
    return lines
