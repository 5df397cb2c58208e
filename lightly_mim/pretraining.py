"""Pretraining: `pretrain(...)` and the one LightningModule, `Pretraining`."""

from __future__ import annotations

import copy
import inspect
import json
import math
import shlex
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, Timer
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Generator, Tensor
from torch.utils.data import Dataset
from torchmetrics import MeanMetric

from lightly_mim import defaults
from lightly_mim.arguments import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    Workers,
    check_arguments,
    checked,
)
from lightly_mim.callbacks import (
    AtomicCheckpointIO,
    EpochLines,
    LastCheckpoint,
    MaskDistance,
    MetricsLogger,
    ProgressBar,
    ReconstructionPictures,
    SaveBetweenBatches,
)
from lightly_mim.checkpoints import put_encoder, save_encoder
from lightly_mim.checkpoints.encoder import ENCODER_KEY
from lightly_mim.checkpoints.hub import is_hub_name
from lightly_mim.checkpoints.ours import METHOD_KEY
from lightly_mim.cluster import choose_layout
from lightly_mim.config import from_config, is_named_only, to_config
from lightly_mim.data import (
    ImageDataset,
    KeyedLoader,
    keyed_random_state,
    match_classes,
    open_data,
    seed_from,
    spread_out,
)
from lightly_mim.data.depth import ValueRange
from lightly_mim.data.notes import by_reason
from lightly_mim.data.opening import BrokenImageError, read_regular
from lightly_mim.data.seeding import repeatable
from lightly_mim.data.sources import Data
from lightly_mim.data.survey import Survey, survey
from lightly_mim.evaluation.features import batch_images, normalize_images
from lightly_mim.evaluation.images import own_value_range
from lightly_mim.masking import Mask, UnitMasking
from lightly_mim.methods.base import MaskedImageModel, MIMOutput
from lightly_mim.methods.pretrained import from_pretrained, start_from
from lightly_mim.monitoring import (
    FeatureWatch,
    OnlineProbe,
    Probe,
    check_finite_images,
)
from lightly_mim.optim import NonFiniteLossError, Recipe, build_optimizer
from lightly_mim.preemption import Preempted, deferred, listening
from lightly_mim.report import report_run
from lightly_mim.runs import CHANGEABLE, Changes, RunDirectory, TakenOverError
from lightly_mim.sessions import SessionNotes
from lightly_mim.settings import (
    as_published,
    brightness_share,
    channel_statistics,
    choose_method,
    follow_code,
    set_statistics,
    settings_of,
    statistics_are_open,
    suit_as_before,
    warn_of_few_steps,
)
from lightly_mim.transforms import EvalTransform

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

NUM_PICTURES = 8
NUM_TO_FIT = 512  # images for a target that learns from them
NUM_SIZES = 1000  # files whose sizes and times tell a list of images
NUM_CONTENTS = 64  # files whose bytes do


