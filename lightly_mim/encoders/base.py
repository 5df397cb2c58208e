"""The contract that every encoder keeps, whatever its backbone is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from lightly_mim.encoders.attention import choose_attention
from lightly_mim.encoders.pooling import AnyPool as AnyPool
from lightly_mim.encoders.pooling import Pool as Pool
from lightly_mim.encoders.pooling import check_pool, pool_tokens
from lightly_mim.encoders.statistics import imagenet_statistics
from lightly_mim.encoders.tables import Tables
from lightly_mim.masking import Mask
from lightly_mim.patches import Size, grid_size, to_pair


class MaskedEncoder(ABC, nn.Module):
    """A backbone that encodes masked images. Use `masked_encoder` to build one.

    Masked patches get the mask token (`encode_masked`, SimMIM) or, where the backbone
    can do without them, are left out (`encode_visible`, MAE).

    In every method, `images` is a float tensor with shape (batch_size, in_chans,
    height, width), normalised with `mean` and `std`; a `mask` is a `Mask`, or a bool
    tensor with shape (batch_size, mask_height, mask_width), True = masked, in any grid
    that divides the grid of patches. A tensor is checked and counted, which waits for
    the device. What does not fit the encoder is a ValueError.

    A new backbone passes its numbers to the constructor and implements `layer_tokens`
    and `encode_masked`; besides `encode_visible` if it can drop patches, and `_blocks`
    if it has stochastic depth. Nothing here takes it for a transformer.

    Attributes:
        vit:
            The backbone, which timm built. Its state dict is what is saved.
        mask_token:
            Parameter with shape (1, 1, patch_dim) that stands in for a masked patch.
            None until `add_mask_token` is called, since a parameter that a method does
            not use breaks plain DDP.
        name:
            timm's name of the model, None for a model that was passed by hand.
        options:
            The further timm options that it was built with, as JSON has them.
        pos_embed, init:
            These arguments of `masked_encoder`.
        img_size:
            (height, width) in pixels that the model was built for.
        in_chans:
            Number of image channels.
        patch_size:
            (height, width) in pixels of one patch, which is masked as a whole.
        grid:
            How many patches lie along (height, width) of images of `img_size`.
        patch_dim:
            Size of an embedded patch.
        stride:
            (height, width) in pixels of a cell, the footprint of one output token.
        embed_dim:
            Size of an output token.
        num_layers:
            Number of layers that features can be taken from.
        num_prefix_tokens:
            Number of class and register tokens in front of the cells' tokens.
        has_class_token:
            Whether the first prefix token is a class token.
        pool:
            The pooling of `forward`, see `pool_tokens`: what timm's `global_pool` says
            of the model, the mean where it says nothing. SimMIM sets it to the mean.
        mean:
            Per channel, what is subtracted from images with values in [0, 1]: what
            timm's `pretrained_cfg` says of pretrained weights and of a model that is
            passed by hand, else ImageNet's.
        std:
            Per channel, what they are divided by afterwards.
        can_drop_tokens:
            Whether `encode_visible` works.
        untrained:
            Whether it was built by its name with new weights: `pretrain` then
            normalises with the statistics of its images.
        unfinished:
            Where the run of the weights is, if they are from a checkpoint of one that
            had not come to its end: `epoch` of `epochs` and `step` of `steps`.
        value_range:
            The values of 16-bit pictures that it was pretrained with, see
            `lightly_mim.data.decode_image`.
        tables:
            How its tables of relative positions go to another size, "timm" or "simmim",
            see `lightly_mim.encoders.resize_encoder`.
        norm_eps:
            What the norms of its blocks and behind them add to the variance, None where
            they differ. timm's own, unless weights of another library were made with
            another.
    """

    can_drop_tokens: ClassVar[bool] = False

    mask_token: nn.Parameter | None

    def __init__(
        self,
        vit: nn.Module,
        *,
        img_size: Size,
        in_chans: int,
        patch_size: Size,
        patch_dim: int,
        stride: Size,
        embed_dim: int,
        num_layers: int,
        num_prefix_tokens: int = 0,
        has_class_token: bool = False,
    ) -> None:
        super().__init__()
        # timm's families share names, but no base class that a type checker knows.
        self.vit = cast(Any, vit)
        self.register_parameter("mask_token", None)

        self.name: str | None = None
        self.options: dict[str, Any] = {}
        self.pos_embed: str | None = None
        self.untrained = False
        self.init = "timm"
        self.unfinished: dict[str, int | None] | None = None
        self.value_range: tuple[int, int] | None = None
        self.tables: Tables = "timm"

        self.img_size = to_pair(img_size, "img_size")
        self.in_chans = in_chans
        self.patch_size = to_pair(patch_size, "patch_size")
        self.grid = grid_size(self.img_size, self.patch_size)
        self.patch_dim = patch_dim
        self.stride = to_pair(stride, "stride")
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.num_prefix_tokens = num_prefix_tokens
        self.has_class_token = has_class_token
        self.pool = "mean"
        self.mean, self.std = imagenet_statistics(in_chans)

    @property
    def feature_dim(self) -> int:
        """Size of the features that `forward` returns."""
        return self.embed_dim * (2 if self.pool == "cls+mean" else 1)

    @property
    def pool(self) -> Pool:
        """The pooling of `forward`."""
        return self._pool

    @pool.setter
    def pool(self, pool: Pool) -> None:
        check_pool(pool)
        self.check_features([-1], [pool])
        self._pool = pool

    @property
    def norm_eps(self) -> float | None:
        """What the norms add to the variance."""
        values = {norm.eps for norm in self._norms()}
        return values.pop() if len(values) == 1 else None

    @norm_eps.setter
    def norm_eps(self, eps: float | None) -> None:
        if eps is not None:
            for norm in self._norms():
                norm.eps = eps

    def _norms(self) -> Iterator[nn.LayerNorm]:
        for name, module in self.vit.named_modules():
            # Those of patches have PyTorch's own in transformers, too.
            of_patches = name.startswith("patch_embed.") or ".downsample." in name
            if isinstance(module, nn.LayerNorm) and not of_patches:
                yield module

    def extra_repr(self) -> str:
        """Returns what a user asks of an encoder first."""
        return (
            f"img_size={self.img_size}, in_chans={self.in_chans}, pool={self.pool!r}, "
            f"mean={self.mean}, std={self.std}"
        )

    # Encoding.

    @abstractmethod
    def layer_tokens(self, images: Tensor) -> list[Tensor]:
        """Returns what every layer makes of the images, first to last.

        Returns:
            `num_layers` tensors with shape (batch_size, num_prefix_tokens +
            num_positions, dim), positions in raster order. The last one is normalised
            as the model does it, and has shape (batch_size, num_prefix_tokens +
            num_cells, embed_dim).
        """

    @abstractmethod
    def encode_masked(self, images: Tensor, mask: Mask | Tensor) -> Tensor:
        """Encodes images with the mask token in place of the masked patches.

        The mask token replaces the embedded patch before any position is added
        (SimMIM, https://arxiv.org/abs/2111.09886, section 3.2 and reference code).

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_cells, embed_dim).

        Raises:
            ValueError: If there is no mask token.
        """

    def encode_visible(
        self,
        images: Tensor,
        mask: Mask | Tensor,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Encodes the prefix tokens and the visible patches alone.

        Nothing is computed for masked patches, not even their embedding (MAE,
        https://arxiv.org/abs/2111.06377, section 3).

        Args:
            images:
                See the class.
            mask:
                See the class.
            intermediates:
                List that takes the output of every layer, without the final norm.

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_visible, embed_dim),
            the visible patches in raster order.

        Raises:
            ValueError: If the backbone cannot leave patches out.
        """
        raise ValueError(
            f"encode_visible does not work here: {type(self.vit).__name__} needs the "
            "full grid of patches. Use encode_masked, which puts the mask token in "
            "place of masked patches."
        )

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images without a mask.

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_cells, embed_dim).
        """
        return self.layer_tokens(images)[-1]

    def cell_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the tokens of the cells, without the prefix tokens in front of them.

        Args:
            tokens:
                Tensor with shape (batch_size, num_prefix_tokens + num_cells, dim), as
                from `encode_masked`.

        Returns:
            Tensor with shape (batch_size, num_cells, dim), in raster order.
        """
        return tokens[:, self.num_prefix_tokens :]

    # Features.

    def forward(self, images: Tensor) -> Tensor:
        """Returns one feature per image, pooled as `pool` says.

        Returns:
            Tensor with shape (batch_size, feature_dim).
        """
        return self.embed(images, self.pool)

    def pool_encoded(self, tokens: Tensor) -> Tensor | None:
        """Returns what `forward` would make of tokens that are encoded already.

        For a probe that looks on while a method trains. No gradient flows through it.

        Args:
            tokens:
                What `encode_masked` or `encode_visible` returned.

        Returns:
            Tensor with shape (batch_size, feature_dim), or None if the tokens do not
            tell: a model that normalises the mean has normalised each token here.
        """
        return pool_tokens(tokens.detach(), self.num_prefix_tokens, self.pool)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the encoded cells as a picture.

        Returns:
            Tensor with shape (batch_size, embed_dim, height / stride, width / stride).
        """
        tokens = self.cell_tokens(self.encode(images))
        h, w = grid_size((images.shape[-2], images.shape[-1]), self.stride, "stride")
        return tokens.transpose(1, 2).reshape(len(images), -1, h, w)

    def embed(self, images: Tensor, pool: Pool = "mean", layer: int = -1) -> Tensor:
        """Returns one feature per image, from any layer.

        The last layer's feature is normalised as the model does it. Other layers give
        the mean or the class token of what they return, without a norm.

        Args:
            images:
                See the class.
            pool:
                See `pool_tokens`.
            layer:
                Which layer, from 0 to `num_layers` - 1, or counted from the end if
                negative.

        Returns:
            Tensor with shape (batch_size, embed_dim), or (batch_size, 2 * embed_dim)
            for the pool "cls+mean".

        Raises:
            ValueError: If there is no such layer or no class token.
        """
        return self.embed_layers(images, [layer], [pool])[layer, pool]

    def embed_layers(
        self, images: Tensor, layers: Sequence[int], pools: Sequence[AnyPool]
    ) -> dict[tuple[int, AnyPool], Tensor]:
        """Returns what `embed` returns for many layers and pools, in one pass.

        Args:
            images:
                See the class.
            layers:
                See `embed`.
            pools:
                See `pool_tokens`. "tokens" gives all patch tokens of the layer, with
                shape (batch_size, num_patches, dim).

        Returns:
            The features of each layer and pool, see `embed`.

        Raises:
            ValueError: See `embed`.
        """
        self.check_features(layers, pools)
        outputs = self.layer_tokens(images)
        return {
            (layer, pool): pool_tokens(outputs[layer], self.num_prefix_tokens, pool)
            for layer in layers
            for pool in pools
        }

    # Checks.

    def check_features(self, layers: Sequence[int], pools: Sequence[AnyPool]) -> None:
        """Checks that `embed_layers` can make these features, see there.

        Raises:
            ValueError: If there is no such layer or no class token.
        """
        for layer in layers:
            if not -self.num_layers <= layer < self.num_layers:
                raise ValueError(
                    f"The encoder has layers 0 to {self.num_layers - 1} (or "
                    f"-{self.num_layers} to -1 from the end), got {layer}."
                )
        for pool in pools:
            if "cls" in pool and not self.has_class_token:
                raise ValueError(
                    f"The pool '{pool}' takes the class token, and this encoder has "
                    "none. Use the pool 'mean'."
                )

    def input_grid(self, images: Tensor) -> tuple[int, int]:
        """Checks images and returns how many patches lie along (height, width)."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"The encoder takes images with shape (batch_size, {self.in_chans}, "
                f"height, width), got {tuple(images.shape)}. For another number of "
                "channels, build it with in_chans=..."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"The encoder takes normalised float images, got {images.dtype}. "
                "Convert them: (images / 255 - mean) / std."
            )
        size = images.shape[-2], images.shape[-1]
        self._check_size(size)
        return grid_size(size, self.patch_size)

    def patch_mask(self, images: Tensor, mask: Mask | Tensor) -> Mask:
        """Checks images and mask and lays the mask on the grid of patches."""
        grid = self.input_grid(images)
        mask = Mask.of(mask)
        if len(mask) != len(images):
            raise ValueError(
                f"There are {len(images)} images and {len(mask)} masks: pass one mask "
                "for each image."
            )
        return mask.on(grid)

    def _check_size(self, size: tuple[int, int]) -> None:
        """Raises a ValueError if images of this (height, width) do not fit."""
        grid_size(size, self.stride, "the encoder's stride")

    # Masking.

    def add_mask_token(self) -> None:
        """Adds the mask token, drawn from a normal with deviation 0.02.

        The deviation is that of SimMIM's and MAE's code. The former cuts a ViT's off at
        one deviation, and so does `init="simmim"`. A mask token that is already there
        is kept.
        """
        if self.mask_token is None:
            token = next(self.vit.parameters()).new_empty(1, 1, self.patch_dim)
            bound = 0.02 if self.init == "simmim" and self.can_drop_tokens else 2.0
            nn.init.trunc_normal_(token, std=0.02, a=-bound, b=bound)
            self.mask_token = nn.Parameter(token)

    def replace_masked(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Puts the mask token in place of some tokens.

        Args:
            tokens:
                Tensor with shape (batch_size, num_tokens, patch_dim).
            masked:
                Bool tensor with shape (batch_size, num_tokens), True where the mask
                token goes.

        Returns:
            Tensor with the shape of the tokens.

        Raises:
            ValueError: If there is no mask token.
        """
        if self.mask_token is None:
            raise ValueError(
                "The encoder has no mask token to put in place of masked tokens. Call "
                "add_mask_token() once, before the optimiser is made."
            )
        mask_token = self.mask_token.to(tokens.dtype)
        return torch.where(masked.bool().unsqueeze(-1), mask_token, tokens)

    # Training.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: blocks are run again in the backward pass."""
        self.vit.set_grad_checkpointing(enable)

    def choose_attention(self, device: torch.device, bf16: bool) -> None:
        """Chooses the kernel of the attention, see the function of this name."""
        choose_attention(self, device, bf16)

    def set_drop_path(self, rate: float) -> None:
        """Sets stochastic depth, which rises linearly over the blocks as in timm.

        Args:
            rate:
                Probability that the last block's branches are dropped, in [0, 1). The
                first block's are never dropped.

        Raises:
            ValueError: If the rate is out of range, or if there is nothing to drop.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"The drop path rate lies in [0, 1), got {rate}.")
        blocks = self._blocks()
        rates = torch.linspace(0, rate, len(blocks), device="cpu").tolist()
        found = False
        for block, block_rate in zip(blocks, rates, strict=True):
            for path, module in list(block.named_modules()):
                parent, _, name = path.rpartition(".")
                if name.startswith("drop_path"):
                    found = True
                    new = DropPath(block_rate) if block_rate > 0 else nn.Identity()
                    new.train(module.training)
                    setattr(block.get_submodule(parent), name, new)
        if rate and not found:
            raise ValueError(
                f"{type(self.vit).__name__} has no stochastic depth, got a drop path "
                f"rate of {rate}. Use 0."
            )

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters that weight decay leaves out.

        These are the ones that timm names for the model, and the mask token. Biases and
        other vectors are for the optimiser to see.
        """
        by_timm = getattr(self.vit, "no_weight_decay", None)  # not all models have it
        exempt = {f"vit.{name}" for name in (by_timm() if by_timm else ())}
        exempt.add("mask_token")
        return exempt & {name for name, _ in self.named_parameters()}

    def _blocks(self) -> list[nn.Module]:
        """Returns the residual blocks, first to last, of a model that can drop them."""
        return []
