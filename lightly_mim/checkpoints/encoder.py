"""The encoder alone, as one safetensors file under timm's own parameter names.

timm's own models load it, `model.load_state_dict(safetensors.torch.load_file(path))`,
for a model without classifier. The file's metadata says which model that is.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightly_mim.encoders import MaskedEncoder
from lightly_mim.files import atomic_write
from lightly_mim.runs import RunDirectory

_METADATA_KEY = "lightly_mim"


class EncoderCheckpoint(NamedTuple):
    """What a file of an encoder holds.

    Attributes:
        state_dict:
            The weights of the timm model, under timm's names, on the CPU.
        spec:
            What `lightly_mim.encoders.masked_encoder` builds the encoder from: `name`
            (None if the model was passed by hand), `img_size`, `in_chans`, `options`
            and `pos_embed`; besides `mean` and `std` of the images, the `pool` of the
            encoder and the `version` of lightly_mim that wrote the file.
    """

    state_dict: dict[str, Tensor]
    spec: dict[str, Any]


def encoder_spec(encoder: MaskedEncoder) -> dict[str, Any]:
    """Returns what to build an encoder from, see `EncoderCheckpoint`.

    Args:
        encoder:
            The encoder.
    """
    return {
        "name": encoder.name,
        "img_size": list(encoder.img_size),
        "in_chans": encoder.in_chans,
        "options": encoder.options,
        "pos_embed": encoder.pos_embed,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "pool": encoder.pool,
        "version": importlib.metadata.version("lightly-mim"),
    }


def save_encoder(encoder: MaskedEncoder, path: Path | str) -> None:
    """Writes the weights of the timm model inside an encoder.

    The mask token is not part of the timm model and is left out. The file appears as a
    whole or not at all.

    Args:
        encoder:
            The encoder, on any device.
        path:
            The file to write, by convention ending with `.safetensors`.

    Raises:
        OSError: If the file cannot be written. What was there before is left as it was.
    """
    metadata = {_METADATA_KEY: json.dumps(encoder_spec(encoder))}
    # Clones, since safetensors refuses parameters that share their memory.
    weights = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in encoder.vit.state_dict().items()
    }
    try:
        with atomic_write(path) as temporary:
            save_file(weights, temporary, metadata)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"Cannot write {path}: {error}") from error


def read_encoder(path: Path | str) -> EncoderCheckpoint:
    """Reads a file that `save_encoder` wrote.

    Args:
        path:
            The file, or a run directory with an `encoder.safetensors`.

    Returns:
        The weights, and what to build the encoder from.

    Raises:
        ValueError: If there is no such file, if it is damaged, or if it was written by
            something else.
    """
    file = _find_encoder(Path(path))
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            weights = {name: content.get_tensor(name) for name in content.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file: {error}. Copy it again, or "
            "write it again with lightly_mim.checkpoints.save_encoder."
        ) from error
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{file} holds weights but does not say of which encoder: lightly_mim did "
            "not write it. Build the model, load the weights with "
            "safetensors.torch.load_model, and pass the model itself."
        )
    return EncoderCheckpoint(weights, json.loads(metadata[_METADATA_KEY]))


def _find_encoder(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; the directory of a run, or a .safetensors file of "
            "an encoder, is expected."
        )
    run = RunDirectory(path)
    if run.encoder.is_file():
        return run.encoder
    if run.finished:
        state = "The run has finished, so the file was moved or deleted since."
    else:
        state = (
            "The run has not finished, or this is not the directory of a run: the "
            "encoder is written at the end. Resume the run to finish it."
        )
    raise ValueError(f"There is no {run.encoder.name} in {path}. {state}")
