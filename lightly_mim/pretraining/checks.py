"""What `pretrain` would refuse, found without images, weights or files."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lightly_mim.arguments import check_arguments
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.pretraining.arguments import refuse
from lightly_mim.pretraining.entry import pretrain
from lightly_mim.pretraining.images import check_shares
from lightly_mim.settings import as_published, settings_of


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
    refuse(check_arguments(pretrain, given) | {"data": ""})
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
        check_shares(
            settings.batch_size, devices * (nodes or 1), arguments["accumulate"]
        )
    method.check_masking()
    return method
