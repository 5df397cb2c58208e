"""The contract that every encoder keeps.

An encoder is a timm model behind lightly's `MaskedVisionTransformer` interface, with
two more ways to encode masked images: `encode_masked` puts the mask token in place of
the masked patches (SimMIM), `encode_visible` leaves them out (MAE).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from lightly.models import utils
from lightly.models.modules.masked_vision_transformer import MaskedVisionTransformer
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.masking import count_masked, expand_mask, mask_to_index
from lightly_mim.patches import gather_patches, grid_size, to_pair

Pool = Literal["mean", "cls", "cls+mean"]
AnyPool = Pool | Literal["tokens"]  # all patch tokens: not pooled at all


class MaskedEncoder(MaskedVisionTransformer):
    """A timm model that encodes masked images. Use `masked_encoder` to build one.

    The model's weights and positions are left as they are. Its classifier is removed,
    so that no parameter stays without a gradient.

    Attributes:
        vit:
            The timm model.
        mask_token:
            Parameter with shape (1, 1, dim) that stands in for a masked patch. None
            until `add_mask_token` is called, since a parameter that a method does not
            use breaks plain DDP.
        name:
            timm's name of the model, None for a model that was passed by hand.
        options:
            The further timm options that the model was built with. Can be written as
            JSON.
        pos_embed:
            The `pos_embed` argument of `masked_encoder`.
        img_size:
            (height, width) in pixels that the model was built for.
        grid:
            How many patches lie along (height, width) of such images.
        patch_size:
            (height, width) in pixels of one input token.
        stride:
            (height, width) in pixels of one output token.
        in_chans:
            Number of image channels.
        embed_dim:
            Size of an output token.
        num_prefix_tokens:
            Number of class and register tokens in front of the patch tokens.
        has_class_token:
            Whether the first prefix token is a class token.
        num_layers:
            Number of features that `forward_intermediates` returns.
        mean:
            Per channel, what is subtracted from images with values in [0, 1].
        std:
            Per channel, what they are divided by afterwards.
        can_drop_tokens:
            Whether `encode_visible` and `idx_keep` work, which leave tokens out.
    """

    mask_token: nn.Parameter | None  # type: ignore[assignment]

    can_drop_tokens: ClassVar[bool] = True

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        # timm's families share names, but no base class that a type checker knows.
        self.vit = cast(Any, vit)
        self.vit.reset_classifier(0)
        self.register_parameter("mask_token", None)

        self.name: str | None = None
        self.options: dict[str, Any] = {}
        self.pos_embed: str | None = None

        patch_embed = self.vit.patch_embed
        self.img_size = to_pair(patch_embed.img_size, "img_size")
        self.patch_size = to_pair(patch_embed.patch_size, "patch_size")
        self.grid = grid_size(self.img_size, self.patch_size)
        self.stride = self.patch_size
        self.in_chans: int = patch_embed.proj.in_channels
        self.embed_dim: int = self.vit.num_features
        self.num_prefix_tokens: int = getattr(self.vit, "num_prefix_tokens", 0)
        self.has_class_token = getattr(self.vit, "cls_token", None) is not None
        self.num_layers = len(self._blocks())
        self.mean, self.std = imagenet_statistics(self.in_chans)

    @property
    def sequence_length(self) -> int:
        """Number of input tokens at `img_size`, prefix tokens included."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def feature_dim(self) -> int:
        """Size of the features that `forward` and `embed` return."""
        return self.embed_dim

    def add_mask_token(self) -> None:
        """Adds the mask token, drawn from a truncated normal with deviation 0.02.

        The deviation is that of SimMIM's reference code. A mask token that is already
        there is kept.
        """
        if self.mask_token is None:
            projection = self.vit.patch_embed.proj
            token = projection.weight.new_empty(1, 1, projection.out_channels)
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(token, std=0.02))

    # lightly's interface.

    def forward(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns one feature per image, the mean of its patch tokens.

        lightly's and timm's encoders return the class token by default. SimMIM never
        trains it, so this one does not. A model with `fc_norm` normalises the mean
        instead of the tokens, as in timm.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            idx_mask:
                See `preprocess`.
            idx_keep:
                See `preprocess`. Each image must keep a patch token.
            mask:
                See `preprocess`.

        Returns:
            Tensor with shape (batch_size, embed_dim).

        Raises:
            ValueError: See `preprocess`.
        """
        tokens = self.preprocess(images, idx_mask, idx_keep, mask)
        tokens = self._transform(tokens, self.input_grid(images), idx_keep)
        tokens = self.vit.norm(tokens)
        if idx_keep is None:
            return self._fc_norm(pool_tokens(tokens, self.num_prefix_tokens, "mean"))
        # The caller may have dropped prefix tokens, or kept them in any order.
        is_patch = (idx_keep >= self.num_prefix_tokens).unsqueeze(-1).to(tokens.dtype)
        return self._fc_norm((tokens * is_patch).sum(dim=1) / is_patch.sum(dim=1))

    def encode(
        self,
        images: Tensor,
        idx_mask: Tensor | None = None,
        idx_keep: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Encodes images.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            idx_mask:
                See `preprocess`.
            idx_keep:
                See `preprocess`.
            mask:
                See `preprocess`.

        Returns:
            Tensor with shape (batch_size, num_tokens, embed_dim), normalised, prefix
            tokens first. Where timm normalises the pooled feature (`fc_norm`), each
            token is normalised with that norm.

        Raises:
            ValueError: See `preprocess`.
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
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            idx_mask:
                See `preprocess`.
            idx_keep:
                See `preprocess`.
            norm:
                Whether the final norm is applied to the output of every layer as well.
            mask:
                See `preprocess`.

        Returns:
            The tokens that `encode` returns, and a list of `num_layers` tensors with
            shape (batch_size, num_tokens, embed_dim).

        Raises:
            ValueError: See `preprocess`.
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

        All indices and masks count the prefix tokens in.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            idx_mask:
                int64 tensor with shape (batch_size, num_masked), the tokens that the
                mask token replaces. Excludes `mask`.
            idx_keep:
                int64 tensor with shape (batch_size, num_kept), the tokens that are
                encoded. All of them if None.
            mask:
                Bool tensor with shape (batch_size, sequence_length), True where the
                mask token replaces a token. Excludes `idx_mask`.

        Returns:
            Tensor with shape (batch_size, sequence_length, dim), or (batch_size,
            num_kept, dim).

        Raises:
            ValueError: If the images do not fit the encoder, if `idx_mask` and `mask`
                are both given, if `mask` has the wrong shape, or if there is no mask
                token.
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
            tokens = self._replace_masked(tokens, mask)
        tokens = self.add_pos_embed(tokens, grid)
        return tokens if idx_keep is None else utils.get_at_index(tokens, idx_keep)

    def images_to_tokens(self, images: Tensor) -> Tensor:
        """Embeds the patches.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).

        Returns:
            Tensor with shape (batch_size, num_patches, dim), without positions and
            prefix tokens.

        Raises:
            ValueError: If the images do not fit the encoder.
        """
        self.input_grid(images)
        tokens: Tensor = self.vit.patch_embed(images)
        # timm keeps the grid, (batch_size, height, width, dim), for some models.
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens

    def prepend_prefix_tokens(self, x: Tensor) -> Tensor:
        """Puts the class token and the registers in front of the patch tokens.

        Args:
            x:
                Tensor with shape (batch_size, num_patches, dim).

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_patches, dim).
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
        positions = self._positions(self.grid if grid is None else grid)
        if positions is not None:
            if idx_keep is not None:
                # Not an index: an embedding's backward is deterministic on CPUs.
                positions = functional.embedding(idx_keep, positions[0])
            x = x + positions
        dropout = getattr(self.vit, "pos_drop", None)
        return x if dropout is None else cast(Tensor, dropout(x))

    # What masked image modelling adds.

    def encode_masked(self, images: Tensor, mask: Tensor) -> Tensor:
        """Encodes images with the mask token in place of the masked patches.

        The mask token replaces the embedded patch before any position is added
        (SimMIM, https://arxiv.org/abs/2111.09886, section 3.2 and reference code).

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            mask:
                Bool tensor with shape (batch_size, mask_height, mask_width), True =
                masked, in any grid that divides the grid of patches.

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_output_patches,
            embed_dim).

        Raises:
            ValueError: If the images or the mask do not fit the encoder, or if there is
                no mask token.
        """
        grid = self.input_grid(images)
        mask = _expand_mask(mask, images, grid)
        tokens = self._replace_masked(self.images_to_tokens(images), mask.flatten(1))
        tokens = self.add_pos_embed(self.prepend_prefix_tokens(tokens), grid)
        return self._norm(self._transform(tokens, grid))

    def encode_visible(
        self,
        images: Tensor,
        mask: Tensor,
        num_masked: int | None = None,
        intermediates: list[Tensor] | None = None,
    ) -> Tensor:
        """Encodes the prefix tokens and the visible patches alone.

        Nothing is computed for masked patches, not even their embedding (MAE,
        https://arxiv.org/abs/2111.06377, section 3).

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            mask:
                Bool tensor with shape (batch_size, mask_height, mask_width), True =
                masked, in any grid that divides the grid of patches, with the same
                number of True entries in each image.
            num_masked:
                That number, taken on trust. Counted if None, which checks the mask and
                waits for the device.
            intermediates:
                List that takes the output of every layer, without the final norm.

        Returns:
            Tensor with shape (batch_size, num_prefix_tokens + num_visible, embed_dim),
            the visible patches in raster order.

        Raises:
            ValueError: If the images or the mask do not fit the encoder.
        """
        grid = self.input_grid(images)
        token_mask = _expand_mask(mask, images, grid)
        if num_masked is None:
            num_masked = count_masked(mask)
        num_masked *= token_mask[0].numel() // mask[0].numel()
        idx_keep, _ = mask_to_index(token_mask, num_masked, self.num_prefix_tokens)
        visible = idx_keep[:, self.num_prefix_tokens :] - self.num_prefix_tokens

        # The patch embedding is a convolution whose windows do not overlap, which is a
        # linear map of flattened patches: (channels, height, width) in the weight,
        # (height, width, channels) in the patches.
        patches = gather_patches(images, visible, self.patch_size)
        projection = self.vit.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = functional.linear(patches, weight, projection.bias)
        tokens = self.vit.patch_embed.norm(tokens)

        tokens = self.add_pos_embed(self.prepend_prefix_tokens(tokens), grid, idx_keep)
        return self._norm(self._transform(tokens, grid, idx_keep, intermediates))

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the encoded patches as a picture.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).

        Returns:
            Tensor with shape (batch_size, embed_dim, height / stride, width / stride).

        Raises:
            ValueError: If the images do not fit the encoder.
        """
        tokens = self.encode(images)[:, self.num_prefix_tokens :]
        h, w = grid_size((images.shape[-2], images.shape[-1]), self.stride, "stride")
        return tokens.transpose(1, 2).reshape(len(images), -1, h, w)

    def embed(self, images: Tensor, pool: Pool = "mean", layer: int = -1) -> Tensor:
        """Returns one feature per image, from any layer.

        The last layer's feature is normalised as the model does it. Other layers give
        the mean or the class token of what their block returns, without a norm.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            pool:
                See `pool_tokens`.
            layer:
                Which layer, from 0 to `num_layers` - 1, or counted from the end if
                negative.

        Returns:
            Tensor with shape (batch_size, embed_dim), or (batch_size, 2 * embed_dim)
            for the pool "cls+mean".

        Raises:
            ValueError: If the images do not fit the encoder, or if it has no such layer
                or no class token.
        """
        return self.embed_layers(images, [layer], [pool])[layer, pool]

    def embed_layers(
        self, images: Tensor, layers: Sequence[int], pools: Sequence[AnyPool]
    ) -> dict[tuple[int, AnyPool], Tensor]:
        """Returns what `embed` returns for many layers and pools, in one pass.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
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
        outputs: list[Tensor] = []
        tokens = self.preprocess(images)
        self._transform(tokens, self.input_grid(images), intermediates=outputs)
        outputs[-1] = self.vit.norm(outputs[-1])
        features: dict[tuple[int, AnyPool], Tensor] = {}
        for layer in layers:
            for pool in pools:
                pooled = pool_tokens(outputs[layer], self.num_prefix_tokens, pool)
                if layer % self.num_layers == self.num_layers - 1:
                    parts = pooled.view(len(pooled), -1, self.embed_dim)
                    pooled = self._fc_norm(parts).view_as(pooled)
                features[layer, pool] = pooled
        return features

    def check_features(self, layers: Sequence[int], pools: Sequence[AnyPool]) -> None:
        """Checks that `embed_layers` can make these features.

        Args:
            layers:
                See `embed`.
            pools:
                See `pool_tokens`.

        Raises:
            ValueError: If the encoder has no such layer or no class token.
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
        """Checks images and returns how many patches lie along (height, width).

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).

        Raises:
            ValueError: If the images do not fit the encoder.
        """
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

    # Training.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: blocks are run again in the backward pass.

        Args:
            enable:
                Whether to do so.
        """
        self.vit.set_grad_checkpointing(enable)

    def choose_attention(self, device: torch.device, bf16: bool) -> None:
        """Chooses the kernel of the attention, see the function of this name.

        Args:
            device:
                Where the encoder is going to run.
            bf16:
                Whether it computes in bfloat16.
        """
        choose_attention(self, device, bf16)

    def set_drop_path(self, rate: float) -> None:
        """Sets stochastic depth, which rises linearly over the blocks as in timm.

        Args:
            rate:
                Probability that the last block's branches are dropped, in [0, 1). The
                first block's are never dropped.

        Raises:
            ValueError: If the rate is out of range.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"The drop path rate lies in [0, 1), got {rate}.")
        blocks = self._blocks()
        rates = torch.linspace(0, rate, len(blocks), device="cpu").tolist()
        for block, block_rate in zip(blocks, rates, strict=True):
            for path, module in list(block.named_modules()):
                parent, _, name = path.rpartition(".")
                if name.startswith("drop_path"):
                    new = DropPath(block_rate) if block_rate > 0 else nn.Identity()
                    new.train(module.training)
                    setattr(block.get_submodule(parent), name, new)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters that weight decay leaves out.

        These are the ones that timm names for the model, and the mask token. Biases and
        other vectors are for the optimiser to see.
        """
        exempt = {f"vit.{name}" for name in self.vit.no_weight_decay()} | {"mask_token"}
        return exempt & {name for name, _ in self.named_parameters()}

    # What the families of models have in common, and where they differ.

    def _blocks(self) -> list[nn.Module]:
        """Returns the transformer blocks, first to last."""
        return list(self.vit.blocks)

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
                Tensor with shape (batch_size, num_tokens, dim).
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

    def _fc_norm(self, features: Tensor) -> Tensor:
        """Applies the norm that some models have behind the pooling."""
        if not hasattr(self.vit, "fc_norm"):
            return features
        return cast(Tensor, self.vit.fc_norm(features))

    def _replace_masked(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Puts the mask token where a bool (batch_size, num_tokens) mask is True."""
        if self.mask_token is None:
            raise ValueError(
                "The encoder has no mask token to put in place of masked tokens. Call "
                "add_mask_token() once, before the optimiser is made."
            )
        mask_token = self.mask_token.to(tokens.dtype)
        return torch.where(mask.bool().unsqueeze(-1), mask_token, tokens)

    def _check_size(self, size: tuple[int, int]) -> None:
        """Raises a ValueError if the encoder cannot take images of this size."""
        if self.vit.patch_embed.strict_img_size and size != self.img_size:
            raise ValueError(
                f"The encoder was built for images of {self.img_size[0]} x "
                f"{self.img_size[1]} pixels, got {size[0]} x {size[1]}. Resize the "
                f"images or build it with img_size={size}."
            )


def choose_attention(model: nn.Module, device: torch.device, bf16: bool) -> None:
    """Chooses the kernel of the attention: PyTorch's fused one, except on CPUs.

    In bfloat16 on a CPU with AMX the matrix products one by one took 22 ms where the
    fused kernel took 104 (forward and backward, 64 x 6 heads of 65 tokens and 32
    dimensions), and 19 where it took 43 (4 x 12 heads of 197 tokens and 64 dimensions).
    In float32 the fused kernel is as fast or faster there too. The price is memory for
    the attention weights.

    Args:
        model:
            Anything with timm's attention in it.
        device:
            Where the model is going to run.
        bf16:
            Whether it computes in bfloat16.
    """
    fused = not (device.type == "cpu" and bf16)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", fused)  # noqa: B010, mypy knows tensors


def pool_tokens(
    tokens: Tensor, num_prefix_tokens: int, pool: AnyPool = "mean"
) -> Tensor:
    """Makes one feature of the tokens of an image.

    Args:
        tokens:
            Tensor with shape (batch_size, num_tokens, dim), prefix tokens first.
        num_prefix_tokens:
            Number of class and register tokens.
        pool:
            "mean" of the patch tokens, "cls" for the class token, "cls+mean" for both,
            one behind the other, or "tokens" for the patch tokens as they are.

    Returns:
        Tensor with shape (batch_size, dim), (batch_size, 2 * dim) for "cls+mean", or
        (batch_size, num_patches, dim) for "tokens".

    Raises:
        ValueError: If there is no such pool, or no prefix token to take.
    """
    if pool == "tokens":
        return tokens[:, num_prefix_tokens:]
    if pool not in get_args(Pool):
        raise ValueError(f"pool is one of {', '.join(get_args(Pool))}, got '{pool}'.")
    mean = tokens[:, num_prefix_tokens:].mean(dim=1)
    if pool == "mean":
        return mean
    if num_prefix_tokens == 0:
        raise ValueError(
            f"The pool '{pool}' takes the class token, and there is none. Use 'mean'."
        )
    cls = tokens[:, 0]
    return cls if pool == "cls" else torch.cat([cls, mean], dim=-1)


def _expand_mask(mask: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Checks a mask over the images and repeats it up to the grid of patches."""
    if mask.dtype != torch.bool or mask.ndim != 3 or len(mask) != len(images):
        raise ValueError(
            f"{len(images)} images take a bool mask with shape ({len(images)}, height, "
            f"width), True = masked, got {mask.dtype} with shape {tuple(mask.shape)}."
        )
    return expand_mask(mask, grid)


def imagenet_statistics(
    in_chans: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns ImageNet's mean and deviation, averaged over colours unless RGB.

    Args:
        in_chans:
            Number of channels.
    """
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if in_chans == len(mean):
        return tuple(mean), tuple(std)
    return (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
