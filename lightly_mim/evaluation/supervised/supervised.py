"""Training a classifier on labelled images: what the image protocols have in common.

A plain loop on one device. Batches, augmentations and noise are functions of (seed,
epoch, batch), and a checkpoint holds the place between two optimiser steps, so a
training that was cut anywhere goes on and ends with the same weights (bit for bit on a
CPU with the same versions and threads). The global random state is left as it was.

Shapes: B images in a micro-batch, C channels, (H, W) pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from lightly_mim.checkpoints import load_whole
from lightly_mim.data import KeyedLoader, keyed_random_state, seed_from
from lightly_mim.data.seeding import repeatable
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation.features import Precision, batch_images, normalize_images
from lightly_mim.evaluation.probes.standardize import check_label_range
from lightly_mim.files import atomic_write
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.preemption import Request, deferred, listening, preempted, take

CHECKPOINT_FILE = "checkpoint.pt"

# Work that is lost at most when a training is cut, beside the step that was under way.
SAVE_EVERY_SECONDS = 60.0


class BatchPlan(NamedTuple):
    """How the images of an epoch are shared out.

    Attributes:
        batch_size:
            Images per optimiser step.
        num_parts:
            Micro-batches per optimiser step, all of the same size.
        steps_per_epoch:
            Optimiser steps in an epoch. The images that are left over, others in each
            epoch, are not used.
    """

    batch_size: int
    num_parts: int
    steps_per_epoch: int


def plan_batches(
    num_train: int, batch_size: int, micro_batch_size: int, multiple: int = 1
) -> BatchPlan:
    """Cuts batches into micro-batches that are equal in size.

    Args:
        num_train:
            Number of training images.
        batch_size:
            Images per optimiser step. If there are fewer training images, all of them
            make a batch, but for the few that do not share out evenly.
        micro_batch_size:
            Most images at a time.
        multiple:
            What the size of a micro-batch is a multiple of.

    Returns:
        The plan with the largest micro-batches.

    Raises:
        ValueError: If the batch cannot be shared out.
    """
    if micro_batch_size < multiple or num_train < multiple:
        raise ValueError(
            f"A micro-batch has at least {multiple} image(s), got micro_batch_size="
            f"{micro_batch_size} for {num_train} training images."
        )
    if batch_size > num_train:
        num_parts = math.ceil(num_train / micro_batch_size)
        batch_size = num_train - num_train % (num_parts * multiple)
    fewest = max(math.ceil(batch_size / micro_batch_size), 1)
    for num_parts in range(fewest, batch_size + 1):
        if batch_size and batch_size % (num_parts * multiple) == 0:
            return BatchPlan(batch_size, num_parts, num_train // batch_size)
    raise ValueError(
        f"A batch is shared out into equal micro-batches of at most {micro_batch_size} "
        f"images, a multiple of {multiple}, and batch_size={batch_size} cannot be. Use "
        f"a batch_size that is a multiple of {multiple}, such as a power of two."
    )


@dataclass(frozen=True)
class Classification:
    """A classifier and how it is trained.

    Attributes:
        name:
            What the progress bar and errors call it.
        model:
            Module from normalised images with shape (B, C, H, W) to logits with shape
            (B, num_classes), on its device. `train` and `eval` put it in its modes.
        trained:
            The part of the model that changes, which checkpoints hold.
        optimizer:
            Optimiser of that part.
        schedule:
            Its learning rate schedule, which steps with it.
        loss:
            Function from (model, normalised images, labels with shape (B,)) to the mean
            loss. It draws from the global random states, which are seeded for it, and
            may change the images.
        epochs:
            Number of passes over the training images.
        plan:
            How they are shared out.
        clip_grad:
            Largest norm of the gradient. None for no clipping.
    """

    name: str
    model: nn.Module
    trained: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    epochs: int
    plan: BatchPlan
    clip_grad: float | None = None


def train_and_score(
    task: Classification,
    train: Dataset[Any],
    test: Dataset[Any],
    encoder: MaskedEncoder,
    num_classes: int,
    *,
    identity: Mapping[str, Any],
    out: Path,
    seed: int,
    precision: Precision,
    num_workers: int | None,
    progress: bool,
) -> Tensor:
    """Trains a classifier to its last epoch and scores the test images once.

    Args:
        task:
            The classifier and how it is trained.
        train:
            Training images with their augmentation: uint8 tensors with shape (C, H, W),
            or lists of one such view.
        test:
            Test images, uint8 tensors with shape (C, H, W).
        encoder:
            Gives mean and standard deviation of the images.
        num_classes:
            Number of classes.
        identity:
            What the result depends on beside the images: a checkpoint of something else
            is refused. Numbers and strings by name.
        out:
            Directory of the checkpoint.
        seed:
            Seed of order, augmentation and noise.
        precision:
            "32", or "bf16" for bfloat16 autocast.
        num_workers:
            Number of processes that read images, None for the loader's choice.
        progress:
            Whether to show a progress bar.

    Returns:
        Float tensor with shape (num_test, num_classes) on the CPU, the logits.

    Raises:
        ValueError: If `out` holds the checkpoint of another training, or if a label is
            not one of the classes.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        Preempted: If a signal asked to stop, after what was reached was saved; see
            `lightly_mim.preemption`.
    """
    device = next(task.model.parameters()).device
    plan = task.plan
    micro_batch_size = plan.batch_size // plan.num_parts
    loader = KeyedLoader(
        train, micro_batch_size, training=True, seed=seed, num_workers=num_workers
    )
    identity = {**identity, "seed": seed, "precision": precision}
    checkpoint = _Checkpoint(out / CHECKPOINT_FILE, task, loader, identity)
    first_epoch, first_step = checkpoint.load()
    bar = _progress_bar(progress)
    with listening(), deferred(), repeatable(device), bar:
        total = task.epochs * plan.steps_per_epoch
        done = first_epoch * plan.steps_per_epoch + first_step
        row = bar.add_task(task.name, total=total, completed=done)
        for epoch in range(first_epoch, task.epochs):
            loader.set_epoch(epoch)
            task.model.train()
            mean_loss = torch.zeros((), device=device)
            batches = iter(loader)
            first = first_step if epoch == first_epoch else 0
            for step in range(first, plan.steps_per_epoch):
                mean_loss += _step(
                    task, batches, (seed, epoch, step), encoder, num_classes, precision
                )
                bar.advance(row)
                if step + 1 < plan.steps_per_epoch:
                    checkpoint.save_in_time(epoch, step + 1, mean_loss)
            loader.set_epoch(epoch + 1)  # also where a rest of micro-batches was left
            checkpoint.check_finite(epoch, mean_loss)
            loss = float(mean_loss) / max(plan.steps_per_epoch - first, 1)
            bar.update(
                row,
                description=f"{task.name} {epoch + 1}/{task.epochs} loss {loss:.3f}",
            )
            if epoch + 1 == task.epochs:
                checkpoint.save(epoch + 1, 0)
            else:
                checkpoint.save_in_time(epoch + 1, 0, mean_loss)
        test_loader = KeyedLoader(
            test, micro_batch_size, training=False, num_workers=num_workers
        )
        return _score(task.model, test_loader, encoder, device, precision)


def _step(
    task: Classification,
    batches: Iterator[Any],
    key: tuple[int, int, int],
    encoder: MaskedEncoder,
    num_classes: int,
    precision: Precision,
) -> Tensor:
    """Makes one optimiser step and returns the loss of its batch, on the device."""
    device = next(task.model.parameters()).device
    total = torch.zeros((), device=device)
    for part in range(task.plan.num_parts):
        batch = next(batches)
        labels = batch[1]
        check_label_range(labels, num_classes)
        images = normalize_images(
            batch_images(batch).to(device, non_blocking=True), encoder.mean, encoder.std
        )
        labels = labels.to(device, non_blocking=True)
        with _seeded(device, *key, "noise", part), _autocast(device, precision):
            loss = task.loss(task.model, images, labels) / task.plan.num_parts
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if task.clip_grad is not None:
        nn.utils.clip_grad_norm_(task.trained.parameters(), task.clip_grad)
    task.optimizer.step()
    task.schedule.step()
    task.optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def _score(
    model: nn.Module,
    loader: KeyedLoader,
    encoder: MaskedEncoder,
    device: torch.device,
    precision: Precision,
) -> Tensor:
    model.eval()
    logits = []
    for batch in loader:
        images = batch_images(batch).to(device, non_blocking=True)
        with _autocast(device, precision):
            scores = model(normalize_images(images, encoder.mean, encoder.std))
        logits.append(scores.float().cpu())
    return torch.cat(logits)


class _Checkpoint:
    """The one file that a training goes on from."""

    def __init__(
        self,
        path: Path,
        task: Classification,
        loader: KeyedLoader,
        identity: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.task = task
        self.loader = loader
        self.identity = dict(identity)
        self._saved_at = time.monotonic()

    def load(self) -> tuple[int, int]:
        """Returns (epoch, step) to go on from, (0, 0) if there is no checkpoint."""
        if not self.path.exists():
            return 0, 0
        remedy = "Delete it: this training then begins anew."
        foreign = f"{self.path} is no checkpoint of a training. {remedy}"
        content = load_whole(self.path, remedy=remedy, foreign=foreign)
        if not (isinstance(content, dict) and content.keys() >= _PARTS):
            raise ValueError(foreign)
        before = content["identity"]
        differences = [
            f"{name} was {before.get(name)} and is {self.identity.get(name)}"
            for name in sorted({*before, *self.identity})
            if before.get(name) != self.identity.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.path} is the checkpoint of another training: "
                f"{', '.join(differences)}. Use the same settings to go on with it, or "
                "delete it to start anew."
            )
        self.loader.load_state_dict(content["loader"])
        self.task.trained.load_state_dict(content["trained"])
        self.task.optimizer.load_state_dict(content["optimizer"])
        self.task.schedule.load_state_dict(content["schedule"])
        return content["epoch"], content["step"]

    def save_in_time(self, epoch: int, step: int, loss: Tensor) -> None:
        """Saves if that was not done for a while, or if a signal asks for it.

        Raises:
            Preempted: After it was saved, if a signal asked to stop.
        """
        request = take()
        late = time.monotonic() - self._saved_at >= SAVE_EVERY_SECONDS
        if late or request is not Request.NOTHING:
            self.check_finite(epoch, loss)
            self.save(epoch, step)
        if request is Request.STOP:
            raise preempted()

    def save(self, epoch: int, step: int) -> None:
        """Writes what it takes to go on with a step of an epoch."""
        content = {
            "identity": self.identity,
            "epoch": epoch,
            "step": step,
            "loader": self.loader.state_dict(),
            "trained": self.task.trained.state_dict(),
            "optimizer": self.task.optimizer.state_dict(),
            "schedule": self.task.schedule.state_dict(),
        }
        with atomic_write(self.path) as temporary:
            torch.save(content, temporary)
        self._saved_at = time.monotonic()

    def check_finite(self, epoch: int, loss: Tensor) -> None:
        """Raises a NonFiniteLossError, before weights that are spoilt are saved."""
        if not math.isfinite(float(loss)):
            raise NonFiniteLossError(
                f"The loss of {self.task.name} became NaN or infinite in epoch "
                f"{epoch + 1}. Lower its lr, lengthen the warm-up, or use precision "
                '"32".'
            )


_PARTS = {
    *("identity", "epoch", "step", "loader", "trained", "optimizer", "schedule"),
}


@contextmanager
def _seeded(device: torch.device, *key: int | str) -> Iterator[None]:
    """Seeds all random states inside, those of the device too, and restores them."""
    with ExitStack() as stack:
        stack.enter_context(keyed_random_state(*key))
        if device.type != "cpu":
            devices = [device.index or 0]
            stack.enter_context(torch.random.fork_rng(devices, device_type=device.type))
            torch.get_device_module(device).manual_seed(seed_from(*key, "device"))
        yield


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        disable=not show,
    )
