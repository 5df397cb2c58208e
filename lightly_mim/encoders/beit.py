"""timm's `Beit`: relative position bias, shared by the blocks or one table per block.

The ViT of the official SimMIM code is a Beit with one shared table, no absolute
positions and layer scale 0.1 (https://github.com/microsoft/SimMIM, configs/vit_base):
`masked_encoder("beit_base_patch16_224", use_shared_rel_pos_bias=True,
use_rel_pos_bias=False, use_abs_pos_emb=False, use_fc_norm=False, init_values=0.1,
init="simmim")`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightly_mim.encoders.vit import MaskedViT


class MaskedBeit(MaskedViT):
    """A timm `Beit` that encodes masked images.

    - [0]: BEiT, 2021, https://arxiv.org/abs/2106.08254

    Raises:
        ValueError: If the model has a part that a mask does not get along with.
    """

    def _transform(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        idx_keep: Tensor | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        table = self.vit.rel_pos_bias
        shared_bias = None if table is None else _relative_bias(table, idx_keep)
        for block in self.vit.blocks:
            run = block
            if idx_keep is not None and block.attn.window_size is not None:
                run = partial(_run_block_on_part, block, idx_keep)
            tokens = self._run(run, tokens, shared_bias)
            if intermediates is not None:
                intermediates.append(tokens)
        return tokens


def _relative_bias(table: Any, idx_keep: Tensor | None) -> Tensor:
    """Looks up what to add to the attention between every two tokens.

    Args:
        table:
            timm module with a `relative_position_bias_table` and the
            `relative_position_index` of the whole sequence.
        idx_keep:
            int64 tensor with shape (batch_size, num_tokens), the tokens of each image.
            All of them if None.

    Returns:
        Tensor with shape (batch_size, num_heads, num_tokens, num_tokens), or one for
        all images of the batch.
    """
    index: Tensor = table.relative_position_index
    if idx_keep is None:
        index = index[None]
    else:
        index = index[idx_keep[:, :, None], idx_keep[:, None, :]]
    # Not an index: the backward pass of an embedding is deterministic on CPUs.
    bias = functional.embedding(index, table.relative_position_bias_table)
    return bias.permute(0, 3, 1, 2).contiguous()


def _run_block_on_part(
    block: Any, idx_keep: Tensor, tokens: Tensor, shared_bias: Tensor | None
) -> Tensor:
    """Runs a block with its own table on some of the tokens.

    timm's block adds its table's bias for the whole sequence, so its arithmetic is
    repeated here with the bias of the tokens that are left.

    Args:
        block:
            timm's block.
        idx_keep:
            int64 tensor with shape (batch_size, num_tokens), the tokens of each image.
        tokens:
            Tensor with shape (batch_size, num_tokens, embed_dim).
        shared_bias:
            Tensor with shape (batch_size, num_heads, num_tokens, num_tokens), or None.

    Returns:
        Tensor with shape (batch_size, num_tokens, embed_dim).
    """
    bias = _relative_bias(block.attn, idx_keep)
    if shared_bias is not None:
        bias = bias + shared_bias
    attended = _attend(block.attn, block.norm1(tokens), bias)
    if block.gamma_1 is not None:
        attended = block.gamma_1 * attended
    tokens = tokens + block.drop_path1(attended)
    mixed = block.mlp(block.norm2(tokens))
    if block.gamma_2 is not None:
        mixed = block.gamma_2 * mixed
    output: Tensor = tokens + block.drop_path2(mixed)
    return output


def _attend(attn: Any, tokens: Tensor, bias: Tensor) -> Tensor:
    """Self-attention with timm's weights and a given bias."""
    qkv_bias = None
    if attn.q_bias is not None:
        # The reference code has no bias for the keys: softmax does not see it.
        qkv_bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv = functional.linear(tokens, attn.qkv.weight, qkv_bias)
    batch_size, num_tokens, _ = qkv.shape
    qkv = qkv.view(batch_size, num_tokens, 3, attn.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
    )
    attended = attended.transpose(1, 2).flatten(2)
    output: Tensor = attn.proj_drop(attn.proj(attended))
    return output
