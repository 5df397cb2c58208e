"""The encoder alone, as one safetensors file under timm's own parameter names.

timm's own models load it, `model.load_state_dict(safetensors.torch.load_file(path))`,
for a model without classifier. The file's metadata says which model that is.

Until a run has come to its end, its last checkpoint holds the encoder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightly_mim.checkpoints.spec import read_spec
from lightly_mim.checkpoints.whole import check_claims, load_whole
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.files import atomic_write
from lightly_mim.runs import RunDirectory

METADATA_KEY = "lightly_mim"
# Ends what a file says of its encoder. A key of its own would be before or behind the
# other one by chance, and the same weights would make other files.
CHECKSUM = ', "sha256": "'
ENCODER_KEY = "encoder"  # in a checkpoint, what `encoder_spec` says
_WEIGHTS = "method.encoder.vit."  # what a checkpoint calls them


class EncoderCheckpoint(NamedTuple):
    """What a file of an encoder holds.

    Attributes:
        state_dict:
            The weights of the timm model, under timm's names, on the CPU.
        spec:
            What `lightly_mim.encoders.masked_encoder` builds the encoder from: `name`
            (None if the model was passed by hand), `img_size`, `in_chans`, `options`,
            `pos_embed` and `init`; besides `mean` and `std` of the images, the `pool`
            of the encoder and the `version` of lightly_mim that wrote the file.
            `unfinished`, see `MaskedEncoder`, if the weights are of a run that had not
            come to its end. `value_range` and `tables`, see there, where they are not
            the default, and `norm_eps`, where there is one.
    """

    state_dict: dict[str, Tensor]
    spec: dict[str, Any]


def encoder_spec(encoder: MaskedEncoder) -> dict[str, Any]:
    """Returns what to build an encoder from, see `EncoderCheckpoint`.

    Args:
        encoder:
            The encoder.
    """
    spec: dict[str, Any] = {
        "name": encoder.name,
        "img_size": list(encoder.img_size),
        "in_chans": encoder.in_chans,
        "options": encoder.options,
        "pos_embed": encoder.pos_embed,
        "init": encoder.init,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "pool": encoder.pool,
        "version": importlib.metadata.version("lightly-mim"),
    }
    if encoder.unfinished is not None:
        spec["unfinished"] = encoder.unfinished
    if encoder.value_range is not None:
        spec["value_range"] = list(encoder.value_range)
    if encoder.tables != "timm":
        spec["tables"] = encoder.tables
    if encoder.norm_eps is not None:
        spec["norm_eps"] = encoder.norm_eps
    return spec


def put_encoder(
    encoder: MaskedEncoder,
    checkpoint: dict[str, Any],
    unfinished: dict[str, int | None] | None,
) -> None:
    """Lets a checkpoint of `Pretraining` say which encoder its weights are of.

    Args:
        encoder:
            The encoder.
        checkpoint:
            What Lightning is about to save.
        unfinished:
            Where the run is, see `MaskedEncoder`. None at its end.
    """
    spec = encoder_spec(encoder)
    if unfinished is not None:
        spec["unfinished"] = unfinished
    checkpoint[ENCODER_KEY] = json.dumps(spec)


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
    spec = json.dumps(encoder_spec(encoder))
    # Clones, since safetensors refuses parameters that share their memory.
    weights = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in encoder.vit.state_dict().items()
    }
    checksum = hash_tensors(sorted(weights.items()), spec)
    metadata = {METADATA_KEY: f'{spec[:-1]}{CHECKSUM}{checksum}"}}'}
    try:
        with atomic_write(path) as temporary:
            save_file(weights, temporary, metadata)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"Cannot write {path}: {error}") from error


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """Returns the SHA-256 of tensors, their names, shapes and types included.

    Args:
        tensors:
            Names and tensors, on any device, in the order of their names.
        text:
            What is hashed before them.
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def read_encoder(path: Path | str) -> EncoderCheckpoint:
    """Reads a file that `save_encoder` wrote, or the encoder in a checkpoint.

    Args:
        path:
            The file, a checkpoint of `Pretraining`, or the directory of a run, of which
            `encoder.safetensors` is read, and the last checkpoint until that is there.

    Returns:
        The weights, and what to build the encoder from.

    Raises:
        ValueError: If there is no such file, if it is damaged, if it was written by
            something else, or if what it says of its encoder does not fit its weights.
    """
    file = _find_encoder(Path(path))
    if _is_pytorch(file):
        return _read_checkpoint(file)
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            weights = {name: content.get_tensor(name) for name in content.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged or not a safetensors file: {error}. {_REMEDY}"
        ) from error
    return encoder_in_file(file, metadata, weights)


