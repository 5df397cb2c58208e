"""Ctrl-C ends a program with one line and exit code 130, and never with a traceback.

While a program imports PyTorch, and once it has done what it was asked for, there is
nothing to save: the process ends at once. In between, `KeyboardInterrupt` is raised as
ever, so that runs are left as they should be.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = 130  # exit code, as a shell reports it


def end_at_once() -> None:
    """Has Ctrl-C end the process from now on, unless it ignores Ctrl-C."""
    sys.stdout.flush()  # which a process that ends at once does not do
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Has Ctrl-C raise `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, frame: FrameType | None) -> None:
    name = "lightly-mim" if Path(sys.argv[0]).stem in ("__main__", "-m") else ""
    name = name or Path(sys.argv[0]).name
    os.write(2, f"\n{name}: interrupted.\n".encode(errors="surrogateescape"))
    os._exit(INTERRUPTED)
