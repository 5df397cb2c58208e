"""State dicts of official files: names and shapes as published, random values."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def rand(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape)


def linear(name: str, rows: int, columns: int, bias: bool = True) -> State:
    weights = {f"{name}.weight": rand(rows, columns)}
    return weights | ({f"{name}.bias": rand(rows)} if bias else {})


def norm(name: str, dim: int) -> State:
    return {f"{name}.weight": 1 + rand(dim), f"{name}.bias": rand(dim)}


def block(name: str, dim: int, qkv_bias: bool = True) -> State:
    return {
        **norm(f"{name}.norm1", dim),
        **linear(f"{name}.attn.qkv", 3 * dim, dim, bias=qkv_bias),
        **linear(f"{name}.attn.proj", dim, dim),
        **norm(f"{name}.norm2", dim),
        **linear(f"{name}.mlp.fc1", 4 * dim, dim),
        **linear(f"{name}.mlp.fc2", dim, 4 * dim),
    }


def embedding(name: str, dim: int, patch: int) -> State:
    return {f"{name}.proj.weight": rand(dim, 3, patch, patch)} | {
        f"{name}.proj.bias": rand(dim)
    }


def mae(
    full: bool = True, tuned: bool = False, dim: int = 192, width: int = 32
) -> State:
    """MAE's ViT at 64 pixels; 192 wide, as its heads are not in the file."""
    state = {
        "cls_token": rand(1, 1, dim),
        "pos_embed": rand(1, 17, dim),
        **embedding("patch_embed", dim, 16),
        **block("blocks.0", dim),
        **block("blocks.1", dim),
    }
    if tuned:
        return state | norm("fc_norm", dim) | linear("head", 10, dim)
    state |= norm("norm", dim)
    if full:
        state |= {
            "mask_token": rand(1, 1, width),
            "decoder_pos_embed": rand(1, 17, width),
            **linear("decoder_embed", width, dim),
            **block("decoder_blocks.0", width),
            **norm("decoder_norm", width),
            **linear("decoder_pred", 768, width),
        }
    return state


def beit_block(name: str, dim: int) -> State:
    return {
        **block(name, dim, qkv_bias=False),
        f"{name}.attn.q_bias": rand(dim),
        f"{name}.attn.v_bias": rand(dim),
        f"{name}.gamma_1": 1 + rand(dim),
        f"{name}.gamma_2": 1 + rand(dim),
    }


def simmim_vit(tuned: bool = False, dim: int = 32, heads: int = 2) -> State:
    """SimMIM's ViT at 64 pixels, one shared table."""
    state = {
        "cls_token": rand(1, 1, dim),
        **embedding("patch_embed", dim, 16),
        **beit_block("blocks.0", dim),
        **beit_block("blocks.1", dim),
    }
    index = torch.zeros(17, 17, dtype=torch.int64)
    if tuned:
        for number in range(2):
            name = f"blocks.{number}.attn.relative_position"
            state |= {f"{name}_bias_table": rand(52, heads), f"{name}_index": index}
        return state | norm("fc_norm", dim) | linear("head", 10, dim)
    name = "rel_pos_bias.relative_position"
    state |= {f"{name}_bias_table": rand(52, heads), f"{name}_index": index}
    state |= {"mask_token": rand(1, 1, dim), **norm("norm", dim)}
    return {f"encoder.{n}": t for n, t in state.items()} | {
        "decoder.0.weight": rand(768, dim, 1, 1),
        "decoder.0.bias": rand(768),
    }


def swin(
    second: bool = False, tuned: bool = False, window: int = 4, dim: int = 16
) -> State:
    """SimMIM's Swin or SwinV2 of two stages at 32 * window / 4 pixels."""
    state = {
        **embedding("patch_embed", dim, 4),
        **norm("patch_embed.norm", dim),
        **norm("norm", 2 * dim),
    }
    for stage, heads in enumerate((1, 2)):
        width = dim * 2**stage
        for number in range(2):
            name = f"layers.{stage}.blocks.{number}"
            state |= block(name, width, qkv_bias=not second)
            index = torch.zeros(window**2, window**2, dtype=torch.int64)
            state[f"{name}.attn.relative_position_index"] = index
            side = 2 * window - 1
            if second:
                state |= {
                    f"{name}.attn.q_bias": rand(width),
                    f"{name}.attn.v_bias": rand(width),
                    f"{name}.attn.logit_scale": 2 + rand(heads, 1, 1),
                    f"{name}.attn.relative_coords_table": coordinates(window, window),
                    **linear(f"{name}.attn.cpb_mlp.0", 512, 2),
                    f"{name}.attn.cpb_mlp.2.weight": rand(heads, 512),
                }
            else:
                table = rand(side**2, heads)
                state[f"{name}.attn.relative_position_bias_table"] = table
            if number and not stage:  # the last stage is one window
                state[f"{name}.attn_mask"] = torch.zeros(4, window**2, window**2)
    state["layers.0.downsample.reduction.weight"] = rand(2 * dim, 4 * dim)
    state |= norm("layers.0.downsample.norm", 2 * dim if second else 4 * dim)
    if tuned:
        return state | linear("head", 10, 2 * dim)
    state["mask_token"] = rand(1, 1, dim)
    return {f"encoder.{n}": t for n, t in state.items()} | {
        "decoder.0.weight": rand(192, 2 * dim, 1, 1),
        "decoder.0.bias": rand(192),
    }


def coordinates(window: int, unit: int) -> Tensor:
    steps = 8 * torch.arange(1 - window, window) / (unit - 1)
    steps = steps.sign() * torch.log2(steps.abs() + 1) / 3
    pairs = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack(pairs, dim=-1)[None]
