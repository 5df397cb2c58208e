"""timm's `Eva`: rotary positions, in EVA, EVA-02, DINOv3 and RoPE ViTs.

A rotary position turns the queries and keys of a patch token by angles that depend on
where the patch lies; prefix tokens are not turned. What is left of the tokens is turned
by the angles of the patches that are left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightly_mim.encoders.vit import MaskedViT


class MaskedEva(MaskedViT):
    """A timm `Eva` that encodes masked images.

    - [0]: EVA-02, 2023, https://arxiv.org/abs/2303.11331
    - [1]: Rotary Position Embedding for Vision Transformer, 2024,
      https://arxiv.org/abs/2403.13298

    Raises:
        ValueError: If the model has a part that a mask does not get along with.
    """

    def preprocess(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Embeds the images, see `MaskedTransformer.preprocess`.

        Raises:
            ValueError: Also if `idx_keep` does not begin with all prefix tokens, in
                their order: the blocks turn every token that comes after them.
        """
        if idx_keep is not None:
            count = self.num_prefix_tokens
            prefix = torch.arange(count, device=idx_keep.device)
            rest = idx_keep[:, count:]
            if bool((idx_keep[:, :count] != prefix).any() | (rest < count).any()):
                raise ValueError(
                    f"idx_keep begins with the {count} prefix tokens in every image, "
                    "since rotary positions are for the patch tokens behind them, got "
                    f"{idx_keep[:, : count + 1].tolist()}, ..."
                )
        return super().preprocess(images, idx_mask, idx_keep, mask)

    def _transform(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        idx_keep: Tensor | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        angles = self._angles(grid, idx_keep)
        tokens = self.vit.norm_pre(tokens)
        for number, block in enumerate(self.vit.blocks):
            # Mixed positions are learned for each block and head.
            own = angles[number] if self.vit.rope_mixed else angles
            tokens = self._run(block, tokens, own)
            if intermediates is not None:
                intermediates.append(tokens)
        return tokens

    def _angles(self, grid: tuple[int, int], idx_keep: Tensor | None) -> Any:
        """Returns the sines and cosines that turn the patch tokens.

        Args:
            grid:
                How many patches lie along (height, width) of the images.
            idx_keep:
                int64 tensor with shape (batch_size, num_tokens), the tokens of each
                image, prefix tokens first. All of them if None.

        Returns:
            What timm's blocks take: tensor with shape (num_patches, 2 * head_dim), with
            `idx_keep` (batch_size, 1, num_visible, 2 * head_dim). Mixed positions have
            shape (depth, num_heads, num_patches, 2 * head_dim), with `idx_keep` (depth,
            batch_size, num_heads, num_visible, 2 * head_dim). None without rotary
            positions.
        """
        rope = self.vit.rope
        if rope is None:
            return None
        # The shape the model was built for is kept by most of them.
        known = not self.vit.dynamic_img_size and hasattr(rope, "feat_shape")
        angles: Tensor = rope.get_embed() if known else rope.get_embed(shape=list(grid))
        if idx_keep is None:
            return angles
        visible = idx_keep[:, self.num_prefix_tokens :] - self.num_prefix_tokens
        if not self.vit.rope_mixed:
            return functional.embedding(visible, angles)[:, None]
        depth, num_heads, num_patches, dim = angles.shape
        per_patch = angles.permute(2, 0, 1, 3).reshape(num_patches, -1)
        # Not an index: an embedding's backward is deterministic on CPUs.
        chosen = functional.embedding(visible, per_patch)
        chosen = chosen.view(*visible.shape, depth, num_heads, dim)
        return chosen.permute(2, 0, 3, 1, 4)
