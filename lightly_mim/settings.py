"""What a run is made of where it was not said: published, or chosen for the images."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

import lightly_mim.methods
from lightly_mim import defaults
from lightly_mim.config import to_config
from lightly_mim.data import open_data
from lightly_mim.data.named import NAMED_DATA
from lightly_mim.data.sources import Data
from lightly_mim.data.survey import survey
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.encoders.statistics import imagenet_statistics
from lightly_mim.files import expanded
from lightly_mim.methods import MaskedImageModel
from lightly_mim.methods.base import published_parts
from lightly_mim.optim import Recipe
from lightly_mim.targets import Pixels

# The arguments of `pretrain` that replace single values of a recipe.
REPLACEABLE = ("batch_size", "lr", "warmup_epochs", "weight_decay", "min_scale")
FEW_STEPS = 500
IMAGENET = 1_281_167  # training images, which the published recipes pass over


def choose_method(data: Data, accelerator: str) -> Callable[[], MaskedImageModel]:
    """Returns a function that makes a method for the images and the machine.

    Args:
        data:
            The images, see `pretrain`.
        accelerator:
            Lightning's name of the accelerator; 'auto' prefers a GPU.

    Raises:
        ValueError: If the data set does not yield pictures.
    """
    images, _ = open_data(data, with_val=False, labels=False)
    found = survey(images)
    if found.side is None:
        raise ValueError(
            "No method was given, and it cannot be chosen without the sizes of the "
            "pictures, which this data set does not tell: pass a method, such as "
            'method=lambda: SimMIM("vit_small_patch16_224", img_size=...).'
        )
    gpu = accelerator in ("gpu", "cuda") or (
        accelerator == "auto" and torch.cuda.is_available()
    )
    name, options = defaults.method(found.num_images, found.side, found.grey, gpu)
    return partial(getattr(lightly_mim.methods, name), **options)


def as_published(
    build: Callable[[], MaskedImageModel], recipe: str | Recipe | None
) -> Callable[[], MaskedImageModel]:
    """Returns a function that builds a method with what a recipe published of it.

    Args:
        build:
            A function that makes a method. Of a `functools.partial` of its class what
            is left open (missing or None) is filled in; others are left as they are.
        recipe:
            The recipe, or its name. None fills in nothing.
    """
    if recipe is None or not isinstance(build, partial):
        return build
    # jsonargparse's partial is of a function of its own and the class.
    callables = [build.func, *build.args]
    kinds = (c for c in callables if isinstance(c, type))
    method = next((c for c in kinds if issubclass(c, MaskedImageModel)), None)
    if method is None:
        return build
    if not isinstance(recipe, Recipe):
        recipe = method.recipe(recipe)
    said = {name for name, value in build.keywords.items() if value is not None}
    if build.func is method:  # by their places
        said |= set(list(inspect.signature(method).parameters)[: len(build.args)])
    published = published_parts(recipe, said)
    first = build.args[0] if build.func is method and build.args else None
    encoder = build.keywords.get("encoder", first)
    new = isinstance(encoder, str) and not build.keywords.get("pretrained")
    if new and "init" in recipe.encoder_options:
        published["init"] = recipe.encoder_options["init"]
    return partial(build, **{k: v for k, v in published.items() if k not in said})


def settings_of(
    method: MaskedImageModel,
    arguments: Mapping[str, Any],
    stored: Recipe | None = None,
    num_images: int | None = None,
) -> Recipe:
    """Returns the recipe of a run, with the caller's own values in it.

    Args:
        method:
            The method.
        arguments:
            Those of `pretrain`.
        stored:
            The recipe that a run that goes on began with.
        num_images:
            Number of training images, None if it is not known yet.

    Raises:
        ValueError: If a value is out of its range, or there is no such recipe.
    """
    given = {n: arguments[n] for n in REPLACEABLE if arguments[n] is not None}
    recipe: str | Recipe | None = arguments["recipe"]
    epochs = arguments["epochs"]
    if isinstance(recipe, str):
        recipe = method.recipe(recipe)
    if recipe is None and stored is None:
        batch_size = given.get("batch_size")
        if num_images is None and epochs is None:
            given.pop("warmup_epochs", None)  # nobody knows yet of how many
        return dataclasses.replace(
            method.default_recipe(num_images, batch_size, epochs), **given
        )
    recipe = recipe or stored
    assert recipe is not None
    if epochs is not None and epochs != recipe.epochs:
        recipe = recipe.for_epochs(epochs)
    if stored is None and recipe.source == defaults.SOURCE:
        # Ours has the rate itself, also where a config.yaml brings it.
        given["lr_batch_size"] = given.get("batch_size", recipe.batch_size)
    return dataclasses.replace(recipe, **given)


def check_batch(
    data: str | None, method: MaskedImageModel | None, arguments: Mapping[str, Any]
) -> None:
    """Refuses a batch of more images than there are, before anything starts.

    Images that this machine does not see, and a folder with files enough, are left to
    `pretrain`: large ones take long to list.

    Args:
        data:
            The folder or the name of the images, None for those of a run that goes on.
        method:
            The method, None if it is not known.
        arguments:
            Those of `pretrain`, of which `batch_size` or `recipe` tells the batch.

    Raises:
        ValueError: If the images are too few.
    """
    batch_size, recipe = arguments.get("batch_size"), arguments.get("recipe")
    if batch_size is None and recipe is not None and method is not None:
        recipe = recipe if isinstance(recipe, Recipe) else method.recipe(recipe)
        batch_size = recipe.batch_size
    if batch_size is None or data is None:
        return
    if data not in NAMED_DATA:
        folder = expanded(data)
        if not folder.is_dir():
            return
        train = folder / "train"
        walked = os.walk(train if train.is_dir() else folder)
        files = (name for _, _, names in walked for name in names)
        if len(list(itertools.islice(files, batch_size))) == batch_size:
            return
    in_chans = 3 if method is None else method.encoder.in_chans
    try:
        images, _ = open_data(
            os.path.expanduser(data),  # noqa: PTH111, "./imagenette" is no name
            in_chans=in_chans,
            with_val=False,
            labels=False,
        )
    except ValueError:
        if data in NAMED_DATA:  # it is not on this machine
            return
        raise
    number = len(images)  # type: ignore[arg-type]
    if number < batch_size:
        raise ValueError(
            f"{data} has {number} training images, and a batch has that many at "
            f"most, got batch_size={batch_size}."
        )


def warn_of_few_steps(
    method: MaskedImageModel, recipe: str | Recipe | None, settings: Recipe, steps: int
) -> None:
    """Says before they are spent that the steps of a run are too few.

    With a published recipe a hundredth of its steps or fewer are worth a warning, else
    fewer than 500 a line: on MNIST, MAE's features were behind their random start after
    250 steps of 32 images and ahead of it after 500, in one run.

    Args:
        method:
            The method.
        recipe:
            The recipe that was asked for.
        settings:
            The settings of the run.
        steps:
            Optimiser steps of the run.
    """
    rate = settings.lr * settings.batch_size / settings.lr_batch_size
    said = (
        f"This run takes {steps:,} steps at a learning rate of up to {rate:.2g}, after "
        "which the encoder will hardly be better than before. "
    )
    if not isinstance(recipe, str):
        if steps < FEW_STEPS:
            print(f"{said}Train for more epochs, or take a smaller batch_size.")
        return
    published = method.recipe(recipe)
    its_steps = published.epochs * IMAGENET // published.batch_size
    its_rate = published.lr * published.batch_size / published.lr_batch_size
    if steps * 100 <= its_steps:
        warnings.warn(
            f"{said}{recipe} was published for {its_steps:,} steps at up to "
            f"{its_rate:.2g}. Leave recipe out for settings that are made for the "
            "images at hand, or train for more epochs.",
            stacklevel=2,
        )


def channel_statistics(images: Tensor) -> dict[str, list[float]]:
    """Returns `mean` and `std` of each channel, of values in [0, 1].

    Args:
        images:
            uint8 tensor with shape (num_images, channels, height, width).
    """
    values = images.double() / 255
    mean = values.mean(dim=(0, 2, 3))
    # A channel that is the same everywhere is not divided by nothing.
    std = values.std(dim=(0, 2, 3), correction=0).clamp(min=1 / 255)
    return {
        name: [round(value, 4) for value in tensor.tolist()]
        for name, tensor in (("mean", mean), ("std", std))
    }


def brightness_share(images: Tensor) -> float:
    """Returns the share of the variance of all pixels that lies between the images.

    Args:
        images:
            Tensor with shape (num_images, channels, height, width).

    Returns:
        0 if all images are as bright, 1 if each of them is of one colour.
    """
    values = images.double()
    between = values.mean(dim=(2, 3)).var(dim=0, correction=0).mean()
    total = values.var(dim=(0, 2, 3), correction=0).mean()
    return float(between / total) if total > 0 else 0.0


def suit_as_before(method: MaskedImageModel, stored: Mapping[str, Any]) -> None:
    """Lets a method take what its run took for its images when it began.

    Args:
        method:
            The method of a run that goes on.
        stored:
            The run's config.yaml.
    """
    arguments = (stored.get("method") or {}).get("init_args") or {}
    if arguments.get("target") == to_config(Pixels()):
        method.suit(brightness=0.0)


def follow_code(encoder: MaskedEncoder, recipe: Recipe) -> None:
    """Lets a Swin that a recipe of SimMIM's code pretrains go to other sizes as there.

    Args:
        encoder:
            The encoder.
        recipe:
            The recipe.
    """
    ours = recipe.encoder_options.get("init") == "simmim"
    if ours and isinstance(encoder.vit, SwinTransformer):
        encoder.tables = "simmim"


def statistics_are_open(encoder: MaskedEncoder) -> bool:
    """Returns whether an encoder has new weights and ImageNet's mean and deviation.

    Args:
        encoder:
            The encoder.
    """
    own = (encoder.mean, encoder.std) != imagenet_statistics(encoder.in_chans)
    return encoder.untrained and not own


def set_statistics(
    encoder: MaskedEncoder, normalize: Mapping[str, Sequence[float]]
) -> None:
    """Lets an encoder's images be normalised with a mean and deviation.

    Args:
        encoder:
            The encoder.
        normalize:
            `mean` and `std`, one number per channel.

    Raises:
        ValueError: If they are not that.
    """
    try:
        found = {name: tuple(map(float, normalize[name])) for name in normalize}
    except (TypeError, ValueError):
        found = {}
    fits = found.keys() == {"mean", "std"} and all(
        len(values) == encoder.in_chans and all(map(math.isfinite, values))
        for values in found.values()
    )
    if not fits or min(found["std"]) <= 0:
        raise ValueError(
            f"normalize has mean and std, {encoder.in_chans} number(s) each, one per "
            "channel of images in [0, 1], and deviations above 0, got "
            f"{normalize!r}."
        )
    encoder.mean, encoder.std = found["mean"], found["std"]
