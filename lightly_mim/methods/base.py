"""What every method of masked image modelling is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from lightly_mim import defaults
from lightly_mim.config import Recorded, constructor_arguments
from lightly_mim.encoders import (
    MaskedEncoder,
    choose_attention,
)
from lightly_mim.masking import Mask, Masking
from lightly_mim.methods.pretrained import from_pretrained
from lightly_mim.optim import Recipe
from lightly_mim.patches import scatter_patches
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
