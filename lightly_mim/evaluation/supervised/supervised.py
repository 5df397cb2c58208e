"""Training a classifier on labelled images: what the image protocols have in common.

It stands on the floor of pretraining, `lightly_mim.training`: one process or several, a
bar or lines, checkpoints between two optimiser steps. A training that was cut anywhere
goes on and ends with the same weights (bit for bit on a CPU with the same versions and
threads). The global random state is left as it was.

A batch is cut into micro-batches. Order, augmentation, what is mixed with what, noise
and the statistics of a batch norm are functions of (seed, epoch, step, number of the
micro-batch): processes share the micro-batches out, each its every so many-th, and make
the weights of one process that accumulates all of them, but for the order of sums.

Shapes: B images in a micro-batch, C channels, (H, W) pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from lightly_mim.data import KeyedLoader, keyed_random_state, seed_from
from lightly_mim.data.notes import counted
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation.base import TrainingRun
from lightly_mim.evaluation.features import batch_images, normalize_images
from lightly_mim.evaluation.fingerprints import encoder_fingerprint
from lightly_mim.evaluation.probes.standardize import check_label_range
from lightly_mim.training.cuda import float32_products
from lightly_mim.training.machine import (
    Layout,
    check_precision,
    lightning_precision,
)
from lightly_mim.training.module import TrainingModule
from lightly_mim.training.signals import deferred, listening
from lightly_mim.training.trainer import calling, fit, resumable_trainer

CHECKPOINT_FILE = "last.ckpt"
PREVIOUS_FILE = "previous.ckpt"

# Work that is lost at most when a training is killed without a word, beside the ends of
# epochs, which save too.
SAVE_EVERY_MINUTES = 10.0
LOG_EVERY = 10  # optimiser steps


class BatchPlan(NamedTuple):
    """How the images of an epoch are shared out."""

    batch_size: int  # images per optimiser step
    num_parts: int  # micro-batches of equal size per step, over all processes
    steps_per_epoch: int  # images that are left over, others each time, are not used


def plan_batches(
    num_train: int,
    batch_size: int,
    micro_batch_size: int,
    multiple: int = 1,
    processes: int = 1,
) -> BatchPlan:
    """Cuts batches into the largest micro-batches that are equal in size.

    If there are fewer training images than `batch_size`, all of them make a batch, but
    for the few that do not share out evenly. The size of a micro-batch is a multiple of
    `multiple`, and their number one of `processes`.

    Raises:
        ValueError: If the batch cannot be shared out.
    """
    if micro_batch_size < multiple or num_train < multiple:
        raise ValueError(
            f"A micro-batch has at least {multiple} image(s), got micro_batch_size="
            f"{micro_batch_size} for {num_train} training images."
        )
    if batch_size > num_train:
        num_parts = processes * math.ceil(num_train / (processes * micro_batch_size))
        batch_size = num_train - num_train % (num_parts * multiple)
    fewest = max(math.ceil(batch_size / (processes * micro_batch_size)), 1)
    for num_parts in range(fewest * processes, batch_size + 1, processes):
        if batch_size and batch_size % (num_parts * multiple) == 0:
            return BatchPlan(batch_size, num_parts, num_train // batch_size)
    raise ValueError(
        f"A batch is shared out into equal micro-batches of at most {micro_batch_size} "
        f"images, a multiple of {multiple}, over {processes} process(es), and "
        f"batch_size={batch_size} cannot be. Use a batch_size that is a multiple of "
        f"{multiple * processes}, such as a power of two."
    )


@dataclass(frozen=True)
class Classification:
    """A classifier and how it is trained."""

    name: str  # what the results call it
    model: nn.Module  # normalised images (B, C, H, W) to logits (B, num_classes)
    trained: nn.Module  # the part of the model that changes, which checkpoints hold
    optimizer: Optimizer  # of that part
    schedule: LambdaLR  # steps with the optimiser
    # From (model, normalised images, labels) to the mean loss. It draws from the global
    # random states, which are seeded for it, and may change the images.
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    epochs: int
    plan: BatchPlan
    clip_grad: float | None = None  # largest norm of the gradient


class Classifier(TrainingModule):
    """Trains a `Classification` and keeps the logits of the test images.

    `logits` are float tensors with shape (rows, num_classes) on the CPU, this rank's
    rows of each batch. A checkpoint with another `identity` is refused: numbers and
    strings by name, what the result depends on beside the images.
    """

    def __init__(
        self,
        task: Classification,
        encoder: MaskedEncoder,
        num_classes: int,
        seed: int,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.task = task
        self.model = task.model
        self.mean, self.std = encoder.mean, encoder.std
        self.num_classes = num_classes
        self.seed = seed
        self.identity = dict(identity)
        self.logits: list[Tensor] = []
        self._prefix = next(n for n, m in self.named_modules() if m is task.trained)
        self._norms = [m for m in task.trained.modules() if isinstance(m, _BatchNorm)]
        self.strict_loading = task.trained is task.model

    @property
    def trained(self) -> nn.Module:
        """The part that is trained."""
        return self.task.trained

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what changes: no copy of a frozen encoder."""
        kept = (f"{self._prefix}.", "train_loss.")
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name.startswith(kept)}

    def configure_optimizers(self) -> Any:
        """Returns optimiser and schedule of the task."""
        task = self.task
        steps = task.plan.steps_per_epoch * task.epochs
        return self.use(task.optimizer, task.schedule, steps, task.clip_grad)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Checks the labels, while they are where that costs nothing."""
        if self.trainer.training:
            check_label_range(batch[1], self.num_classes)
        return batch_images(batch), batch[1]

    def on_train_epoch_start(self) -> None:
        """See `TrainingModule`. Puts the model in training mode."""
        super().on_train_epoch_start()
        self.model.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Computes the loss of a micro-batch."""
        images, labels = batch
        step, part = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        part = part * self.trainer.world_size + self.global_rank
        key = (self.seed, self.current_epoch, step, "noise", part)
        with _seeded(self.device, *key), self._shared_statistics():
            loss = self.task.loss(
                self.model, normalize_images(images, self.mean, self.std), labels
            )
        self.log_loss(loss, len(images))
        return loss

    @contextmanager
    def _shared_statistics(self) -> Iterator[None]:
        """Lets the running statistics of batch norms follow those of all processes.

        One micro-batch after the other, as in one process that accumulates. MAE's code
        keeps those of the first GPU's images.
        """
        world = self.trainer.world_size
        before = (
            [_statistics(norm).clone() for norm in self._norms] if world > 1 else []
        )
        yield
        for norm, old in zip(self._norms, before, strict=False):
            assert norm.momentum is not None and norm.num_batches_tracked is not None
            keep = 1 - norm.momentum
            moved = self.all_gather(_statistics(norm))
            assert isinstance(moved, Tensor)  # (world, 2, D)
            found = old
            for each in moved:
                found = keep * found + (each - keep * old)
            norm.running_mean, norm.running_var = found.clone().unbind()
            norm.num_batches_tracked.add_(world - 1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Keeps the logits of a batch."""
        images = normalize_images(batch[0], self.mean, self.std)
        self.logits.append(self.model(images).float().cpu())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `TrainingModule`. Says what training it is of."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["identity"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `TrainingModule`.

        Raises:
            ValueError: If it is of another training.
        """
        before = checkpoint.get("identity", {})
        differences = [
            f"{name} was {before.get(name)} and is {self.identity.get(name)}"
            for name in sorted({*before, *self.identity})
            if before.get(name) != self.identity.get(name)
        ]
        if differences:
            raise ValueError(
                f"{CHECKPOINT_FILE} in {self.trainer.default_root_dir} is the "
                f"checkpoint of another training: {', '.join(differences)}. Use the "
                "same settings to go on with it, or delete it to start anew."
            )
        super().on_load_checkpoint(checkpoint)


def train_and_score(
    task: Classification,
    train: Dataset[Any],
    test: Dataset[Any],
    encoder: MaskedEncoder,
    num_classes: int,
    *,
    identity: Mapping[str, Any],
    run: TrainingRun,
) -> Tensor:
    """Trains a classifier to its last epoch and scores the test images once.

    Training images, with their augmentation, are uint8 tensors with shape (C, H, W) or
    lists of one such view; test images are such tensors. The encoder gives their mean
    and standard deviation, and `identity` is of the settings, see `Classifier`. The
    processes of the layout run already, see `lightly_mim.training.machine.start`.

    Returns:
        Float tensor with shape (num_test, num_classes) on the CPU, the logits, the same
        in every process.

    Raises:
        ValueError: If `out` holds the checkpoint of another training, or if a label is
            not one of the classes.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        Preempted: If a signal asked to stop, after what was reached was saved; see
            `lightly_mim.training.signals`.
    """
    plan = task.plan
    device = next(task.model.parameters()).device
    check_precision(run.precision, device)
    layout, processes = run.layout, run.layout.world_size
    accumulate = plan.num_parts // processes
    if processes == 1 and device.index is not None:
        layout = Layout([device.index], 1, layout.environment)
    identity = {
        **identity,
        "protocol": task.name,
        "encoder": encoder_fingerprint(encoder),
        "num_classes": num_classes,
        "seed": run.seed,
        "precision": run.precision,
        "num_images": len(train),  # type: ignore[arg-type]
        "batch": list(plan),
        "processes": processes,
        "compile": run.compile,
    }
    module = Classifier(task, encoder, num_classes, run.seed, identity)
    task.model.train()
    if run.compile:
        task.model.compile()
    checkpoint, previous = run.out / CHECKPOINT_FILE, run.out / PREVIOUS_FILE
    with keyed_random_state(run.seed, task.name):
        trainer = resumable_trainer(
            layout,
            checkpoint,
            ask_every=LOG_EVERY,
            save_every_minutes=SAVE_EVERY_MINUTES,
            show_bar=run.progress,
            previous={checkpoint.absolute(): previous},
            remedy="Delete it: this training then begins anew.",
            max_epochs=task.epochs,
            accelerator=device.type,
            strategy="ddp" if processes > 1 else "auto",
            precision=lightning_precision(run.precision),
            accumulate_grad_batches=accumulate,
            limit_train_batches=plan.steps_per_epoch * accumulate,
            limit_val_batches=0.0,
            log_every_n_steps=min(LOG_EVERY, plan.steps_per_epoch),
            default_root_dir=run.out.absolute(),
        )

        if trainer.is_global_zero:
            print(
                f"{task.name}: {counted(task.epochs, 'epoch')} of "
                f"{counted(plan.steps_per_epoch, 'step')} of "
                f"{counted(plan.batch_size, 'image')}, {processes} x {device.type}, "
                f"{trainer.precision}",
                flush=True,
            )

        def loader(images: Dataset[Any], training: bool) -> KeyedLoader:
            return KeyedLoader(
                images,
                processes * plan.batch_size // plan.num_parts,
                training=training,
                seed=run.seed if training else 0,
                rank=layout.rank,
                world_size=processes,
                num_workers=run.num_workers,
            )

        with listening(), deferred():
            fit(
                trainer,
                module,
                checkpoint if checkpoint.exists() else None,
                train_dataloaders=loader(train, training=True),
            )
            products = float32_products(device, str(trainer.precision))
            with calling(trainer), products:
                trainer.test(module, loader(test, training=False), verbose=False)
    parts = [module.logits]
    if processes > 1:
        parts = [[] for _ in range(processes)]
        torch.distributed.all_gather_object(parts, module.logits)
    # Batch by batch, each rank's rows of it.
    return torch.cat([rows for batch in zip(*parts, strict=True) for rows in batch])


def _statistics(norm: _BatchNorm) -> Tensor:
    """Returns running mean and variance with shape (2, D)."""
    assert norm.running_mean is not None and norm.running_var is not None
    return torch.stack([norm.running_mean, norm.running_var])


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
