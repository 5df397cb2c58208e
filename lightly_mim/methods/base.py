"""What every method of masked image modelling is."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor, nn

from lightly_mim import defaults
from lightly_mim.config import Recorded, constructor_arguments
from lightly_mim.encoders import (
    Encoder,
    Init,
    MaskedEncoder,
    choose_attention,
    masked_encoder,
)
from lightly_mim.heads import Head
from lightly_mim.losses import Loss
from lightly_mim.masking import Mask, Masking, RandomMasking, UnitMasking
from lightly_mim.methods.pretrained import from_pretrained
from lightly_mim.optim import Recipe
from lightly_mim.patches import Size, scatter_patches
from lightly_mim.targets import Target
from lightly_mim.transforms import Normalize


class MIMOutput(NamedTuple):
    """What a method computes for a batch of images.

    Attributes:
        loss:
            Tensor with shape ().
        prediction:
            Float tensor with shape (batch_size, num_cells, width), the predicted values
            of the cells; where the target is classes (batch_size, num_cells, width *
            num_classes), the logits. A cell is the footprint of one output token.
        target:
            Tensor with shape (batch_size, num_cells, width), float or int64 classes.
        index:
            int64 tensor with shape (batch_size, num_cells): which cells, in raster
            order, prefix tokens not counted.
        weight:
            Tensor with the shape of the target, how much a value counts, from 0 to 1;
            None if all count.
        mask:
            The mask, with shape (batch_size, mask_height, mask_width).
        features:
            Tensor with shape (batch_size, feature_dim) for a probe that looks on, as
            lightly's `OnlineLinearClassifier`: the encoder's tokens of the masked
            images, pooled as `forward` of the encoder pools those of whole images,
            without a gradient. None if the method does not have them at hand.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    weight: Tensor | None
    mask: Mask
    features: Tensor | None = None


