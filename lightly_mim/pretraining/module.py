"""`Pretraining`: the LightningModule that trains a method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Timer
from torch import Generator, Tensor

from lightly_mim.arguments import PositiveInt, Seed, checked
from lightly_mim.checkpoints import put_encoder
from lightly_mim.checkpoints.encoder import ENCODER_KEY
from lightly_mim.checkpoints.ours import METHOD_KEY
from lightly_mim.config import to_config
from lightly_mim.data import seed_from
from lightly_mim.evaluation.features import normalize_images
from lightly_mim.masking import Mask
from lightly_mim.methods.base import MaskedImageModel, MIMOutput
from lightly_mim.optim import NonFiniteLossError, Recipe, build_optimizer
from lightly_mim.settings import follow_code
from lightly_mim.training.cuda import scales_gradients
from lightly_mim.training.module import TrainingModule
from lightly_mim.training.saving import AtomicCheckpointIO


@checked
class Pretraining(TrainingModule):
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
        self._bad_validation = torch.tensor(False)
        if recipe is not None:
            follow_code(method.encoder, recipe)
        if compile:
            # Not torch.compile(method), which would rename the keys of its state.
            self.method.compile()

    @property
    def trained(self) -> MaskedImageModel:
        """The method."""
        return self.method

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
        self.log_loss(output.loss, rows)
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
            fused=not scales_gradients(str(trainer.precision)),
        )
        return self.use(optimizer, scheduler, total_steps, recipe.clip_grad)

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

    def on_fit_start(self) -> None:
        """See `TrainingModule`. The encoder is no longer untrained."""
        super().on_fit_start()
        self.method.encoder.untrained = False

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `TrainingModule`. Takes over what the encoder says of its weights."""
        super().on_load_checkpoint(checkpoint)
        encoder = self.method.encoder
        encoder.untrained = False
        # Which may be those of the weights that the run began with.
        said = dict(json.loads(checkpoint.get(ENCODER_KEY) or "{}"))
        if said.get("tables"):
            encoder.tables = "simmim"
        encoder.norm_eps = said.get("norm_eps")

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
        """See `TrainingModule`.

        The checkpoint says which encoder it holds, so that it can be evaluated.
        """
        super().on_save_checkpoint(checkpoint)
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
