"""SimMIM: put mask tokens in place of patches, encode all, regress the masked pixels.

- [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886

Shapes: B images, C channels, N cells (output tokens of the encoder) of (p, q) pixels,
K of them predicted, D = p * q * C values each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightly_mim.arguments import InnerShare, PositiveInt
from lightly_mim.defaults import (
    SAME_BRIGHTNESS,
    initialization,
    mask_unit,
    target_window,
)
from lightly_mim.encoders import Encoder, Init, MaskedEncoder
from lightly_mim.heads import Head, LinearHead
from lightly_mim.losses import L1, Loss, choose_loss, masked_loss
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
from lightly_mim.patches import Size, grid_size
from lightly_mim.targets import LocallyNormalizedPixels, Pixels, Target
from lightly_mim.transforms import Normalize, SimMIMTransform


class SimMIM(MaskedImageModel):
    """SimMIM, a simple framework for masked image modelling.

    Its four components are the paper's: masking, encoder, head and target.

    - [0]: SimMIM, 2021, https://arxiv.org/abs/2111.09886

    Attributes:
        encoder:
            The encoder, with a mask token.
        head:
            The module from the tokens to the values of their cells.

    Args:
        encoder:
            timm name or timm module of a VisionTransformer, Beit, Eva, SwinTransformer
            or SwinTransformerV2, or a `MaskedEncoder`.
        img_size:
            Side of the images in pixels or (height, width). None for the encoder's own.
        in_chans:
            Number of image channels.
        masking:
            Where to mask, see `lightly_mim.masking`. By default `RandomMasking(unit,
            0.6)`: blocks of 32 pixels at 192 and 224 pixels (section 3.2), whatever the
            encoder's patch size, and in proportion at others, see
            `lightly_mim.defaults.mask_unit`.
        target:
            What to predict, see `lightly_mim.targets`. By default
            `LocallyNormalizedPixels(window)`, with SwinV2's window of 47 at 192 pixels
            and in proportion at others, see `lightly_mim.defaults.target_window`; the
            paper's own is `Pixels()` (section 3.4), which its recipes take.
        head:
            From tokens to values, see `lightly_mim.heads`. By default `LinearHead()`
            (section 3.3).
        loss:
            How to measure, see `lightly_mim.losses`. By default `L1()` (section 3.4),
            and `CrossEntropy()` where the target is classes.
        region:
            'masked' measures the masked pixels only (section 3.4). 'all' measures every
            pixel, which the paper found worse (section 4.1.4), and 'visible' those that
            the encoder saw.
        mask_patch_size:
            Short for `masking=RandomMasking(mask_patch_size, ...)`.
        mask_ratio:
            Short for `masking=RandomMasking(..., ratio=mask_ratio)`.
        init:
            The law of the weights of an encoder that is built here by its name, see
            `masked_encoder`. By default `lightly_mim.defaults.initialization`; the
            reference's is "simmim", which its recipes take.
        encoder_options:
            Further options of the encoder: see `lightly_mim.encoders.masked_encoder`.

    Raises:
        ValueError: If an argument is out of range, if parts do not fit each other, or
            if the encoder is not supported.

    Examples:
        >>> import torch
        >>> model = SimMIM("vit_tiny_patch16_224", img_size=64)
        >>> model(torch.randn(2, 3, 64, 64)).prediction.shape
        torch.Size([2, 10, 768])
    """

    replaced: ClassVar[Mapping[str, str]] = {
        "norm_target_window": "pass target=LocallyNormalizedPixels(47) for a window of "
        "47 pixels, and no target for None.",
    }

    def __init__(
        self,
        encoder: Encoder,
        img_size: Size | None = None,
        in_chans: PositiveInt = 3,
        masking: Masking | None = None,
        target: Target | None = None,
        head: Head | None = None,
        loss: Loss | None = None,
        region: Literal["masked", "all", "visible"] = "masked",
        mask_patch_size: Size | None = None,
        mask_ratio: InnerShare | None = None,
        init: Init | None = None,
        **encoder_options: Any,
    ) -> None:
        super().__init__()
        self.region = region
        if isinstance(encoder, str):
            # timm builds Swin with 0.1; the reference pretrains it without, and the ViT
            # with 0.1, which its recipe sets.
            encoder_options = {"drop_path_rate": 0.0} | encoder_options
        init = choose_init(init, encoder, encoder_options, initialization(encoder))
        self.encoder: MaskedEncoder = build_encoder(
            self,
            encoder,
            img_size=img_size,
            in_chans=in_chans,
            init=init,
            **encoder_options,
        )
        size = self.encoder.img_size
        unit = mask_unit(size, self.encoder.stride)
        self.masking = choose_masking(
            masking, mask_patch_size, mask_ratio, RandomMasking(unit, 0.6)
        )
        window = LocallyNormalizedPixels(target_window(size))
        self.target = choose_part(target, window)
        self._target_is_open = target is None
        self.loss = choose_loss(loss, self.target.num_classes, default=L1())
        check_unit(type(self).__name__, self.masking, self.encoder)
        self.encoder.add_mask_token()
        self.encoder.pool = "mean"  # the loss never trains a class token
        head = choose_part(head, LinearHead())
        cell, in_chans = self.encoder.stride, self.encoder.in_chans
        _, num_values = count_values(self.target, cell, in_chans)
        self.head = head(
            self.encoder.embed_dim,
            num_values,
            cell,
            _grid(self.encoder.img_size, self.encoder),
            getattr(self.target, "per_pixel", False),
        )
        self.record(
            masking=self.masking,
            target=self.target,
            head=head,
            loss=self.loss,
            mask_patch_size=None,
            mask_ratio=None,
            init=init,
        )

    def forward(self, images: Tensor, mask: Mask | Tensor | None = None) -> MIMOutput:
        """Computes the loss of a batch, see `MaskedImageModel.forward`."""
        mask = self.prepare_mask(images, mask)  # section 3.2
        encoded = self.encoder.encode_masked(images, mask)  # section 3.1
        tokens = self.encoder.cell_tokens(encoded)

        index, weight = self._cells_to_predict(images, mask)
        grid = _grid(images.shape[-2:], self.encoder)
        prediction = self.head(tokens, grid, index)  # section 3.3
        target = self.target(images, index, self.encoder.stride)  # section 3.4
        loss = masked_loss(
            prediction, target, self.loss, weight, self.target.num_classes
        )
        features = self.encoder.pool_encoded(encoded)
        return MIMOutput(loss, prediction, target, index, weight, mask, features)

    def suit(self, brightness: float) -> None:
        """Takes plain pixels if none were asked for and images are as bright.

        Args:
            brightness:
                See `MaskedImageModel.suit`.
        """
        if self._target_is_open and brightness < SAME_BRIGHTNESS:
            self.target = Pixels()
            self.record(target=self.target)

    def transform(
        self, normalize: Normalize | None = None, **options: Any
    ) -> SimMIMTransform:
        """Returns the paper's augmentation at the encoder's image size.

        Args:
            normalize:
                Mean and standard deviation per channel, None for uint8 images.
            options:
                Further arguments of `SimMIMTransform`.
        """
        return SimMIMTransform(
            input_size=self.encoder.img_size, normalize=normalize, **options
        )

    def _cells_to_predict(
        self, images: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the index (B, K) of the cells and the weight (B, K, D) of values."""
        grid = _grid(images.shape[-2:], self.encoder)
        masked = self.region == "masked"
        # Without gradients all cells are predicted, as a picture needs masked ones.
        visible = self.region == "visible" and torch.is_grad_enabled()
        if mask.fits(grid) and (masked or visible):
            return mask.on(grid).index()[0 if masked else 1], None
        all_cells = torch.arange(math.prod(grid), device=images.device)
        all_cells = all_cells.expand(len(images), -1)
        if self.region == "all":
            return all_cells, None
        pixels = mask.pixels((images.shape[-2], images.shape[-1]))
        counts = pixels if masked else ~pixels
        cell, in_chans = self.encoder.stride, images.shape[1]
        return all_cells, self.target.weight(counts, all_cells, cell, in_chans)


