"""What is said while images are found and read: once, and so that it can be printed."""

from __future__ import annotations

from pytorch_lightning.utilities import rank_zero_only

_said: set[str] = set()


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


def printable(name: str) -> str:
    r"""Returns a name that can be printed in one line, as UTF-8.

    Args:
        name:
            Any text. What is no character, such as a byte that is not UTF-8, or breaks
            the line is written as in Python: \\udce4, \\n.
    """
    if name.isprintable():
        return name
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape").decode("ascii")
        for character in name
    )
