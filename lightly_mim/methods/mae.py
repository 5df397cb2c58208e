"""MAE: drop patches, encode the visible ones, decode the rest.

- [0]: MAE, 2021, https://arxiv.org/abs/2111.06377
- [1]: CrossMAE, 2024, https://arxiv.org/abs/2401.14391

Shapes: B images, P prefix tokens, V visible and K masked patches of (p, q) pixels and C
channels, D = p * q * C values each.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any, Literal, cast

import torch
from lightly.models.modules.masked_vision_transformer_timm import init_weights
from lightly.models.utils import get_at_index
from torch import Tensor, nn

from lightly_mim.decoders import CrossAttentionDecoder, MAEDecoder
from lightly_mim.encoders import Encoder, MaskedEncoder, masked_encoder
from lightly_mim.losses import masked_loss
from lightly_mim.masking import (
    BlockMasking,
    GridMasking,
    Masking,
    RandomMasking,
    expand_mask,
    mask_to_index,
)
from lightly_mim.methods.base import MaskedImageModel, MIMOutput
from lightly_mim.optim import Recipe
from lightly_mim.patches import Size
from lightly_mim.targets import PatchNormalizedPixels, Pixels
from lightly_mim.transforms import MAETransform

Sampling = Literal["random", "block", "grid"]

_MASKINGS: dict[str, type[Masking]] = {
    "random": RandomMasking,
    "block": BlockMasking,
    "grid": GridMasking,
}


class MAE(MaskedImageModel):
    """MAE, the masked autoencoder.

    With `norm_pix`, `reconstruct` gives each masked patch its true mean and deviation,
    which the model does not predict; without, it paints what the model predicts. The
    visible patches are the image's own in both cases.

    With `decoder="cross"` this is CrossMAE, and with a `mask_patch_size` of several
    patches, `reg_tokens=7` and a deep decoder it masks and decodes as Pixio does.

    - [0]: MAE, 2021, https://arxiv.org/abs/2111.06377
    - [1]: CrossMAE, 2024, https://arxiv.org/abs/2401.14391

    Attributes:
        encoder:
            The encoder, which sees the visible patches alone.
        decoder_embed:
            One linear layer from the encoder's width to the decoder's. The identity for
            a cross-attention decoder, which takes the encoder's width.
        decoder:
            The transformer from visible tokens to masked ones.
        head:
            One linear layer from a token to the pixels of its patch.

    Args:
        encoder:
            timm name or timm module of a VisionTransformer, Beit or Eva, or a
            `MaskedEncoder`. One that is built here by its name, and not pretrained, is
            initialised as in the reference, with fixed sine-cosine positions if it has
            absolute ones (`pos_embed="learned"` keeps timm's). Weights that come from
            elsewhere are left as they are.
        img_size:
            Side of the images in pixels or (height, width). None for the encoder's own.
        in_chans:
            Number of image channels.
        mask_patch_size:
            Side in pixels, or (height, width), of the blocks that are masked as a
            whole, a multiple of the encoder's patch size. None for single patches
            (section 3).
        mask_ratio:
            Share of blocks that is masked (section 3: 0.75).
        sampling:
            What is masked: 'random' blocks (section 3), large rectangles ('block') or
            all but one of every 2 x 2 ('grid', with a ratio of 0.75); the paper found
            both worse (figure 6, table 1f).
        norm_pix:
            Whether the target is normalised in each patch (section 3; table 1d: better
            features) or is the normalised image itself.
        decoder_dim:
            Width of the decoder (table 1b: 512), a multiple of 4 and of its heads.
        decoder_depth:
            Number of the decoder's blocks (table 1a: 8).
        decoder_num_heads:
            Number of the decoder's attention heads (reference code: 16).
        decoder:
            'self' attends to visible tokens and mask tokens, as in the paper. 'cross'
            lets mask tokens attend to visible tokens alone, as in CrossMAE.
        predict_ratio:
            Share of the masked patches that is predicted in a training step, drawn
            anew each time, for a cross-attention decoder (CrossMAE, section 3; 1 / 3 of
            75 % masked patches are the 25 % there). Without gradients or in
            evaluation mode all of them are predicted.
        weighted_feature_maps:
            Whether each block of a cross-attention decoder attends to its own learned
            sum of the encoder's layers (CrossMAE, section 3) or to the last one.
        encoder_mask_tokens:
            Whether the encoder sees mask tokens in place of the masked patches, and
            the decoder what becomes of them; an ablation, slower and worse (table 1c).
        encoder_options:
            Further options of the encoder: see `lightly_mim.encoders.masked_encoder`.

    Raises:
        ValueError: If an argument is out of range or the encoder is not supported.

    Examples:
        >>> model = MAE("vit_tiny_patch16_224", img_size=64)
        >>> model(torch.randn(2, 3, 64, 64)).prediction.shape
        torch.Size([2, 12, 768])
    """

    def __init__(
        self,
        encoder: Encoder,
        img_size: Size | None = None,
        in_chans: int = 3,
        mask_patch_size: Size | None = None,
        mask_ratio: float = 0.75,
        sampling: Sampling = "random",
        norm_pix: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder: Literal["self", "cross"] = "self",
        predict_ratio: float = 1.0,
        weighted_feature_maps: bool = False,
        encoder_mask_tokens: bool = False,
        **encoder_options: Any,
    ) -> None:
        super().__init__()
        _check_relatives(
            decoder, predict_ratio, weighted_feature_maps, encoder_mask_tokens
        )
        self.encoder: MaskedEncoder = masked_encoder(
            encoder, img_size=img_size, in_chans=in_chans, **encoder_options
        )
        _check_encoder(self.encoder, encoder_mask_tokens)
        if isinstance(encoder, str) and not encoder_options.get("pretrained"):
            _initialize_encoder(self.encoder, **encoder_options)
        patch_size = self.encoder.patch_size
        if sampling not in _MASKINGS:
            raise ValueError(
                f"sampling is one of {tuple(_MASKINGS)}, got {sampling!r}."
            )
        self.masking = _MASKINGS[sampling](
            patch_size if mask_patch_size is None else mask_patch_size, mask_ratio
        )
        _check_mask_patch_size(self.masking.mask_patch_size, patch_size)
        self.target = PatchNormalizedPixels() if norm_pix else Pixels()
        self.predict_ratio = predict_ratio
        self.weighted_feature_maps = weighted_feature_maps
        self.encoder_mask_tokens = encoder_mask_tokens
        width, layers = self.encoder.embed_dim, self.encoder.num_layers
        num_prefix_tokens = self.encoder.num_prefix_tokens
        sizes = decoder_dim, decoder_depth, decoder_num_heads, num_prefix_tokens
        self.decoder_embed: nn.Module
        self.decoder: MAEDecoder | CrossAttentionDecoder
        if decoder == "self":
            self.decoder_embed = nn.Linear(width, decoder_dim)
            self.decoder = MAEDecoder(self.encoder.grid, *sizes)
        else:
            self.decoder_embed = nn.Identity()
            maps = layers if weighted_feature_maps else None
            self.decoder = CrossAttentionDecoder(
                self.encoder.grid, width, *sizes, num_feature_maps=maps
            )
        self.head = nn.Linear(
            decoder_dim, math.prod(patch_size) * self.encoder.in_chans
        )
        for part in (self.decoder_embed, self.decoder, self.head):
            part.apply(init_weights)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        if encoder_mask_tokens:
            self.encoder.add_mask_token()
            self.decoder.mask_token.requires_grad_(False)  # without a use

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        num_masked: int | None = None,
    ) -> MIMOutput:
        """Computes the loss of a batch, see `MaskedImageModel.forward`."""
        # Section 3: masking.
        mask, num_masked = self.prepare_mask(images, mask, num_masked)
        grid = self.encoder.input_grid(images)
        num_prefix = self.encoder.num_prefix_tokens
        idx_keep, idx_mask = mask_to_index(
            expand_mask(mask, grid),
            num_masked * math.prod(grid) // mask[0].numel(),
            num_prefix,
        )
        if self.predict_ratio < 1 and self.training and torch.is_grad_enabled():
            idx_mask = _draw_share(idx_mask, self.predict_ratio)

        # The encoder on the visible patches, the decoder from them to the masked ones.
        if self.encoder_mask_tokens:
            tokens = self._decode_all(images, mask, idx_mask, grid)
        else:
            tokens = self._encode_visible(images, mask, num_masked)
            tokens = self.decoder_embed(tokens)
            tokens = self.decoder.decode_masked(tokens, idx_keep, idx_mask, grid)
        prediction = self.head(tokens)

        # Reconstruction target: squared error on the masked patches. Each image has as
        # many of them: the mean of all values is the mean over patches of the mean
        # in each.
        index = idx_mask - num_prefix
        target = self.target(images, index, self.encoder.patch_size)
        loss = masked_loss(prediction, target, loss="l2")
        return MIMOutput(loss, prediction, target, index, None, mask)

    def _encode_visible(self, images: Tensor, mask: Tensor, num_masked: int) -> Tensor:
        """Returns tokens (B, P + V, E), or those of all layers (L, B, P + V, E)."""
        if not self.weighted_feature_maps:
            return self.encoder.encode_visible(images, mask, num_masked)
        layers: list[Tensor] = []
        tokens = self.encoder.encode_visible(images, mask, num_masked, layers)
        return torch.stack([*layers[:-1], tokens])  # the last one normalised

    def _decode_all(
        self, images: Tensor, mask: Tensor, idx_mask: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Encodes and decodes the whole sequence, and picks the masked tokens."""
        decoder = cast(MAEDecoder, self.decoder)
        tokens = self.decoder_embed(self.encoder.encode_masked(images, mask))
        return get_at_index(decoder.decode(tokens + decoder.positions(grid)), idx_mask)

    def transform(
        self, normalize: dict[str, tuple[float, ...]] | None = None, **options: Any
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


def _draw_share(index: Tensor, share: float) -> Tensor:
    """Draws a share of the tokens (B, K) of each image, rounded up, in their order."""
    count = math.ceil(index.shape[1] * Fraction(str(share)))
    noise = torch.rand(index.shape, device=index.device)
    chosen = noise.argsort(dim=1)[:, :count].sort(dim=1).values
    return index.gather(1, chosen)


def _check_relatives(
    decoder: str,
    predict_ratio: float,
    weighted_feature_maps: bool,
    encoder_mask_tokens: bool,
) -> None:
    if decoder not in ("self", "cross"):
        raise ValueError(f"The decoder is 'self' or 'cross', got {decoder!r}.")
    if not 0 < predict_ratio <= 1:
        raise ValueError(f"predict_ratio lies in (0, 1], got {predict_ratio}.")
    if decoder == "self" and (predict_ratio < 1 or weighted_feature_maps):
        raise ValueError(
            "predict_ratio and weighted_feature_maps are for a cross-attention decoder:"
            " mask tokens that attend to each other are decoded together. Use "
            "decoder='cross'."
        )
    if decoder == "cross" and encoder_mask_tokens:
        raise ValueError(
            "A cross-attention decoder makes masked tokens from visible ones, so the "
            "encoder has no mask tokens to make. Use decoder='self'."
        )


def _check_encoder(encoder: MaskedEncoder, encoder_mask_tokens: bool) -> None:
    name = encoder.name or type(encoder.vit).__name__
    if not encoder.can_drop_tokens:
        raise ValueError(
            f"MAE encodes the visible patches alone, and {name} needs all of them: its "
            "windows and patch merging take the full grid. Use a VisionTransformer, "
            "Beit or Eva, or SimMIM, which puts mask tokens in place of masked patches."
        )
    if encoder.mask_token is not None and not encoder_mask_tokens:
        raise ValueError(
            f"{name} has a mask token, which MAE's encoder never sees and which would "
            "stay without a gradient. Set encoder.mask_token = None first."
        )


def _check_mask_patch_size(
    mask_patch_size: tuple[int, int], patch_size: tuple[int, int]
) -> None:
    if mask_patch_size[0] % patch_size[0] or mask_patch_size[1] % patch_size[1]:
        raise ValueError(
            "MAE masks whole patches of the encoder: mask_patch_size is a multiple of "
            f"{patch_size[0]} x {patch_size[1]}, got {mask_patch_size[0]} x "
            f"{mask_patch_size[1]}."
        )


def _initialize_encoder(
    encoder: MaskedEncoder, pos_embed: str | None = None, **_: Any
) -> None:
    """Draws the weights as the reference does.

    Linear layers, and the patch embedding as one, are Xavier uniform (appendix A.1),
    tokens normal with deviation 0.02. The bias of the patch embedding, a convolution,
    keeps PyTorch's default there, too.
    """
    encoder.apply(init_weights)
    with torch.no_grad():
        nn.init.xavier_uniform_(encoder.vit.patch_embed.proj.weight.flatten(1))
    for name in ("cls_token", "reg_token"):
        token = getattr(encoder.vit, name, None)
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if pos_embed is None and getattr(encoder.vit, "pos_embed", None) is not None:
        masked_encoder(encoder, pos_embed="sincos")


# Appendix A.1, table 8 of the paper. Rates are per 256 images.
_BASE = Recipe(
    source="MAE, appendix A.1, table 8, and table 3 (1600 epochs)",
    encoder="vit_base_patch16_224",
    img_size=224,
    epochs=1600,
    batch_size=4096,
    lr=1.5e-4,
    lr_batch_size=256,
    warmup_epochs=40,
    schedule="cosine",
    cosine_from_warmup=True,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    drop_path=0.0,
    min_scale=0.2,
)
# Figure 7: shorter runs of ViT-L have the same schedule and warm-up. For ViT-B and
# ViT-H the paper has no shorter runs; these do the same.
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
        source=_BASE.source if epochs == _BASE.epochs else _SHORTER,
    )
    for epochs in (1600, 800, 400)
    for name, encoder in _ENCODERS.items()
}
