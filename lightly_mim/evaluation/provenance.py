"""What it takes to run an evaluation again: its arguments, versions and device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lightly_mim.files import printable


def choose_device(device: str | None) -> torch.device:
    """Returns the device of that name, by default the accelerator if there is one.

    Raises:
        ValueError: If PyTorch cannot compute there.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"PyTorch cannot compute on device={device!r} here: {error}"
            ) from error
        return torch.device(device)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def probe_device(device: torch.device) -> torch.device:
    """Returns where probes compute when encoders do it on a device.

    In float64 in places, which Apple's accelerator does not know.
    """
    return device if device.type == "cuda" else torch.device("cpu")


def model_name(encoder: Any, model: Any) -> str:
    """Returns what a table calls what `load_encoder` made of the user's encoder."""
    if isinstance(encoder, nn.Module):
        inner = getattr(model, "vit", getattr(model, "model", model))
        return model.name or type(inner).__name__
    return str(encoder)


def to_json(value: Any) -> Any:
    """Returns what a record shows of an argument."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(entry) for name, entry in vars(value).items()}
    if isinstance(value, (list, tuple, range)):
        return [to_json(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return to_json(value.tolist())
    if isinstance(value, os.PathLike):
        return str(value)
    return getattr(value, "__qualname__", None) or describe_data(value)


def describe_data(data: Any) -> str:
    """Returns what a message calls a folder, a name or a data set."""
    if isinstance(data, (str, os.PathLike)):
        return f"'{printable(os.fspath(data))}'"
    return f"the {type(data).__name__}"


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that make the numbers."""
    packages = (
        "lightly-mim",
        "lightly",
        "numpy",
        "pillow",
        "scikit-learn",
        "timm",
        "torch",
        "torchvision",
    )
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions}


def evaluation_record(
    given: Mapping[str, Any],
    chosen: Mapping[str, Any],
    encoder: Mapping[str, Any],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what it takes to run an evaluation again, see `Results.record`.

    `given` are the arguments by name, with those of `load_encoder` as `loading`;
    `chosen` are the protocols by name, and `encoder` is what `describe_encoder` says.
    """
    plain = {name: value for name, value in given.items() if name != "loading"}
    plain |= {"protocols": list(chosen)} | dict(chosen) | dict(given["loading"])
    return {
        "command": shlex.join(sys.orig_argv),
        "arguments": {name: to_json(value) for name, value in plain.items()},
        "encoder": dict(encoder),
        "data": dict(data),
        "versions": package_versions(),
    }
