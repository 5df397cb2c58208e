"""The arguments of `pretrain`: what is refused, and those of a run that goes on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightly_mim.checkpoints.hub import is_hub_name
from lightly_mim.config import from_config, is_named_only, to_config
from lightly_mim.files import is_same_place
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.optim import Recipe
from lightly_mim.runs import CHANGEABLE, Changes, RunDirectory


def refuse(arguments: Mapping[str, Any]) -> None:
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


def check_init(
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
    if stored is not None and not is_same_place(stored.get("init"), str(init)):
        raise ValueError(
            f"resume goes on with the run in {run.path}, which began with "
            f"init={stored.get('init')!r}, and init={str(init)!r} begins a run with "
            "other weights. Leave init out to go on; or leave resume out and pass "
            "another folder as out to begin."
        )


def run_arguments(
    run: RunDirectory, arguments: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of the run that is there, and those that were given.

    Args:
        run:
            The run directory.
        arguments:
            Arguments of `pretrain` by their names.
        defaults:
            Their defaults. What equals them counts as not given.
    """
    stored = run.stored_arguments()
    given = {
        name: value
        for name, value in arguments.items()
        if value is not defaults[name] and value != defaults[name]
    }
    complete = {
        name: value for name, value in stored.items() if name in defaults
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
        complete["recipe"] = stored_recipe(run, stored)
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


def stored_recipe(run: RunDirectory, stored: Mapping[str, Any]) -> Recipe:
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


def config_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
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


def withdrawal(changes: Changes) -> str:
    """Returns the sentence that takes back the promise of a resumed run."""
    said = "; ".join(
        f"{name} {was!r} -> {now!r}" for name, (was, now) in changes.items()
    )
    return (
        f"Going on with changes ({said}): this run does not end bit for bit as one "
        "that never was cut."
    )
