"""What masking and reconstruction look like while a method trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor

from lightly_mim.masking import Mask, average_distance
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.monitoring.images import method_of, undisturbed
from lightly_mim.reporting.figures import reconstruction_grid
from lightly_mim.training.logs import is_due


class ReconstructionPictures(Callback):
    """Writes a grid of original | masked | prediction | pasted pictures.

    The images and their masks stay the same from epoch to epoch. The prediction column
    shows what the model predicted alone; the pasted column shows it in its
    surroundings. A target that was normalised per patch or window is turned back into
    pixels with the true statistics of the image, which the model did not predict; the
    picture says so. Loggers that take images get the picture, too.

    Attributes:
        images:
            Float tensor with shape (num_images, channels, height, width), normalised.
        mask:
            The mask of each image.
        directory:
            Where the pictures go, as `epoch_0010.png`.
        every_n_epochs:
            How often, besides the last epoch. 0 for the last epoch only.
    """

    def __init__(
        self, images: Tensor, mask: Mask, directory: Path | str, every_n_epochs: int
    ) -> None:
        self.images = images
        self.mask = mask
        self.directory = Path(directory)
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Writes the pictures when it is time."""
        if not is_due(trainer, self.every_n_epochs):
            return
        # All processes ask for the loss: it is the mean over them.
        loss = trainer.callback_metrics["train_loss"]
        if not trainer.is_global_zero:
            return
        epoch = trainer.current_epoch + 1
        method = method_of(pl_module)
        picture = draw_reconstructions(
            method,
            self.images,
            self.mask,
            self.directory / f"epoch_{epoch:04d}.png",
            f"epoch {epoch} of {trainer.max_epochs} · training loss {float(loss):.4f} "
            f"· {type(method).__name__} · {self.directory.absolute().parent.name}",
        )
        for logger in trainer.loggers:
            log_picture(logger, "reconstructions", picture, trainer.global_step)


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Gives a picture to a logger, if it takes pictures.

    Args:
        logger:
            TensorBoard's, or one with Lightning's `log_image(key, images, step)`, such
            as Weights & Biases'. Others are left alone.
        name:
            What it is called there.
        picture:
            The picture.
        step:
            The optimiser step.
    """
    if isinstance(logger, TensorBoardLogger):
        pixels = np.asarray(picture)
        logger.experiment.add_image(name, pixels, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[picture], step=step)


def draw_reconstructions(
    method: MaskedImageModel,
    images: Tensor,
    mask: Mask,
    path: Path | str | None = None,
    title: str = "",
) -> Image.Image:
    """Draws a grid of original | masked | prediction | pasted pictures.

    Args:
        method:
            The method that predicts. Its mode, and the random numbers of the run, stay
            as they were.
        images:
            Float tensor with shape (num_images, channels, height, width), normalised.
        mask:
            The mask of each image.
        path:
            PNG file to write as well.
        title:
            What stands above it.
    """
    with undisturbed(method) as device:
        images, mask = images.to(device), mask.to(device)
        pasted = method.reconstruct(images, mask)
    mean = torch.tensor(method.encoder.mean, device=device)[:, None, None]
    std = torch.tensor(method.encoder.std, device=device)[:, None, None]
    return reconstruction_grid(
        images * std + mean,
        pasted * std + mean,
        mask.pixels((images.shape[-2], images.shape[-1])),
        path,
        title=title,
        note=getattr(method.target, "picture_note", ""),
    )


class MaskDistance(Callback):
    """Logs `avg_dist`, the mean distance from a masked pixel to a visible one."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs it when Lightning logs."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        part = (batch_idx + 1) % trainer.accumulate_grad_batches  # of a step
        if every and part == 0 and trainer.global_step % every == 0:
            distance = average_distance(outputs["mask"], outputs["image_size"]).mean()
            pl_module.log("avg_dist", distance, sync_dist=trainer.world_size > 1)