class MaskedImageModel(Recorded, nn.Module):
    """Base class of the methods.

    A method sets `encoder`, `masking` and `target`, and implements `forward` and
    `transform`. One with a moving teacher moves it in `after_step`; what it holds in
    parameters and buffers is in the checkpoint.

    Attributes:
        encoder:
            The encoder that is pretrained.
        masking:
            Draws the masks.
        target:
            What is predicted.
        num_views:
            Number of augmented views of an image that the method takes.
        recipes:
            Published settings by name.
        replaced:
            What to say instead of arguments that the method took once, or that its
            relatives take, by their names.
    """

    num_views: ClassVar[int] = 1
    recipes: ClassVar[Mapping[str, Recipe]] = {}
    replaced: ClassVar[Mapping[str, str]] = {}

    encoder: MaskedEncoder
    masking: Masking
    target: Target

    def __new__(cls, *args: Any, **kwargs: Any) -> MaskedImageModel:
        """Refuses arguments of earlier versions, which timm would be asked for."""
        self = super().__new__(cls, *args, **kwargs)
        refuse_replaced(cls, self.init_args)
        return self

    # Not the one line of other recorded objects, but the tree of a module.
    __repr__ = nn.Module.__repr__

    @classmethod
    def from_recipe(cls, name: str, **options: Any) -> MaskedImageModel:
        """Builds the method with the encoder of a published recipe.

        Args:
            name:
                One of `recipes`.
            options:
                Arguments of the constructor that replace the recipe's.

        Raises:
            ValueError: If there is no such recipe.
        """
        recipe = cls.recipe(name)
        settings: dict[str, Any] = {
            "encoder": recipe.encoder,
            "img_size": recipe.img_size,
            **recipe.encoder_options,
            **published_parts(recipe, options),
        }
        if recipe.drop_path is not None:
            settings["drop_path_rate"] = recipe.drop_path
        if options.get("pretrained"):
            settings.pop("init", None)  # there is nothing to draw
        return cls(**(settings | options))

    @classmethod
    def from_pretrained(cls, source: Path | str, **options: Any) -> MaskedImageModel:
        """Builds the method with weights that are there, and says what it took.

        The encoder's weights are taken, and where they are in the file and fit those of
        the decoder or the head. Weights of another image size, patch size, window size
        or number of channels are interpolated as timm does.

        Args:
            source:
                A run directory, or a file or folder of weights: official ones of MAE
                and SimMIM, of Hugging Face transformers, timm, lightly's benchmark of
                MAE, and ours; the name of a timm model with its weights; or
                OWNER/MODEL on the Hugging Face hub.
            options:
                Arguments of the constructor, but for the encoder. Those that are left
                out are the ones that the weights were made with, where the file tells.

        Raises:
            ValueError: If the weights cannot be read or do not fit what is asked for.
        """
        return from_pretrained(source, cls, **options)

    @classmethod
    def recipe(cls, name: str | None = None) -> Recipe:
        """Returns a published recipe, by default the first.

        Raises:
            ValueError: If there is no such recipe.
        """
        if name is None:
            name = next(iter(cls.recipes), None)
        if name is None or name not in cls.recipes:
            raise ValueError(
                f"{cls.__name__} has no recipe {name or 'of its own'!r}. It has: "
                f"{', '.join(cls.recipes) or 'none. Pass a Recipe as recipe'}."
            )
        return cls.recipes[name]

    def default_recipe(
        self,
        num_images: int | None = None,
        batch_size: int | None = None,
        epochs: int | None = None,
    ) -> Recipe:
        """Returns settings for the images at hand.

        The crops are those of the method's own transform, and AdamW's betas those that
        it was published with. The arguments are those of `lightly_mim.defaults.recipe`.
        """
        own: dict[str, Any] = {}
        if self.recipes:
            own["betas"] = self.recipe().betas
        crop = getattr(self.transform(), "min_scale", None)
        if crop is not None:
            own["min_scale"] = crop
        return defaults.recipe(self.encoder, num_images, batch_size, epochs, **own)

    def forward(self, images: Tensor, mask: Mask | Tensor | None = None) -> MIMOutput:
        """Computes the loss of a batch.

        Args:
            images:
                Float tensor with shape (batch_size, channels, height, width),
                normalised. With several `num_views` a list of them.
            mask:
                The mask, or bool tensor with shape (batch_size, mask_height,
                mask_width), True = masked, in any grid that divides the image; a tensor
                is checked and counted, which waits for the device. With several views a
                list of them, one for each. Drawn if None.

        Raises:
            ValueError: If the images or the mask do not fit.
        """
        raise NotImplementedError

    def transform(self, normalize: Normalize | None = None, **options: Any) -> Any:
        """Returns the method's augmentation of a training image."""
        raise NotImplementedError

    def draw_mask(self, images: Tensor, generator: Generator | None = None) -> Mask:
        """Draws a mask for each image.

        Args:
            images:
                Tensor with shape (batch_size, channels, height, width). Only its shape
                and its device are used.
            generator:
                Source of the random numbers, on the images' device.

        Raises:
            ValueError: If the masking does not fit the images.
        """
        return Mask.of(
            self.masking(
                len(images),
                _image_size(images),
                device=images.device,
                generator=generator,
            )
        )

    def prepare_mask(self, images: Tensor, mask: Mask | Tensor | None) -> Mask:
        """Draws the mask if there is none, and checks it.

        Args:
            images:
                Tensor with shape (batch_size, channels, height, width).
            mask:
                As in `forward`.

        Raises:
            ValueError: If the mask does not fit the images.
        """
        mask = Mask.of(self.draw_mask(images) if mask is None else mask)
        if len(mask) != len(images):
            raise ValueError(
                f"There are {len(images)} images and {len(mask)} masks: pass one mask "
                "for each image."
            )
        return mask

    def check_masking(self) -> None:
        """Raises a ValueError if the masks do not fit images of the encoder's size."""
        image = torch.empty(1, 1, *self.encoder.img_size, device="cpu")
        mask = Mask.of(self.draw_mask(image, Generator().manual_seed(0)))
        if (counted := Mask.of(mask.cells)).count != mask.count:
            raise ValueError(
                f"{self.masking!r} says that it masks {mask.count} cells of an image, "
                f"and it masks {counted.count}."
            )
        mask.on(self.encoder.grid)

    def suit(self, brightness: float) -> None:
        """Takes what suits the images of a run, of what was left open.

        Args:
            brightness:
                Share of the variance of all pixels that lies between the means of the
                images, 0 to 1.
        """

    def fit_target(self, sample: Callable[[], Tensor]) -> None:
        """Lets a target that learns from images do so before the training starts.

        One that has learned already (`fitted`) is left as it is.

        Args:
            sample:
                Returns some training images, normalised and not augmented, as a float
                tensor with shape (num_images, channels, height, width).
        """
        fit = getattr(self.target, "fit", None)
        if fit is not None and not getattr(self.target, "fitted", False):
            fit(sample())

    def after_step(self, progress: float) -> None:
        """Acts after an optimiser step: here a teacher follows its student.

        Args:
            progress:
                Share of the run's optimiser steps that are done, above 0 and at most 1.
        """

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """Paints what the method predicts into the masked part of the images.

        Args:
            images:
                Float tensor with shape (batch_size, channels, height, width),
                normalised. Stands for all views of a method with several.
            mask:
                As in `forward`, of one view. Drawn if None.

        Returns:
            Float tensor with the shape of the images, normalised like them. The
            visible part is the images' own.

        Raises:
            ValueError: If the images or the mask do not fit, or if the target does not
                say what a patch looks like (`drawable` is False).
        """
        mask = self.prepare_mask(images, mask)
        many = self.num_views
        output = self(
            *((images, mask) if many == 1 else ([images] * many, [mask] * many))
        )
        stride = self.encoder.stride
        pixels = self.target.to_pixels(
            output.prediction.to(images.dtype), images, output.index, stride
        )
        painted = scatter_patches(images, output.index, pixels, stride)
        return torch.where(mask.pixels(_image_size(images)), painted, images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory: blocks are run again in the backward pass.

        Args:
            enable:
                Whether to do so.
        """
        self.encoder.set_grad_checkpointing(enable)

    def choose_attention(self, device: torch.device, bf16: bool) -> None:
        """Chooses the kernel of the attention, in the encoder and beyond.

        Args:
            device:
                Where the method is going to run.
            bf16:
                Whether it computes in bfloat16.
        """
        choose_attention(self, device, bf16)

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters with several dimensions that do not decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def published_parts(recipe: Recipe, said: Iterable[str]) -> dict[str, Any]:
    """Returns a recipe's options of the method, but for what is said otherwise.

    Args:
        recipe:
            The recipe.
        said:
            Names of the options that the caller gives. A masking of one's own takes the
            place of the size and the ratio that are short for one.
    """
    said = set(said)
    if "masking" in said:
        said |= {"mask_patch_size", "mask_ratio"}
    return {k: v for k, v in recipe.method_options.items() if k not in said}


def _image_size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def refuse_replaced(cls: type[MaskedImageModel], names: Iterable[str]) -> None:
    """Raises a ValueError for arguments of other versions or methods, with what to do.

    Args:
        cls:
            The method.
        names:
            The arguments that it is given.
    """
    unknown = set(names) - set(constructor_arguments(cls))
    refused = sorted(cls.replaced.keys() & unknown)
    if refused:
        what = " ".join(f"{name}: {cls.replaced[name]}" for name in refused)
        raise ValueError(f"{cls.__name__} does not take {what}")


def build_encoder(
    method: MaskedImageModel, encoder: Encoder, **options: Any
) -> MaskedEncoder:
    """Builds the encoder of a method; a misspelled argument of the method is named.

    What a method does not know is timm's to take, and timm's refusal does not tell of
    the method's arguments.

    Args:
        method:
            The method.
        encoder:
            See `lightly_mim.encoders.masked_encoder`.
        options:
            The same.

    Raises:
        ValueError: See there.
    """
    try:
        return masked_encoder(encoder, **options)
    except ValueError as error:
        known = constructor_arguments(type(method))
        for name in options.keys() - known:
            value = options[name]
            kind = value if isinstance(value, type) else type(value)
            near = difflib.get_close_matches(name, known, n=1)
            refused = (
                callable(value)
                or f"keyword argument '{name}'" in str(error)
                or not isinstance(encoder, str)
            )
            if issubclass(kind, Recorded) or (near and refused):
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"Neither {type(method).__name__} nor timm takes {name!r}.{hint} "
                    f"{type(method).__name__} takes {', '.join(known)}."
                ) from error
        raise


def choose_init(
    init: Init | None, encoder: Encoder, options: Mapping[str, Any], default: Init
) -> Init:
    """Returns the law that the weights of a method's encoder are drawn by.

    Args:
        init:
            What was asked for. None leaves weights that come from elsewhere as they
            are, and takes the default for others.
        encoder:
            The `encoder` of the method.
        options:
            The options of that encoder.
        default:
            The method's own law.
    """
    if init is not None:
        return init
    new = isinstance(encoder, str) and not options.get("pretrained")
    return default if new else "timm"


def choose_masking(
    masking: Masking | None,
    mask_patch_size: Size | None,
    mask_ratio: float | None,
    default: RandomMasking,
) -> Masking:
    """Returns the masking, or the random one that size and ratio are short for.

    Args:
        masking:
            The masking of a method.
        mask_patch_size:
            Of random masking, None for the default's.
        mask_ratio:
            Of random masking, None for the default's.
        default:
            What is taken if nothing is said.

    Raises:
        ValueError: If a masking and one of the others are given.
    """
    if mask_patch_size is None and mask_ratio is None:
        return choose_part(masking, default)
    if masking is not None:
        raise ValueError(
            "mask_patch_size and mask_ratio are short for masking=RandomMasking("
            "mask_patch_size, ratio): say them in the masking, got both them and "
            f"{masking!r}."
        )
    return RandomMasking(
        default.mask_patch_size if mask_patch_size is None else mask_patch_size,
        default.ratio if mask_ratio is None else mask_ratio,
    )


def check_unit(method: str, masking: Masking, encoder: MaskedEncoder) -> None:
    """Checks that a masking takes whole patches of an encoder.

    Args:
        method:
            Name of the method, for the error message.
        masking:
            The masking. One of a user is checked when its mask is laid on the grid.
        encoder:
            The encoder.

    Raises:
        ValueError: If a patch would be masked in part. It names sizes that fit.
    """
    for part in getattr(masking, "maskings", [masking]):  # of a mixture
        if not isinstance(part, UnitMasking):
            continue
        unit, patch = part.mask_patch_size, encoder.patch_size
        if unit[0] % patch[0] == 0 and unit[1] % patch[1] == 0:
            continue
        fitting = [
            _fitting_unit(*sides)
            for sides in zip(unit, patch, encoder.stride, encoder.img_size, strict=True)
        ]
        (height, width), (p, q) = zip(*fitting, strict=True)
        raise ValueError(
            f"{method} masks whole patches of the encoder: mask_patch_size is a "
            f"multiple of {patch[0]} x {patch[1]}, got {unit[0]} x {unit[1]}. Use for "
            f"example img_size={_short(height, width)} with "
            f"mask_patch_size={_short(p, q)}."
        )


def _fitting_unit(unit: int, patch: int, stride: int, side: int) -> tuple[int, int]:
    """Returns (side, unit) near those given, where units are of whole patches."""
    units = range(patch, side // 2 + 1, patch)
    near = [each for each in units if side % each == 0 and 2 * unit <= 3 * each]
    near = [each for each in near if 2 * each <= 3 * unit]
    if near:  # the image can stay as it is
        return side, min(near, key=lambda each: abs(each - unit))
    unit = max(round(unit / patch), 1) * patch
    both = math.lcm(unit, stride)
    return max(side // both, 1) * both, unit


def _short(height: int, width: int) -> int | tuple[int, int]:
    return height if height == width else (height, width)


def count_values(
    target: Target, cell_size: tuple[int, int], in_chans: int
) -> tuple[int, int]:
    """Returns how many values a target has in a cell, and how many are predicted.

    Args:
        target:
            The target.
        cell_size:
            (height, width) of a cell in pixels.
        in_chans:
            Number of image channels.

    Raises:
        ValueError: If the target cannot be made of such cells.
    """
    width = target.width(cell_size, in_chans)
    if not isinstance(width, int) or width < 1:
        raise ValueError(
            f"The width of a target is a whole number of at least 1, {target!r} has "
            f"{width!r} for cells of {cell_size[0]} x {cell_size[1]} pixels."
        )
    return width, width * (target.num_classes or 1)


PartT = TypeVar("PartT", Masking, Target, Head, Loss)


def choose_part(part: PartT | None, default: PartT) -> PartT:
    """Returns a part of a method, the default if there is none.

    Args:
        part:
            What was passed.
        default:
            What is taken if that is None.

    Raises:
        ValueError: If the part is a target that does not say its width, or a head that
            is built already.
    """
    if part is None:
        return default
    if isinstance(default, Target) and not (
        hasattr(part, "width") and hasattr(part, "num_classes")
    ):
        raise ValueError(
            "A target has width and num_classes besides its call: derive yours from "
            f"lightly_mim.targets.Target, got {part!r}."
        )
    if isinstance(default, Head) and isinstance(part, nn.Module):
        raise ValueError(
            "A head is built by the method, which knows the widths: pass an object "
            f"such as {default!r} or a function like its call, got {part!r}."
        )
    # What a target learns from the images of a run is that run's.
    return copy.deepcopy(part) if isinstance(part, nn.Module) else part
