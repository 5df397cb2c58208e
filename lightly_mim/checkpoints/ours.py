"""Our own layouts: a run directory, its last checkpoint, and the encoder's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightly_mim.checkpoints.encoder import (
    CHECKSUM,
    ENCODER_KEY,
    METADATA_KEY,
    checkpoint_remedy,
    encoder_in_checkpoint,
    encoder_in_file,
    read_encoder,
)
from lightly_mim.checkpoints.reading import Content, read_content
from lightly_mim.checkpoints.weights import Weights
from lightly_mim.runs import RunDirectory

METHOD_KEY = "method"  # in a checkpoint, the method as config.yaml writes it
_METHOD = "method."
_VIT = "encoder.vit."
_TOKEN = "encoder.mask_token"


def read_run(path: Path, parts: bool = True) -> Weights:
    """Returns the weights of a run: of its last checkpoint, which holds all of them.

    Args:
        path:
            The directory of the run.
        parts:
            Whether to read more than the encoder.

    Raises:
        ValueError: If there are none, or if a file is damaged.
    """
    run = RunDirectory(path)
    state: Mapping[str, Tensor] = {}
    stored = run.stored_config() or {}
    described = stored.get("method")
    if not (parts and run.checkpoint.is_file()):
        encoder, spec = read_encoder(path)
    else:
        content = read_content(run.checkpoint, checkpoint_remedy(run.checkpoint))
        state = content.tensors
        described = _described(content) or described
        said = content.beside.get(ENCODER_KEY)
        # The encoder's file of a finished run says that it is.
        if run.encoder.is_file() or not isinstance(said, str):
            encoder, spec = read_encoder(path)
        else:
            encoder, spec = encoder_in_checkpoint(run.checkpoint, said, state)
    return _weights(f"the run {path}", spec, encoder, state, described)


def read(content: Content, num_heads: int | None = None) -> Weights | None:
    """Returns the weights of a file in our layouts, None for one in another.

    Args:
        content:
            What is in the file.
        num_heads:
            Not used: the file tells it.
    """
    # Also where a bit of the key has changed, which is then said.
    is_encoder = METADATA_KEY in content.metadata or any(
        CHECKSUM in said for said in content.metadata.values()
    )
    said = content.beside.get(ENCODER_KEY)
    is_checkpoint = isinstance(said, str)
    if not (is_encoder or is_checkpoint):
        return None
    path, tensors = content.path, content.tensors
    encoder, spec = (
        encoder_in_checkpoint(path, said, tensors)
        if isinstance(said, str)
        else encoder_in_file(path, content.metadata, tensors)
    )
    state = tensors if is_checkpoint else {}
    layout = f"lightly_mim's {'checkpoint' if is_checkpoint else 'encoder'}"
    return _weights(layout, spec, encoder, state, _described(content))


def _described(content: Content) -> Any:
    try:
        return json.loads(content.beside.get(METHOD_KEY) or "null")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{content.path} is damaged: what it says of its method is no JSON."
        ) from error


def _weights(
    layout: str,
    spec: dict[str, Any],
    encoder: dict[str, Tensor],
    state: Mapping[str, Tensor],
    described: Any,
) -> Weights:
    """Returns the weights with the method that is described, if one is."""
    parts = {
        name.removeprefix(_METHOD): tensor
        for name, tensor in state.items()
        if name.startswith(_METHOD)
        and not name.startswith((_METHOD + _VIT, _METHOD + _TOKEN))
    }
    token = state.get(_METHOD + _TOKEN)
    if not isinstance(described, Mapping) or not isinstance(
        described.get("class_path"), str
    ):
        return Weights(layout, spec, encoder, token)
    arguments = {
        **(described.get("init_args") or {}),
        **(described.get("dict_kwargs") or {}),
    }
    # The encoder is described by its own file.
    own = {"encoder", "img_size", "in_chans", "init", "pos_embed", "pretrained"}
    options = {
        name: value
        for name, value in arguments.items()
        if name not in {*own, *spec["options"]}
    }
    return Weights(
        layout, spec, encoder, token, described["class_path"], options, parts
    )
