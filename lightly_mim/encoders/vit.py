"""timm's `VisionTransformer`: class token, registers or none of them, any aspect."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightly_mim.encoders.base import MaskedEncoder
from lightly_mim.patches import grid_size


class MaskedViT(MaskedEncoder):
    """A timm `VisionTransformer` that encodes masked images.

    - [0]: An Image is Worth 16x16 Words, 2020, https://arxiv.org/abs/2010.11929

    Raises:
        ValueError: If the model has a part that a mask does not get along with.
    """

    def __init__(self, vit: nn.Module) -> None:
        _check_supported(vit)
        super().__init__(vit)

    def add_pos_embed(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        idx_keep: Tensor | None = None,
    ) -> Tensor:
        """Adds the absolute positions, if the model has any.

        Args:
            x:
                Tensor with shape (batch_size, num_tokens, dim), prefix tokens first.
            grid:
                How many patches lie along (height, width) of the images. That of
                `img_size` if None.
            idx_keep:
                int64 tensor with shape (batch_size, num_tokens) that says which tokens
                of the sequence `x` holds. All of them if None.

        Returns:
            Tensor with the shape of `x`.
        """
        positions = self.vit.pos_embed
        if positions is None:
            return x
        trained_grid = grid_size(self.img_size, self.patch_size)
        grid = trained_grid if grid is None else grid
        # With no_embed_class the prefix tokens have no positions.
        num_prefix = positions.shape[1] - trained_grid[0] * trained_grid[1]
        positions = resample_abs_pos_embed(
            positions, list(grid), list(trained_grid), num_prefix_tokens=num_prefix
        )
        positions = functional.pad(
            positions, (0, 0, self.num_prefix_tokens - num_prefix, 0)
        )
        if idx_keep is not None:
            # Not an index: the backward pass of an embedding is deterministic on CPUs.
            positions = functional.embedding(idx_keep, positions[0])
        dropped: Tensor = self.vit.pos_drop(x + positions)
        return dropped

    def _transform(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        idx_keep: Tensor | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        tokens = self.vit.norm_pre(tokens)
        for block in self.vit.blocks:
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if intermediates is not None:
                intermediates.append(tokens)
        return tokens


def _check_supported(vit: Any) -> None:
    """Raises a ValueError for parts whose work a mask would change or disturb."""
    if type(vit.patch_embed) is not PatchEmbed:
        raise ValueError(
            "Only a plain patch embedding can be masked patch by patch, got "
            f"{type(vit.patch_embed).__name__}. Use a timm model without a hybrid stem."
        )
    if vit.patch_embed.dynamic_img_pad:
        raise ValueError(
            "Padded images shift the masked patches. Build the model with "
            "dynamic_img_pad=False, and dynamic_img_size=True for images of any size."
        )
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError(
            "Patches that are dropped at random lose their place in the mask. Build "
            "the model with patch_drop_rate=0."
        )
    if vit.attn_pool is not None:
        raise ValueError(
            f"The attention pooling of global_pool='{vit.global_pool}' is a head, which "
            "masked image modelling does not train. Build the model with "
            "global_pool=''."
        )