def encoder_in_file(
    file: Path, metadata: Mapping[str, str], weights: dict[str, Tensor]
) -> EncoderCheckpoint:
    """Returns the encoder in what was read of a file that `save_encoder` wrote.

    Args:
        file:
            The file, for the error message.
        metadata:
            What it says beside its tensors.
        weights:
            Its tensors.

    Raises:
        ValueError: See `read_encoder`.
    """
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{file} holds weights but does not say of which encoder: lightly_mim did "
            "not write it. Build the model, load the weights with "
            "safetensors.torch.load_model, and pass the model itself."
        )
    spec, end, checksum = metadata[METADATA_KEY].rpartition(CHECKSUM)
    if not end:  # of an earlier version
        return _checked(file, weights, checksum)
    spec += "}"
    if checksum != hash_tensors(sorted(weights.items()), spec) + '"}':
        raise ValueError(f"{file} is damaged: its checksum is another. {_REMEDY}")
    return _checked(file, weights, spec)


def encoder_in_checkpoint(
    file: Path, said: str, state: Mapping[str, Any]
) -> EncoderCheckpoint:
    """Returns the encoder in what was read of a checkpoint of `Pretraining`.

    Args:
        file:
            The file, for the error message.
        said:
            What it says of its encoder, under `ENCODER_KEY`.
        state:
            Its state dict.

    Raises:
        ValueError: See `read_encoder`.
    """
    weights = {
        name.removeprefix(_WEIGHTS): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and str(name).startswith(_WEIGHTS)
    }
    check_claims(file, weights)
    return _checked(file, weights, said)


def checkpoint_remedy(file: Path) -> str:
    """Returns what to do if a checkpoint of a run is damaged, one sentence.

    Args:
        file:
            The checkpoint.
    """
    previous = RunDirectory(file.absolute().parent.parent).previous
    return "Copy it again" + (
        f", or take the one before it, {previous}."
        if previous.exists() and previous != file.absolute()
        else ", or evaluate encoder.safetensors, if the run has finished."
    )


_REMEDY = (
    "Copy it again; of a run of your own, its checkpoints/last.ckpt holds the encoder "
    "as well."
)


def _checked(file: Path, weights: dict[str, Tensor], text: str) -> EncoderCheckpoint:
    try:
        return EncoderCheckpoint(weights, read_spec(text, weights))
    except ValueError as error:
        raise ValueError(
            f"{file} is not a file that lightly_mim wrote: {error}. Build the model, "
            "load the weights, and pass the model itself."
        ) from error


def _is_pytorch(file: Path) -> bool:
    """Returns whether a file begins like one of `torch.save`: a zip, or a pickle."""
    with file.open("rb") as content:
        head = content.read(9)
    # A safetensors file begins with the length of its header, in eight bytes, and "{".
    return head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[8:] != b"{")


def _read_checkpoint(file: Path) -> EncoderCheckpoint:
    foreign = (
        f"{file} is a PyTorch file, and not a checkpoint of a run of lightly_mim that "
        "says which encoder it holds. Build the model, load the weights with "
        "torch.load(..., weights_only=True) and load_state_dict, and pass the model "
        "itself. A run that an earlier version began says it once it has gone on with "
        "resume."
    )
    checkpoint = load_whole(file, remedy=checkpoint_remedy(file), foreign=foreign)
    known = isinstance(checkpoint, dict) and {ENCODER_KEY, "state_dict"} <= (
        checkpoint.keys()
    )
    if not known or not isinstance(checkpoint[ENCODER_KEY], str):
        raise ValueError(foreign)
    said, state = checkpoint[ENCODER_KEY], dict(checkpoint["state_dict"])
    return encoder_in_checkpoint(file, said, state)


def _find_encoder(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist; the directory of a run, a .safetensors file of an "
            "encoder, or a checkpoint of a run is expected."
        )
    run = RunDirectory(path)
    for file in (run.encoder, run.checkpoint):
        if file.is_file():
            return file
    if run.finished:
        state = "The run has finished, so the file was moved or deleted since."
    elif run.config.is_file():
        state = "The run has not finished and has no checkpoint yet. Resume the run."
    else:
        state = (
            "It is neither the directory of a run, which has a config.yaml, nor a "
            "folder of weights with a config.json. Check the path."
        )
    raise ValueError(f"There is no {run.encoder.name} in {path}. {state}")
