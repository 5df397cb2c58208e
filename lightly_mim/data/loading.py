"""Loading as a function of (seed, epoch), with a position that a checkpoint can hold.

The batches are the same however many workers read them and processes share them.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import time
import warnings
import weakref
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from lightly_mim.arguments import (
    AnyDataset,
    NonNegativeInt,
    PositiveInt,
    Seed,
    Workers,
    checked,
)
from lightly_mim.data.folder import ReplacementName
from lightly_mim.data.items import Key, KeyedDataset, collate
from lightly_mim.data.opening import BrokenImageError, or_skip
from lightly_mim.data.seeding import seed_from

_MAX_WORKERS = 8

# What SLURM, submitit and Lightning use to say that time is up.
_SLURM_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# In which forked workers have to begin, the first time and once more: it takes them
# milliseconds, but on a machine that does much else.
_SECONDS_TO_BEGIN = (10, 30, 60)
# Pipes by which workers that are forked now tell that they begin.
_begun: list[int] = []

_running: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators that have workers


@checked
class GlobalBatches(Sampler[list[Key]]):
    """Yields the (epoch, index) keys of one rank's part of each global batch.

    Args:
        num_images:
            Length of the data set.
        batch_size:
            Images per global batch.
        training:
            True shuffles as a function of (seed, epoch) and drops the last batch if it
            is incomplete. False keeps the order, the incomplete batch and epoch 0, so
            that every pass yields the same.
        seed:
            Seed of the order.
        rank:
            Which part of each batch is yielded: the rank-th of `world_size` slices.
        world_size:
            Number of parts.
        pieces:
            Lengths of consecutive pieces of the data set, where one rank reads it in
            order: a batch ends with its piece. None for one piece.

    Raises:
        ValueError: If the batch does not divide by the ranks, or is larger than the
            data set in training, if there are fewer images than ranks, or if the pieces
            are not the data set's or not one rank's.
    """

    def __init__(
        self,
        num_images: PositiveInt,
        batch_size: PositiveInt,
        *,
        training: bool = True,
        seed: Seed = 0,
        rank: NonNegativeInt = 0,
        world_size: PositiveInt = 1,
        pieces: Sequence[PositiveInt] | None = None,
    ) -> None:
        if rank >= world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}.")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, "
                f"{world_size}, got {batch_size}."
            )
        if training and batch_size > num_images:
            raise ValueError(
                f"A batch of {batch_size} images is larger than the dataset, which "
                f"has {num_images}. Incomplete batches are dropped, so nothing would "
                f"be left: take a batch_size of at most {num_images}."
            )
        if num_images < world_size:
            raise ValueError(
                f"{num_images} images are too few for {world_size} processes."
            )
        if pieces is None:
            pieces = [num_images]
        elif training or world_size > 1 or sum(pieces) != num_images:
            raise ValueError(
                f"pieces are the lengths of pieces of {num_images} images which one "
                f"process reads in order, got {list(pieces)} with {training=} and "
                f"{world_size=}."
            )
        ends = itertools.accumulate(pieces)
        self._batches = [
            range(start, min(start + batch_size, end))
            for end, length in zip(ends, pieces, strict=True)
            for start in range(end - length, end, batch_size)
        ]
        incomplete = len(self._batches[-1]) < (batch_size if training else world_size)
        if incomplete and len(self._batches) > 1:
            rest = self._batches.pop()
            if not training:  # each rank gets an image: it joins the batch before
                self._batches[-1] = range(self._batches[-1].start, rest.stop)
        self.num_images = num_images
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_batch = 0

    @property
    def sampler(self) -> GlobalBatches:
        """Itself: Lightning calls `set_epoch` on `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass; outside training it stays 0."""
        if self.training:
            self.epoch = epoch

    def order(self) -> list[int]:
        """Returns the indices of all images in the epoch's order."""
        if not self.training:
            return list(range(self.num_images))
        generator = torch.Generator()
        generator.manual_seed(seed_from(self.seed, self.epoch, "order"))
        order: list[int] = torch.randperm(self.num_images, generator=generator).tolist()
        return order

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order()
        for batch in self._batches[self.first_batch :]:
            first = batch.start + len(batch) * self.rank // self.world_size
            last = batch.start + len(batch) * (self.rank + 1) // self.world_size
            yield [(epoch, index) for index in order[first:last]]


@checked
class KeyedLoader(DataLoader[Any]):
    """Loads batches that are a function of (seed, epoch) and of the batch's number.

    Neither the number of workers nor of processes changes which images a global batch
    holds and how they are augmented. Works in a plain loop, where each complete pass
    moves on to the next epoch, and in a Lightning Trainer with
    `use_distributed_sampler=False`, which sets the epoch and keeps `state_dict` in its
    checkpoints: the position counts what was handed out, not what workers have
    prefetched, so a run that was cut between two batches goes on with the next one.

    Args:
        dataset:
            Data set of (sample, target, filename); see `KeyedDataset`.
        batch_size:
            Images per batch over all processes.
        training:
            True for shuffled batches, an incomplete last one dropped; False for a fixed
            pass over all images in order. See `GlobalBatches`.
        seed:
            Seed of order and augmentations.
        rank:
            Number of this process.
        world_size:
            Number of processes; each reads `batch_size / world_size` images per batch.
        num_workers:
            Processes that read. None takes `default_num_workers`.
        labels:
            Whether targets are labels; see `KeyedDataset`.
        pieces:
            Lengths of pieces that no batch crosses; see `GlobalBatches`.
        **options:
            Further arguments of `torch.utils.data.DataLoader`, such as
            `prefetch_factor` or `multiprocessing_context`.

    Attributes:
        unreadable:
            Files that `on_error="skip"` replaced so far, and why: {filename: reason}.
            Of this rank's part.

    Raises:
        ValueError: See `GlobalBatches`.
        BrokenImageError: While iterating, if a file cannot be used.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        batch_size: PositiveInt,
        *,
        training: bool = True,
        seed: Seed = 0,
        rank: NonNegativeInt = 0,
        world_size: PositiveInt = 1,
        num_workers: Workers | None = None,
        labels: bool | None = True,
        pieces: Sequence[PositiveInt] | None = None,
        **options: Any,
    ) -> None:
        num_images = len(dataset)  # type: ignore[arg-type]
        if num_images == 0:
            raise ValueError("The dataset has no images.")
        batches = GlobalBatches(
            num_images,
            batch_size,
            training=training,
            seed=seed,
            rank=rank,
            world_size=world_size,
            pieces=pieces,
        )
        if num_workers is None:
            num_workers = default_num_workers(dataset, world_size)
        super().__init__(
            KeyedDataset(dataset, seed, labels),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=_begin,
            # The loader draws a seed for its workers: not from the global state, where
            # a resumed run would have drawn one more.
            generator=torch.Generator(),
            **{
                "pin_memory": torch.cuda.is_available(),
                "persistent_workers": num_workers > 0,
                **options,
            },
        )
        self.batches = batches
        self.unreadable: dict[str, str] = {}
        self._position = (0, 0)  # (epoch, batches handed out)
        self._resumes = False

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass."""
        self.batches.set_epoch(epoch)

    # A generator: nothing is read before the first batch is asked for. Lightning
    # creates the first epoch's iterator before it sets the epoch.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the batches of the epoch, after a resume those that were left."""
        epoch = self.batches.epoch
        resumes = self._resumes and self._position[0] == epoch
        self._resumes = False
        self._position = (epoch, self._position[1] if resumes else 0)
        self.batches.first_batch = self._position[1]
        for batch in super().__iter__():
            if isinstance(batch, BrokenImageError):
                raise or_skip(batch) from batch
            for filename in batch[2]:
                if isinstance(filename, ReplacementName):
                    self.unreadable[filename.replaces] = filename.reason
            self._position = (epoch, self._position[1] + 1)
            yield batch
        if self.batches.epoch == epoch:
            self.set_epoch(epoch + 1)

    def _get_iterator(self) -> Any:
        # Workers inherit the mask, so a signal cannot hit one that has not come to
        # ignore it yet. This process gets its own a moment later.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SLURM_SIGNALS)
        try:
            iterator = self._begin_workers()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # SIGTERM, which torch sends to a worker that does not end in time, is ignored.
        for worker in getattr(iterator, "_workers", ()):
            worker._popen.terminate = worker._popen.kill
            _running.add(iterator)
        if self.pin_memory:
            # Before what PyTorch, before 2.14, has just registered: it waits 5 s for
            # each worker, which nobody has told to end, and then kills it.
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)
        return iterator

    def _begin_workers(self) -> Any:
        """Makes an iterator whose workers all have begun.

        A fork while another thread holds a lock of Python's own leaves a child that
        waits for it for ever, and the run with it: such workers are forked again.
        """
        context = self.multiprocessing_context or multiprocessing
        if (
            self.num_workers == 0
            or self.worker_init_fn is not _begin
            or context.get_start_method() != "fork"
        ):
            return super()._get_iterator()
        wait_behind_collectives()
        for seconds in _SECONDS_TO_BEGIN:
            reading, writing = os.pipe()
            _begun.append(writing)
            try:
                iterator: Any = super()._get_iterator()
                workers = iterator._workers
                if _all_begin(workers, reading, seconds):
                    return iterator
            finally:
                _begun.remove(writing)
                os.close(reading)
                os.close(writing)
            # No longer watched: torch raises an error in whatever runs when one dies.
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
            for worker in workers:
                worker.kill()
            warnings.warn(
                f"Processes that read images did not begin within {seconds} s: they "
                "are ended, and begun once more.",
                stacklevel=2,
            )
        raise RuntimeError(
            f"{len(workers)} processes that read images did not begin within {seconds} "
            f"s, nor before: pass num_workers=0, or fewer than {len(workers)}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns where the next batch comes from, and what it depends on."""
        epoch, batch = self._position
        if batch == len(self):
            epoch, batch = epoch + 1, 0
        if self.batches.epoch > epoch:
            epoch, batch = self.batches.epoch, 0
        return {
            "epoch": epoch,
            "batch": batch,
            "unreadable": dict(self.unreadable),
            **self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, on any number of processes.

        Raises:
            ValueError: If the state is that of a loader with other batches.
        """
        differences = [
            f"{name} was {state_dict[name]} and is {value}"
            for name, value in self._identity().items()
            if state_dict[name] != value
        ]
        if differences:
            raise ValueError(
                f"The checkpoint was written with other batches: "
                f"{', '.join(differences)}. Resume with the same ones, or start anew."
            )
        self.unreadable = dict(state_dict["unreadable"])
        self.set_epoch(state_dict["epoch"])
        self._position = (state_dict["epoch"], state_dict["batch"])
        self._resumes = True

    def _filenames_hash(self) -> int:
        dataset = self.dataset
        assert isinstance(dataset, KeyedDataset)
        names: list[str] = getattr(dataset.dataset, "filenames", [])
        # Names need not be UTF-8; those that are keep the hash that they had.
        return zlib.crc32("\n".join(names).encode(errors="backslashreplace"))

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.batches.seed,
            "batch_size": self.batches.batch_size,
            "num_images": self.batches.num_images,
            "filenames": self._filenames_hash(),
        }


@checked
def default_num_workers(dataset: AnyDataset, world_size: PositiveInt = 1) -> int:
    """Returns how many processes read by default.

    0 for a data set held in memory, of which each worker would hold a copy. Otherwise
    this process' part of the CPUs that it may use, 8 at most.

    Args:
        dataset:
            Data set; `dataset.in_memory` tells whether it is held in memory.
        world_size:
            Number of processes, taken to share the machine unless SLURM or torchrun say
            how many do.
    """
    if getattr(dataset, "in_memory", False):
        return 0
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    if "SLURM_CPUS_PER_TASK" in os.environ:
        share = min(cpus, int(os.environ["SLURM_CPUS_PER_TASK"]))
    else:
        share = cpus // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, min(share, _MAX_WORKERS))


def wait_behind_collectives() -> None:
    """Waits a moment, if there are several processes: before a fork, and at exit.

    Behind a collective, a thread of gloo's lets go of Python's objects. A fork at that
    moment makes a worker that hangs; a thread that has not done it by the time at which
    Python ends aborts the process, and with it a SLURM step.
    """
    if distributed.is_available() and distributed.is_initialized():
        time.sleep(0.1)


def _begin(worker: int) -> None:
    """Leaves the signals that SLURM sends to all processes to the main one.

    A forked worker inherits the main process' handlers, and would act on them too. It
    tells its parent that it has begun; one that is not forked does not know where.
    """
    for number in _SLURM_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SLURM_SIGNALS)
    for pipe in _begun:
        os.write(pipe, b".")


def _all_begin(workers: Sequence[Any], pipe: int, seconds: float) -> bool:
    """Returns whether all forked workers begin in time, or have ended."""
    missing, end = len(workers), time.monotonic() + seconds
    while missing and all(worker.is_alive() for worker in workers):
        left = end - time.monotonic()
        if left <= 0:
            return False
        if connection.wait([pipe], min(left, 1)):
            missing -= len(os.read(pipe, missing))
    return True


@atexit.register
def _end_workers() -> None:
    """Ends workers at exit: multiprocessing's own exit would kill them with a fuss.

    It was registered earlier, so it runs later.
    """
    for iterator in list(_running):
        iterator._shutdown_workers()


# A forked process, which may run functions at its exit, ends no workers of its parent.
os.register_at_fork(after_in_child=_running.clear)
