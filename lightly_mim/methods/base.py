"""What every method of masked image modelling is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from lightly_mim.encoders import MaskedEncoder, choose_attention
from lightly_mim.masking import Masking, count_masked, expand_mask
from lightly_mim.optim import Recipe
from lightly_mim.patches import scatter_patches
from lightly_mim.targets import Target


class MIMOutput(NamedTuple):
    """What a method computes for a batch of images.

    Attributes:
        loss:
            Tensor with shape ().
        prediction:
            Float tensor with shape (batch_size, num_cells, dim), the predicted values
            of the cells. A cell is the footprint of one output token.
        target:
            Tensor with the shape of the prediction.
        index:
            int64 tensor with shape (batch_size, num_cells): which cells, in raster
            order, prefix tokens not counted.
        weight:
            Tensor with the shape of the prediction, 1 where a value counts and 0 where
            it does not; None if all count.
        mask:
            Bool tensor with shape (batch_size, mask_height, mask_width), True = masked.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    weight: Tensor | None
    mask: Tensor


class MaskedImageModel(nn.Module):
    """Base class of the methods.

    A method sets `encoder`, `masking` and `target`, and implements `forward` and
    `transform`.

    Attributes:
        encoder:
            The encoder that is pretrained.
        masking:
            Draws the masks.
        target:
            What is predicted.
        init_args:
            The arguments that the method was made with, by name: what a run directory
            records to build it again.
        recipes:
            Published settings by name. The first one is the default; without any,
            `pretrain` needs a `Recipe` as recipe.
    """

    recipes: ClassVar[Mapping[str, Recipe]] = {}

    encoder: MaskedEncoder
    masking: Masking
    target: Target
    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> MaskedImageModel:
        """Records the constructor's arguments."""
        self = super().__new__(cls)
        # Copying and unpickling call this without arguments and fill in the state
        # afterwards; missing ones are __init__'s to complain about.
        signature = inspect.signature(cls)
        bound = signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        init_args = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                init_args.update(init_args.pop(name, {}))
        self.__dict__["init_args"] = init_args
        return self

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
            **recipe.method_options,
        }
        if recipe.drop_path is not None:
            settings["drop_path_rate"] = recipe.drop_path
        return cls(**(settings | options))

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

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        num_masked: int | None = None,
    ) -> MIMOutput:
        """Computes the loss of a batch.

        Args:
            images:
                Float tensor with shape (batch_size, channels, height, width),
                normalised.
            mask:
                Bool tensor with shape (batch_size, mask_height, mask_width), True =
                masked, in any grid that divides the image. Drawn if None.
            num_masked:
                Number of True entries in each image, if the caller knows it, as
                for masks from `draw_mask`. Otherwise the mask is checked and counted,
                which waits for the device.

        Raises:
            ValueError: If the images or the mask do not fit.
        """
        raise NotImplementedError

    def transform(
        self, normalize: dict[str, tuple[float, ...]] | None = None, **options: Any
    ) -> Any:
        """Returns the method's augmentation of a training image."""
        raise NotImplementedError

    def draw_mask(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Draws a mask for each image.

        Args:
            images:
                Tensor with shape (batch_size, channels, height, width). Only its shape
                and its device are used.
            generator:
                Source of the random numbers, on the images' device.

        Returns:
            Bool tensor with shape (batch_size, mask_height, mask_width), True = masked.
        """
        return self.masking(
            len(images), _image_size(images), device=images.device, generator=generator
        )

    def num_masked(self, images: Tensor) -> int:
        """Returns how many cells of a mask from `draw_mask` are masked."""
        return self.masking.count(*self.masking.grid(_image_size(images)))

    def prepare_mask(
        self, images: Tensor, mask: Tensor | None, num_masked: int | None
    ) -> tuple[Tensor, int]:
        """Draws the mask if there is none and counts it if that was not done.

        Args:
            images:
                Tensor with shape (batch_size, channels, height, width).
            mask:
                As in `forward`.
            num_masked:
                As in `forward`.

        Returns:
            (mask, number of True entries in each image).

        Raises:
            ValueError: If the mask does not fit the images.
        """
        if mask is None:
            return self.draw_mask(images), self.num_masked(images)
        if num_masked is None:
            num_masked = count_masked(mask)
        if len(mask) != len(images):
            raise ValueError(
                f"There are {len(images)} images and {len(mask)} masks: pass one mask "
                "for each image."
            )
        return mask, num_masked

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Paints what the method predicts into the masked part of the images.

        Args:
            images:
                Float tensor with shape (batch_size, channels, height, width),
                normalised.
            mask:
                As in `forward`. Drawn if None.

        Returns:
            Float tensor with the shape of the images, normalised like them. The
            visible part is the images' own.

        Raises:
            ValueError: If the images or the mask do not fit.
        """
        output = self(images, mask)
        stride = self.encoder.stride
        pixels = self.target.to_pixels(
            output.prediction.to(images.dtype), images, output.index, stride
        )
        painted = scatter_patches(images, output.index, pixels, stride)
        masked = expand_mask(output.mask, _image_size(images))[:, None]
        return torch.where(masked, painted, images)

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


def _image_size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
