"""What timm's transformers have in common: lightly's interface around their blocks.

Each family says how its blocks run on embedded tokens (`_transform`) and where its
positions come from (`_positions`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightly.models import utils
from lightly.models.modules.masked_vision_transformer import MaskedVisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.encoders.base import AnyPool, MaskedEncoder
from lightly_mim.encoders.pooling import Pool, pool_tokens, timm_pooling
from lightly_mim.masking import Mask
from lightly_mim.patches import to_pair


class MaskedTransformer(MaskedEncoder, MaskedVisionTransformer):
    """A timm transformer that encodes masked images, and lightly's interface to it.

    The model's weights and positions are left as they are. Its classifier is removed,
    so that no parameter stays without a gradient.

    In lightly's methods all indices and masks count the prefix tokens in:

    - idx_mask: int64 tensor with shape (batch_size, num_masked), the tokens that the
      mask token replaces
    - mask: the same as a bool tensor with shape (batch_size, sequence_length), True =
      replaced; only one of the two may be given
    - idx_keep: int64 tensor with shape (batch_size, num_kept), the tokens that are
      encoded, all of them if None
    """

    mask_token: nn.Parameter | None  # type: ignore[assignment]  # lightly always has it

    def __init__(
        self, vit: nn.Module, num_layers: int | None = None, patches_per_cell: int = 1
    ) -> None:
        """Reads off the model what the contract asks for.

        Args:
            vit:
                The timm model.
            num_layers:
                Number of layers. That of the blocks if None.
            patches_per_cell:
                How many patches lie along each side of an output token's cell.
        """
        model = cast(Any, vit)
        model.reset_classifier(0)
        embed = model.patch_embed
        height, width = to_pair(embed.patch_size, "patch_size")
        super().__init__(
            vit,
            img_size=embed.img_size,
            in_chans=embed.proj.in_channels,
            patch_size=(height, width),
            patch_dim=embed.proj.out_channels,
            stride=(height * patches_per_cell, width * patches_per_cell),
            embed_dim=model.num_features,
            num_layers=len(model.blocks) if num_layers is None else num_layers,
            num_prefix_tokens=getattr(model, "num_prefix_tokens", 0),
            has_class_token=getattr(model, "cls_token", None) is not None,
        )
        self.pool = _pool(model)

    @property
    def sequence_length(self) -> int:
        """Number of input tokens at `img_size`, prefix tokens included."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    # The contract.

    def layer_tokens(self, images: Tensor) -> list[Tensor]:
        """Returns the output of every layer, see `MaskedEncoder.layer_tokens`."""
        outputs: list[Tensor] = []
        tokens = self.preprocess(images)
        self._transform(tokens, self.input_grid(images), intermediates=outputs)
        outputs[-1] = self.vit.norm(outputs[-1])
        return outputs

    def embed_layers(
        self, images: Tensor, layers: Sequence[int], pools: Sequence[AnyPool]
    ) -> dict[tuple[int, AnyPool], Tensor]:
        """Returns features of layers and pools, see `MaskedEncoder.embed_layers`.

        A model with `fc_norm` normalises what is pooled, as in timm.
        """
        features = super().embed_layers(images, layers, pools)
        for (layer, pool), feature in features.items():
            if layer % self.num_layers == self.num_layers - 1:
                features[layer, pool] = self._normalize_pooled(feature)
        return features

    def pool_encoded(self, tokens: Tensor) -> Tensor | None:
        """Pools encoded tokens, see `MaskedEncoder.pool_encoded`."""
        fc_norm = getattr(self.vit, "fc_norm", None)
        if self.pool == "cls" or fc_norm is None or isinstance(fc_norm, nn.Identity):
            return super().pool_encoded(tokens)
        return None

    def encode_masked(self, images: Tensor, mask: Mask | Tensor) -> Tensor:
        """Encodes images with mask tokens, see `MaskedEncoder.encode_masked`."""
        mask = self.patch_mask(images, mask)
        tokens = self.images_to_tokens(images)
        tokens = self.replace_masked(tokens, mask.cells.flatten(1))
        tokens = self.add_pos_embed(self.prepend_prefix_tokens(tokens), mask.grid)
        return self._norm(self._transform(tokens, mask.grid))

    def _check_size(self, size: tuple[int, int]) -> None:
        if self.vit.patch_embed.strict_img_size and size != self.img_size:
            raise ValueError(
                f"The encoder was built for images of {self.img_size[0]} x "
                f"{self.img_size[1]} pixels, got {size[0]} x {size[1]}. Resize the "
                f"images or build it with img_size={size}."
            )

    def _blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    # lightly's interface.

    def forward(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns one feature per image, see `MaskedEncoder.forward`.

        With `idx_keep`, each image must keep what is pooled: a patch token for the
        mean, the class token for "cls". A model with `fc_norm` normalises what is
        pooled instead of the tokens, as in timm.
        """
        tokens = self.preprocess(images, idx_mask, idx_keep, mask)
        tokens = self._transform(tokens, self.input_grid(images), idx_keep)
        tokens = self.vit.norm(tokens)
        if idx_keep is None:
            pooled = pool_tokens(tokens, self.num_prefix_tokens, self.pool)
        else:
            # The caller may have dropped prefix tokens, or kept them in any order.
            pooled = torch.cat(
                [
                    _mean_of(
                        tokens,
                        idx_keep == 0
                        if part == "cls"
                        else idx_keep >= self.num_prefix_tokens,
                    )
                    for part in self.pool.split("+")
                ],
                dim=-1,
            )
        return self._normalize_pooled(pooled)

    def encode(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Encodes images.

        Returns:
            Tensor with shape (batch_size, num_tokens, embed_dim), normalised, prefix
            tokens first. Where timm normalises the pooled feature (`fc_norm`), each
            token is normalised with that norm.
        """
        tokens = self.preprocess(images, idx_mask, idx_keep, mask)
        return self._norm(self._transform(tokens, self.input_grid(images), idx_keep))

    def forward_intermediates(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        norm: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encodes images and returns the output of every layer, too.

        Args:
            images:
                See `MaskedEncoder`.
            idx_mask:
                See the class.
            idx_keep:
                See the class.
            norm:
                Whether the final norm is applied to the output of every layer as well.
            mask:
                See the class.

        Returns:
            The tokens that `encode` returns, and a list of `num_layers` tensors with
            shape (batch_size, num_tokens, embed_dim).
        """
        outputs: list[Tensor] = []
        tokens = self.preprocess(images, idx_mask, idx_keep, mask)
        grid = self.input_grid(images)
        tokens = self._norm(self._transform(tokens, grid, idx_keep, outputs))
        if norm:
            outputs = [self._norm(output) for output in outputs]
        return tokens, outputs

    def preprocess(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Embeds patches, masks tokens, adds positions and drops tokens, in that order.

        Returns:
            Tensor with shape (batch_size, sequence_length, patch_dim), or (batch_size,
            num_kept, patch_dim).

        Raises:
            ValueError: If `idx_mask` and `mask` are both given, if `mask` has the wrong
                shape, or if there is no mask token.
        """
        if idx_mask is not None and mask is not None:
            raise ValueError(
                "idx_mask and mask cannot both be set at the same time. Pass one."
            )
        grid = self.input_grid(images)
        tokens = self.prepend_prefix_tokens(self.images_to_tokens(images))
        if idx_mask is not None:
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            mask = mask.scatter(1, idx_mask, True)
        if mask is not None:
            if mask.shape != tokens.shape[:2]:
                raise ValueError(
                    "The mask needs one entry per token, prefix tokens included: shape "
                    f"{tuple(tokens.shape[:2])}, got {tuple(mask.shape)}. A mask over "
                    "the image goes to encode_masked."
                )
            tokens = self.replace_masked(tokens, mask)
        tokens = self.add_pos_embed(tokens, grid)
        return tokens if idx_keep is None else utils.get_at_index(tokens, idx_keep)

    def images_to_tokens(self, images: Tensor) -> Tensor:
        """Embeds the patches.

        Returns:
            Tensor with shape (batch_size, num_patches, patch_dim), without positions
            and prefix tokens.
        """
        self.input_grid(images)
        tokens: Tensor = self.vit.patch_embed(images)
        # timm keeps the grid, (batch_size, height, width, dim), for some models.
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens

    def prepend_prefix_tokens(self, x: Tensor) -> Tensor:
        """Puts the class token and the registers in front of the patch tokens.

        Args:
            x:
                Tensor with shape (batch_size, num_patches, patch_dim).

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_patches, patch_dim).
        """
        for name in ("reg_token", "cls_token"):
            token = getattr(self.vit, name, None)
            if token is not None:
                x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
        return x

    def add_pos_embed(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        idx_keep: Tensor | None = None,
    ) -> Tensor:
        """Adds the absolute positions, if the model has any.

        Args:
            x:
                Tensor with shape (batch_size, num_tokens, patch_dim), prefix tokens
                first.
            grid:
                How many patches lie along (height, width) of the images. That of
                `img_size` if None.
            idx_keep:
                Which tokens of the sequence `x` holds, see the class.

        Returns:
            Tensor with the shape of `x`.
        """
        positions = self._positions(self.grid if grid is None else grid)
        if positions is not None:
            if idx_keep is not None:
                # Not an index: an embedding's backward is deterministic on CPUs.
                positions = functional.embedding(idx_keep, positions[0])
            x = x + positions
        dropout = getattr(self.vit, "pos_drop", None)
        return x if dropout is None else cast(Tensor, dropout(x))

    # Where the families differ.

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Returns the absolute positions, (1, num_tokens, dim), prefix included."""
        return None

    @abstractmethod
    def _transform(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        idx_keep: Tensor | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs the blocks on embedded tokens, without the norm that follows them.

        Args:
            tokens:
                Tensor with shape (batch_size, num_tokens, patch_dim).
            grid:
                How many patches lie along (height, width) of the images.
            idx_keep:
                int64 tensor with shape (batch_size, num_tokens) that says which tokens
                of the sequence these are. All of them if None.
            intermediates:
                List that takes the output of every layer.

        Returns:
            Tensor with shape (batch_size, num_output_tokens, embed_dim).
        """

    def _norm(self, tokens: Tensor) -> Tensor:
        """Normalises every token."""
        return self._fc_norm(self.vit.norm(tokens))

    def _normalize_pooled(self, features: Tensor) -> Tensor:
        """Applies `_fc_norm` to each part of features that were pooled."""
        parts = features.reshape(*features.shape[:-1], -1, self.embed_dim)
        return self._fc_norm(parts).view_as(features)

    def _fc_norm(self, features: Tensor) -> Tensor:
        """Applies the norm that some models have behind the pooling."""
        if not hasattr(self.vit, "fc_norm"):
            return features
        return cast(Tensor, self.vit.fc_norm(features))


def _mean_of(tokens: Tensor, chosen: Tensor) -> Tensor:
    """Returns the mean (B, D) of those of the tokens (B, S, D) that are chosen."""
    weights = chosen.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)


def _pool(model: nn.Module) -> Pool:
    """Returns our word for the pooling of a timm model."""
    pools: dict[str, Pool] = {"token": "cls", "avg": "mean", "": "mean"}
    pool = timm_pooling(model)
    if pool not in pools:
        raise ValueError(
            f"The model pools by '{pool}', which is no pooling here. Build it with "
            "global_pool='avg' for the mean of its patch tokens, or 'token' for its "
            "class token."
        )
    return pools[pool]
