"""Every door in: weights in any layout that is known, recognised by their content."""

from __future__ import annotations

import json
from pathlib import Path

from lightly_mim.checkpoints import (
    huggingface,
    lightly_benchmark,
    mae,
    ours,
    simmim,
    timm_model,
)
from lightly_mim.checkpoints.hub import SUFFIXES
from lightly_mim.checkpoints.reading import read_content
from lightly_mim.checkpoints.spec import read_spec
from lightly_mim.checkpoints.weights import Weights
from lightly_mim.runs import RunDirectory

# timm's comes last: others hold its names.
_LAYOUTS = (ours, huggingface, lightly_benchmark, mae, simmim, timm_model)
KNOWN = (
    "a run directory, its encoder.safetensors or last.ckpt; an official file of MAE or "
    "SimMIM; a folder of Hugging Face transformers (ViTMAE, ViT, Swin, SwinV2, BEiT, "
    "Data2VecVision) or of timm, with config.json; a state dict of a timm model; a "
    "checkpoint of lightly's benchmark of MAE"
)


def read_weights(
    path: Path | str, num_heads: int | None = None, *, parts: bool = True
) -> Weights:
    """Reads weights in any layout that is known.

    Nothing in a file is executed, and names of files do not matter.

    Args:
        path:
            The file or the folder.
        num_heads:
            Number of attention heads, where neither the file nor its shapes tell it.
        parts:
            False leaves the last checkpoint of a run alone where the encoder has a file
            of its own.

    Raises:
        ValueError: If there is no such file, if it is damaged, holds more than weights
            and plain values, or is in a layout that is not known.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Weights are read from {KNOWN}.")
    if path.is_dir() and not (path / "config.json").is_file():
        file = _lone_file(path)
        if file is None:
            return ours.read_run(path, parts)
        path = file
    if not (path.is_file() or path.is_dir()):  # a pipe, which nobody fills
        raise ValueError(f"{path} is neither a file nor a folder.")
    content = read_content(path)
    for layout in _LAYOUTS:
        weights: Weights | None
        try:
            weights = layout.read(content, num_heads)
        except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
            # Shapes and settings that contradict each other.
            raise ValueError(
                f"{path} has the names of a known layout, and weights that do not fit "
                f"it: {type(error).__name__}: {error}"
            ) from error
        if weights is not None:
            return _checked(weights, path)
    some = ", ".join(sorted(content.tensors)[:5])
    raise ValueError(
        f"{path} holds weights in a layout that is not known ({some}, ...). Known are "
        f"{KNOWN}. Otherwise build the model, load them, and pass the model itself."
    )


def _lone_file(folder: Path) -> Path | None:
    """Returns the one file of weights in a folder that is no run's.

    `convert` writes such a folder in lightly's layout.
    """
    run = RunDirectory(folder)
    if any(each.exists() for each in (run.config, run.encoder, run.checkpoint)):
        return None
    files = [each for each in folder.iterdir() if each.suffix in SUFFIXES]
    return files[0] if len(files) == 1 and files[0].is_file() else None


def _checked(weights: Weights, path: Path) -> Weights:
    """Returns weights whose description builds nothing but what it says."""
    try:
        spec = read_spec(json.dumps(weights.spec), weights.encoder)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} describes an encoder that cannot be built: {error}."
        ) from error
    return weights._replace(spec=spec)
