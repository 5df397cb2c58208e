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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
from lightly_mim.evaluation.base import (
    LabelledImages,
    Outcome,
    TrainingRun,
    rank_classes,
)
from lightly_mim.evaluation.supervised.augmentation import (
    FineTuneTransform,
    check_rand_augment,
    mixed_loss,
)
from lightly_mim.evaluation.supervised.recipes import (
    RECIPES,
    FineTuneRecipe,
    RecipeName,
    default_recipe,
)
from lightly_mim.evaluation.supervised.supervised import (
    BatchPlan,
    Classification,
    plan_batches,
    train_and_score,
)
from lightly_mim.optim import build_optimizer, layer_ids

# An epoch of fewer steps than this gets smaller batches, if no batch size is asked for.
_MIN_STEPS_PER_EPOCH = 25
_MIN_BATCH_SIZE = 32
_FEW_STEPS = 10_000


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
        """Returns a published recipe of `RECIPES` with the values that were asked for.

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
            check_rand_augment(recipe.rand_augment)
        return recipe

    def __call__(
        self,
        encoder: MaskedEncoder,
        images: LabelledImages,
        num_classes: int,
        run: TrainingRun,
    ) -> list[Outcome]:
        """See `ImageProtocol`."""
        device = torch.device(run.device)
        name = self.recipe or default_recipe(encoder)
        train = images.train(self._transform(encoder))
        num_train = len(train)  # type: ignore[arg-type]
        self.check(num_train)
        self.check_encoder(encoder)
        recipe = self.settings(name, num_train)
        plan = self._plan(num_train, recipe, run.layout.world_size)
        with keyed_random_state(run.seed, "finetune", "head"):
            model = FineTuned(encoder, num_classes, self.pool, recipe.head_std)
        if recipe.drop_path is not None:
            model.encoder.set_drop_path(recipe.drop_path)
        if self.grad_checkpointing:
            model.encoder.set_grad_checkpointing()
        model.encoder.choose_attention(device, bf16=run.precision == "bf16")
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
            fused=run.precision != "16",  # see `lightly_mim.training.cuda`,
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
                **dataclasses.asdict(self),
                "grad_checkpointing": None,  # changes nothing
                "recipe": name,
            },
            run=run,
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
