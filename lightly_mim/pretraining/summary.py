"""What a run says before it begins, and when it has ended."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Generator

from lightly_mim import defaults
from lightly_mim.data.notes import counted
from lightly_mim.data.sources import Data
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
        f"{counted(recipe.epochs, 'epoch')} of "
        f"{counted(images.steps_per_epoch, 'step')} of "
        f"{counted(recipe.batch_size, 'image')}, {steps} in all, learning rate up to "
        f"{lr:.3g} after {counted(warmup, 'step')}, weight decay "
        f"{recipe.weight_decay:g}, crops of {recipe.min_scale:g} to 1 of an image"
        + (", where not said chosen by lightly_mim.defaults" if ours else ""),
        f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision "
        f"{trainer.precision}",
    ]
    if checkpoint:
        lines.append(f"going on from {checkpoint}")
    return "\n".join(lines)


def say_what_next(
    run: Path, data: Data, val: Data | None, images: PretrainingImages
) -> None:
    """Prints the command that evaluates a run, or without labels writes features."""
    if not all(isinstance(part, str | Path | None) for part in (data, val)):
        return  # a data set in Python has no name for the command line
    tested = images.val is not None and getattr(images.val, "classes", None)
    if tested or len(getattr(images.plain(), "classes", None) or []) > 1:
        what = "Evaluate it"
        words = ["evaluate", "--encoder", str(run), "--data", str(data)]
        if not tested:
            words += ["--holdout", "0.2"]
        elif val is not None:
            words += ["--val", str(val)]
        words += ["--baselines", "random", "pixels", "--out", str(run)]
    else:
        what = "Write the features of its images"
        features = str(run / "features.npz")
        words = ["embed", str(run), str(data), "--out", features]
    print(f"{what}: {shlex.join(['lightly-mim', *words])}", flush=True)


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
