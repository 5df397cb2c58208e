"""Opening files as data: regular ones only, and what goes wrong is named."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lightly_mim.data.notes import printable
from lightly_mim.files import check_regular

Read = TypeVar("Read")

# Errors of the machine, the disk or the network that may pass, and how long is waited
# before each further try, in seconds.
_PASSING = {
    getattr(errno, name)
    for name in (
        *("EMFILE", "ENFILE", "EAGAIN", "EINTR", "EBUSY", "EIO", "ENOLCK", "ENOBUFS"),
        *("ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN"),
        *("EHOSTUNREACH", "ECONNRESET", "ECONNABORTED", "ENOTCONN", "ESHUTDOWN"),
    )
    if hasattr(errno, name)
}
_PAUSES = (0.1, 0.5, 2.0)


class BrokenImageError(ValueError):
    """A file that cannot be used: damaged, of a kind not supported, or too small.

    Attributes:
        path:
            The file. None if the error comes out of a worker of a plain DataLoader,
            which passes on the message alone, or is about a sample of a data set.
        passing:
            Whether the machine, the disk or the network failed, and not the file.
    """

    def __init__(
        self, message: str, path: str | None = None, passing: bool = False
    ) -> None:
        super().__init__(message)
        self.path = path
        self.passing = passing

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.path, self.passing)


def or_skip(error: BrokenImageError) -> BrokenImageError:
    """Returns an error that says that files can be left out, if it is one of a file.

    Args:
        error:
            What was raised.
    """
    message = str(error)
    if error.path is not None and not error.passing and "on_error" not in message:
        message = (
            f"{message.rstrip('.')}. Mend or remove the file, or leave such files out "
            'with on_error="skip".'
        )
    return BrokenImageError(message, error.path, error.passing)


def read_regular(path: str, kind: str, read: Callable[[BinaryIO], Read]) -> Read:
    """Returns what a function makes of a file; what goes wrong names the file.

    Errors that may pass, such as too many open files or a hiccup of a network file
    system, are tried again three times within 3 seconds.

    Args:
        path:
            The file.
        kind:
            What it is, for an error.
        read:
            Function of the open file.

    Raises:
        BrokenImageError: If it is no regular file (waiting for a FIFO or a device might
            take for ever), or if the function fails.
    """
    for pause in (*_PAUSES, None):
        try:
            check_regular(path)
            with Path(path).open("rb") as file:
                return read(file)
        except BrokenImageError:
            raise
        except Exception as error:  # PIL lets nearly any kind through on damaged files
            passing = isinstance(error, OSError) and error.errno in _PASSING
            if passing and pause is not None:
                time.sleep(pause)
                continue
            reason = printable(str(error) or type(error).__name__)
            if is_memory_error(error):
                reason = "there is not enough memory for it."
            if passing:
                reason += f" (after {len(_PAUSES) + 1} tries; the file may be whole)"
            shown = printable(path)
            where = "" if shown in reason else f" {shown}"
            message = f"Cannot read the {kind}{where}: {reason}"
            raise BrokenImageError(message, path, passing) from error
    raise AssertionError("the last try returns or raises")


def is_memory_error(error: Exception) -> bool:
    """Returns whether memory did not suffice, of which PyTorch makes a RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
