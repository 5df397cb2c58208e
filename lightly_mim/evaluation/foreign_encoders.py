"""Encoders that are not ours, behind the few names that an evaluation needs.

`MaskedEncoder` has all of them. The others are wrapped: other families of timm models,
lightly's torchvision wrapper, modules with a feature function, and raw pixels, which
are the baseline without an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, cast

from lightly.models.modules.masked_vision_transformer_torchvision import (
    MaskedVisionTransformerTorchvision,
)
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.arguments import PositiveInt, checked
from lightly_mim.encoders import MaskedEncoder, pool_tokens
from lightly_mim.encoders.base import AnyPool
from lightly_mim.encoders.pooling import timm_pooling
from lightly_mim.encoders.statistics import Statistics, pretrained_statistics
from lightly_mim.patches import Size, to_pair

FeatureFunction = Callable[[Tensor], Tensor | Mapping[str, Tensor]]


@checked
class AdaptedEncoder(nn.Module):
    """What an evaluation needs of an encoder that is not one of ours.

    Attributes:
        model:
            The model.
        name:
            timm's name of it, None for a model that was passed by hand.
        img_size:
            (height, width) in pixels of the images that it is given.
        in_chans:
            Number of image channels.
        num_layers:
            Number of layers that features can be taken from.
        has_class_token:
            Whether there is the pooling "cls".
        names_features:
            Whether its features have names of their own, in place of layers and
            poolings.
        mean:
            Per channel, what is subtracted from images with values in [0, 1].
        std:
            Per channel, what they are divided by afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        img_size: Size,
        in_chans: PositiveInt,
        num_layers: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.model = cast(Any, model)
        self.name: str | None = None
        self.img_size = to_pair(img_size, "img_size")
        self.in_chans = in_chans
        self.num_layers = num_layers
        self.has_class_token = False
        self.names_features = False
        self.mean, self.std = _statistics(model, in_chans)

    def embed_layers(
        self, images: Tensor, layers: Sequence[int], pools: Sequence[AnyPool]
    ) -> Mapping[Any, Tensor]:
        """Returns features of several layers, as `MaskedEncoder.embed_layers` does.

        An encoder that names its features returns all of them, whatever is asked for.

        Args:
            images:
                Normalised images, tensor with shape (batch_size, channels, height,
                width).
            layers:
                Layers, counted from 0, or from the end if negative.
            pools:
                Poolings, see `lightly_mim.encoders.pool_tokens`, or "tokens".

        Returns:
            For each (layer, pooling), or (None, name), a tensor with shape
            (batch_size, dim), or (batch_size, num_patches, dim) for "tokens".

        Raises:
            ValueError: If there is no such layer or pooling.
        """
        raise NotImplementedError


AnyEncoder = MaskedEncoder | AdaptedEncoder


