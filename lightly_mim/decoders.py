"""From the visible tokens to the masked ones.

Shapes: B images, P prefix tokens, V visible and K masked patches, S = P + V, D the
decoder's width, E the encoder's. Indices count the prefix tokens in, as in lightly.
"""

from __future__ import annotations

import math

import torch
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from timm.layers.mlp import Mlp
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightly_mim.patches import sincos_positions


class MAEDecoder(MaskedVisionTransformerDecoderTIMM):
    """MAE's decoder: a plain transformer over visible tokens and mask tokens.

    lightly's decoder with sine-cosine positions for any aspect ratio. Its `forward`
    takes and returns the whole sequence; `decode_masked` takes the visible tokens and
    returns the masked ones, so that nothing is put in raster order and back, and the
    last norm sees masked tokens alone. Self-attention does not care about the order.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377 (section 3, "MAE decoder")

    Attributes:
        grid:
            How many patches lie along (height, width) of the images.
        grad_checkpointing:
            Whether blocks are run again in the backward pass, to save memory.

    Args:
        grid:
            How many patches lie along (height, width) of the images.
        embed_dim:
            Size of a token, a multiple of 4 and of `num_heads`.
        depth:
            Number of transformer blocks, at least 1.
        num_heads:
            Number of attention heads.
        num_prefix_tokens:
            Number of class and register tokens in front of the patch tokens.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        num_prefix_tokens: int = 1,
    ) -> None:
        _check(embed_dim, depth, num_heads)
        positions = sincos_positions(grid, embed_dim, num_prefix_tokens)
        super().__init__(
            num_patches=math.prod(grid),
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_prefix_tokens=num_prefix_tokens,
            # lightly's makes the positions for squares.
            initialize_weights=False,
        )
        self.pos_embed.data.copy_(positions)
        self.grid = grid
        self.grad_checkpointing = False

    def positions(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Returns the positions of all tokens, prefix tokens first.

        Args:
            grid:
                How many patches lie along (height, width) of the images. That of the
                constructor if None; positions are resampled to others.

        Returns:
            Tensor with shape (num_prefix_tokens + num_patches, embed_dim).
        """
        return _resample(self.pos_embed, self.grid, grid, self.num_prefix_tokens)

    def decode_masked(
        self,
        tokens: Tensor,
        idx_keep: Tensor,
        idx_mask: Tensor,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Decodes the masked tokens from the visible ones.

        Args:
            tokens:
                Tensor with shape (batch_size, num_prefix_tokens + num_visible,
                embed_dim), the encoded tokens in the decoder's width.
            idx_keep:
                int64 tensor with shape (batch_size, num_prefix_tokens + num_visible)
                that says which tokens these are, prefix tokens counted in.
            idx_mask:
                int64 tensor with shape (batch_size, num_masked), the tokens to decode.
            grid:
                See `positions`.

        Returns:
            Tensor with shape (batch_size, num_masked, embed_dim), normalised.
        """
        positions = self.positions(grid)
        visible = tokens + functional.embedding(idx_keep, positions)
        masked = self.mask_token + functional.embedding(idx_mask, positions)
        x = self._run_blocks(torch.cat([visible, masked], dim=1))
        output: Tensor = self.norm(x[:, tokens.shape[1] :])
        return output

    def decode(self, x: Tensor) -> Tensor:
        """Applies the transformer blocks and the final norm layer to the tokens."""
        output: Tensor = self.norm(self._run_blocks(x))
        return output

    def _run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = _run(block, self.grad_checkpointing, x)
        return x


class CrossAttentionDecoder(nn.Module):
    """CrossMAE's decoder: mask tokens look at the visible ones, not at each other.

    What is decoded for a patch does not depend on which others are decoded, so that a
    share of the masked patches can be decoded alone. Keys and values are made from
    tokens in the encoder's width. With `num_feature_maps`, each block has its own
    weighted sum of the encoder's layers to look at, normalised; the weights are learned
    and begin with a deviation of 1 / sqrt(num_feature_maps).

    - [0]: CrossMAE, 2024, https://arxiv.org/abs/2401.14391 (section 3)

    Attributes:
        grid:
            How many patches lie along (height, width) of the images.
        grad_checkpointing:
            Whether blocks are run again in the backward pass, to save memory.

    Args:
        grid:
            How many patches lie along (height, width) of the images.
        encoder_dim:
            Size of the encoder's tokens.
        embed_dim:
            Size of a decoded token, a multiple of 4 and of `num_heads`.
        depth:
            Number of blocks, at least 1.
        num_heads:
            Number of attention heads.
        num_prefix_tokens:
            Number of class and register tokens in front of the patch tokens.
        num_feature_maps:
            How many layers of the encoder are summed. None if all blocks look at the
            encoder's output.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        encoder_dim: int,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        num_prefix_tokens: int = 1,
        num_feature_maps: int | None = None,
    ) -> None:
        super().__init__()
        _check(embed_dim, depth, num_heads)
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.grad_checkpointing = False
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = sincos_positions(grid, embed_dim, num_prefix_tokens)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            _CrossAttentionBlock(embed_dim, encoder_dim, num_heads)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        if num_feature_maps is None:
            self.register_parameter("map_weights", None)
        else:
            weights = torch.randn(depth, num_feature_maps) / math.sqrt(num_feature_maps)
            self.map_weights = nn.Parameter(weights)
            self.map_norms = nn.ModuleList(
                nn.LayerNorm(encoder_dim, eps=1e-6) for _ in range(depth)
            )

    def decode_masked(
        self,
        tokens: Tensor,
        idx_keep: Tensor,
        idx_mask: Tensor,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Decodes masked tokens from the visible ones.

        Args:
            tokens:
                Tensor with shape (batch_size, num_prefix_tokens + num_visible,
                encoder_dim), or (num_feature_maps, batch_size, num_prefix_tokens +
                num_visible, encoder_dim).
            idx_keep:
                Not used: the encoder's tokens know their positions.
            idx_mask:
                int64 tensor with shape (batch_size, num_decoded), the tokens to decode,
                prefix tokens counted in.
            grid:
                How many patches lie along (height, width) of the images. That of the
                constructor if None; positions are resampled to others.

        Returns:
            Tensor with shape (batch_size, num_decoded, embed_dim), normalised.
        """
        positions = _resample(self.pos_embed, self.grid, grid, self.num_prefix_tokens)
        x = self.mask_token + functional.embedding(idx_mask, positions)
        for number, block in enumerate(self.blocks):
            visible = tokens
            if self.map_weights is not None:
                summed = torch.tensordot(self.map_weights[number], tokens, dims=1)
                visible = self.map_norms[number](summed)
            x = _run(block, self.grad_checkpointing, x, visible)
        output: Tensor = self.norm(x)
        return output


class _CrossAttentionBlock(nn.Module):
    """Cross-attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, dim: int, encoder_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True  # see lightly_mim.encoders.choose_attention
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(encoder_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Takes masked tokens (B, K, D) and visible ones (B, S, E)."""
        query = self._heads(self.query(self.norm1(x)))
        key, value = map(self._heads, self.key_value(visible).chunk(2, dim=-1))
        if self.fused_attn:
            attended = functional.scaled_dot_product_attention(query, key, value)
        else:
            scaled = query / math.sqrt(query.shape[-1])
            attended = (scaled @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        output: Tensor = x + self.mlp(self.norm2(x))
        return output

    def _heads(self, tokens: Tensor) -> Tensor:
        """Views tokens (B, N, D) as (B, heads, N, D / heads)."""
        batch_size, num_tokens, _ = tokens.shape
        return tokens.view(batch_size, num_tokens, self.num_heads, -1).transpose(1, 2)


def _check(embed_dim: int, depth: int, num_heads: int) -> None:
    if depth < 1:
        raise ValueError(f"A decoder has at least 1 block, got depth {depth}.")
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            "The decoder's width is a multiple of its number of heads, got "
            f"{embed_dim} and {num_heads}."
        )


def _resample(
    positions: Tensor,
    built_for: tuple[int, int],
    grid: tuple[int, int] | None,
    num_prefix_tokens: int,
) -> Tensor:
    """Returns positions (1, P + N, D) as (P + N, D) for another grid."""
    resampled: Tensor = resample_abs_pos_embed(
        positions, list(grid or built_for), list(built_for), num_prefix_tokens
    )
    return resampled[0]


def _run(block: nn.Module, again: bool, *arguments: Tensor) -> Tensor:
    """Calls a block, which is run again in the backward pass if asked for."""
    output: Tensor
    if again and torch.is_grad_enabled():
        output = checkpoint(block, *arguments, use_reentrant=False)
    else:
        output = block(*arguments)
    return output
