"""From the visible tokens to the masked ones.

Shapes: B images, P prefix tokens, V visible and K masked patches, D the decoder's
width. Indices count the prefix tokens in, as in lightly.
"""

from __future__ import annotations

import math

import torch
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor
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
        if depth < 1:
            raise ValueError(f"A decoder has at least 1 block, got depth {depth}.")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "The decoder's width is a multiple of its number of heads, got "
                f"{embed_dim} and {num_heads}."
            )
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
                How many patches lie along (height, width) of the images. That of the
                constructor if None; positions are resampled to others.

        Returns:
            Tensor with shape (batch_size, num_masked, embed_dim), normalised.
        """
        positions = resample_abs_pos_embed(
            self.pos_embed,
            list(self.grid if grid is None else grid),
            list(self.grid),
            self.num_prefix_tokens,
        )[0]
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
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
