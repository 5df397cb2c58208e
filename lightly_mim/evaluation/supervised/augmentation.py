"""The augmentations of fine-tuning: on pictures in the workers, on batches in the loss.

Shapes: B images in a micro-batch, C channels, (H, W) pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.evaluation.supervised.recipes import FineTuneRecipe
from lightly_mim.transforms import MAETransform


class FineTuneTransform:
    """Random crop, flip and RandAugment, as the fine-tuning of MAE and SimMIM.

    Input to this transform:
        PIL image of mode L or RGB, or uint8 tensor with shape (channels, height,
        width).

    Output of this transform:
        List of one uint8 tensor with shape (channels, height, width). Random erasing,
        which comes next, is for normalised batches on the device.

    RandAugment is timm's, and its text timm's ("" for none): two operations per image,
    each with probability 0.5, with the mean of the images (in [0, 1]) as the colour
    behind them. For grey images it chooses among the operations that are not about
    colour.

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
        check_rand_augment(rand_augment)
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


def mixed_loss(
    recipe: FineTuneRecipe, num_classes: int, device: torch.device
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Returns the loss of a batch with random erasing, mixup, cutmix and smoothing.

    It is a function from (model, normalised images with shape (B, C, H, W), int64
    labels with shape (B,)) to the mean cross-entropy. It changes the images.
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


def check_rand_augment(text: str) -> None:
    """Raises a ValueError for a RandAugment that timm would not read."""
    # timm skips what it does not know, or fails by an assertion.
    number, whole = r"\d+(\.\d+)?", r"\d+"
    parts = f"(m|n|mmax|inc){whole}|(p|mstd){number}|tweights|t3aw?"
    if not re.fullmatch(f"rand(-({parts}))*", text):
        raise ValueError(
            'rand_augment is timm\'s text, such as "rand-m9-mstd0.5-inc1" (magnitude 9 '
            'of 10 with a deviation of 0.5), or "" for none, got '
            f"{text!r}."
        )
