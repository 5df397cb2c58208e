"""The layout of MAE's official code: a timm ViT, and a decoder with prefixed names.

Its files of the encoder alone and its fine-tuned ones are in timm's own layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightly_mim.checkpoints.reading import Content
from lightly_mim.checkpoints.shapes import count, encoder_of, is_encoder
from lightly_mim.checkpoints.weights import Weights

DECODER = (
    ("decoder_embed.", "decoder_embed."),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "head."),
    ("mask_token", "decoder.mask_token"),
)
_NUM_HEADS = 16  # of the decoder of all published models
LICENCE = "CC-BY-NC 4.0, if they are Meta's own weights of MAE or began with them"


def read(content: Content, num_heads: int | None = None) -> Weights | None:
    """Returns the weights of a file in this layout, None for one in another.

    Args:
        content:
            What is in the file.
        num_heads:
            See `lightly_mim.checkpoints.shapes.encoder_of`.
    """
    tensors = content.tensors
    full = {"decoder_embed.weight", "decoder_pred.weight", "decoder_pos_embed"}
    if not is_encoder(tensors) or not full <= tensors.keys():
        return None
    taken = {theirs for theirs, _ in _pairs(tensors, DECODER)}
    encoder = {name: t for name, t in tensors.items() if name not in taken}
    parts = decoder_parts(tensors, DECODER)
    options = decoder_options(parts)
    normalised = getattr(content.beside.get("args"), "norm_pix_loss", None)
    notes: tuple[str, ...] = ()
    if normalised is None:
        notes = (
            "The file does not say whether normalised pixels were predicted, as in "
            "MAE's own training: pass target=Pixels() for mae_visualize_ files.",
        )
    else:
        target = "PatchNormalizedPixels" if normalised else "Pixels"
        options["target"] = {"class_path": f"lightly_mim.targets.{target}"}
    spec = encoder_of(encoder, num_heads, pos_embed="sincos")
    return Weights(
        "official MAE",
        spec,
        encoder,
        method="MAE",
        options=options,
        parts=parts,
        licence=LICENCE,
        notes=notes,
    )


def decoder_parts(
    tensors: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    """Returns the weights of a decoder under our names.

    Args:
        tensors:
            Weights by their names in the file.
        names:
            How names begin in the file, and how they do here.
    """
    return {ours: tensors[theirs] for theirs, ours in _pairs(tensors, names)}


def _pairs(
    tensors: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]
) -> list[tuple[str, str]]:
    return [
        (name, ours + name.removeprefix(theirs))
        for name in tensors
        for theirs, ours in names
        if name.startswith(theirs)
    ]


def decoder_options(
    parts: Mapping[str, Tensor], num_heads: int = _NUM_HEADS
) -> dict[str, Any]:
    """Returns the arguments of `MAE` that make such a decoder.

    Args:
        parts:
            The weights of a decoder under our names.
        num_heads:
            Number of its attention heads.

    Raises:
        ValueError: If its width does not divide into the heads.
    """
    dim = len(parts["decoder_embed.weight"])
    if dim % num_heads:
        raise ValueError(
            f"A decoder of the official layout has {num_heads} attention heads, which "
            f"{dim} channels do not divide into."
        )
    return {
        "decoder_dim": dim,
        "decoder_depth": count(parts, "decoder.blocks."),
        "decoder_num_heads": num_heads,
    }
