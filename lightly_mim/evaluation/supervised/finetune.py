"""Fine-tuning: the whole encoder and a linear head, with the papers' recipes.

- [0]: Masked Autoencoder, 2021, https://arxiv.org/abs/2111.06377 (table 9, and
  FINETUNE.md and `main_finetune.py` of its code, which differ from it)
- [1]: SimMIM, 2021, https://arxiv.org/abs/2111.09886 (appendix, and the configuration
  files of its code)

Shapes: B images in a micro-batch, C channels, (H, W) pixels, D features.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightly.transforms.torchvision_v2_compatibility import (
    torchvision_transforms as T,
)
from PIL import ImageOps
from PIL.Image import Image, Resampling
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.arguments import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Rate,
    Share,
    checked,
)
from lightly_mim.data import keyed_random_state
from lightly_mim.encoders import MaskedEncoder, Pool
from lightly_mim.evaluation.fingerprints import encoder_fingerprint
from lightly_mim.evaluation.protocol import LabelledImages, Outcome, rank_classes
from lightly_mim.evaluation.supervised.supervised import (
    BatchPlan,
    Classification,
    plan_batches,
    train_and_score,
)
from lightly_mim.optim import Recipe, build_optimizer, layer_ids
from lightly_mim.training.machine import (
    ONE,
    Layout,
    MixedPrecision,
)
from lightly_mim.transforms import MAETransform

# An epoch of fewer steps than this gets smaller batches, if no batch size is asked for.
_MIN_STEPS_PER_EPOCH = 25
_MIN_BATCH_SIZE = 32
_FEW_STEPS = 10_000


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

    Args:
        encoder:
            The encoder.
    """
    if isinstance(encoder.vit, SwinTransformerV2):
        return "simmim_swinv2_base"
    if isinstance(encoder.vit, SwinTransformer):
        large = encoder.embed_dim >= 1536
        return "simmim_swin_large" if large else "simmim_swin_base_100ep"
    if encoder.num_layers >= 24:
        return "mae_vit_huge" if encoder.num_layers >= 32 else "mae_vit_large"
    return "simmim_vit_base" if isinstance(encoder.vit, Beit) else "mae_vit_base"


