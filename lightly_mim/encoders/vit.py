"""timm's `VisionTransformer`: class token, registers or none of them, any aspect."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, ClassVar

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightly_mim.encoders.transformer import MaskedTransformer
from lightly_mim.masking import Mask
from lightly_mim.patches import gather_patches


class MaskedViT(MaskedTransformer):
    """A timm `VisionTransformer` that encodes masked images.

    - [0]: An Image is Worth 16x16 Words, 2020, https://arxiv.org/abs/2010.11929

    Raises:
        ValueError: If the model has a part that a mask does not get along with.
    """

    can_drop_tokens: ClassVar[bool] = True

    def __init__(self, vit: nn.Module) -> None:
        _check_supported(vit)
        super().__init__(vit)

    def encode_visible(
        self,
        images: Tensor,
        mask: Mask | Tensor,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Encodes visible patches alone, see `MaskedEncoder.encode_visible`."""
        mask = self.patch_mask(images, mask)
        _, visible = mask.index()
        idx_keep, _ = mask.token_index(self.num_prefix_tokens)

        # The patch embedding is a convolution whose windows do not overlap, which is a
        # linear map of flattened patches: (channels, height, width) in the weight,
        # (height, width, channels) in the patches.
        patches = gather_patches(images, visible, self.patch_size)
        projection = self.vit.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = functional.linear(patches, weight, projection.bias)
        tokens = self.vit.patch_embed.norm(tokens)

        tokens = self.prepend_prefix_tokens(tokens)
        tokens = self.add_pos_embed(tokens, mask.grid, idx_keep)
        return self._norm(self._transform(tokens, mask.grid, idx_keep, intermediates))

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        positions: Tensor | None = self.vit.pos_embed
        if positions is None:
            return None
        num_prefix_positions = positions.shape[1] - self.grid[0] * self.grid[1]
        resampled = resample_abs_pos_embed(
            positions, list(grid), list(self.grid), num_prefix_positions
        )
        # With no_embed_class, prefix tokens have no positions: nothing is added then.
        missing = self.num_prefix_tokens - num_prefix_positions
        return functional.pad(resampled, (0, 0, missing, 0)) if missing else resampled

    def _transform(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        idx_keep: Tensor | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        tokens = self.vit.norm_pre(tokens)
        for block in self.vit.blocks:
            tokens = self._run(block, tokens)
            if intermediates is not None:
                intermediates.append(tokens)
        return tokens

    def _run(self, block: Callable[..., Any], *arguments: Any) -> Tensor:
        """Calls a block, which is run again in the backward pass if asked for."""
        tokens: Tensor
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, *arguments, use_reentrant=False)
        else:
            tokens = block(*arguments)
        return tokens


def _check_supported(vit: Any) -> None:
    """Raises a ValueError for parts that would disturb the mask or go unused."""
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
    if not isinstance(getattr(vit, "patch_drop", None), NoneType | nn.Identity):
        raise ValueError(
            "Patches that are dropped at random lose their place in the mask. Build "
            "the model with patch_drop_rate=0."
        )
    if getattr(vit, "attn_pool", None) is not None:
        raise ValueError(
            f"The attention pooling of global_pool='{vit.global_pool}' is a head, "
            "which masked image modelling does not train. Build the model with "
            "global_pool=''."
        )
