"""MAE's linear probe: one learning rate, crops and flips, through the frozen encoder.

- [0]: Masked Autoencoder, 2021, https://arxiv.org/abs/2111.06377 (appendix A.1, table
  10, and the settings of its code, `main_linprobe.py`)
- [1]: LARS, 2017, https://arxiv.org/abs/1708.03888

Shapes: B images in a micro-batch, D features.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.arguments import (
    AtLeastTwo,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Rate,
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
from lightly_mim.evaluation.features import EncoderFeatures
from lightly_mim.evaluation.supervised.supervised import (
    BatchPlan,
    Classification,
    plan_batches,
    train_and_score,
)
from lightly_mim.optim import Recipe, build_schedule
from lightly_mim.transforms import MAETransform

_LARGE_DEPTH = 24  # blocks of ViT-L, which the code trains for 50 epochs
_IMAGENET_STEPS = 90 * (1_281_167 // 16_384)


@checked
@dataclass(frozen=True)
class LinearMAE:
    """The linear probe of MAE [0], as published.

    A BatchNorm without affine parameters and a linear layer, trained with LARS on
    random crops (8 to 100 % of the area, bicubic) and flips; the encoder is frozen and
    in evaluation mode, and every image goes through it in every epoch. Nothing is
    chosen: there is one learning rate, and the weights after the last epoch count.

    The settings are made for the 7,000 steps that ImageNet's 1.28 million images give.
    A LARS step changes the weights by a share of their norm that is proportional to the
    learning rate, so the rule `lr * batch_size / 256` makes the way that the weights go
    proportional to `epochs` times the number of images. On a few thousand images they
    hardly leave their initial values: there, take `batch_size=256` and an `lr` of 6.4
    or more, or the probe of cached features (`Linear`).

    One thing differs from the code: it draws a crop once and cuts it to the image;
    torchvision's draws anew until one fits.

    Attributes:
        epochs:
            Number of passes over the images. None for 90, or 50 from 24 blocks on, as
            the code does for ViT-L and ViT-H.
        batch_size:
            Images per optimiser step. If there are fewer training images, all of them
            make a batch, and the learning rate is that of this smaller batch.
        micro_batch_size:
            Most images at a time on a device. The BatchNorm takes its statistics from
            each micro-batch, as the code does from the 512 images of each GPU. For
            scoring it takes the running ones of all micro-batches, in their order,
            where the code takes those of the first GPU: with as many micro-batches in
            a batch, any number of devices makes the same weights.
        lr:
            Learning rate per 256 images: 0.1 makes 6.4 for 16,384.
        warmup_epochs:
            Epochs of linear warm-up. None for 10 of 90.
        momentum:
            Momentum of LARS.
        trust_coefficient:
            LARS' trust coefficient [1].
        pool:
            "cls" as in [0], "mean" of the patch tokens, or "cls+mean". None takes the
            class token if there is one. SimMIM does not train it: use "mean".
        layer:
            Block of a ViT or stage of a Swin, from 0, or from the end if negative.
    """

    name: ClassVar[str] = "linear_mae"
    reads: ClassVar[str] = "images"

    epochs: PositiveInt | None = None
    batch_size: AtLeastTwo = 16_384
    micro_batch_size: PositiveInt = 512
    lr: PositiveFloat = 0.1
    warmup_epochs: NonNegativeFloat | None = None
    momentum: Rate = 0.9
    trust_coefficient: PositiveFloat = 0.001
    pool: Pool | None = None
    layer: int = -1

    def check(self, num_train: int) -> list[str]:
        """See `ImageProtocol`."""
        recipe = self._recipe(depth=1)
        plan = plan_batches(num_train, self.batch_size, self.micro_batch_size)
        _check_norm(plan)
        notes = []
        if self.pool is None:
            notes.append(
                "linear_mae: the features are class tokens if there are any, as "
                "published. SimMIM does not train them: use pool='mean' for it."
            )
        lr = self.lr * plan.batch_size / 256
        if plan.batch_size != self.batch_size:
            notes.append(
                f"linear_mae: the training set is smaller than the batch of "
                f"{self.batch_size} images. Batches have {plan.batch_size}, for which "
                f"the learning rate is {lr:.3g}."
            )
        # How far the weights may go, as a share of the published training's.
        share = lr * plan.steps_per_epoch * recipe.epochs / (6.4 * _IMAGENET_STEPS)
        if share < 0.05:
            notes.append(
                f"linear_mae: {plan.steps_per_epoch * recipe.epochs} steps at a "
                f"learning rate of {lr:.3g} are {share:.2g} of the published way of "
                f"{_IMAGENET_STEPS} steps at 6.4: the probe is not trained to its end. "
                "For few images use a smaller batch_size and a higher lr."
            )
        return notes

    def check_encoder(self, encoder: MaskedEncoder) -> None:
        """See `ImageProtocol`."""
        encoder.check_features([self.layer], [self._pool(encoder)])

    def __call__(
        self,
        encoder: MaskedEncoder,
        images: LabelledImages,
        num_classes: int,
        run: TrainingRun,
    ) -> list[Outcome]:
        """See `ImageProtocol`. The encoder computes in bfloat16, the probe does not."""
        device = torch.device(run.device)
        pool = self._pool(encoder)
        transform = MAETransform(encoder.img_size, min_scale=0.08, normalize=None)
        train = images.train(transform)
        num_train = len(train)  # type: ignore[arg-type]
        self.check(num_train)
        self.check_encoder(encoder)
        recipe = self._recipe(encoder.num_layers)
        plan = plan_batches(
            num_train,
            self.batch_size,
            self.micro_batch_size,
            processes=run.layout.world_size,
        )
        _check_norm(plan)
        with keyed_random_state(run.seed, "linear_mae", "head"):
            model = _Probe(copy.deepcopy(encoder), num_classes, pool, self.layer)
        model.encoder.choose_attention(device, bf16=run.precision == "bf16")
        model.to(device)
        lr = self.lr * plan.batch_size / 256
        optimizer = build_lars(
            model.probe.parameters(), lr, self.momentum, self.trust_coefficient
        )
        logits = train_and_score(
            Classification(
                name="linear_mae",
                model=model,
                trained=model.probe,
                optimizer=optimizer,
                schedule=build_schedule(
                    optimizer,
                    recipe,
                    plan.steps_per_epoch,
                    plan.steps_per_epoch * recipe.epochs,
                ),
                loss=_cross_entropy,
                epochs=recipe.epochs,
                plan=plan,
            ),
            train,
            images.test,
            encoder,
            num_classes,
            identity=dataclasses.asdict(self),
            run=run,
        )
        return [
            Outcome(
                (self.layer % encoder.num_layers, pool),
                {
                    "epochs": recipe.epochs,
                    "batch_size": plan.batch_size,
                    "learning_rate": lr,
                },
                [],
                rank_classes(logits),
            )
        ]

    def _pool(self, encoder: MaskedEncoder) -> Pool:
        return self.pool or ("cls" if encoder.has_class_token else "mean")

    def _recipe(self, depth: int) -> Recipe:
        published = Recipe(
            source="facebookresearch/mae, main_linprobe.py",
            encoder="vit_base_patch16_224",
            img_size=224,
            epochs=90 if depth < _LARGE_DEPTH else 50,
            batch_size=16_384,
            lr=0.1,
            lr_batch_size=256,
            warmup_epochs=10,
            min_scale=0.08,
            cosine_from_warmup=True,
        )
        recipe = published
        if self.epochs is not None:
            recipe = published.for_epochs(self.epochs)
        if self.warmup_epochs is not None:
            recipe = dataclasses.replace(recipe, warmup_epochs=self.warmup_epochs)
        return recipe


def build_lars(
    parameters: Iterable[nn.Parameter],
    lr: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> Lars:
    """Makes timm's LARS scale as MAE's code does at a weight decay of 0.

    The gradient of each matrix is scaled by `trust_coefficient` times the norm of the
    weights over that of the gradient, before the momentum; biases are left as they are
    [1]. timm's (and lightly's) would leave everything unscaled without weight decay: it
    is told to adapt always, for the matrices.
    """
    parameters = list(parameters)
    return Lars(
        [
            {"params": [p for p in parameters if p.ndim > 1], "always_adapt": True},
            {"params": [p for p in parameters if p.ndim <= 1], "always_adapt": False},
        ],
        lr=lr,
        momentum=momentum,
        trust_coeff=trust_coefficient,
        weight_decay=0.0,
        eps=0.0,  # the reference has none
    )


class _Probe(nn.Module):
    """A frozen encoder, and a BatchNorm and a linear layer on one of its features."""

    def __init__(
        self, encoder: MaskedEncoder, num_classes: int, pool: Pool, layer: int
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.pool: Pool = pool
        self.layer = layer
        # A Swin's stages have different widths.
        ((dim,),) = EncoderFeatures(encoder, [layer], [pool]).shapes.values()
        linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.probe = nn.Sequential(nn.BatchNorm1d(dim, eps=1e-6, affine=False), linear)

    def train(self, mode: bool = True) -> _Probe:
        """Puts the probe in training mode; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits with shape (B, num_classes)."""
        with torch.no_grad():
            features = self.encoder.embed(images, self.pool, self.layer).float()
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.probe(features)
        return logits


def _check_norm(plan: BatchPlan) -> None:
    """Raises a ValueError if a micro-batch is too small for a BatchNorm."""
    if plan.batch_size // plan.num_parts < 2:
        raise ValueError(
            "The BatchNorm needs micro-batches of at least 2 images: use a "
            "batch_size and a micro_batch_size that are powers of two."
        )


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(model(images), labels)