class TimmEncoder(AdaptedEncoder):
    """Any timm model, with its stages or blocks as layers.

    "mean" of the last layer is what the model itself hands to its classifier, if that
    is the mean over the image, as in convolutional and hierarchical models; for models
    of tokens the mean of the patch tokens after the final norm. Other layers give the
    mean of what their stage returns, without a norm. "tokens" are the positions of the
    last feature map. There is no "cls": where the class token lies differs between
    families.

    Raises:
        ValueError: If the model says nothing of the images that it takes, or cannot
            return what lies between its layers.
    """

    def __init__(
        self, model: nn.Module, name: str | None = None, img_size: Size | None = None
    ) -> None:
        config = getattr(model, "pretrained_cfg", None)
        if not config or not hasattr(model, "forward_intermediates"):
            raise ValueError(
                f"{type(model).__name__} is not a timm model that returns what lies "
                "between its layers. Pass feature_function=..., a function from "
                "normalised images to features, beside the module."
            )
        first = config.get("first_conv")
        first = first if isinstance(first, str) else (first or [""])[0]
        layer = dict(model.named_modules()).get(first)
        size = config["input_size"][1:] if img_size is None else img_size
        super().__init__(
            model,
            size if isinstance(size, int) else (size[0], size[1]),
            getattr(layer, "in_channels", config["input_size"][0]),
            _count_layers(model),
        )
        self.name = name

    def embed_layers(
        self, images: Tensor, layers: Sequence[int], pools: Sequence[AnyPool]
    ) -> dict[tuple[int, AnyPool], Tensor]:
        """See `AdaptedEncoder`."""
        if others := [pool for pool in pools if pool not in ("mean", "tokens")]:
            raise ValueError(
                f"For a {type(self.model).__name__}, pools are any of mean, tokens, "
                f"got '{others[0]}'."
            )
        last = self.num_layers - 1
        wanted = sorted({layer % self.num_layers for layer in layers} | {last})
        final, maps = self.model.forward_intermediates(images, indices=wanted)
        by_layer = dict(zip(wanted, maps, strict=True))
        features: dict[tuple[int, AnyPool], Tensor] = {}
        for layer in layers:
            number = layer % self.num_layers
            tokens = by_layer[number].flatten(2).transpose(1, 2)
            pooled = tokens.mean(dim=1)
            if number == last:
                tokens, pooled = self._last(final, tokens)
            for pool in pools:
                features[layer, pool] = tokens if pool == "tokens" else pooled
        return features

    def _last(self, final: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens and their mean as the model would give them to its head."""
        if final.ndim == 3:
            num_prefix = final.shape[1] - tokens.shape[1]
            if num_prefix < 0:
                raise ValueError(
                    f"{type(self.model).__name__} returns {final.shape[1]} tokens for "
                    f"a map of {tokens.shape[1]} positions, so which ones are patches "
                    "is not known. Pass feature_function=... beside the module."
                )
            tokens = final[:, num_prefix:]
            pooled = tokens.mean(dim=1)
            fc_norm = getattr(self.model, "fc_norm", None)
            return tokens, pooled if fc_norm is None else fc_norm(pooled)
        pool = timm_pooling(self.model)
        if pool not in ("", "avg", "fast", "fastavg"):
            raise ValueError(
                f"{type(self.model).__name__} pools by '{pool}', which is not the mean "
                "of its features. Build it with global_pool='avg', or pass "
                "feature_function=... beside the module."
            )
        pooled = self.model.forward_head(final, pre_logits=True)
        return tokens, pooled.flatten(1)


class TorchvisionEncoder(AdaptedEncoder):
    """lightly's `MaskedVisionTransformerTorchvision`: layers, class token and mean."""

    def __init__(self, wrapper: MaskedVisionTransformerTorchvision) -> None:
        vit: Any = wrapper.vit
        super().__init__(
            wrapper, vit.image_size, vit.conv_proj.in_channels, len(vit.encoder.layers)
        )
        self.has_class_token = True

    def embed_layers(
        self, images: Tensor, layers: Sequence[int], pools: Sequence[AnyPool]
    ) -> dict[tuple[int, AnyPool], Tensor]:
        """See `AdaptedEncoder`. The last layer is normalised, as in the model."""
        stack, outputs = self.model.vit.encoder, []
        tokens = stack.dropout(self.model.preprocess(images))
        for block in stack.layers:
            tokens = block(tokens)
            outputs.append(tokens)
        outputs[-1] = stack.ln(tokens)
        return {
            (layer, pool): pool_tokens(outputs[layer], 1, pool)
            for layer in layers
            for pool in pools
        }


class FunctionEncoder(AdaptedEncoder):
    """Any module, with a function that makes features of images.

    Attributes:
        function:
            Function from normalised images with shape (batch_size, channels, height,
            width) to features with shape (batch_size, dim), or to a dictionary of them
            whose keys take the place of poolings.
    """

    def __init__(
        self, model: nn.Module, function: FeatureFunction, img_size: Size, in_chans: int
    ) -> None:
        super().__init__(model, img_size, in_chans)
        self.function = function
        self.names_features = True

    def embed_layers(
        self, images: Tensor, layers: Sequence[int] = (), pools: Sequence[AnyPool] = ()
    ) -> dict[tuple[None, str], Tensor]:
        """Returns the features of normalised images by the function's own names.

        Raises:
            ValueError: If the function returns something else.
        """
        found = self.function(images)
        named = {"features": found} if isinstance(found, Tensor) else dict(found)
        for name, value in named.items():
            dims = 3 if name == "tokens" else 2
            if (
                not isinstance(value, Tensor)
                or value.ndim != dims
                or len(value) != len(images)
            ):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value)
                raise ValueError(
                    "feature_function returns one row of features per image, shape "
                    f"(batch_size, dim), or a dictionary of such tensors ('tokens' has "
                    f"shape (batch_size, num_patches, dim)); for {len(images)} images "
                    f"'{name}' is {shape}."
                )
        if not named:
            raise ValueError("feature_function returned an empty dictionary.")
        return {(None, name): value for name, value in named.items()}


@checked
class RawPixels(AdaptedEncoder):
    """The pixels themselves as features: the baseline without an encoder.

    Attributes:
        size:
            (height, width) that images are resized to, bilinear with antialiasing.
    """

    def __init__(
        self, img_size: Size, in_chans: PositiveInt = 3, size: Size = 32
    ) -> None:
        super().__init__(nn.Identity(), img_size, in_chans)
        self.size = to_pair(size, "size")
        self.names_features = True

    def embed_layers(
        self, images: Tensor, layers: Sequence[int] = (), pools: Sequence[AnyPool] = ()
    ) -> dict[tuple[None, str], Tensor]:
        """Returns features with shape (batch_size, channels * height * width)."""
        small = functional.interpolate(
            images, self.size, mode="bilinear", antialias=True
        )
        return {(None, "pixels"): small.flatten(1)}


def _statistics(model: nn.Module, in_chans: int) -> Statistics:
    """Returns the model's own mean and deviation, timm's of it, or ImageNet's."""
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if _fits(mean, in_chans) and _fits(std, in_chans):
        return tuple(map(float, mean)), tuple(map(float, std))
    return pretrained_statistics(model, in_chans)


def _fits(values: Any, in_chans: int) -> TypeGuard[Sequence[float]]:
    return isinstance(values, (tuple, list)) and len(values) == in_chans


def _count_layers(model: Any) -> int:
    info = getattr(model, "feature_info", None)
    return len(model.blocks if info is None else info)