@checked
@dataclass(frozen=True)
class FineTune:
    """Fine-tunes the whole encoder with a linear head on the mean of its patch tokens.

    Random crops and flips, RandAugment, random erasing, mixup and cutmix, soft targets;
    AdamW with layer-wise learning rate decay, warm-up and cosine; stochastic depth. As
    in [0] and [1], a new norm behind the pooling takes the place of a ViT's final norm,
    positions are trained, and a table of relative positions that the blocks of a Beit
    share becomes one of each block. The weights after the last epoch count: the test
    images are scored once.

    Images have the encoder's size. The recipes of Swin of 800 epochs, Swin-L and
    SwinV2 have 224 pixels after 192 in pretraining: `evaluate(run, img_size=224)`.

    None takes the recipe's value. The recipes are made for ImageNet. With few images
    try others on a part of the training images (`evaluate(holdout=0.2)`): of the solar
    cells, 15 epochs with `lr=4e-3`, `layer_decay=0.75` and MAE's augmentations got 65 %
    of the held-out images right, and 77 % with a `min_scale` of 0.67 and neither
    mixup, cutmix, RandAugment, random erasing nor drop path.

    Attributes:
        recipe:
            One of `RECIPES`. None for `default_recipe`.
        epochs:
            Number of passes over the images. Warm-up keeps its share of them.
        batch_size:
            Images per optimiser step. None for the recipe's, or half, a quarter... of
            it, down to 32, until an epoch has 25 steps: 64 for 2,000 training images;
            or all of fewer than 32 images.
        micro_batch_size:
            Most images at a time on a device. A batch is shared out evenly into
            micro-batches, each of which is mixed by itself: with as many of them, any
            number of devices makes the same weights.
        lr:
            Highest learning rate, per 256 (MAE) or 512 (SimMIM) images.
        warmup_epochs:
            Epochs of linear warm-up.
        weight_decay:
            AdamW's weight decay.
        layer_decay:
            Factor on the learning rate from layer to layer downwards. 1 for none.
        drop_path:
            Stochastic depth rate of the last block.
        mixup:
            Alpha of mixup, 0 for none.
        cutmix:
            Alpha of cutmix, 0 for none.
        label_smoothing:
            Share of the target that is spread over all classes.
        rand_augment:
            RandAugment as timm writes it, "" for none. Grey images leave out the
            operations on colour, which would do nothing.
        random_erasing:
            Probability that a rectangle of an image is replaced by noise.
        min_scale:
            Smallest share of an image that a crop covers.
        clip_grad:
            Largest norm of the gradient, 0 for no clipping.
        pool:
            "mean" as in [0] and [1]; "cls" and "cls+mean" keep the encoder's own norm.
        grad_checkpointing:
            Trade time for memory: recompute the encoder's activations.
    """

    name: ClassVar[str] = "finetune"
    reads: ClassVar[str] = "images"

    recipe: RecipeName | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt = 128
    lr: PositiveFloat | None = None
    warmup_epochs: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    layer_decay: Share | None = None
    drop_path: Rate | None = None
    mixup: NonNegativeFloat | None = None
    cutmix: NonNegativeFloat | None = None
    label_smoothing: Rate | None = None
    rand_augment: str | None = None
    random_erasing: Probability | None = None
    min_scale: Share | None = None
    clip_grad: NonNegativeFloat | None = None
    pool: Pool = "mean"
    grad_checkpointing: bool = False

    def check(self, num_train: int) -> list[str]:
        """See `ImageProtocol`."""
        # The encoder is not known yet, and its recipe only if it is given.
        recipe = self.settings(self.recipe or "mae_vit_base", num_train)
        plan = self._plan(num_train, recipe)
        notes = []
        published = RECIPES[self.recipe or "mae_vit_base"]
        if self.batch_size is None and recipe.batch_size < published.batch_size:
            notes.append(
                f"finetune: with {num_train} training images, batches have "
                f"{recipe.batch_size} images instead of the published "
                f"{published.batch_size}."
            )
        steps = plan.steps_per_epoch * recipe.epochs
        as_published = (recipe.lr, recipe.mixup, recipe.rand_augment) == (
            published.lr,
            published.mixup,
            published.rand_augment,
        )
        if as_published and steps < _FEW_STEPS:
            notes.append(
                f"finetune: {steps} steps, and the published rate and augmentations "
                "are made for the 60,000 and more of ImageNet. For few images a higher "
                "lr without mixup, cutmix, rand_augment and random_erasing may train "
                "further."
            )
        return notes

    def check_encoder(self, encoder: MaskedEncoder) -> None:
        """See `ImageProtocol`."""
        encoder.check_features([-1], [self.pool])
        self._transform(encoder)

    def settings(self, name: str, num_train: int) -> FineTuneRecipe:
        """Returns a published recipe with the values that were asked for.

        Args:
            name:
                One of `RECIPES`.
            num_train:
                Number of training images.

        Raises:
            ValueError: If a value is out of range.
        """
        recipe = RECIPES[name]
        if self.epochs is not None:
            recipe = recipe.for_epochs(self.epochs)
        fields = {field.name for field in dataclasses.fields(recipe)}
        given = {
            field: value
            for field, value in vars(self).items()
            if field in fields and value is not None
        }
        recipe = dataclasses.replace(recipe, **given)
        if self.batch_size is None:
            batch_size = recipe.batch_size
            while (
                batch_size > _MIN_BATCH_SIZE
                and num_train // batch_size < _MIN_STEPS_PER_EPOCH
            ):
                batch_size //= 2
            batch_size = min(batch_size, max(num_train // 2 * 2, 2))  # mixing pairs
            recipe = dataclasses.replace(recipe, batch_size=batch_size)
        if recipe.rand_augment:
            _check_rand_augment(recipe.rand_augment)
        return recipe

    def __call__(
        self,
        encoder: MaskedEncoder,
        images: LabelledImages,
        num_classes: int,
        *,
        out: Path,
        seed: int = 0,
        device: torch.device | str = "cpu",
        precision: MixedPrecision = "32",
        num_workers: int | None = None,
        progress: bool = False,
        layout: Layout = ONE,
        compile: bool = False,
    ) -> list[Outcome]:
        """See `ImageProtocol`."""
        device = torch.device(device)
        name = self.recipe or default_recipe(encoder)
        train = images.train(self._transform(encoder))
        num_train = len(train)  # type: ignore[arg-type]
        self.check(num_train)
        self.check_encoder(encoder)
        recipe = self.settings(name, num_train)
        plan = self._plan(num_train, recipe, layout.world_size)
        with keyed_random_state(seed, "finetune", "head"):
            model = FineTuned(encoder, num_classes, self.pool, recipe.head_std)
        if recipe.drop_path is not None:
            model.encoder.set_drop_path(recipe.drop_path)
        if self.grad_checkpointing:
            model.encoder.set_grad_checkpointing()
        model.encoder.choose_attention(device, bf16=precision == "bf16")
        model.to(device)
        optimizer, schedule = build_optimizer(
            model,
            recipe,
            plan.batch_size,
            plan.steps_per_epoch,
            plan.steps_per_epoch * recipe.epochs,
            recipe.exempt(model.no_weight_decay()),
            layer_decay=recipe.layer_decay if recipe.layer_decay != 1 else None,
            decay_ends=recipe.decay_ends,
            fused=precision != "16",  # see `lightly_mim.training.cuda`,
        )
        logits = train_and_score(
            Classification(
                name="finetune",
                model=model,
                trained=model,
                optimizer=optimizer,
                schedule=schedule,
                loss=mixed_loss(recipe, num_classes, device),
                epochs=recipe.epochs,
                plan=plan,
                clip_grad=recipe.clip_grad or None,
            ),
            train,
            images.test,
            encoder,
            num_classes,
            identity={
                **dataclasses.asdict(self) | {"grad_checkpointing": None},
                "protocol": "finetune",
                "recipe": name,
                "encoder": encoder_fingerprint(encoder),
                "num_classes": num_classes,
            },
            out=out,
            seed=seed,
            precision=precision,
            num_workers=num_workers,
            progress=progress,
            layout=layout,
            compile=compile,
        )
        return [
            Outcome(
                (encoder.num_layers - 1, self.pool),
                {
                    "epochs": recipe.epochs,
                    "batch_size": recipe.batch_size,
                    "learning_rate": (
                        recipe.lr * recipe.batch_size / recipe.lr_batch_size
                    ),
                    "layer_decay": recipe.layer_decay,
                },
                [],
                rank_classes(logits),
                classifier=model,
            )
        ]

    def _transform(self, encoder: MaskedEncoder) -> FineTuneTransform:
        published = RECIPES[self.recipe or default_recipe(encoder)]
        min_scale = published.min_scale if self.min_scale is None else self.min_scale
        rand_augment = self.rand_augment
        return FineTuneTransform(
            encoder.img_size,
            encoder.in_chans,
            encoder.mean,
            min_scale,
            published.rand_augment if rand_augment is None else rand_augment,
        )

    def _plan(
        self, num_train: int, recipe: FineTuneRecipe, processes: int = 1
    ) -> BatchPlan:
        if recipe.batch_size > num_train:
            raise ValueError(
                f"A batch of {recipe.batch_size} images is larger than the training "
                f"set of {num_train}: use batch_size={num_train // 2 * 2} or less."
            )
        # Mixing pairs the first image with the last one, and so on.
        mixes = recipe.mixup > 0 or recipe.cutmix > 0
        multiple = 2 if mixes else 1
        return plan_batches(
            num_train, recipe.batch_size, self.micro_batch_size, multiple, processes
        )


class FineTuneTransform:
    """Random crop, flip and RandAugment, as the fine-tuning of MAE and SimMIM.

    Input to this transform:
        PIL image of mode L or RGB, or uint8 tensor with shape (channels, height,
        width).

    Output of this transform:
        List of one uint8 tensor with shape (channels, height, width). Random erasing,
        which comes next, is for normalised batches on the device.

    RandAugment is timm's: two operations per image, each with probability 0.5, with the
    mean of the images as the colour behind them. For grey images it chooses among the
    operations that are not about colour.

    Attributes:
        crop:
            The random resized crop (bicubic) and flip.
        augment:
            timm's RandAugment. None for none.

    Args:
        input_size:
            (height, width) of the result in pixels.
        in_chans:
            Number of channels. RandAugment needs 1 or 3.
        mean:
            Per channel, the mean of images in [0, 1].
        min_scale:
            Smallest area of the random crop, as a part of the picture's.
        rand_augment:
            RandAugment as timm writes it, such as "rand-m9-mstd0.5-inc1"; empty for
            none.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        input_size: tuple[int, int],
        in_chans: int,
        mean: tuple[float, ...],
        min_scale: float,
        rand_augment: str,
    ) -> None:
        self.crop = MAETransform(input_size, min_scale=min_scale, normalize=None)
        self.augment: Any = None
        if not rand_augment:
            return
        _check_rand_augment(rand_augment)
        if in_chans not in (1, 3):
            raise ValueError(
                "RandAugment is made for grey and colour images, and these have "
                f'{in_chans} channels: use rand_augment="".'
            )
        colour = tuple(min(255, round(255 * value)) for value in mean)
        self.augment = rand_augment_transform(
            rand_augment,
            {
                "img_mean": colour if in_chans == 3 else colour[0],
                "interpolation": Resampling.BICUBIC,
            },
        )
        for op in self.augment.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
        if in_chans == 1:
            _leave_out_colour(self.augment)

    def __call__(self, image: Image | Tensor) -> list[Tensor]:
        """Returns a list of one view of the image."""
        view = self.crop(image)[0]
        if self.augment is not None:
            view = T.functional.pil_to_tensor(
                self.augment(T.functional.to_pil_image(view))
            )
        return [view]

    def decode_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """See `lightly_mim.transforms.MAETransform.decode_size`."""
        return self.crop.decode_size(image_size)


_COLOUR_OPERATIONS = ("Color", "ColorIncreasing", "Desaturate")


def _posterize(image: Image, bits_to_keep: int, **_: Any) -> Image:
    """Keeps the highest bits of each pixel, none of them at the highest magnitude.

    That is a black image. Recent versions of Pillow refuse to make it, and timm fails
    with them about once in 650 images at "rand-m9-mstd0.5-inc1".
    """
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def _leave_out_colour(augment: Any) -> None:
    kept = np.array([op.name not in _COLOUR_OPERATIONS for op in augment.ops])
    augment.ops = [op for op, keep in zip(augment.ops, kept, strict=True) if keep]
    if augment.choice_weights is not None:
        weights = augment.choice_weights[kept]
        augment.choice_weights = weights / weights.sum()


@checked
class FineTuned(nn.Module):
    """A copy of an encoder made ready for fine-tuning, and a linear head.

    Attributes:
        encoder:
            The copy, all of it trained, without a mask token.
        pool:
            The pooling.
        head:
            The linear layer.

    Args:
        encoder:
            The encoder, left as it is.
        num_classes:
            Number of classes.
        pool:
            "mean" puts a new norm behind the pooling in the place of a ViT's final one,
            unless the model has one there already (`fc_norm`). A Swin keeps its norm,
            which is in front of the pooling in the references, too.
        head_std:
            Standard deviation of the head's initial weights.
    """

    def __init__(
        self,
        encoder: MaskedEncoder,
        num_classes: PositiveInt,
        pool: Pool,
        head_std: NonNegativeFloat,
    ) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.encoder.mask_token = None
        self.pool: Pool = pool
        vit = self.encoder.vit
        if pool == "mean" and isinstance(getattr(vit, "fc_norm", None), nn.Identity):
            vit.fc_norm, vit.norm = vit.norm, nn.Identity()
            vit.fc_norm.reset_parameters()
        if getattr(vit, "rel_pos_bias", None) is not None:
            _share_out_positions(vit)
        width = encoder.embed_dim * (2 if pool == "cls+mean" else 1)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits with shape (B, num_classes) of normalised images."""
        logits: Tensor = self.head(self.encoder.embed(images, self.pool))
        return logits

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Returns the function from a parameter's name to the number of its layer."""
        ids = layer_ids(self.encoder.vit)
        behind = max(ids.values())
        prefix = "encoder.vit."
        return lambda name: ids.get(name.removeprefix(prefix), behind)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters with several dimensions that do not decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def _share_out_positions(vit: Any) -> None:
    """Gives each block of a Beit its own copy of the table that they share."""
    shared = vit.rel_pos_bias
    for block in vit.blocks:
        attn = block.attn
        if attn.window_size is None:
            attn.window_size = shared.window_size
            attn.relative_position_bias_table = nn.Parameter(
                shared.relative_position_bias_table.detach().clone()
            )
            # A buffer that the module has as a plain None.
            del attn.relative_position_index
            attn.register_buffer(
                "relative_position_index",
                shared.relative_position_index.clone(),
                persistent=False,
            )
        else:
            with torch.no_grad():
                attn.relative_position_bias_table += shared.relative_position_bias_table
    vit.rel_pos_bias = None


def mixed_loss(
    recipe: FineTuneRecipe, num_classes: int, device: torch.device
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Returns the loss of a batch with random erasing, mixup, cutmix and smoothing.

    Args:
        recipe:
            The settings.
        num_classes:
            Number of classes.
        device:
            Where the images are.

    Returns:
        Function from (model, normalised images with shape (B, C, H, W), int64 labels
        with shape (B,)) to the mean cross-entropy. It changes the images.
    """
    smoothing = recipe.label_smoothing
    erase = RandomErasing(
        recipe.random_erasing, mode="pixel", max_count=1, device=str(device)
    )
    mix = None
    if recipe.mixup > 0 or recipe.cutmix > 0:
        mix = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if recipe.random_erasing > 0:
            images = erase(images)
        if mix is None:
            return functional.cross_entropy(
                model(images).float(), labels, label_smoothing=smoothing
            )
        images, targets = mix(images, labels)  # targets: (B, num_classes), smoothed
        return functional.cross_entropy(model(images).float(), targets)

    return loss


def _check_rand_augment(text: str) -> None:
    # timm skips what it does not know, or fails by an assertion.
    number, whole = r"\d+(\.\d+)?", r"\d+"
    parts = f"(m|n|mmax|inc){whole}|(p|mstd){number}|tweights|t3aw?"
    if not re.fullmatch(f"rand(-({parts}))*", text):
        raise ValueError(
            'rand_augment is timm\'s text, such as "rand-m9-mstd0.5-inc1" (magnitude 9 '
            'of 10 with a deviation of 0.5), or "" for none, got '
            f"{text!r}."
        )
