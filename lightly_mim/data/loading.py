"""Loading as a function of (seed, epoch), with a position that a checkpoint can hold.

The batches are the same however many workers read them and processes share them.
"""

from __future__ import annotations

import atexit
import operator
import os
import signal
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightly.data.multi_view_collate import MultiViewCollate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightly_mim.arguments import (
    AnyDataset,
    NonNegativeInt,
    PositiveInt,
    Seed,
    Workers,
    checked,
)
from lightly_mim.data.folder import ReplacementName
from lightly_mim.data.notes import printable
from lightly_mim.data.opening import BrokenImageError, or_skip
from lightly_mim.data.seeding import keyed_random_state, seed_from

Key = tuple[int, int]  # (epoch, index)
Item = tuple[Any, int, str]  # (sample, target, filename)

_MAX_WORKERS = 8

# What SLURM, submitit and Lightning use to say that time is up.
_SLURM_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_running: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators that have workers


@checked
class KeyedDataset(Dataset[Any]):
    """Reads items of another data set under a random state that is keyed.

    Transforms then draw the same numbers for (seed, epoch, index) whatever was drawn
    before and whichever process reads; the random state outside is left as it was.

    Attributes:
        dataset:
            Data set of (sample, target, filename), (sample, target) or samples. What is
            missing becomes target 0 and the index as filename, as in lightly.
        seed:
            First part of the key.
        labels:
            Whether targets are labels, whole numbers. False replaces them by 0,
            whatever they are, masks, boxes or None; None replaces those by -1 that are
            no whole numbers.
    """

    def __init__(
        self, dataset: AnyDataset, seed: Seed, labels: bool | None = True
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.labels = labels

    def __getitem__(self, key: Key) -> Item | BrokenImageError:
        """Returns the item for (epoch, index), or the error of one that is no use.

        The error is returned, since a worker would pass on a raised one as a long
        traceback; `KeyedLoader` raises it.
        """
        epoch, index = key
        with keyed_random_state(self.seed, epoch, index):
            try:
                sample, target, filename = as_item(self.dataset[index], index)
                _check_sample(sample, index)
                label = self._label(target, index)
            except BrokenImageError as error:
                return error
            return sample, label, filename

    def _label(self, target: Any, index: int) -> int:
        if self.labels is False:
            return 0
        try:
            return _as_label(target, index)
        except BrokenImageError:
            if self.labels is None:
                return -1
            raise


def _check_sample(sample: Any, index: int) -> None:
    views = sample if isinstance(sample, list) else [sample]
    if not views or not all(isinstance(view, Tensor) for view in views):
        kinds = ", ".join(type(view).__name__ for view in views) or "no view"
        raise BrokenImageError(
            f"Sample {index} of the data set cannot be used: it is "
            f"{'a list of ' if isinstance(sample, list) else 'of type '}{kinds}; a "
            "batch is made of tensors or of lists of them. Give the data set a "
            "transform, for example lightly_mim.SimMIMTransform()."
        )


def _as_label(target: Any, index: int) -> int:
    try:
        number = operator.index(target)  # also of numpy's and PyTorch's whole numbers
        if number.bit_length() > 63:
            raise ValueError
        return number
    except (TypeError, ValueError, RuntimeError):
        shown = printable(repr(target))
        raise BrokenImageError(
            f"The label of sample {index} of the data set is no class: whole numbers "
            f"of 64 bits are needed, got {type(target).__name__} "
            f"{shown if len(shown) < 80 else shown[:80] + ' ...'}."
        ) from None


def as_item(item: Any, index: int) -> Item:
    """Returns lightly's (sample, target, filename) for an item of any data set."""
    if not isinstance(item, tuple):
        return item, 0, str(index)
    if len(item) == 1:
        return item[0], 0, str(index)
    if len(item) == 2:
        return item[0], item[1], str(index)
    return item[0], item[1], item[2]


def collate(items: Sequence[Item | BrokenImageError]) -> Any:
    """Makes a batch: lightly's for lists of views, plain for tensors.

    Args:
        items:
            (sample, target, filename) each, with a list of views or a tensor as sample.

    Returns:
        ([views], targets, filenames) or (samples, targets, filenames); each view and
        the samples are a tensor with shape (batch_size, ...), the targets int64 with
        shape (batch_size,). An error among the items is returned in their place.

    Raises:
        ValueError: If the samples have not all the same shape.
    """
    whole: list[Item] = []
    for item in items:
        if isinstance(item, BrokenImageError):
            return item
        whole.append(item)
    shapes = [_shapes(sample) for sample, _, _ in whole]
    for shape, (_, _, filename) in zip(shapes, whole, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"All samples of a batch need the same shape, {printable(filename)} "
                f"has {shape} and {printable(whole[0][2])} {shapes[0]}. Give the data "
                "set a transform that crops, for example lightly_mim.SimMIMTransform()."
            )
    if isinstance(whole[0][0], list):
        return MultiViewCollate()(whole)
    samples, targets, filenames = zip(*whole, strict=True)
    return torch.stack(samples), torch.tensor(targets), list(filenames)


def _shapes(sample: Tensor | list[Tensor]) -> list[list[int]]:
    """Returns the shape of each view."""
    views = sample if isinstance(sample, list) else [sample]
    return [list(view.shape) for view in views]


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

    Raises:
        ValueError: If the batch does not divide by the ranks, or is larger than the
            data set in training, or if there are fewer images than ranks.
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
        whole, rest = divmod(self.num_images, self.batch_size)
        if self.training:
            return whole
        # A rest that is too small to give each rank an image joins the batch before.
        return max(whole + (rest >= self.world_size), 1)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order()
        for batch in range(self.first_batch, len(self)):
            start = batch * self.batch_size
            stop = start + self.batch_size
            if not self.training and batch == len(self) - 1:
                stop = self.num_images
            size = stop - start
            first = start + size * self.rank // self.world_size
            last = start + size * (self.rank + 1) // self.world_size
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
        )
        if num_workers is None:
            num_workers = default_num_workers(dataset, world_size)
        super().__init__(
            KeyedDataset(dataset, seed, labels),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=_ignore_signals,
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
            iterator = super()._get_iterator()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # SIGTERM, which torch sends to a worker that does not end in time, is ignored.
        for worker in getattr(iterator, "_workers", ()):
            worker._popen.terminate = worker._popen.kill
            _running.add(iterator)
        return iterator

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


def _ignore_signals(worker: int) -> None:
    """Leaves the signals that SLURM sends to all processes to the main one.

    A forked worker inherits the main process' handlers, and would act on them too.
    """
    for number in _SLURM_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SLURM_SIGNALS)


@atexit.register
def _end_workers() -> None:
    """Ends workers in time: multiprocessing's own exit would kill them with a fuss.

    It was registered earlier, so it runs later.
    """
    for iterator in list(_running):
        iterator._shutdown_workers()
