"""Being told to stop: signals are noted, and acted on where nothing is lost.

SLURM, a cloud's spot machine or `kill` ask a process to end. Within `listening()` such
a signal ends it by `Preempted`: at once, as Ctrl-C would, or, within `deferred()`, when
the block asks for it. `pretrain` defers: it saves between two batches, on all ranks
together, and then raises `Preempted`.

For a launcher that can queue the job again (`slurm/task.py`), in SLURM:

    with listening(stop=[signal.SIGUSR2], save=[signal.SIGTERM]) as handlers:
        try:
            ...  # one or more calls of pretrain, evaluate, ...
        except Preempted:  # what was reached is saved
            if rank == 0:
                handlers[signal.SIGUSR2](signal.SIGUSR2, None)  # submitit's: requeue
            else:
                ...  # wait with SIGTERM at its default until SLURM ends the step

A second signal while a `Preempted` is on its way is only noted.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class Request(IntEnum):
    """What a signal asks for; the larger one wins."""

    NOTHING = 0
    SAVE = 1  # save, and go on
    STOP = 2  # save, and end


class Preempted(SystemExit):
    """The process was told to stop, and what it had reached is saved.

    A SystemExit, so that a program that does not catch it ends without a traceback, and
    that no `except Exception` takes it for a failure.

    Attributes:
        signum:
            The signal, or 0 if another process of the run received it.
        code:
            Exit code: 128 + signum as a shell reports it, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + (signum or signal.SIGTERM))
        self.signum = signum


class _State:
    """Of this process."""

    pid = -1  # of the process that listens: forked children inherit the handlers
    request = Request.NOTHING
    signum = 0
    deferred = 0  # depth
    raised = False


def in_slurm() -> bool:
    """Returns whether the process is part of a SLURM job."""
    return "SLURM_JOB_ID" in os.environ


@contextmanager
def listening(
    stop: Iterable[int] | None = None, save: Iterable[int] | None = None
) -> Iterator[dict[int, Handler]]:
    """Takes over signals for the time of the block.

    Within another such block, or outside the main thread, where Python sets no
    handlers, it changes nothing: the outermost block owns the signals.

    Args:
        stop:
            Signals that ask to save and to end. By default SIGTERM and SIGUSR2, in a
            SLURM job SIGUSR2 alone.
        save:
            Signals that ask to save and to go on. By default none, in a SLURM job
            SIGTERM: SLURM sends it before it kills, and a job that ends by itself
            then counts as COMPLETED or FAILED and is not queued again.

    Yields:
        The handlers that were there before, by signal. They are back after the block.
    """
    if _listens() or threading.current_thread() is not threading.main_thread():
        yield {}
        return
    slurm = in_slurm()
    if stop is None:
        stop = [signal.SIGUSR2] if slurm else [signal.SIGTERM, signal.SIGUSR2]
    if save is None:
        save = [signal.SIGTERM] if slurm else []
    kinds = dict.fromkeys(save, Request.SAVE) | dict.fromkeys(stop, Request.STOP)
    _State.pid = os.getpid()
    _State.request, _State.signum = Request.NOTHING, 0
    _State.deferred, _State.raised = 0, False

    def note(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != _State.pid:
            return
        if kinds[signum] > _State.request:
            _State.request, _State.signum = kinds[signum], signum
        stops = _State.request == Request.STOP
        if stops and not _State.deferred and not _State.raised:
            _State.raised = True
            raise Preempted(_State.signum)

    before: dict[int, Handler] = {}
    try:
        for signum in kinds:
            before[signum] = signal.getsignal(signum)
            signal.signal(signum, note)
        yield before
    finally:
        _State.pid = -1
        for signum, handler in before.items():
            # None: set by something other than Python, which cannot be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Keeps signals from ending the process within the block: they are only noted.

    Raises:
        Preempted: At the end of the block, if a signal asked to stop meanwhile.
    """
    if not _listens():
        yield
        return
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1
    check()


def requested() -> Request:
    """Returns what the signals so far ask for."""
    return _State.request if _listens() else Request.NOTHING


def take() -> Request:
    """Returns what the signals so far ask for, and takes a request to save as met.

    A request to stop stays: nothing but the end meets it.
    """
    request = requested()
    if request == Request.SAVE:
        _State.request = Request.NOTHING
    return request


def preempted() -> Preempted:
    """Returns the exception that ends a run, after it was saved, for the caller."""
    _State.raised = True
    return Preempted(_State.signum if requested() == Request.STOP else 0)


def check() -> None:
    """Raises `Preempted` if a signal asked to stop."""
    if requested() == Request.STOP:
        raise preempted()


def _listens() -> bool:
    return _State.pid == os.getpid()
