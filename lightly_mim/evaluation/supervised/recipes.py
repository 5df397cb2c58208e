"""The published recipes of fine-tuning, as data.

- [0]: Masked Autoencoder, 2021, https://arxiv.org/abs/2111.06377 (table 9, and
  FINETUNE.md and `main_finetune.py` of its code, which differ from it)
- [1]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (appendix, and the configuration
  files of its code)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from lightly_mim.arguments import NonNegativeFloat, Probability, Rate, Share, checked
from lightly_mim.encoders import MaskedEncoder
from lightly_mim.optim import Recipe


@checked
@dataclass(frozen=True)
class FineTuneRecipe(Recipe):
    """Settings of fine-tuning: those of a `Recipe`, and what comes on top.

    Attributes:
        layer_decay:
            Factor on the learning rate from each layer to the one below it, see
            `lightly_mim.optim.layer_ids`.
        decay_ends:
            Whether that factor applies to the rates of warm-up and end (MAE), or to the
            highest rate alone (SimMIM).
        head_std:
            Standard deviation of the head's initial weights, a truncated normal. Its
            bias begins at zero.
        mixup:
            Alpha of mixup's beta distribution, 0 for none. Each micro-batch is mixed,
            by mixup or cutmix with equal chances if both are on.
        cutmix:
            Alpha of cutmix' beta distribution, 0 for none.
        label_smoothing:
            Share of the target that is spread over all classes.
        rand_augment:
            RandAugment as timm writes it, empty for none.
        random_erasing:
            Probability that a rectangle of an image is replaced by noise.
    """

    layer_decay: Share = 1.0
    decay_ends: bool = True
    head_std: NonNegativeFloat = 0.02
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    label_smoothing: Rate = 0.1
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: Probability = 0.25


# The recipe of FINETUNE.md; table 9 of the paper has 1e-3 and .75 for ViT-B, too. The
# warm-up is the table's; the lowest rate of 1e-6 is the code's, whatever the batch.
# Crops cover 8 to 100 % of the area, timm's default.
_MAE_BASE = FineTuneRecipe(
    source="facebookresearch/mae, FINETUNE.md",
    encoder="vit_base_patch16_224",
    img_size=224,
    epochs=100,
    batch_size=1024,
    lr=5e-4,
    lr_batch_size=256,
    warmup_epochs=5,
    min_lr=1e-6,
    min_lr_is_absolute=True,
    cosine_from_warmup=True,
    weight_decay=0.05,
    drop_path=0.1,
    layer_decay=0.65,
    head_std=2e-5,
    min_scale=0.08,
)
_MAE_LARGE = dataclasses.replace(
    _MAE_BASE,
    encoder="vit_large_patch16_224",
    epochs=50,
    lr=1e-3,
    drop_path=0.2,
    layer_decay=0.75,
)
# The configuration files named finetune; rates per 512 images, 2048 in a step. The
# rates of warm-up and end are from memory of these files. They list a colour jitter of
# 0.4, which timm leaves out beside RandAugment.
_SIMMIM_SWIN = FineTuneRecipe(
    source="microsoft/SimMIM, configs/swin_base__100ep",
    encoder="swin_base_patch4_window7_224",
    encoder_options={"window_size": 6},
    img_size=192,
    epochs=100,
    batch_size=2048,
    lr=1.25e-3,
    lr_batch_size=512,
    warmup_epochs=20,
    warmup_lr=2.5e-7,
    min_lr=2.5e-7,
    weight_decay=0.05,
    clip_grad=5.0,
    drop_path=0.1,
    layer_decay=0.9,
    # timm's scheduler takes them as they are for every layer.
    decay_ends=False,
    min_scale=0.08,
)

RECIPES: dict[str, FineTuneRecipe] = {
    "mae_vit_base": _MAE_BASE,
    "mae_vit_large": _MAE_LARGE,
    "mae_vit_huge": dataclasses.replace(
        _MAE_LARGE, encoder="vit_huge_patch14_224", drop_path=0.3
    ),
    "simmim_vit_base": dataclasses.replace(
        _SIMMIM_SWIN,
        source="microsoft/SimMIM, configs/vit_base__800ep",
        encoder="beit_base_patch16_224",
        encoder_options={"use_abs_pos_emb": False, "init_values": 0.1},
        img_size=224,
        layer_decay=0.65,
        # A Swin leaves its tables out.
        weight_decay_on=("relative_position_bias_table",),
        # Its head is drawn with 0.02 and then multiplied by 0.001.
        head_std=2e-5,
    ),
    "simmim_swin_base_100ep": _SIMMIM_SWIN,
    "simmim_swin_base_800ep": dataclasses.replace(
        _SIMMIM_SWIN,
        source="microsoft/SimMIM, configs/swin_base__800ep",
        encoder_options={"window_size": 7},
        img_size=224,
        layer_decay=0.8,
    ),
    "simmim_swin_large": dataclasses.replace(
        _SIMMIM_SWIN,
        source="microsoft/SimMIM, configs/swin_large__800ep",
        encoder="swin_large_patch4_window12_384",
        encoder_options={"window_size": 14},
        img_size=224,
        drop_path=0.2,
        layer_decay=0.7,
    ),
    "simmim_swinv2_base": dataclasses.replace(
        _SIMMIM_SWIN,
        source="microsoft/Swin-Transformer, configs/simmim: swinv2_base",
        encoder="swinv2_base_window12_192",
        encoder_options={
            "window_size": 14,
            "pretrained_window_sizes": [12, 12, 12, 6],
        },
        img_size=224,
        cosine_from_warmup=True,
        layer_decay=0.75,
    ),
}

RecipeName = Literal[
    "mae_vit_base",
    "mae_vit_large",
    "mae_vit_huge",
    "simmim_vit_base",
    "simmim_swin_base_100ep",
    "simmim_swin_base_800ep",
    "simmim_swin_large",
    "simmim_swinv2_base",
]


def default_recipe(encoder: MaskedEncoder) -> RecipeName:
    """Returns the name of the published recipe that is nearest to an encoder.

    A Swin gets SimMIM's for Swin-B, or Swin-L from a width of 1,536 on; a SwinV2 that
    for SwinV2-B. A Beit gets SimMIM's for ViT-B, whose ViT is one. Other ViTs, and a
    Beit of 24 blocks or more, get MAE's for ViT-B, ViT-L (from 24 blocks on) or ViT-H
    (from 32 on).
    """
    if isinstance(encoder.vit, SwinTransformerV2):
        return "simmim_swinv2_base"
    if isinstance(encoder.vit, SwinTransformer):
        large = encoder.embed_dim >= 1536
        return "simmim_swin_large" if large else "simmim_swin_base_100ep"
    if encoder.num_layers >= 24:
        return "mae_vit_huge" if encoder.num_layers >= 32 else "mae_vit_large"
    return "simmim_vit_base" if isinstance(encoder.vit, Beit) else "mae_vit_base"
