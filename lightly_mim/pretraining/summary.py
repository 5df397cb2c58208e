"""What a run says before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Generator

from lightly_mim import defaults
from lightly_mim.masking import Mask
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.optim import Recipe
from lightly_mim.pretraining.images import PretrainingImages


def summary(
    trainer: pl.Trainer,
    recipe: Recipe,
    images: PretrainingImages,
    checkpoint: Path | None,
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
