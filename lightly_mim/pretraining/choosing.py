"""Settles a run's method, optimiser settings and statistics, anew or as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightly_mim.data import keyed_random_state
from lightly_mim.data.sources import Data
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.methods.pretrained import from_pretrained, start_from
from lightly_mim.optim import Recipe
from lightly_mim.pretraining.arguments import stored_recipe
from lightly_mim.pretraining.images import PretrainingImages
from lightly_mim.runs import RunDirectory
from lightly_mim.settings import (
    as_published,
    brightness_share,
    channel_statistics,
    choose_method,
    settings_of,
    statistics_are_open,
    suit_as_before,
)


def build_method(
    method: Callable[[], MaskedImageModel] | MaskedImageModel | None,
    data: Data,
    init: str | Path | None,
    recipe: str | Recipe | None,
    accelerator: str,
    seed: int,
    goes_on: bool,
) -> MaskedImageModel:
    """Returns the method of a run, with the weights that it begins with.

    Without one it is that of `init`, or one for the images. A run that goes on gets its
    weights from its checkpoint. The other arguments are those of `pretrain`.

    Raises:
        ValueError: If `method` makes something else, or `init` does not fit it.
    """
    takes_weights = method is not None and not goes_on
    if method is None and init is not None:
        method = partial(from_pretrained, init)
    elif method is None:
        method = choose_method(data, accelerator)
    if not isinstance(method, MaskedImageModel):
        with keyed_random_state(seed, "weights"):
            made = as_published(method, recipe)()
        if not isinstance(made, MaskedImageModel):
            raise ValueError(f"method makes a {type(made).__name__}, no method.")
        method = made
    if init is not None and takes_weights:
        with keyed_random_state(seed, "init"):
            start_from(method, init)
    return method


class Choice(NamedTuple):
    """Optimiser settings, and mean and deviation of the images if they were chosen."""

    settings: Recipe
    normalize: dict[str, list[float]] | None


def choose_as_before(
    method: MaskedImageModel,
    run: RunDirectory,
    stored: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Choice:
    """Returns what a run chose when it began, which is its own.

    Args:
        method:
            The method, which is made to suit the images as it was then.
        run:
            The run.
        stored:
            Its configuration.
        arguments:
            Arguments of `pretrain`.
    """
    recipe = stored_recipe(run, stored) if arguments["recipe"] is None else None
    timed = arguments["minutes"] is not None
    measured = {"epochs": stored["recipe"]["epochs"]} if timed else {}
    settings = settings_of(method, {**arguments, **measured}, recipe)
    if arguments["recipe"] is None:
        suit_as_before(method, stored)
    return Choice(settings, arguments["normalize"] or stored.get("normalize"))


def choose_for_images(
    method: MaskedImageModel, images: PretrainingImages, arguments: Mapping[str, Any]
) -> Choice:
    """Returns what suits the images of a run that begins.

    Args:
        method:
            The method, which is made to suit them.
        images:
            Training and validation images.
        arguments:
            Arguments of `pretrain`.
    """
    provisional = {} if arguments["minutes"] is None else {"warmup_epochs": None}
    settings = settings_of(
        method, {**arguments, **provisional}, num_images=images.num_images
    )
    normalize = arguments["normalize"]
    pictures = images.pixels() if arguments["recipe"] is None else None
    if pictures is not None:
        method.suit(brightness_share(pictures))
        if normalize is None and statistics_are_open(method.encoder):
            normalize = channel_statistics(pictures)
    if normalize is None and arguments["init"] is not None:
        # A run that goes on does not read the weights again, which say it.
        mean, std = method.encoder.mean, method.encoder.std
        normalize = {"mean": list(mean), "std": list(std)}
    return Choice(settings, normalize)