def _grid(size: Sequence[int], encoder: MaskedEncoder) -> tuple[int, int]:
    """Returns how many cells lie along (height, width) of images of a size."""
    return grid_size((size[0], size[1]), encoder.stride, "the encoder's stride")


# Section 4.1.1 and appendix A of the paper, with the values of the configuration files
# that its code was published with where the paper is silent. Rates are per 512 images
# and every run has 2048 in a step. All encoders see 192 pixels except the ViT.
#
# The code moves its schedule after a step, so that its first two steps have the first
# rate; here each step has its own, one step ahead of the code.
#
# The code looks for what timm leaves out of weight decay under names that are not the
# pretrained model's: but for the mask token it decays. The ViT's mask token does, too.
_DECAYED = ("relative_position_bias_table", "cpb_mlp", "logit_scale")
_SWIN = Recipe(
    source="microsoft/SimMIM, configs/swin_base__100ep",
    encoder="swin_base_patch4_window7_224",
    encoder_options={"window_size": 6, "init": "simmim"},
    method_options={"target": Pixels(), "mask_patch_size": 32, "mask_ratio": 0.6},
    img_size=192,
    epochs=100,
    batch_size=2048,
    lr=2e-4,
    lr_batch_size=512,
    warmup_epochs=10,
    warmup_lr=1e-6,
    min_lr=1e-5,
    schedule="cosine",
    betas=(0.9, 0.999),
    weight_decay=0.05,
    weight_decay_on=_DECAYED,
    clip_grad=5.0,
    drop_path=0.0,
    min_scale=0.67,
)
# 800 epochs: half the rate, and one step down by ten at epoch 700 instead of a cosine.
_SWIN_800 = dataclasses.replace(
    _SWIN,
    source="microsoft/SimMIM, configs/swin_base__800ep",
    epochs=800,
    lr=1e-4,
    warmup_lr=5e-7,
    min_lr=0.0,
    schedule="step",
    step_epochs=(700,),
    step_factor=0.1,
)