@checked
class Pretraining(pl.LightningModule):
    """Trains a method of masked image modelling with Lightning.

    Batches are lightly's, (list of views, labels, filenames), or any tuple or list that
    begins with the images. uint8 images are normalised on the device with the
    encoder's mean and standard deviation; float images count as normalised.

    Masks are a function of (seed, epoch, batch index), drawn for the global batch, of
    which each rank takes its rows; dropout and drop path are reseeded before every
    batch from the same key and the rank. Logs `train_loss`, `val_loss`, `lr`,
    `grad_norm` and `images_per_second`.

    Attributes:
        method:
            The method that is trained.
        recipe:
            Optimiser settings. None for `lightly_mim.defaults`, for the Trainer's
            epochs or steps; `SimMIM.recipe("swin_base_100ep")` is a published one. A
            Trainer with `max_time` alone takes the recipe's epochs for the schedule.
        batch_size:
            Images per optimiser step over all devices and accumulated micro-batches,
            which the learning rate is scaled by. None to read it from the loader.
        seed:
            Seed of masks and noise.
        takes_other_images:
            Whether a run that goes on may do so with other images.

    Args:
        compile:
            Whether to compile the method, in place, with `torch.compile`. The other
            arguments are the attributes.

    Raises:
        ValueError: When the training starts, if the Trainer has no length, if the
            loader does not tell its batch size and none is given, or if a batch has
            another number of views than the method or images that are neither uint8 nor
            float.
        NonFiniteLossError: While it trains, if the loss or the gradient is not finite.

    Examples:
        >>> module = Pretraining(SimMIM("vit_tiny_patch16_224"))  # doctest: +SKIP
        >>> pl.Trainer(max_epochs=10).fit(module, dataloader)  # doctest: +SKIP

        A checkpoint holds the weights of the whole method:

        >>> method = SimMIM("vit_tiny_patch16_224")  # doctest: +SKIP
        >>> Pretraining.load_from_checkpoint(path, method=method)  # doctest: +SKIP
    """

    def __init__(
        self,
        method: MaskedImageModel,
        recipe: Recipe | None = None,
        batch_size: PositiveInt | None = None,
        seed: Seed = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.method = method
        self.recipe = recipe
        self.batch_size = batch_size
        self.seed = seed
        self.takes_other_images = False
        self._bad_validation = torch.tensor(False)
        self._loader_state: dict[str, Any] | None = None
        if recipe is not None:
            follow_code(method.encoder, recipe)
        # In the checkpoint, so that an epoch that was cut has the mean of all of it.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_loss.persistent(True)
        if compile:
            # Not torch.compile(method), which would rename the keys of its state.
            self.method.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the encoder's features, as lightly's classifiers ask for them.

        Args:
            images:
                Tensor with shape (batch_size, channels, height, width). uint8 images
                are normalised.

        Returns:
            Tensor with shape (batch_size, feature_dim), see `MaskedEncoder.forward`.
        """
        encoder = self.method.encoder
        features: Tensor = encoder(normalize_images(images, encoder.mean, encoder.std))
        return features

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Computes the loss of a batch, and returns the mask beside it."""
        views = self._views(batch, self.method.num_views)
        # global_step stands still while gradients accumulate; the batch index does not.
        key = (self.seed, "train", self.current_epoch, batch_idx)
        torch.manual_seed(seed_from(*key, "noise", self.global_rank))
        rows = len(views[0])
        output = self._forward(
            views, key, rows * self.global_rank, rows * self.trainer.world_size
        )
        loss = output.loss.detach()
        self._note_non_finite(loss)
        self._images_seen += rows * self.trainer.world_size
        self.log("train_loss_step", loss, batch_size=rows)
        self.train_loss.update(loss)
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        size = (views[0].shape[-2], views[0].shape[-1])
        return {"loss": output.loss, "mask": output.mask, "image_size": size}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Computes the loss on masks that are the same in every epoch.

        One view of an image stands for all that the method takes.
        """
        views = self._views(batch, 1) * self.method.num_views
        # The last batch need not be shared out evenly.
        rows = [len(views[0])]
        if self.trainer.world_size > 1:
            gathered = self.all_gather(torch.tensor(rows, device=self.device))
            assert isinstance(gathered, Tensor)
            rows = gathered.flatten().tolist()
        output = self._forward(
            views,
            (self.seed, "validation", batch_idx),
            first_row=sum(rows[: self.global_rank]),
            num_rows=sum(rows),
        )
        bad = ~torch.isfinite(output.loss.detach())
        self._bad_validation = self._bad_validation | bad
        self.log(
            "val_loss",
            output.loss,
            prog_bar=True,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(views[0]),
        )

    def _forward(
        self,
        views: list[Tensor],
        key: tuple[int | str, ...],
        first_row: int,
        num_rows: int,
    ) -> MIMOutput:
        """Draws the masks of the global batch and computes this rank's rows of it."""
        device = views[0].device
        generator = Generator(device).manual_seed(seed_from(*key, "mask"))
        masks = []
        for images in views:
            global_batch = images[:1].expand(num_rows, -1, -1, -1)  # its shape alone
            mask = Mask.of(self.method.draw_mask(global_batch, generator))
            masks.append(mask[first_row : first_row + len(images)])
        output: MIMOutput
        if self.method.num_views == 1:
            output = self.method(views[0], masks[0])
        else:
            output = self.method(views, masks)
        return output

    def _views(self, batch: Any, num_views: int) -> list[Tensor]:
        """Returns the views of the images, normalised."""
        views = batch[0] if isinstance(batch, (list, tuple)) else batch
        views = list(views) if isinstance(views, (list, tuple)) else [views]
        if len(views) != num_views:
            name = type(self.method).__name__
            raise ValueError(
                f"{name} takes {num_views} view(s) of an image, and the batch has "
                f"{len(views)}: use a transform with as many views, such as "
                f"{name}.transform()."
            )
        encoder = self.method.encoder
        return [normalize_images(view, encoder.mean, encoder.std) for view in views]

    # Optimiser.

    def configure_optimizers(self) -> Any:
        """Makes the optimiser and the schedule of the recipe."""
        trainer = self.trainer
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        batch_size = self._global_batch_size()
        per_epoch = self._steps_per_epoch()
        recipe = self.recipe
        if recipe is None:
            known = 0 < per_epoch < math.inf
            num_images = int(per_epoch * batch_size) if known else None
            epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
            recipe = self.method.default_recipe(num_images, batch_size, epochs)
        total_steps, steps_per_epoch = self._length(recipe, per_epoch)
        optimizer, scheduler = build_optimizer(
            self.method,
            recipe,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            no_weight_decay=recipe.exempt(self.method.no_weight_decay()),
            fused=trainer.precision != "16-mixed",
        )
        self._clip_grad = recipe.clip_grad
        self._schedule = scheduler
        self._total_steps = total_steps
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def _steps_per_epoch(self) -> float:
        """Returns the optimiser steps of an epoch, infinity if they are not known."""
        trainer = self.trainer
        if trainer.max_epochs == -1 and self.recipe is None and not self._timed:
            return math.inf
        batches = trainer.num_training_batches
        if math.isinf(batches):
            return math.inf
        return math.ceil(batches / trainer.accumulate_grad_batches)

    def _length(self, recipe: Recipe, per_epoch: float) -> tuple[int, float]:
        """Returns the steps of the run, and those of an epoch of the recipe.

        The Trainer says how long the run is, in epochs or in steps; one that says a
        time alone leaves the length to the recipe. A recipe of ours is stretched to it.
        """
        trainer = self.trainer
        epochs = trainer.max_epochs or -1
        limits = [
            trainer.max_steps if trainer.max_steps > 0 else math.inf,
            epochs * per_epoch if epochs > 0 else math.inf,
        ]
        total = min(limits)
        if math.isinf(total) and self._timed:
            total = recipe.epochs * per_epoch
        if not math.isfinite(total) or total < 1:
            raise ValueError(
                "The learning rate schedule needs the length of the run: pass "
                "max_epochs or, for a loader without a length, max_steps to the "
                "Trainer. max_time may end it earlier."
            )
        stretched = self.recipe is None or math.isinf(per_epoch)
        return int(total), total / recipe.epochs if stretched else per_epoch

    @property
    def _timed(self) -> bool:
        return any(isinstance(c, Timer) for c in self.trainer.callbacks)  # type: ignore[attr-defined]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes an optimiser step, after which the method may act."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            # Lightning has not counted this step yet.
            self.method.after_step((self.global_step + 1) / self._total_steps)

    def _global_batch_size(self) -> int:
        if self.batch_size is not None:
            return self.batch_size
        loader = self.trainer.train_dataloader
        per_device = getattr(loader, "batch_size", None)
        if not isinstance(per_device, int):
            raise ValueError(
                "The learning rate is scaled by the batch size, which this loader does "
                "not tell: pass Pretraining(..., batch_size=...), the number of images "
                "per optimiser step over all devices."
            )
        accumulated = self.trainer.accumulate_grad_batches
        return per_device * self.trainer.world_size * accumulated

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the recipe's norm, or the Trainer's, and logs the norm before it."""
        if gradient_clip_algorithm == "value":
            raise ValueError("Gradients are clipped by norm, not by value.")
        largest = gradient_clip_val or self._clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.method.parameters(), largest)
        if self.trainer.precision != "16-mixed":
            # A gradient scaler skips steps with infinite gradients by itself.
            self._note_non_finite(norm)
        self.log("grad_norm", norm)
        # Not the bare number, which Lightning would copy and wait for.
        self.log("lr", torch.full_like(norm, optimizer.param_groups[0]["lr"]))

    # Non-finite losses are noted on the device and read when something is logged or
    # saved, so that no step waits for the device.

    def on_fit_start(self) -> None:
        """Prepares the note of non-finite losses and the clock."""
        self.method.encoder.untrained = False
        self._bad_step = torch.tensor(-1, device=self.device)
        log_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._log_every = log_every or sys.maxsize
        self._start_clock()

    def on_validation_epoch_start(self) -> None:
        """Prepares the note of non-finite losses."""
        self._bad_validation = torch.tensor(False, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Ends the run if a validation loss was not finite.

        Raises:
            NonFiniteLossError: If so.
        """
        bad = self.trainer.strategy.reduce(self._bad_validation.int(), reduce_op="max")
        if int(bad):
            raise NonFiniteLossError(
                f"The validation loss became NaN or infinite in epoch "
                f"{self.current_epoch + 1}: look for NaN among the validation images, "
                "or lower the learning rate."
            )

    def _note_non_finite(self, value: Tensor) -> None:
        bad = (self._bad_step < 0) & ~torch.isfinite(value)
        self._bad_step = torch.where(bad, self.global_step, self._bad_step)

    def check_finite(self) -> None:
        """Ends the run if a loss or a gradient was not finite.

        Raises:
            NonFiniteLossError: If so, naming the step, the learning rate and the last
                good checkpoint.
        """
        step = int(self.trainer.strategy.reduce(self._bad_step, reduce_op="max"))
        if step < 0:
            return
        schedule = self._schedule
        lr = schedule.base_lrs[0] * schedule.lr_lambdas[0](step)
        callback = self.trainer.checkpoint_callback
        last_good = getattr(callback, "best_model_path", "") or "none was written yet"
        raise NonFiniteLossError(
            f"The loss or its gradient became NaN or infinite in optimiser step {step} "
            f"at a learning rate of {lr:.3g}. The last good checkpoint: {last_good}. "
            "Lower the learning rate, lengthen the warm-up, use float32 precision, or "
            "look for NaN among the images if they are floats of your own."
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Checks the loss when Lightning logs, and logs the speed of an epoch."""
        last = self.trainer.is_last_batch
        if last or self.global_step % self._log_every == 0:
            self.check_finite()
        if last:
            seconds = time.perf_counter() - self._epoch_start
            self.log(
                "images_per_second",
                self._images_seen / seconds,
                on_step=False,
                on_epoch=True,
                batch_size=1,
                rank_zero_only=True,
            )

    def on_train_epoch_start(self) -> None:
        """Starts the epoch's mean and count, unless the run goes on within it."""
        self.train_loss.reset()
        self._start_clock()

    def _start_clock(self) -> None:
        self._images_seen = 0
        self._epoch_start = time.perf_counter()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back the rows of `metrics.csv` that are going to be written again."""
        self._loader_state = checkpoint.get("train_loader")
        encoder = self.method.encoder
        encoder.untrained = False
        # Which may be those of the weights that the run began with.
        if dict(json.loads(checkpoint.get(ENCODER_KEY) or "{}")).get("tables"):
            encoder.tables = "simmim"
        # Without a Trainer the weights alone are loaded, by `load_from_checkpoint`.
        for logger in self._trainer.loggers if self._trainer else ():
            if isinstance(logger, MetricsLogger):
                logger.drop_after(checkpoint["global_step"])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Path | str, *, method: MaskedImageModel, **options: Any
    ) -> Pretraining:
        """Loads the weights of a checkpoint on the CPU, without unpickling anything.

        Lightning's own takes names that begin with "http" for addresses and, before
        2.6, unpickles.

        Args:
            checkpoint_path:
                The file.
            method:
                A method like the one whose weights it holds, which gets them.
            options:
                Further arguments of `Pretraining`.

        Raises:
            ValueError: If the file is damaged or no checkpoint.
            RuntimeError: If its weights are another method's.
        """
        io = AtomicCheckpointIO(lambda: None)
        checkpoint = io.load_checkpoint(checkpoint_path)
        module = cls(method, **options)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps weights that a non-finite loss has spoilt out of a checkpoint.

        The checkpoint says which encoder it holds, so that it can be evaluated.
        """
        self.check_finite()
        epoch, epochs = self.current_epoch + 1, self.trainer.max_epochs
        place = {
            "epoch": epoch,
            "epochs": epochs if epochs and epochs > 0 else None,
            "step": self.global_step,
            "steps": self._total_steps,
        }
        at_end = self.global_step >= self._total_steps
        put_encoder(self.method.encoder, checkpoint, None if at_end else place)
        checkpoint[METHOD_KEY] = json.dumps(to_config(self.method))
        loader = self.trainer.train_dataloader
        if isinstance(loader, KeyedLoader):
            checkpoint["train_loader"] = loader.state_dict()

    def on_train_start(self) -> None:
        """Puts the loader where it was, and checks that it has the same images.

        Lightning does so only if nothing asked for the loader before it restored the
        checkpoint, and only within an epoch.
        """
        loader = self.trainer.train_dataloader
        if self._loader_state is not None and isinstance(loader, KeyedLoader):
            state = dict(self._loader_state)
            if self.takes_other_images:
                new = loader.state_dict()
                state |= {name: new[name] for name in ("num_images", "filenames")}
                state["batch"] = min(state["batch"], len(loader))
            loader.load_state_dict(state)


@checked
def pretrain(
    out: str | Path,
    data: Data | None = None,
    method: Callable[[], MaskedImageModel] | MaskedImageModel | None = None,
    *,
    init: str | Path | None = None,
    val: Data | None = None,
    validate: bool = True,
    recipe: str | Recipe | None = None,
    epochs: PositiveInt | None = None,
    minutes: PositiveFloat | None = None,
    batch_size: PositiveInt | None = None,
    lr: PositiveFloat | None = None,
    warmup_epochs: NonNegativeFloat | None = None,
    weight_decay: NonNegativeFloat | None = None,
    min_scale: Share | None = None,
    normalize: dict[str, list[float]] | None = None,
    seed: Seed = 0,
    precision: Precision | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: PositiveInt | None = None,
    strategy: str = "auto",
    accumulate: PositiveInt = 1,
    grad_checkpointing: bool = False,
    compile: bool = False,
    num_workers: Workers | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    value_range: ValueRange | None = None,
    reconstruct_every: NonNegativeInt = 10,
    probe: Probe | None = None,
    probe_every: NonNegativeInt = 10,
    rank_every: NonNegativeInt = 10,
    avg_dist: bool = False,
    log_every: PositiveInt = 10,
    save_every_minutes: NonNegativeFloat = 30.0,
    tensorboard: bool = True,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
    progress: bool | None = None,
    report: bool = True,
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    overwrite: bool = False,
) -> MaskedImageModel:
    """Pretrains an encoder on images and writes everything into a run directory.

    The directory is described in `lightly_mim.runs`. A run that was cut goes on with
    `resume=True` at the last checkpoint and ends with the weights of one that never was
    cut, bit for bit on a CPU with the same versions, threads, precision and compile
    setting. SIGTERM and SIGUSR2 make it save between two batches and end by
    `Preempted` with exit code 143 or 140; in a SLURM job, SIGTERM makes it save and go
    on until SLURM ends it (see `lightly_mim.preemption`).

    Args:
        out:
            The run directory.
        data:
            A folder of images with `train/` and `val/`, with class folders, or flat;
            the name of a data set (see `lightly_mim.data.open_data`); or a Dataset
            that yields (sample, ...): samples that are still PIL images or uint8
            tensors get the method's augmentation, float tensors and lists of views are
            taken as they are. Labels are of use to `probe` and `rank_every` alone.
        method:
            The method, or a function that makes it. `seed` covers the initial weights
            only of what is made by a function: on the command line, always. None
            chooses method, encoder and size for the images and the machine, see
            `lightly_mim.defaults.method`, and says so; with `init` the method that the
            weights are of.
        init:
            Weights to begin with, on these images and with a schedule of this run's
            own: an earlier run's directory, a file or a folder of published weights,
            the name of a timm model with its weights, or OWNER/MODEL on the Hugging
            Face hub. Encoder, mask token, head and decoder are taken where they fit,
            and interpolated for another image size, patch size, window size or number
            of channels, see `MaskedImageModel.from_pretrained`. Not `resume`, which
            goes on with the run in `out` where it stopped.
        val:
            Images for the validation loss: a folder or a Dataset. By default the
            `val/` part of `data` if it has one; without either, nothing is validated.
        validate:
            False leaves validation images alone: pretraining then sees training images
            only, where those of `val/` are for testing.
        recipe:
            Name of one of the method's published recipes, or a `Recipe`. It also sets
            the drop path rate of the encoder and, of a method that is made by
            `functools.partial(SimMIM, ...)` as on the command line, the initial weights
            and the parts that are left open; a method that is made otherwise has them
            from `SimMIM.from_recipe(name)`. By default `lightly_mim.defaults` chooses
            for the images at hand.
        epochs:
            Passes over the training images. By default the recipe's, or chosen. Warm-up
            and schedule keep their share of the run.
        minutes:
            How long the training steps are to take, instead of epochs: their speed is
            measured in a few that are thrown away, and the number of epochs follows
            from it. Validation, probes and pictures come on top. In one process only.
        batch_size:
            Images per optimiser step, over all devices and accumulated micro-batches.
            By default the recipe's, or chosen. An incomplete last batch is dropped.
        lr:
            Highest learning rate, instead of the chosen one; with `recipe` the rate per
            `recipe.lr_batch_size` images (512 for SimMIM), instead of the recipe's.
        warmup_epochs:
            Epochs of linear warm-up, instead of the recipe's.
        weight_decay:
            Weight decay, instead of the recipe's.
        min_scale:
            Smallest share of an image that a training crop covers, instead of the
            recipe's.
        normalize:
            `mean` and `std` of each channel, of images in [0, 1]. By default ImageNet's
            with `recipe`, those that the weights were trained with for a pretrained
            encoder, and else those of 512 of the training images.
        seed:
            Seed of everything that is random.
        precision:
            Lightning's precision. By default 'bf16-mixed' where the hardware computes
            in bfloat16, '32-true' elsewhere.
        accelerator:
            Lightning's accelerator: 'auto', 'cpu', 'gpu', 'mps'.
        devices:
            Lightning's devices: how many, or which. In a SLURM step, by default one
            for each task of a node.
        num_nodes:
            Number of machines. By default those of the SLURM step, or 1.
        strategy:
            Lightning's strategy: 'auto', 'ddp', ...
        accumulate:
            Number of micro-batches that an optimiser step accumulates.
        grad_checkpointing:
            Trade time for memory: recompute the encoder's activations.
        compile:
            Compile the method with `torch.compile`.
        num_workers:
            Processes that read images, per device. By default chosen by the loader.
        on_error:
            'raise' ends the run at an image that cannot be read and names it. 'skip'
            puts another image in its place, and says how many there were.
        value_range:
            The values of 16-bit pictures that become 0 and 255, such as (0, 4095) for a
            camera of 12 bits, instead of (0, 65535). For folders. By default those that
            the weights were pretrained with. `evaluate` takes it over from the run.
        reconstruct_every:
            Epochs between two pictures of reconstructions. 0 for the last epoch only.
        probe:
            'linear' or 'attentive' shows the accuracy of a probe while the encoder is
            pretrained, as `probe_top1`: in the logs, the progress bar and the lines of
            the epochs. It is fitted on at most 5,000 labelled training images (1,000 if
            attentive) and scored on as many validation images; with `validate=False` or
            without validation images on a fifth of the training images, which the probe
            is then not fitted on. It changes nothing of the run. See
            `lightly_mim.monitoring.OnlineProbe`.
        probe_every:
            Epochs between two probes, besides one before the first step and one at the
            end. 0 for those two only.
        rank_every:
            Epochs between two looks at the features of up to 512 training images,
            besides one before the first step and one at the end: `rankme` and, with
            labels, `knn_top1` in the logs, a warning if the encoder collapses, and at
            the end a sentence, or a warning if the features are worse than before. It
            changes nothing of the run. See `lightly_mim.monitoring.FeatureWatch`. 0 for
            none.
        avg_dist:
            Log the masks' AvgDist in pixels, see
            `lightly_mim.masking.average_distance`.
        log_every:
            Optimiser steps between two logs. Several processes look as often whether
            one of them was told to stop; one looks after every step.
        save_every_minutes:
            Longest time between two checkpoints: what a run that is killed without
            warning may lose. Every epoch's end saves too. 0 for that alone.
        tensorboard:
            Write logs for TensorBoard beside `metrics.csv`.
        loggers:
            Further Lightning loggers.
        callbacks:
            Further Lightning callbacks.
        progress:
            Show a progress bar. By default on a terminal; elsewhere a line is printed
            for every epoch.
        report:
            Write `report.html` at the end, see `lightly_mim.report`: what was run, its
            curves and pictures, and features of up to 300 images.
        resume:
            Go on with the run in `out`, or begin it if there is none. `out` is enough:
            without data or without method, all that is left at its default is the run's
            own, as its config.yaml says. Other arguments than the run's own are
            refused, but for those that no weight depends on, such as `val`, `probe`,
            `num_workers` or `tensorboard`. Images are known by their names and sizes,
            by the bytes of a few and by the times of all or none: their folder may
            have moved or been copied.
        allow_changes:
            Arguments that a run that goes on may change although its result depends on
            them: some of 'accelerator', 'callbacks', 'compile', 'data' (other images),
            'devices', 'grad_checkpointing', 'num_nodes', 'on_error', 'precision' and
            'strategy'. The run then does not end bit for bit as one that never was cut;
            what was changed is in `history.json` and `finished.json`.
        overwrite:
            Replace the run in `out`.

    Returns:
        The trained method.

    Raises:
        ValueError: If an argument is out of range, if data and method do not fit, or
            if `out` may not be written. Nothing has been written then.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        Preempted: If a signal told the process to stop, when the run is saved.
    """
    arguments = dict(locals())
    run = RunDirectory(out)
    stored = run.stored_config() if resume else None
    if resume and (data is None or (method is None and stored is not None)):
        return pretrain(**_run_arguments(run, arguments))
    _check_arguments(arguments)
    _check_init(run, init, stored)
    assert data is not None
    for name in ("data", "val"):
        if isinstance(arguments[name], str) and Path(arguments[name]).is_dir():
            arguments[name] = str(Path(arguments[name]))  # photos/ is photos
    takes_weights = init is not None and not (resume and run.checkpoint.exists())
    if method is None and init is not None:
        method, takes_weights = partial(from_pretrained, init), False
    elif method is None:
        method = choose_method(data, accelerator)
    built = isinstance(method, MaskedImageModel)
    if not isinstance(method, MaskedImageModel):
        with keyed_random_state(seed, "weights"):
            made = as_published(method, recipe)()
        if not isinstance(made, MaskedImageModel):
            raise ValueError(f"method makes a {type(made).__name__}, no method.")
        method = made
    if takes_weights and init is not None:
        with keyed_random_state(seed, "init"):
            start_from(method, init)
    precision = precision or default_precision(accelerator)
    layout = choose_layout(devices, num_nodes)
    if stored is not None and value_range is None and stored.get("value_range"):
        low, high = stored["value_range"]
        value_range = (low, high)
    elif stored is None and value_range is None:  # that of the weights, if they say it
        value_range = own_value_range(method.encoder, data, val)
    open_images = partial(
        _Images, method, data, val, validate, num_workers, on_error, value_range, seed
    )
    images: _Images | None = None
    if stored is not None:
        # What was chosen when the run began is the run's own.
        own = _stored_recipe(run, stored) if recipe is None else None
        measured = {} if minutes is None else {"epochs": stored["recipe"]["epochs"]}
        settings = settings_of(method, arguments | measured, own)
        normalize = normalize or stored.get("normalize")
        if recipe is None:
            suit_as_before(method, stored)
    else:
        if _rank() == 0:  # before anything is looked at or chosen
            run.check({}, resume, overwrite, allow_changes)
        images = open_images()
        provisional = {} if minutes is None else {"warmup_epochs": None}
        settings = settings_of(
            method, arguments | provisional, num_images=images.num_images
        )
        pictures = images.pixels() if recipe is None else None
        if pictures is not None:
            method.suit(brightness_share(pictures))
            if normalize is None and statistics_are_open(method.encoder):
                normalize = channel_statistics(pictures)
        if normalize is None and init is not None:
            # A run that goes on does not read the weights again, which say it.
            mean, std = method.encoder.mean, method.encoder.std
            normalize = {"mean": list(mean), "std": list(std)}
    if normalize is not None:
        set_statistics(method.encoder, normalize)
    if value_range is not None:
        method.encoder.value_range = (value_range[0], value_range[1])
    if settings.drop_path is not None:
        method.encoder.set_drop_path(settings.drop_path)
    if grad_checkpointing:
        method.set_grad_checkpointing()
    if minutes is not None and images is not None:
        images.follow(settings)
        options = arguments | {"devices": layout.devices, "num_nodes": layout.num_nodes}
        epochs = _epochs_in(minutes, method, settings, images, options, precision)
        settings = settings_of(
            method, arguments | {"epochs": epochs}, num_images=images.num_images
        )
    resolved = {
        "method": method,
        "recipe": settings,
        "normalize": normalize,
        "value_range": value_range,
        "precision": precision,
        "devices": layout.devices,
        "num_nodes": layout.num_nodes,
    }
    config = _config(arguments | resolved)
    for folder in (data, val):
        if isinstance(folder, str | Path) and Path(folder).is_dir():
            run.check_outside(Path(folder))
    changes: Changes = {}
    if _rank() == 0:
        changes = run.check(config, resume, overwrite, allow_changes)
    if run.finished and resume:
        print(f"The run in {run.path} has finished: nothing is left to do.", flush=True)
        state = AtomicCheckpointIO(run.check_owner).load_checkpoint(run.checkpoint)
        done = Pretraining(method)
        done.on_load_checkpoint(state)
        done.load_state_dict(state["state_dict"])
        return method
    method.check_masking()

    images = images or open_images()
    images.follow(settings)
    show_bar = sys.stdout.isatty() if progress is None else progress
    watching = _watching(images, probe, probe_every, rank_every)
    trainer = _trainer(
        max_epochs=settings.epochs,
        accelerator=accelerator,
        devices=layout.devices,
        num_nodes=layout.num_nodes,
        strategy=strategy,
        precision=precision,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=min(log_every, images.steps_per_epoch),
        limit_val_batches=0.0 if images.val is None else 1.0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=Path(out).absolute(),
        plugins=[
            AtomicCheckpointIO(
                run.check_owner, {run.checkpoint.absolute(): run.previous}
            ),
            *([layout.environment] if layout.environment else []),
        ],
        logger=[
            MetricsLogger(Path(out).absolute(), run.check_owner),
            *(
                [TensorBoardLogger(Path(out).absolute(), "tensorboard", "")]
                if tensorboard
                else []
            ),
            *(loggers or []),
        ],
        enable_progress_bar=show_bar,
        enable_model_summary=False,
        callbacks=[
            LastCheckpoint(
                run.checkpoint.parent.absolute(),
                run.checkpoint.stem,
                every_n_epochs=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            ),
            SaveBetweenBatches(run.checkpoint, save_every_minutes, log_every),
            SessionNotes(run),
            *_drawing(images, run.reconstructions, reconstruct_every),
            *([MaskDistance()] if avg_dist else []),
            *watching,
            *([ProgressBar(refresh_rate=10)] if show_bar else [EpochLines()]),
            *(callbacks or []),
        ],
    )
    images.check(trainer)
    for callback in watching:
        if isinstance(callback, OnlineProbe) and trainer.is_global_zero:
            callback.read()
    device = trainer.strategy.root_device
    method.choose_attention(device, bf16=trainer.precision == "bf16-mixed")
    checkpoint = run.checkpoint if resume and run.checkpoint.exists() else None
    if checkpoint is None:  # before anything is written
        method.fit_target(images.sample)
    if trainer.is_global_zero:
        facts = images.facts(trainer)
        if checkpoint is not None:
            changes |= run.check_facts(facts, allow_changes)
        fresh = not (resume or overwrite)
        run.begin(
            config, overwrite, fresh=fresh, facts=facts, built=built, changes=changes
        )
        print(_summary(trainer, settings, images, checkpoint), flush=True)
        steps = settings.epochs * images.steps_per_epoch
        warn_of_few_steps(method, recipe, settings, steps)
        if checkpoint is not None and changes:
            print(_withdrawal(changes), flush=True)
    module = Pretraining(method, settings, settings.batch_size, seed, compile)
    module.takes_other_images = "data" in allow_changes
    # Its handler of SIGTERM would talk to the other ranks from within a step of theirs.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore
    with listening(), deferred():
        _fit(trainer, module, images, checkpoint)
        unreadable = images.unreadable()
        if trainer.is_global_zero:
            run.check_owner()
            save_encoder(method.encoder, run.encoder)
            run.finish(
                {
                    "epochs": trainer.current_epoch,
                    "steps": trainer.global_step,
                    "unreadable": unreadable,
                }
            )
            if unreadable:
                print(
                    f"{len(unreadable)} files could not be read, and others took their "
                    f"place (all of them in {run.marker}):\n  "
                    + "\n  ".join(by_reason(unreadable))
                )
            print(f"Finished. The encoder is in {run.encoder}.", flush=True)
            if report:
                report_run(run.path, method, *images.shown(), device)
            testable = images.val is not None and getattr(images.val, "classes", None)
            named = all(isinstance(part, str | Path | None) for part in (data, val))
            if named and testable and method.encoder.name:
                words = ["--encoder", str(run.path), "--data", str(data)]
                words += [] if val is None else ["--val", str(val)]
                command = shlex.join(["lightly-mim", "evaluate", *words])
                print(f"Evaluate it: {command}", flush=True)
    return method


class _Speed(Callback):
    """Measures how long a step takes, and ends the Trainer when it knows."""

    WARM, ENOUGH, SECONDS = 2, 20, 10.0

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Notes the time."""
        self._ends.append(time.perf_counter())
        timed = len(self._ends) - 1 - self.WARM
        long = timed > 2 and self._ends[-1] - self._ends[self.WARM] > self.SECONDS
        trainer.should_stop = long or timed >= self.ENOUGH

    @property
    def seconds(self) -> float:
        """Mean seconds between the ends of two batches, after the first ones."""
        timed = self._ends[min(self.WARM, len(self._ends) - 2) :]
        return (timed[-1] - timed[0]) / (len(timed) - 1)


def _refuse_several(found: str) -> None:
    raise ValueError(
        "minutes is measured in one process, and each of several would find another "
        f"speed; this run has {found}: pass epochs instead, or devices=1."
    )


def _epochs_in(
    minutes: float,
    method: MaskedImageModel,
    settings: Recipe,
    images: _Images,
    arguments: Mapping[str, Any],
    precision: Precision,
) -> int:
    """Returns how many epochs fit into some minutes, by a few steps of a copy."""
    devices = arguments["devices"]
    several = devices > 1 if isinstance(devices, int) else len(devices) > 1
    if (devices != "auto" and several) or arguments["num_nodes"] > 1:
        _refuse_several(f"devices={devices} on {arguments['num_nodes']} machine(s)")
    speed = _Speed()
    names = ("accelerator", "devices", "strategy")
    trainer = _trainer(
        max_epochs=_Speed.WARM + _Speed.ENOUGH,  # an epoch has a batch at least
        **{name: arguments[name] for name in names},
        precision=precision,
        accumulate_grad_batches=arguments["accumulate"],
        limit_val_batches=0.0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[speed],
    )
    if trainer.world_size > 1:
        _refuse_several(f"{trainer.world_size} of them")
    images.check(trainer)
    copied = copy.deepcopy(method)
    copied.choose_attention(trainer.strategy.root_device, precision == "bf16-mixed")
    copied.fit_target(images.sample)
    seed, compile = arguments["seed"], arguments["compile"]
    module = Pretraining(copied, settings, settings.batch_size, seed, compile)
    with keyed_random_state(seed, "speed"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, datamodule=images)
    per_epoch = speed.seconds * images.steps_per_epoch * arguments["accumulate"]
    rate = images.steps_per_epoch * settings.batch_size / per_epoch
    epochs = max(int(minutes * 60 / per_epoch), 1)
    print(
        f"{rate:.0f} images/s: {epochs} epochs in {epochs * per_epoch / 60:.3g} minutes"
    )
    return epochs


def check_pretraining(arguments: Mapping[str, Any]) -> MaskedImageModel | None:
    """Finds what `pretrain` would refuse, without images, weights or files.

    The method is built on PyTorch's device "meta", in tenths of a second, without
    memory and without the pretrained weights that `pretrained` asks for. One that
    cannot be built there, as it looks at its weights or at files of its own while it is
    built, is left to `pretrain`.

    Args:
        arguments:
            Arguments of `pretrain` by their names. Of those that are missing, the
            defaults are taken.

    Returns:
        The method, without weights, or None if it cannot be built like that.

    Raises:
        ValueError: If an argument is out of range, or if the method, its encoder, its
            mask or its recipe cannot be made of them.
    """
    parameters = inspect.signature(pretrain).parameters.values()
    arguments = {p.name: p.default for p in parameters} | dict(arguments)
    if arguments["resume"] and arguments["method"] is None:
        return None  # it is the run's own
    given = {
        name: value
        for name, value in arguments.items()
        if value is not inspect.Parameter.empty and name != "data"
    }
    _check_arguments(check_arguments(pretrain, given) | {"data": ""})
    build = arguments["method"]
    if build is None:
        return None  # it is chosen for the images, or that of the weights
    build = as_published(build, arguments["recipe"])
    if isinstance(build, partial) and build.keywords.get("pretrained"):
        build = partial(build, pretrained=False)
    method: MaskedImageModel
    if isinstance(build, MaskedImageModel):
        method = build
    else:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights that are copied nowhere
                method = build()
        except ValueError:
            raise
        except Exception as error:
            if isinstance(error, TypeError) and "meta" not in str(error):
                message = f"The method cannot be built like that: {error}"
                raise ValueError(message) from error
            return None
    settings = settings_of(method, arguments)
    devices, nodes = arguments["devices"], arguments["num_nodes"]
    given = arguments["batch_size"] or arguments["recipe"]
    if isinstance(devices, int) and devices > 0 and given:
        _check_shares(
            settings.batch_size, devices * (nodes or 1), arguments["accumulate"]
        )
    method.check_masking()
    return method


def _fit(
    trainer: pl.Trainer, module: Pretraining, images: _Images, checkpoint: Path | None
) -> None:
    """Trains, and tells Lightning's ways to end apart."""
    with warnings.catch_warnings(), repeatable(trainer.strategy.root_device):
        # A run that goes on writes to the directory that it wrote to before.
        warnings.filterwarnings("ignore", "Checkpoint directory .* not empty")
        warnings.filterwarnings("ignore", "The dirpath has changed")
        try:
            # Lightning takes names that begin with "http" for addresses.
            where = None if checkpoint is None else checkpoint.absolute()
            trainer.fit(module, datamodule=images, ckpt_path=where)
        except Preempted as preempted:
            launcher = getattr(trainer.strategy, "cluster_environment", None)
            if trainer.local_rank and isinstance(launcher, LightningEnvironment):
                # Lightning kills a first process whose children fail.
                preempted.code = 0
            raise
        except TakenOverError:
            raise
        except SystemExit:
            if trainer.interrupted:  # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from None
            raise


class _Images(pl.LightningDataModule):
    """Makes the loaders once Lightning has told each process its rank."""

    def __init__(
        self,
        method: MaskedImageModel,
        data: Data,
        val: Data | None,
        validate: bool,
        num_workers: int | None,
        on_error: Literal["raise", "skip"],
        value_range: ValueRange | None,
        seed: int,
    ) -> None:
        super().__init__()
        encoder = method.encoder
        self.method = method
        self.num_workers = num_workers
        self.seed = seed
        self.eval_transform = EvalTransform(encoder.img_size, normalize=None)
        smallest = _smallest(method)
        self.train, self.val = open_data(
            data,
            val,
            transform=self.eval_transform,
            in_chans=encoder.in_chans,
            on_error=on_error,
            value_range=value_range,
            min_size=smallest,
            with_val=validate,
            labels=False,  # only what watches the run needs them
        )
        if self.val is not None and not len(self.val):  # type: ignore[arg-type]
            raise ValueError(f"val holds no images, got val={val!r}. Leave it out.")
        self.num_images: int = len(self.train)  # type: ignore[arg-type]
        if on_error == "raise" and isinstance(self.train, ImageDataset):
            _check_sizes(survey(self.train), smallest)

    def follow(self, recipe: Recipe) -> None:
        """Takes the batch size and the crops of a recipe.

        Raises:
            ValueError: If a batch has more images than there are.
        """
        self.batch_size = recipe.batch_size
        if not 0 < self.batch_size <= self.num_images:
            raise ValueError(
                f"A batch has 1 to all {self.num_images} images of the data set, got "
                f"batch_size={self.batch_size}. Incomplete batches are dropped."
            )
        self.steps_per_epoch = self.num_images // self.batch_size
        self.train.transform = self.method.transform(  # type: ignore[attr-defined]
            normalize=None, min_scale=recipe.min_scale
        )

    def pixels(self) -> Tensor | None:
        """Returns some of the images as uint8, None for floats and views."""
        images = self._batch_of(self.plain(), NUM_TO_FIT)[0]
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            return None
        encoder = self.method.encoder
        normalize_images(images[:1], encoder.mean, encoder.std)  # do channels fit?
        return images

    def check(self, trainer: pl.Trainer) -> None:
        """Raises a ValueError if batch and processes do not fit the images."""
        _check_shares(
            self.batch_size, trainer.world_size, trainer.accumulate_grad_batches
        )

    def facts(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Returns what the result depends on and the arguments do not say."""
        return {
            **_image_facts(self.train),
            "processes": trainer.world_size,
            "device": trainer.strategy.root_device.type,
        }

    def pictures(self) -> tuple[Tensor, Mask]:
        """Returns a few images, normalised, and their masks: the same in every run."""
        images = self._some(
            self.val if self.val is not None else self.train, NUM_PICTURES
        )
        generator = Generator().manual_seed(seed_from(self.seed, "pictures"))
        return images, Mask.of(self.method.draw_mask(images, generator))

    def sample(self) -> Tensor:
        """Returns training images for a target to learn from, normalised."""
        return self._some(self.plain(), NUM_TO_FIT)

    def _batch_of(self, dataset: Dataset[Any], number: int) -> Any:
        few = spread_out(dataset, number)
        return next(iter(self._loader(few, len(few), num_workers=0)))

    def _some(self, dataset: Dataset[Any], number: int) -> Tensor:
        encoder = self.method.encoder
        batch = self._batch_of(dataset, number)
        images = batch_images(batch)
        check_finite_images(images, batch[2])
        return normalize_images(images, encoder.mean, encoder.std)

    def plain(self) -> Dataset[Any]:
        """Returns the training images without augmentation."""
        dataset = copy.copy(self.train)
        dataset.transform = self.eval_transform  # type: ignore[attr-defined]
        return dataset

    def shown(self) -> tuple[Dataset[Any], str]:
        """Returns the images that a report shows features of, and what they are."""
        if self.val is not None:
            return self.val, "validation images"
        return self.plain(), "training images"

    def unreadable(self) -> dict[str, str]:
        """Returns the files that were replaced, on all devices, and why."""
        trainer = self.trainer
        assert trainer is not None
        loader = trainer.train_dataloader
        if not isinstance(loader, KeyedLoader):  # the checkpoint was the last one
            return {}
        found = dict(loader.unreadable)
        if isinstance(trainer.val_dataloaders, KeyedLoader):
            found |= trainer.val_dataloaders.unreadable
        parts: list[dict[str, str]] = [found] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, found)
        return {name: reason for part in parts for name, reason in part.items()}

    def train_dataloader(self) -> KeyedLoader:
        """Returns the training images, this rank's rows of each global batch."""
        assert self.trainer is not None
        micro_batch = self.batch_size // self.trainer.accumulate_grad_batches
        return self._loader(self.train, micro_batch, training=True)

    def val_dataloader(self) -> KeyedLoader | list[Any]:
        """Returns the validation images, in order; nothing if there are none."""
        assert self.trainer is not None
        if self.val is None:
            return []
        micro_batch = self.batch_size // self.trainer.accumulate_grad_batches
        return self._loader(self.val, micro_batch)

    def _loader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        training: bool = False,
        num_workers: int | None = None,
    ) -> KeyedLoader:
        trainer = self.trainer
        return KeyedLoader(
            dataset,
            batch_size,
            training=training,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            num_workers=self.num_workers if num_workers is None else num_workers,
            labels=False,  # what watches the run reads them for itself
        )


def _check_sizes(found: Survey, smallest: tuple[int, int]) -> None:
    """Raises a ValueError if pictures are smaller than what is masked as a whole."""
    small = [s for s in found.sizes if s[0] < smallest[0] or s[1] < smallest[1]]
    if small:
        height, width, name = small[0]
        raise ValueError(
            f"{len(small)} of {len(found.sizes)} images that were looked at are "
            f"smaller than {smallest[0]} x {smallest[1]} pixels; the first of them, "
            f"{name}, has {height} x {width} (height x width). Remove them, leave "
            'them out with on_error="skip", or take a smaller mask_patch_size or patch.'
        )


def _smallest(method: MaskedImageModel) -> tuple[int, int]:
    """Returns the size of the smallest images that are worth training on."""
    masking = method.masking
    unit = masking.mask_patch_size if isinstance(masking, UnitMasking) else None
    return unit or method.encoder.patch_size


def _drawing(
    images: _Images, directory: Path, every_n_epochs: int
) -> list[ReconstructionPictures]:
    """Returns the callback that draws reconstructions, if the target can be drawn."""
    target = images.method.target
    if not getattr(target, "drawable", False):
        print(
            f"No pictures of reconstructions: {type(target).__name__} does not say "
            "what a patch looks like."
        )
        return []
    return [ReconstructionPictures(*images.pictures(), directory, every_n_epochs)]


def _watching(
    images: _Images, probe: Probe | None, probe_every: int, rank_every: int
) -> list[Callback]:
    """Returns the callbacks that encode whole images while the encoder trains."""
    train = images.plain()
    options: dict[str, Any] = {"num_workers": images.num_workers}
    watch = FeatureWatch(train, every_n_epochs=rank_every, **options)
    if probe is None:
        return [watch]
    for part in (train, images.val):
        is_folder = isinstance(part, ImageDataset)
        if is_folder and not part.classes:  # type: ignore[union-attr]
            raise ValueError(
                f"The probe needs labelled images, and those of {part.root} "  # type: ignore[union-attr]
                "have no labels: give a folder with one folder per class, or leave "
                "the probe out."
            )
    if images.val is not None:
        match_classes(train, images.val)
    options |= {"every_n_epochs": probe_every, "seed": images.seed}
    return [watch, OnlineProbe(train, images.val, probe, **options)]


def default_precision(accelerator: str) -> Precision:
    """Returns 'bf16-mixed' where the hardware computes in bfloat16, else '32-true'.

    Args:
        accelerator:
            Lightning's name of the accelerator; 'auto' prefers a GPU.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        # Without these instructions a CPU emulates bfloat16, slower than float32.
        supported = any(
            getattr(torch.cpu, name, bool)()
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    else:
        supported = False
    return "bf16-mixed" if supported else "32-true"


def _trainer(**options: Any) -> pl.Trainer:
    try:
        return pl.Trainer(**options)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(
            f"Lightning cannot train with accelerator={options['accelerator']!r}, "
            f"devices={options['devices']!r}, strategy={options['strategy']!r}: {error}"
        ) from error


def _run_arguments(run: RunDirectory, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the run that is there, and those that were given."""
    stored = run.stored_arguments()
    parameters = inspect.signature(pretrain).parameters
    given = {
        name: value
        for name, value in arguments.items()
        if value is not parameters[name].default and value != parameters[name].default
    }
    complete = {
        name: value for name, value in stored.items() if name in parameters
    } | given
    for name in ("data", "val"):
        if is_named_only(complete.get(name)):
            raise ValueError(
                f"The run in {run.path} was begun with {name}={complete[name]}, which "
                f"is not a folder to open again: pass {name}=... as well."
            )
    init = str(complete.get("init"))
    fetched = not Path(init).exists() and (":" in init or is_hub_name(init))
    if fetched and "init" not in given and not run.checkpoint.exists():
        raise ValueError(
            f"The run in {run.path} began with init={init!r}, which is not on this "
            "machine, and has no checkpoint yet. No file has weights fetched: pass "
            f"init={init!r} as well."
        )
    for name in ("loggers", "callbacks"):
        if name not in given:  # they cannot be made again from words
            complete[name] = None
    if stored.get("loggers") and complete["loggers"] is None:
        print(f"Without the run's own loggers: {', '.join(stored['loggers'])}.")
    if "recipe" not in given:
        complete["recipe"] = _stored_recipe(run, stored)
    if "method" not in given:
        try:
            # Says what is wrong before anything starts.
            if not isinstance(from_config(stored["method"]), MaskedImageModel):
                raise ValueError("it is no method")
        except Exception as error:  # whatever its parts make of their arguments
            raise ValueError(
                f"The method of the run in {run.path} cannot be built from its "
                f"config.yaml: {error}. Pass the method and its arguments again."
            ) from error
        complete["method"] = partial(from_config, stored["method"])
    return complete


def _stored_recipe(run: RunDirectory, stored: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of a run that is there."""
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in stored["recipe"].items()
        }
        return Recipe(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The recipe in {run.config} is not one of this version: {error}. Pass the "
            "run's arguments again."
        ) from error


def _image_facts(dataset: Dataset[Any]) -> dict[str, Any]:
    """Returns what tells images from others, wherever they lie.

    Their number, the hash of their names, and that of the sizes of a thousand files:
    asking a network's file system for those of a million takes minutes. When these
    files were written, and what 64 of them begin with: copies have other times, all of
    them, and the same bytes; of images that were changed in place some keep their time.
    """
    told = [f"{len(dataset)} images"]  # type: ignore[arg-type]
    names: Sequence[str] = getattr(dataset, "filenames", ())
    if names:
        text = "\n".join(names).encode(errors="surrogateescape")
        told.append(f"names {zlib.crc32(text):08x}")
    paths: Sequence[Path] = getattr(dataset, "paths", ())
    if not paths:
        return {"images": ", ".join(told)}
    some = [paths[index] for index in spread_out(dataset, NUM_SIZES).indices]
    stats = [path.stat() if path.exists() else None for path in some]
    sizes = [stat.st_size if stat else -1 for stat in stats]
    told.append(f"sizes {zlib.crc32(str(sizes).encode()):08x}")
    crc = 0
    for index in spread_out(dataset, NUM_CONTENTS).indices:
        with suppress(BrokenImageError):  # is what the run will say
            path = str(paths[index])
            crc = zlib.crc32(read_regular(path, "image", _beginning), crc)
    return {
        "images": ", ".join(told),
        "contents": f"{crc:08x}",
        "times": [int(stat.st_mtime) if stat else -1 for stat in stats],
    }


def _beginning(file: BinaryIO) -> bytes:
    return file.read(1 << 20)


def _withdrawal(changes: Changes) -> str:
    """Returns the sentence that takes back the promise of a resumed run."""
    said = "; ".join(
        f"{name} {was!r} -> {now!r}" for name, (was, now) in changes.items()
    )
    return (
        f"Going on with changes ({said}): this run does not end bit for bit as one "
        "that never was cut."
    )


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises a ValueError for what is wrong at first sight."""
    changes = arguments["allow_changes"]
    if set(changes) - set(CHANGEABLE):
        raise ValueError(
            f"allow_changes is a list of some of {', '.join(CHANGEABLE)}, got "
            f"{changes!r}. With other arguments begin another run."
        )
    if changes and not arguments["resume"]:
        raise ValueError(
            "allow_changes is for a run that goes on: pass resume as well, or leave it "
            "out."
        )
    method = arguments["method"]
    if arguments["data"] is None:
        raise ValueError(
            "A run begins with data: pass a folder of images, or resume to go on with "
            "the run in out."
        )
    if method is None and arguments["recipe"] is not None:
        raise ValueError(
            f"recipe={arguments['recipe']!r} is a method's: pass the method as well, "
            "or leave recipe out."
        )
    if arguments["minutes"] is not None and arguments["epochs"] is not None:
        raise ValueError("Pass epochs or minutes, not both.")
    if arguments["probe"] is None and arguments["probe_every"] != 10:
        warnings.warn(
            f"probe_every={arguments['probe_every']} does nothing without a probe: "
            'pass probe="linear" as well, or leave probe_every out.',
            stacklevel=4,
        )
    if isinstance(method, type):
        raise ValueError(
            "method is a method or a function that makes one, for example "
            f'lambda: SimMIM("vit_base_patch16_224"), got {method!r}.'
        )


def _check_init(
    run: RunDirectory, init: str | Path | None, stored: Mapping[str, Any] | None
) -> None:
    """Raises a ValueError where a run that goes on was meant, or one that begins."""
    if init is None:
        return
    path = Path(init)
    if path.exists() and path.resolve().is_relative_to(run.path.resolve()):
        raise ValueError(
            f"init={str(init)!r} is of the run in out itself. To go on with it where "
            "it stopped pass resume, without init; to begin another run with its "
            "weights pass another folder as out."
        )
    if stored is not None and stored.get("init") != str(init):
        raise ValueError(
            f"resume goes on with the run in {run.path}, which began with "
            f"init={stored.get('init')!r}, and init={str(init)!r} begins a run with "
            "other weights. Leave init out to go on; or leave resume out and pass "
            "another folder as out to begin."
        )


def _check_shares(batch_size: int, devices: int, accumulate: int) -> None:
    """Raises a ValueError if a batch cannot be shared out evenly."""
    parts = devices * accumulate
    if batch_size % parts:
        raise ValueError(
            f"batch_size is the number of images per optimiser step, {parts} = "
            f"{devices} device(s) x {accumulate} accumulated micro-batch(es) share it, "
            f"and {batch_size} does not divide by that: pass another batch_size."
        )


def _rank() -> int:
    """Returns this process' number, also before a Trainer is there."""
    return getattr(rank_zero_only, "rank", None) or 0


def _config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `pretrain` as YAML can hold them."""
    # These are said anew each time, or a rerun would replace a run.
    config = {
        name: to_config(value)
        for name, value in arguments.items()
        if name not in ("resume", "allow_changes", "overwrite")
    }
    for name in ("data", "val"):
        if not isinstance(arguments[name], str | Path | None):
            # A data set, even if it is a list.
            config[name] = to_config(type(arguments[name]))
    return config


def _summary(
    trainer: pl.Trainer, recipe: Recipe, images: _Images, checkpoint: Path | None
) -> str:
    """Returns what a run is about to do, with what was chosen for it."""
    method, encoder = images.method, images.method.encoder
    height, width = encoder.img_size
    one = torch.empty(1, 1, height, width)
    mask = Mask.of(method.draw_mask(one, Generator().manual_seed(0)))
    cells = math.prod(mask.grid)
    if images.val is None:
        validation = "no validation images (val=... gives a validation loss)"
    else:
        validation = f"{len(images.val)} validation images"  # type: ignore[arg-type]
    lr = recipe.lr * recipe.batch_size / recipe.lr_batch_size
    steps = recipe.epochs * images.steps_per_epoch
    warmup = round(recipe.warmup_epochs * images.steps_per_epoch)
    ours = recipe.source == defaults.SOURCE
    lines = [
        f"{type(method).__name__}, {encoder.name or type(encoder.vit).__name__} at "
        f"{height} x {width} pixels in patches of {encoder.patch_size[0]} x "
        f"{encoder.patch_size[1]}, {_words_of(method)}",
        f"{method.masking} masks {mask.count} of {cells} cells "
        f"({100 * mask.count / cells:.1f} %), target {method.target}",
        f"{images.num_images} training images, {validation}, normalised with mean "
        f"{_numbers(encoder.mean)} and deviation {_numbers(encoder.std)}",
        f"{recipe.epochs} epochs of {images.steps_per_epoch} steps of "
        f"{recipe.batch_size} images, {steps} in all, learning rate up to {lr:.3g} "
        f"after {warmup} steps, weight decay {recipe.weight_decay:g}, crops of "
        f"{recipe.min_scale:g} to 1 of an image"
        + (", where not said chosen by lightly_mim.defaults" if ours else ""),
        f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision "
        f"{trainer.precision}",
    ]
    if checkpoint:
        lines.append(f"going on from {checkpoint}")
    return "\n".join(lines)


def _words_of(method: MaskedImageModel) -> str:
    """Returns the options that a method was made with, in words."""
    told = {
        name: value
        for name, value in method.init_args.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    }
    for name in ("encoder", "img_size", "patch_size"):
        told.pop(name, None)
    return ", ".join(f"{name} {value}" for name, value in told.items())


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
