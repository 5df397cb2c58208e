"""The layout of lightly's Lightning checkpoints of its MAE benchmark.

`backbone` is its `MaskedVisionTransformerTIMM`. The decoder is its
`MaskedVisionTransformerDecoderTIMM` between `decoder_embed` and `prediction_head`, or,
before lightly 1.6, its `MAEDecoderTIMM`, which has all in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightly_mim.checkpoints.mae import DECODER, decoder_options, decoder_parts
from lightly_mim.checkpoints.reading import Content
from lightly_mim.checkpoints.shapes import encoder_of, is_encoder
from lightly_mim.checkpoints.weights import Weights

_VIT = "backbone.vit."
_TOKEN = "backbone.mask_token"
_NEW = (
    ("decoder_embed.", "decoder_embed."),
    ("decoder.", "decoder."),
    ("prediction_head.", "head."),
)
_OLD = tuple((f"decoder.{theirs}", ours) for theirs, ours in DECODER)
_LEFT_OUT = ("online_classifier.", f"{_VIT}head.")


def read(content: Content, num_heads: int | None = None) -> Weights | None:
    """Returns the weights of a file in this layout, None for one in another.

    Args:
        content:
            What is in the file.
        num_heads:
            See `lightly_mim.checkpoints.shapes.encoder_of`.
    """
    tensors = content.tensors
    left_out = tuple(name for name in tensors if name.startswith(_LEFT_OUT))
    encoder = {
        name.removeprefix(_VIT): tensor
        for name, tensor in tensors.items()
        if name.startswith(_VIT) and name not in left_out
    }
    if not is_encoder(encoder):
        return None
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(_VIT) and name not in left_out and name != _TOKEN
    }
    parts = decoder_parts(rest, _NEW if "decoder_embed.weight" in rest else _OLD)
    whole = "decoder_embed.weight" in parts and len(parts) == len(rest)
    if rest and not whole:
        raise ValueError(
            f"{content.path} holds an encoder of lightly's and parts that are not of "
            f"its MAE benchmark: {', '.join(sorted(rest)[:5])}, ..."
        )
    # lightly's wrapper has one in any case, which MAE never trains.
    token = tensors.get(_TOKEN)
    if token is not None and (rest or not token.any()):
        token, left_out = None, (*left_out, _TOKEN)
    options: dict[str, Any] = {}
    if rest:
        target = {"class_path": "lightly_mim.targets.Pixels"}
        options = decoder_options(parts) | {"target": target}
    return Weights(
        "lightly's benchmark of MAE" if rest else "lightly",
        encoder_of(encoder, num_heads),
        encoder,
        token,
        "MAE" if rest else None,
        options,
        parts,
        left_out,
    )


def write(
    encoder: dict[str, Tensor],
    mask_token: Tensor | None,
    parts: dict[str, Tensor],
    version: str,
) -> dict[str, Any]:
    """Returns a Lightning checkpoint of an encoder and, of MAE, its decoder.

    Args:
        encoder:
            The weights of the timm model, under timm's names.
        mask_token:
            The encoder's mask token. lightly's wrapper has one in any case; zeros if
            None.
        parts:
            The weights of MAE's decoder under our names, or none.
        version:
            Lightning's.
    """
    state = {_VIT + name: tensor for name, tensor in encoder.items()}
    if mask_token is None:
        mask_token = torch.zeros(1, 1, len(encoder["patch_embed.proj.weight"]))
    state[_TOKEN] = mask_token
    for name, tensor in parts.items():
        theirs = next(t for t, ours in _NEW if name.startswith(ours))
        ours = dict(_NEW)[theirs]
        state[theirs + name.removeprefix(ours)] = tensor
    return {
        "state_dict": state,
        "pytorch-lightning_version": version,
        "epoch": 0,
        "global_step": 0,
    }
