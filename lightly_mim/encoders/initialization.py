"""The laws that the weights of a new encoder are drawn by, and its fixed positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from lightly_mim.encoders.base import MaskedEncoder
from lightly_mim.patches import sincos_positions

Init = Literal["timm", "mae", "simmim"]
PosEmbed = Literal["learned", "sincos"]

_STD = 0.02


def initialize(
    encoder: MaskedEncoder, init: Init, pos_embed: PosEmbed | None = None
) -> None:
    """Draws the weights of an encoder that timm has just built.

    - "timm" leaves them as timm drew them.
    - "mae" is the law of MAE's code (https://arxiv.org/abs/2111.06377, appendix A.1):
      linear layers, and the patch embedding as one, are Xavier uniform with biases of
      zero, class token and registers normal with deviation 0.02, absolute positions
      fixed sines and cosines. The bias of the patch embedding, a convolution, keeps
      PyTorch's default.
    - "simmim" is that of SimMIM's code (https://github.com/microsoft/SimMIM). In a ViT,
      linear layers, the patch embedding, tokens and absolute positions are normal with
      deviation 0.02 and cut off at 0.02, which leaves a deviation of 0.0108. What the
      attention and the MLP of the i-th block (from 1) add to the tokens is divided by
      sqrt(2 i). Biases are zero, and so are, as in timm, tables of relative positions.
      A Swin is drawn as timm does it.

    A mask token that is added later follows the law, too.

    Args:
        encoder:
            The encoder.
        init:
            The law.
        pos_embed:
            What becomes of absolute positions, see `set_positions`. None for the law's.

    Raises:
        ValueError: If the blocks are of a kind that the law does not know, or if there
            are no positions to set.
    """
    encoder.init = init
    if init == "mae":
        _as_mae(encoder)
        if pos_embed is None and getattr(encoder.vit, "pos_embed", None) is not None:
            pos_embed = "sincos"
    elif init == "simmim" and not isinstance(
        encoder.vit, SwinTransformer | SwinTransformerV2
    ):
        _as_simmim(encoder)
    if pos_embed is not None:
        set_positions(encoder, pos_embed)


def set_positions(encoder: MaskedEncoder, pos_embed: PosEmbed) -> None:
    """Makes the absolute positions learned, or fixed sines and cosines.

    Args:
        encoder:
            The encoder.
        pos_embed:
            "learned" or "sincos".

    Raises:
        ValueError: If it is another word, or if there are no absolute positions.
    """
    if pos_embed not in get_args(PosEmbed):
        raise ValueError(
            f"pos_embed is 'learned', 'sincos' or None, got '{pos_embed}'."
        )
    positions: nn.Parameter | None = getattr(encoder.vit, "pos_embed", None)
    if positions is None:
        raise ValueError(
            f"{type(encoder.vit).__name__} was built without absolute positions, got "
            f"pos_embed='{pos_embed}'. Leave pos_embed out."
        )
    if pos_embed == "sincos":
        # With no_embed_class, prefix tokens have no positions.
        num_prefix = positions.shape[1] - math.prod(encoder.grid)
        with torch.no_grad():
            positions.copy_(
                sincos_positions(encoder.grid, encoder.embed_dim, num_prefix)
            )
    positions.requires_grad_(pos_embed == "learned")
    encoder.pos_embed = pos_embed


def _as_mae(encoder: MaskedEncoder) -> None:
    vit = encoder.vit
    for layer in _linear_layers(vit):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
    for name in ("cls_token", "reg_token"):
        token = getattr(vit, name, None)
        if token is not None:
            nn.init.normal_(token, std=_STD)


def _as_simmim(encoder: MaskedEncoder) -> None:
    vit = encoder.vit
    for layer in (vit.patch_embed.proj, *_linear_layers(vit)):
        _truncated_normal(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for name in ("cls_token", "reg_token", "pos_embed"):
        tokens = getattr(vit, name, None)
        if tokens is not None:
            _truncated_normal(tokens)
    try:
        vit.fix_init_weight()  # divides what each block adds
    except AttributeError as error:
        raise ValueError(
            f"init='simmim' is made for blocks with attn.proj and mlp.fc2, got "
            f"{type(vit.blocks[0]).__name__}: {error}. Use init='timm'."
        ) from error


def _linear_layers(vit: nn.Module) -> Iterator[nn.Linear]:
    return (layer for layer in vit.modules() if isinstance(layer, nn.Linear))


def _truncated_normal(weights: Tensor) -> None:
    nn.init.trunc_normal_(weights, std=_STD, a=-_STD, b=_STD)
