"""Recipes, the optimiser and its learning rate schedules."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from timm.models import group_parameters
from timm.optim._param_groups import (
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightly_mim.arguments import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Rate,
    Share,
    checked,
)

AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


@checked
@dataclass(frozen=True)
class Recipe:
    """Settings of a training run.

    Learning rates are given per `lr_batch_size` images: the rate of a run is `lr *
    batch_size / lr_batch_size`, and so are the rates of warm-up and end.

    Attributes:
        source:
            Where the values were published.
        encoder:
            timm name of the encoder.
        encoder_options:
            Further timm options of the encoder.
        method_options:
            Further options of the method.
        img_size:
            Side of the images in pixels.
        epochs:
            Passes over the data set.
        batch_size:
            Images per optimiser step.
        lr:
            Highest learning rate, per `lr_batch_size` images.
        lr_batch_size:
            Batch size that the learning rates are given for.
        warmup_lr:
            Learning rate of the first step, per `lr_batch_size` images.
        min_lr:
            Learning rate that the cosine ends with, per `lr_batch_size` images.
        min_lr_is_absolute:
            Whether `min_lr` is that rate itself, whatever the batch size.
        warmup_epochs:
            Epochs of linear warm-up.
        full_warmup_from:
            Epochs from which on a run of another length has all of that warm-up, and
            below which its share. None if the warm-up is a share of any run.
        schedule:
            'cosine', or 'step': the rate is multiplied by `step_factor` at each of
            `step_epochs`.
        cosine_from_warmup:
            Whether the cosine begins where warm-up ends (MAE) or at the first step,
            hidden by the warm-up (SimMIM, timm).
        step_epochs:
            Epochs at which the 'step' schedule steps.
        step_factor:
            Factor of a step.
        betas:
            AdamW's betas.
        weight_decay:
            AdamW's weight decay.
        weight_decay_on:
            Parameters that weight decay applies to although the method or timm leave
            them out, by any part of their names between dots, such as "mask_token",
            "relative_position_bias_table", "cpb_mlp" or "logit_scale".
        clip_grad:
            Largest norm of the gradient. None for no clipping.
        drop_path:
            Stochastic depth rate of the encoder's last block. None leaves the encoder
            as it was built.
        min_scale:
            Smallest share of an image that a crop covers.

    Raises:
        ValueError: If the schedule does not exist, or epochs or rates are out of range.
    """

    source: str
    encoder: str
    img_size: PositiveInt
    epochs: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    lr_batch_size: PositiveInt
    warmup_epochs: NonNegativeFloat
    min_scale: Share
    encoder_options: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Any] = field(default_factory=dict)
    warmup_lr: NonNegativeFloat = 0.0
    min_lr: NonNegativeFloat = 0.0
    min_lr_is_absolute: bool = False
    full_warmup_from: PositiveInt | None = None
    schedule: Literal["cosine", "step"] = "cosine"
    cosine_from_warmup: bool = False
    step_epochs: tuple[NonNegativeFloat, ...] = ()
    step_factor: PositiveFloat = 0.1
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.05
    weight_decay_on: tuple[str, ...] = ()
    clip_grad: NonNegativeFloat | None = None
    drop_path: Rate | None = None

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                "A recipe has a warm-up of 0 to `epochs` epochs, got epochs="
                f"{self.epochs} and warmup_epochs={self.warmup_epochs}."
            )

    def exempt(self, names: Collection[str]) -> set[str]:
        """Returns which of the parameters that are left out of weight decay stay so.

        Args:
            names:
                Names of the parameters that the method leaves out.
        """
        decayed = set(self.weight_decay_on)
        return {name for name in names if decayed.isdisjoint(name.split("."))}

    def for_epochs(self: AnyRecipe, epochs: int) -> AnyRecipe:
        """Returns the recipe for another number of epochs.

        Warm-up and steps keep their share of the run: ten epochs of warm-up out of a
        hundred become two out of twenty. With `full_warmup_from` the warm-up of longer
        runs is that of a run of so many epochs.
        """
        share = epochs / self.epochs
        full = math.inf if self.full_warmup_from is None else self.full_warmup_from
        return dataclasses.replace(
            self,
            epochs=epochs,
            warmup_epochs=(
                self.warmup_epochs * min(epochs, full) / min(self.epochs, full)
            ),
            step_epochs=tuple(epoch * share for epoch in self.step_epochs),
        )


def learning_rate_factor(
    step: int, steps_per_epoch: float, total_steps: int, recipe: Recipe
) -> float:
    """Returns the learning rate of an optimiser step as a share of the highest.

    Args:
        step:
            Number of optimiser steps taken before.
        steps_per_epoch:
            Optimiser steps in an epoch.
        total_steps:
            Optimiser steps in the run.
        recipe:
            Gives warm-up, schedule and the rates.

    Returns:
        Number of 0 or more, at most 1 if the rates of warm-up and end are no higher
        than the highest.
    """
    warmup_steps = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        start = recipe.warmup_lr / recipe.lr
        return start + (1 - start) * step / warmup_steps
    if recipe.schedule == "step":
        boundaries = [round(epoch * steps_per_epoch) for epoch in recipe.step_epochs]
        return recipe.step_factor ** bisect_right(boundaries, step)
    first = warmup_steps if recipe.cosine_from_warmup else 0
    progress = min((step - first) / max(total_steps - first, 1), 1.0)
    end = recipe.min_lr / recipe.lr
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    module: nn.Module,
    recipe: Recipe,
    batch_size: int,
    steps_per_epoch: float,
    total_steps: int,
    no_weight_decay: Collection[str] = (),
    fused: bool = True,
    layer_decay: float | None = None,
    decay_ends: bool = True,
) -> tuple[Optimizer, LambdaLR]:
    """Makes the optimiser of a recipe and its schedule, which steps with it.

    Args:
        module:
            Module with the parameters.
        recipe:
            The settings.
        batch_size:
            Images per optimiser step, over all devices and accumulated micro-batches.
        steps_per_epoch:
            Optimiser steps in an epoch.
        total_steps:
            Optimiser steps in the run.
        no_weight_decay:
            Names of parameters that do not decay, beside those with one dimension:
            biases and the weights of normalisation layers.
        fused:
            Whether AdamW runs as one kernel. A fused optimiser unscales fp16 gradients
            by itself, after they were clipped: use False with a gradient scaler.
        layer_decay:
            Factor on the learning rate from each layer to the one below it. The layers
            are those of the module's `group_matcher`, timm's word for a function from
            the name of a parameter to the number of its layer, see `layer_ids`. None
            gives all layers the same rate.
        decay_ends:
            Whether that factor applies to the rates of warm-up and end, too.

    Returns:
        (AdamW optimiser, learning rate scheduler).
    """
    lr = recipe.lr * batch_size / recipe.lr_batch_size
    if recipe.min_lr_is_absolute:
        min_lr = recipe.min_lr * recipe.lr_batch_size / batch_size
        recipe = dataclasses.replace(recipe, min_lr=min_lr, min_lr_is_absolute=False)
    if layer_decay is None:
        groups = param_groups_weight_decay(
            module, recipe.weight_decay, no_weight_decay_list=no_weight_decay
        )
    else:
        groups = param_groups_layer_decay(
            module,
            recipe.weight_decay,
            no_weight_decay_list=no_weight_decay,
            layer_decay=layer_decay,
        )
        for group in groups:
            group["lr"] = lr * group["lr_scale"]
    optimizer = AdamW(groups, lr=lr, betas=recipe.betas, fused=fused)
    schedule = build_schedule(
        optimizer, recipe, steps_per_epoch, total_steps, decay_ends
    )
    return optimizer, schedule


def build_schedule(
    optimizer: Optimizer,
    recipe: Recipe,
    steps_per_epoch: float,
    total_steps: int,
    decay_ends: bool = True,
) -> LambdaLR:
    """Makes the schedule of a recipe, which multiplies the rate of every group.

    Args:
        optimizer:
            The optimiser, with the highest learning rate of each group, and its share
            of the recipe's as `lr_scale` if there is layer-wise decay.
        recipe:
            Gives warm-up, schedule and the rates.
        steps_per_epoch:
            Optimiser steps in an epoch.
        total_steps:
            Optimiser steps in the run.
        decay_ends:
            Whether `lr_scale` applies to the rates of warm-up and end, too.
    """

    def factor(lr_scale: float) -> Callable[[int], float]:
        own = recipe
        if not decay_ends:
            own = dataclasses.replace(recipe, lr=recipe.lr * lr_scale)
        return lambda step: learning_rate_factor(
            step, steps_per_epoch, total_steps, own
        )

    groups = optimizer.param_groups
    return LambdaLR(optimizer, [factor(group.get("lr_scale", 1.0)) for group in groups])


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Numbers the layers of a transformer's parameters for layer-wise learning rates.

    The numbers are those of the code of BEiT, MAE and SimMIM. 0 for patch embedding,
    class token, registers and absolute positions; 1 + i for the i-th block, counted
    through all stages of a Swin; and one more than the last block for all that follows:
    the final norm, and a table of relative positions that all blocks share. A Swin's
    downsampling belongs to the last block of the stage whose output it takes.

    timm's own groups (`group_matcher`) agree but for three: they put the final norm
    into the last block's layer, a shared table of relative positions into layer 0, and
    a Swin's downsampling into the first block behind it.

    Args:
        model:
            timm model with `blocks`, or with `layers` that have `blocks`, such as a
            VisionTransformer, Beit, Eva, SwinTransformer or SwinTransformerV2.

    Returns:
        For the name of each parameter the number of its layer.

    Raises:
        ValueError: If the model is of another kind.
    """
    matcher = getattr(model, "group_matcher", None)
    groups = group_parameters(model, matcher(), reverse=True) if matcher else {}
    ids: dict[str, int] = {
        name: group - 1 if ".downsample." in name else group
        for name, group in groups.items()
        if name.startswith(("blocks.", "layers."))
    }
    if not ids:
        raise ValueError(
            f"The layers of a {type(model).__name__} are not known, so its learning "
            "rate cannot decay from layer to layer. Use layer_decay=1, or a timm "
            "VisionTransformer, Beit, Eva, SwinTransformer or SwinTransformerV2."
        )
    behind = max(ids.values()) + 1
    for name, group in groups.items():
        if name not in ids:
            stem = group == 0 and not name.startswith("rel_pos_bias.")
            ids[name] = 0 if stem else behind
    return ids
