"""Names that print, and files that no reader sees half of."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def print_any_name() -> None:
    r"""Lets what is printed tell of names that are no UTF-8, as in Python: \\udce4.

    A program calls it: it changes how standard output is written.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def expanded(path: Path | str) -> Path:
    """Returns a path with `~` replaced, where somebody has that name.

    `Path.expanduser` raises a RuntimeError where nobody does.

    Args:
        path:
            The path.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


def is_file(text: str) -> bool:
    """Returns whether a word is a file; False for what cannot be a path at all.

    Args:
        text:
            The word.
    """
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, for example
        return False


def is_same_place(one: str | None, other: str | None) -> bool:
    """Returns whether two words are the same or lead to the same file or folder.

    Args:
        one:
            A path, from where one stands, or any other word.
        other:
            Another.
    """
    if one is None or other is None or one == other:
        return one == other
    paths = [expanded(word).absolute() for word in (one, other)]
    try:
        return paths[0] == paths[1] or paths[0].samefile(paths[1])
    except (OSError, ValueError):  # not there, or no paths
        return False


def check_regular(path: Path | str) -> None:
    """Raises a ValueError for what is no regular file: waiting may take for ever.

    Args:
        path:
            Something that is there.

    Raises:
        OSError: If there is nothing.
        ValueError: If it is a folder, a FIFO, a socket or a device.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        "a folder": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }
    kind = next((name for name, test in kinds.items() if test(mode)), "a device")
    raise ValueError(f"it is {kind}, only regular files are read")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path and renames it to the wanted one when all went well.

    The temporary file lies in the same folder, because only a rename within one file
    system is atomic, and it reaches the disk before the rename. If the body raises, it
    is removed and whatever stood at the path stays as it was. Missing folders are made.

    Args:
        path:
            Where the file is wanted.

    Yields:
        The temporary path to write to. It keeps the suffix of the wanted one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give it the rights any other file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record with the SHA-256 of what it says, for `read_sealed`.

    Args:
        record:
            What can be written as JSON.
    """
    plain = json.loads(json.dumps(dict(record)))  # as it will be read
    return {**plain, _SEAL: _digest(plain)}


def read_sealed(path: Path | str, remedy: str) -> dict[str, Any]:
    """Reads JSON that was written of a `sealed` record, if it is as it was.

    Args:
        path:
            The file. One of an earlier version has no seal and is taken as it is.
        remedy:
            What to do if it is damaged, one sentence.

    Returns:
        The record.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is damaged.
    """
    try:
        check_regular(path)
        record = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping. {remedy}")
    seal = record.pop(_SEAL, None)
    if seal is not None and seal != _digest(record):
        raise ValueError(f"{path} is damaged: its checksum is another. {remedy}")
    return record


def sealed_text(text: str) -> str:
    """Returns a text behind a line, a comment, with its SHA-256, for `check_text`.

    Args:
        text:
            YAML, for example, where lines that begin with # are comments.
    """
    return f"{_SEAL_LINE}{_sha256(text)}\n{text}"


def check_text(text: str) -> None:
    """Raises a ValueError if what `sealed_text` returned is something else by now.

    Args:
        text:
            The text. One that never was sealed is taken as it is.
    """
    said, _, lines = text.partition("\n")
    if said.startswith(_SEAL_LINE) and said != f"{_SEAL_LINE}{_sha256(lines)}":
        raise ValueError("its checksum is another")


_SEAL = "sha256"
_SEAL_LINE = "# sha256 of the lines below, which a resume looks at: "


def _digest(record: dict[str, Any]) -> str:
    return _sha256(json.dumps(record, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