SimMIM.recipes = {
    "swin_base_100ep": _SWIN,
    "swin_base_800ep": _SWIN_800,
    "swin_large_800ep": dataclasses.replace(
        _SWIN_800,
        source="microsoft/SimMIM, configs/swin_large__800ep",
        encoder="swin_large_patch4_window12_384",
        encoder_options={"window_size": 12, "init": "simmim"},
    ),
    "vit_base_800ep": dataclasses.replace(
        _SWIN_800,
        source="microsoft/SimMIM, configs/vit_base__800ep",
        encoder="beit_base_patch16_224",
        # One table of relative positions for all blocks, no absolute positions, layer
        # scale 0.1, a norm in front of the head.
        encoder_options={
            "use_shared_rel_pos_bias": True,
            "use_rel_pos_bias": False,
            "use_abs_pos_emb": False,
            "use_fc_norm": False,
            "init_values": 0.1,
            "init": "simmim",
        },
        img_size=224,
        drop_path=0.1,
        weight_decay_on=(*_DECAYED, "mask_token"),
    ),
    "swinv2_base_800ep": dataclasses.replace(
        _SWIN_800,
        source="microsoft/Swin-Transformer, configs/simmim: swinv2_base, 800ep",
        encoder="swinv2_base_window12_192",
        encoder_options={"init": "simmim"},
        method_options={
            **_SWIN.method_options,
            "target": LocallyNormalizedPixels(47),
        },
        drop_path=0.1,
    ),
}
