"""MAE: drop patches, encode the visible ones, decode the rest.

- [0]: MAE, 2021, https://arxiv.org/abs/2111.06377

Shapes: B images, P prefix tokens, V visible and K masked patches of (p, q) pixels and C
channels, D = p * q * C values each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lightly.models.modules.masked_vision_transformer_timm import init_weights
from torch import Tensor, nn

from lightly_mim.arguments import InnerShare, PositiveInt
from lightly_mim.decoders import CrossAttentionDecoder, MAEDecoder
from lightly_mim.defaults import decoder_size, num_heads
from lightly_mim.encoders import (
    Encoder,
    Init,
    MaskedEncoder,
    can_drop_tokens,
)
from lightly_mim.losses import L2, Loss, choose_loss, masked_loss
from lightly_mim.masking import Mask, Masking, RandomMasking
from lightly_mim.methods.base import MaskedImageModel, MIMOutput
from lightly_mim.methods.parts import (
    build_encoder,
    check_unit,
    choose_init,
    choose_masking,
    choose_part,
    count_values,
)
from lightly_mim.optim import Recipe
from lightly_mim.patches import Size
from lightly_mim.targets import PatchNormalizedPixels, Target
from lightly_mim.transforms import MAETransform, Normalize


class MAE(MaskedImageModel):
    """MAE, the masked autoencoder.

    With its own target, `reconstruct` gives each masked patch its true mean and
    deviation, which the model does not predict; with `Pixels()` it paints what the
    model predicts. The visible patches are the image's own in both cases.

    With `RandomMasking` in units of several patches, `reg_tokens=7` and a deep decoder
    it masks and decodes as Pixio does.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377

    Attributes:
        encoder:
            The encoder, which sees the visible patches alone.
        decoder_embed:
            One linear layer from the encoder's width to the decoder's.
        decoder:
            The transformer from visible tokens to masked ones.
        head:
            One linear layer from a token to the values of its patch.

    Args:
        encoder:
            timm name or timm module of a VisionTransformer, Beit or Eva, or a
            `MaskedEncoder`.
        img_size:
            Side of the images in pixels or (height, width). None for the encoder's own.
        in_chans:
            Number of image channels.
        masking:
            Where to mask whole patches, see `lightly_mim.masking`. By default
            `RandomMasking(patch_size, 0.75)`: single patches (section 3). The paper
            found large blocks and a grid worse (figure 6, table 1f).
        target:
            What to predict, see `lightly_mim.targets`. By default
            `PatchNormalizedPixels()` (section 3; table 1d: better features than
            `Pixels()`).
        loss:
            How to measure, see `lightly_mim.losses`. By default `L2()` (section 3), and
            `CrossEntropy()` where the target is classes.
        mask_patch_size:
            Short for `masking=RandomMasking(mask_patch_size, ...)`.
        mask_ratio:
            Short for `masking=RandomMasking(..., ratio=mask_ratio)`.
        decoder_dim:
            Width of the decoder, a multiple of 4 and of its heads. By default 512 for
            ViT-B and larger (table 1b), and in proportion for smaller encoders, see
            `lightly_mim.defaults.decoder_size`.
        decoder_depth:
            Number of the decoder's blocks. By default 8 for ViT-B and deeper (table
            1a), and in proportion.
        decoder_num_heads:
            Number of the decoder's attention heads. By default of 32 values each (16 in
            the reference code).
        init:
            The law of the encoder's weights, see `masked_encoder`. By default "mae",
            that of the reference, with fixed sine-cosine positions if there are
            absolute ones (`pos_embed="learned"` keeps timm's), for an encoder that is
            built here by its name. Weights that come from elsewhere are left as they
            are.
        encoder_options:
            Further options of the encoder: see `lightly_mim.encoders.masked_encoder`.

    Raises:
        ValueError: If an argument is out of range, if parts do not fit each other, or
            if the encoder is not supported.

    Examples:
        >>> import torch
        >>> model = MAE("vit_tiny_patch16_224", img_size=64)
        >>> model(torch.randn(2, 3, 64, 64)).prediction.shape
        torch.Size([2, 12, 768])
    """

    replaced: ClassVar[Mapping[str, str]] = {
        "head": "one linear layer follows its decoder; choose decoder_depth.",
        "region": "it measures the masked patches alone.",
        "norm_pix": "pass target=Pixels() for False, and no target for True.",
        "sampling": "pass masking=BlockMasking(...) or masking=GridMasking(...), and "
        "no masking for 'random'.",
        "decoder": "CrossMAE of lightly_mim.methods has the cross-attention decoder.",
        "predict_ratio": "it is an argument of lightly_mim.methods.CrossMAE.",
        "weighted_feature_maps": "it is an argument of lightly_mim.methods.CrossMAE.",
        "encoder_mask_tokens": "lightly_mim.methods.MaskTokenMAE is that ablation.",
    }

    decoder: MAEDecoder | CrossAttentionDecoder

    def __init__(
        self,
        encoder: Encoder,
        img_size: Size | None = None,
        in_chans: PositiveInt = 3,
        masking: Masking | None = None,
        target: Target | None = None,
        loss: Loss | None = None,
        mask_patch_size: Size | None = None,
        mask_ratio: InnerShare | None = None,
        decoder_dim: PositiveInt | None = None,
        decoder_depth: PositiveInt | None = None,
        decoder_num_heads: PositiveInt | None = None,
        init: Init | None = None,
        **encoder_options: Any,
    ) -> None:
        super().__init__()
        self.target = choose_part(target, PatchNormalizedPixels())
        self.loss = choose_loss(loss, self.target.num_classes, default=L2())
        _check_family(encoder)
        init = choose_init(init, encoder, encoder_options, default="mae")
        self.encoder: MaskedEncoder = build_encoder(
            self,
            encoder,
            img_size=img_size,
            in_chans=in_chans,
            init=init,
            **encoder_options,
        )
        _check_encoder(self.encoder)
        patch_size = self.encoder.patch_size
        self.masking = choose_masking(
            masking, mask_patch_size, mask_ratio, RandomMasking(patch_size, 0.75)
        )
        check_unit(type(self).__name__, self.masking, self.encoder)

        dim, depth = decoder_size(self.encoder.embed_dim, self.encoder.num_layers)
        decoder_dim = dim if decoder_dim is None else decoder_dim
        decoder_depth = depth if decoder_depth is None else decoder_depth
        if decoder_num_heads is None:
            decoder_num_heads = num_heads(decoder_dim)
        self.decoder_embed, self.decoder = self._make_decoder(
            decoder_dim, decoder_depth, decoder_num_heads
        )
        _, num_values = count_values(self.target, patch_size, self.encoder.in_chans)
        self.head = nn.Linear(decoder_dim, num_values)
        for part in (self.decoder_embed, self.decoder, self.head):
            part.apply(init_weights)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        self.record(
            masking=self.masking,
            target=self.target,
            loss=self.loss,
            decoder_dim=decoder_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            mask_patch_size=None,
            mask_ratio=None,
            init=init,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses a decoder that `forward` cannot use, as soon as it is set."""
        if name == "decoder" and not hasattr(value, "decode_masked"):
            raise ValueError(
                "The decoder takes visible tokens and returns masked ones, in "
                f"decode_masked: {type(value).__name__} has no such method. MAE makes "
                "its own from decoder_dim, decoder_depth and decoder_num_heads; for "
                "another one derive from lightly_mim.decoders.MAEDecoder, which is "
                "lightly's MaskedVisionTransformerDecoderTIMM with that method."
            )
        super().__setattr__(name, value)

    def _make_decoder(
        self, dim: int, depth: int, num_heads: int
    ) -> tuple[nn.Module, MAEDecoder | CrossAttentionDecoder]:
        """Returns the map to the decoder's width and the decoder."""
        num_prefix_tokens = self.encoder.num_prefix_tokens
        return nn.Linear(self.encoder.embed_dim, dim), MAEDecoder(
            self.encoder.grid, dim, depth, num_heads, num_prefix_tokens
        )

    def forward(self, images: Tensor, mask: Mask | Tensor | None = None) -> MIMOutput:
        """Computes the loss of a batch, see `MaskedImageModel.forward`."""
        # Section 3, masking.
        grid = self.encoder.input_grid(images)
        mask = self.prepare_mask(images, mask)
        patches = mask.on(grid)
        idx_keep, idx_mask = patches.token_index(self.encoder.num_prefix_tokens)

        # The encoder on the visible patches, the decoder from them to the masked ones.
        encoded = self.encoder.encode_visible(images, patches)
        tokens = self.decoder_embed(encoded)
        tokens = self.decoder.decode_masked(tokens, idx_keep, idx_mask, grid)
        prediction = self.head(tokens)

        # Reconstruction target: squared error on the masked patches. Each image has as
        # many of them: the mean of all values is the mean over patches of the mean
        # in each.
        index, _ = patches.index()
        target = self.target(images, index, self.encoder.patch_size)
        loss = masked_loss(
            prediction, target, self.loss, num_classes=self.target.num_classes
        )
        features = self.encoder.pool_encoded(encoded)
        return MIMOutput(loss, prediction, target, index, None, mask, features)

    def transform(
        self, normalize: Normalize | None = None, **options: Any
    ) -> MAETransform:
        """Returns the paper's augmentation at the encoder's image size.

        Args:
            normalize:
                Mean and standard deviation per channel, None for uint8 images.
            options:
                Further arguments of `MAETransform`.
        """
        return MAETransform(
            input_size=self.encoder.img_size, normalize=normalize, **options
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Runs the blocks of encoder and decoder again in the backward pass.

        Args:
            enable:
                Whether to do so.
        """
        super().set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters with several dimensions that do not decay.

        As in the reference, class, register and mask tokens decay.
        """
        tokens = {"vit.cls_token", "vit.reg_token", "mask_token"}
        return super().no_weight_decay() - {f"encoder.{token}" for token in tokens}


def _check_family(encoder: Encoder) -> None:
    """Raises a ValueError for a family that cannot drop patches, before it is built."""
    if not can_drop_tokens(encoder):
        raise ValueError(
            "MAE encodes the visible patches alone, and "
            f"{_name(encoder)} needs all of them: its "
            "windows and patch merging take the full grid. Use a VisionTransformer, "
            "Beit or Eva, or SimMIM, which puts mask tokens in place of masked patches."
        )


def _check_encoder(encoder: MaskedEncoder) -> None:
    """Raises a ValueError if the encoder cannot drop patches or has a mask token."""
    _check_family(encoder)
    if encoder.mask_token is not None:
        raise ValueError(
            f"{_name(encoder)} has a mask token, which MAE's encoder never sees and "
            "which would stay without a gradient. Set encoder.mask_token = None first."
        )


def _name(encoder: Encoder) -> str:
    if isinstance(encoder, MaskedEncoder):
        return encoder.name or type(encoder.vit).__name__
    return encoder if isinstance(encoder, str) else type(encoder).__name__


# Appendix A.1, table 8 of the paper. Rates are per 256 images.
_BASE = Recipe(
    source="MAE, appendix A.1, table 8, and table 3 (1600 epochs)",
    encoder="vit_base_patch16_224",
    encoder_options={"init": "mae"},
    method_options={
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_num_heads": 16,
    },
    img_size=224,
    epochs=1600,
    batch_size=4096,
    lr=1.5e-4,
    lr_batch_size=256,
    warmup_epochs=40,
    full_warmup_from=800,
    schedule="cosine",
    cosine_from_warmup=True,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    drop_path=0.0,
    min_scale=0.2,
)
# Figure 7: shorter runs of ViT-L have the same schedule and warm-up. For ViT-B and
# ViT-H the paper has no shorter runs; these do the same. Other runs of fewer than 800
# epochs have their share of the warm-up.
_SHORTER = "MAE, appendix A.1, table 8, and figure 7 (shorter schedules)"
_ENCODERS = {
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}

MAE.recipes = {
    f"{name}_{epochs}ep": dataclasses.replace(
        _BASE,
        encoder=encoder,
        epochs=epochs,
        full_warmup_from=min(epochs, 800),
        source=_BASE.source if epochs == _BASE.epochs else _SHORTER,
    )
    for epochs in (1600, 800, 400)
    for name, encoder in _ENCODERS.items()
}
