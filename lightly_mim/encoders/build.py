"""Builds an encoder: any supported timm backbone, by its name or as a module."""

from __future__ import annotations

import difflib
import json
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import timm
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from lightly.models.modules.masked_vision_transformer_torchvision import (
    MaskedVisionTransformerTorchvision,
)
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from lightly_mim.arguments import PositiveInt, Rule, checked
from lightly_mim.config import WEIGHT_OPTIONS
from lightly_mim.encoders.base import (
    MaskedEncoder,
)
from lightly_mim.encoders.beit import MaskedBeit
from lightly_mim.encoders.eva import MaskedEva
from lightly_mim.encoders.initialization import (
    Init,
    PosEmbed,
    initialize,
    set_positions,
)
from lightly_mim.encoders.statistics import imagenet_statistics, pretrained_statistics
from lightly_mim.encoders.swin import MaskedSwin
from lightly_mim.encoders.tables import Tables, spline_table
from lightly_mim.encoders.transformer import MaskedTransformer
from lightly_mim.encoders.vit import MaskedViT
from lightly_mim.patches import Size, grid_size, to_pair

if TYPE_CHECKING:
    Encoder = str | nn.Module
else:
    # What a command line can pass: its help would list every module of PyTorch.
    Encoder = Annotated[
        str,
        Rule(
            "the name of a timm model or a module",
            lambda encoder: isinstance(encoder, (str, nn.Module)) and encoder != "",
            alone=True,
        ),
    ]

_FAMILIES: dict[type[nn.Module], type[MaskedTransformer]] = {
    VisionTransformer: MaskedViT,
    Beit: MaskedBeit,
    Eva: MaskedEva,
    SwinTransformer: MaskedSwin,
    SwinTransformerV2: MaskedSwin,
}
_SUPPORTED = f"Supported are timm's {', '.join(f.__name__ for f in _FAMILIES)}."


class UnsupportedModelError(ValueError):
    """A timm model that cannot encode masked images.

    Attributes:
        model:
            The model, as timm built it.
    """

    def __init__(self, message: str, model: nn.Module) -> None:
        super().__init__(message)
        self.model = model


@checked
def masked_encoder(
    encoder: Encoder,
    *,
    img_size: Size | None = None,
    in_chans: PositiveInt = 3,
    pretrained: bool = False,
    pos_embed: PosEmbed | None = None,
    init: Init = "timm",
    **options: Any,
) -> MaskedEncoder:
    """Builds an encoder from a timm name, or wraps a timm model.

    Args:
        encoder:
            timm's name of the model, or the model itself, whose classifier is then
            removed; of lightly's `MaskedVisionTransformerTIMM` its timm model is taken,
            and its mask token is left behind. A `MaskedEncoder` is returned as it is.
        img_size:
            Height and width of the images in pixels, one number for squares. timm's
            own for that model if None.
        in_chans:
            Number of image channels.
        pretrained:
            Whether timm loads its pretrained weights.
        pos_embed:
            None leaves the absolute positions as timm or `init` made them, "learned"
            asks for learned ones, "sincos" replaces them, pretrained ones too, by fixed
            2-D sines and cosines as in MAE, for any aspect ratio.
        init:
            The law that the weights are drawn by, of an encoder that is built by its
            name without pretrained weights: "timm", "mae" or "simmim", see
            `lightly_mim.encoders.initialization.initialize`.
        **options:
            Further arguments of the timm model, such as `depth`, `embed_dim`,
            `window_size`, `drop_path_rate` or `dynamic_img_size`.

    Images are normalised with the mean and deviation that timm's `pretrained_cfg` says
    of pretrained weights and of a model that is passed by hand, whose weights may be
    such; with ImageNet's for a model that is built by its name with new weights. `mean`
    and `std` of the encoder, which print with it, can be set to others.

    Returns:
        The encoder, without a mask token.

    Raises:
        ValueError: If timm has no such model or cannot build it like that, or if the
            weights that are there cannot be drawn by `init`.
        UnsupportedModelError: A ValueError. If the model is of a family that is not
            supported, or has a part that a mask does not get along with.
    """
    if init != "timm" and (pretrained or not isinstance(encoder, str)):
        what = "pretrained=True" if pretrained else "a model that is passed by hand"
        raise ValueError(
            f"init={init!r} draws new weights, and {what} brings its own: leave init "
            "out, or name a timm model without pretrained weights."
        )
    if isinstance(encoder, str):
        wrapped = _build(encoder, img_size, in_chans, pretrained, options)
        initialize(wrapped, init, pos_embed)
    else:
        if pretrained or options:
            raise ValueError(
                "A model that is passed by hand is used as it is: pass pretrained and "
                f"{sorted(options)} to timm.create_model instead."
            )
        wrapped = encoder if isinstance(encoder, MaskedEncoder) else _wrap(encoder)
        if img_size is not None and to_pair(img_size, "img_size") != wrapped.img_size:
            raise ValueError(
                f"The model was built with img_size={wrapped.img_size}, got "
                f"img_size={img_size}. Build it for the size that you need."
            )
        # 3 is the default, which says nothing about a model that is already built.
        if in_chans not in (3, wrapped.in_chans):
            raise ValueError(
                f"The model was built with in_chans={wrapped.in_chans}, got "
                f"in_chans={in_chans}. Build it for the channels that you need."
            )
        if pos_embed is not None:
            set_positions(wrapped, pos_embed)
    return wrapped


def can_drop_tokens(encoder: Encoder) -> bool:
    """Returns whether an encoder can leave patches out, without building it.

    Args:
        encoder:
            See `masked_encoder`. True for what is not known before it is built.
    """
    if isinstance(encoder, MaskedEncoder):
        return encoder.can_drop_tokens
    if isinstance(encoder, nn.Module):
        family = _FAMILIES.get(type(encoder))
    else:
        # timm keeps a family's class and the functions of its names in one module.
        name = encoder.split(".")[0]
        module = timm.model_entrypoint(name).__module__ if timm.is_model(name) else ""
        families = (each for each in _FAMILIES if each.__module__ == module)
        family = _FAMILIES.get(next(families, nn.Module))
    return family is None or family.can_drop_tokens


def resize_encoder(
    encoder: MaskedEncoder,
    img_size: Size,
    tables: Tables | None = None,
    *,
    patch_size: Size | None = None,
    window_size: Size | None = None,
) -> MaskedEncoder:
    """Makes an encoder take images of another size, with the weights that it has.

    What fine-tuning at a higher resolution than pretraining needs. timm resamples what
    depends on the size: absolute positions (bicubic), tables of relative positions and,
    for patches of another size, their embedding (FlexiViT's pseudo-inverse).
    The windows of a Swin follow, see `MaskedSwin.windows_at`; those that a SwinV2 was
    trained with stay the unit of its log-spaced coordinates (SwinV2, section 3.3;
    `pretrained_window_sizes` in timm).

    Args:
        encoder:
            The encoder. Its timm model is changed: do not use it any more.
        img_size:
            Height and width of the images in pixels, one number for squares.
        tables:
            How a SwinTransformer's tables of relative positions are resampled: "timm"
            does it linearly, "simmim" by a cubic spline on a geometric grid, as
            SimMIM's code does for fine-tuning (`lightly_mim.encoders.tables`). None as
            the encoder says: one that was pretrained by a recipe of SimMIM's code goes
            on as there.
        patch_size:
            Height and width of a patch in pixels. None for what it is.
        window_size:
            Height and width of a Swin's windows in patches. None to let them follow.

    Returns:
        An encoder of that size, on the same device. `options` has what rebuilds it.

    Raises:
        ValueError: If patches or windows do not tile such images, if the encoder is
            not built around a timm transformer, or if it has no tables for `tables`.
    """
    size = to_pair(img_size, "img_size")
    patch = to_pair(patch_size or encoder.patch_size, "patch_size")
    if (size, patch) == (encoder.img_size, encoder.patch_size) and not window_size:
        return encoder
    if not isinstance(encoder, MaskedTransformer):
        raise ValueError(
            f"How to resize a {type(encoder).__name__} is not known: build it with "
            f"img_size={size} and load the weights."
        )
    tables = encoder.tables if tables is None else tables
    if tables != "timm" and (
        tables != "simmim" or not isinstance(encoder.vit, SwinTransformer)
    ):
        raise ValueError(
            "tables is 'timm', or for a SwinTransformer 'simmim', got "
            f"{tables!r} for a {type(encoder.vit).__name__}."
        )
    grid = grid_size(size, patch)  # timm would cut the rest of the image off
    vit, options = encoder.vit, dict(encoder.options)
    family = type(vit)
    windows: dict[str, Any] = {}
    if isinstance(encoder, MaskedSwin):
        (height, width), (p, q) = grid, encoder.patch_size
        follow = encoder.windows_at((height * p, width * q))
        window = window_size and to_pair(window_size, "window_size")
        windows["window_size"] = [window] * len(follow) if window else follow
    elif window_size:
        raise ValueError(f"A {family.__name__} has no windows, got {window_size=}.")
    if family is SwinTransformerV2:
        for stage in vit.layers:
            for block in stage.blocks:
                if block.attn.pretrained_window_size == (0, 0):
                    block.attn.pretrained_window_size = block.attn.window_size
        options["pretrained_window_sizes"] = [
            list(stage.blocks[0].attn.pretrained_window_size) for stage in vit.layers
        ]
    kept = {}
    if tables == "simmim":
        attentions = [block.attn for stage in vit.layers for block in stage.blocks]
        kept = {a: (a.window_size, a.relative_position_bias_table) for a in attentions}
    with warnings.catch_warnings():
        # How timm's interpolation indexes tables, PyTorch warns of.
        warnings.filterwarnings("ignore", module="timm.layers.interpolate")
        new_patch = {} if patch == encoder.patch_size else {"patch_size": patch}
        vit.set_input_size(size, **new_patch, **windows)
    if new_patch:
        options["patch_size"] = patch[0] if patch[0] == patch[1] else list(patch)
    for attention, (window, table) in kept.items():
        if attention.window_size != window:
            resampled = spline_table(table, window, attention.window_size)
            attention.relative_position_bias_table.data = resampled
    if windows:
        options["window_size"] = [
            list(stage.blocks[0].window_size) for stage in vit.layers
        ]
    resized = type(encoder)(vit)
    copy_settings(encoder, resized)
    resized.options, resized.tables = options, tables
    return resized


def copy_settings(source: MaskedEncoder, target: MaskedEncoder) -> None:
    """Copies what an encoder has besides its timm model.

    Args:
        source:
            The encoder that it is taken of.
        target:
            The encoder that gets it.
    """
    for name in (
        *("mask_token", "name", "options", "pos_embed", "init", "mean", "std", "pool"),
        *("untrained", "unfinished", "value_range", "tables"),
    ):
        setattr(target, name, getattr(source, name))


def near(name: str) -> str:
    """Returns a question for the names of timm that are nearest, if any is near."""
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models())
    return f"Did you mean {' or '.join(close)}?" if close else ""


def _build(
    name: str,
    img_size: Size | None,
    in_chans: int,
    pretrained: bool,
    options: dict[str, Any],
) -> MaskedEncoder:
    """Lets timm build a model by its name, and wraps it."""
    base_name = name.split(".")[0]
    if ":" not in name and not timm.is_model(base_name):
        raise ValueError(f"timm has no model '{name}'. {near(name) or _SUPPORTED}")
    if "checkpoint_path" in options:
        raise ValueError(
            "checkpoint_path would be recorded as if it were part of the architecture: "
            "load the weights into a timm model and pass the model as encoder."
        )
    try:
        # What is built is what the record of it builds again: JSON has no tuples.
        options = json.loads(json.dumps(options))
    except TypeError as error:
        raise ValueError(
            f"Options that cannot be written as JSON cannot be recorded: {error}. "
            "Build the model with timm.create_model and pass it instead of its name."
        ) from error
    arguments: dict[str, Any] = {"in_chans": in_chans, **options}
    if img_size is not None:
        arguments["img_size"] = to_pair(img_size, "img_size")
    try:
        model: Any = timm.create_model(name, pretrained, num_classes=0, **arguments)
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"timm cannot build '{name}' with {arguments} ({error}). {_SUPPORTED}"
        ) from error
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        if ":" in name:
            raise ValueError(
                f"Cannot load '{name}': {error} Names with hf-hub: come with their "
                "settings and weights from the Hugging Face hub, or from its cache on "
                "this machine; fetch them once where there is a network, or pass "
                "local-dir:FOLDER, which holds config.json and the weights."
            ) from error
        if not pretrained or isinstance(error, KeyError | ValueError):
            raise
        raise ValueError(
            f"Cannot load timm's pretrained weights of '{name}': {error} Weights come "
            "from the Hugging Face hub, or from its cache on this machine: fetch them "
            "once where there is a network. pretrained=False takes random weights."
        ) from error

    encoder = _wrap(model)
    encoder.name = name
    encoder.options = {k: v for k, v in options.items() if k not in WEIGHT_OPTIONS}
    encoder.untrained = not pretrained
    if not pretrained:  # weights that were never trained: as the papers do
        encoder.mean, encoder.std = imagenet_statistics(in_chans)
    return encoder


def _wrap(model: nn.Module) -> MaskedEncoder:
    """Chooses the encoder class of a timm model."""
    if isinstance(model, MaskedVisionTransformerTIMM):
        model = model.vit
    if isinstance(model, (MaskedVisionTransformerTorchvision, TorchvisionViT)):
        raise UnsupportedModelError(
            f"{type(model).__module__.split('.')[0]}'s {type(model).__name__} is built "
            "around torchvision's ViT, whose blocks have other names and no hold for a "
            f"mask. Take timm's, such as 'vit_base_patch16_224'. {_SUPPORTED}",
            model,
        )
    # Exact types: a subclass may embed or attend in another way.
    if type(model) not in _FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not supported. {_SUPPORTED}", model
        )
    try:
        encoder = _FAMILIES[type(model)](model)
    except ValueError as error:
        raise UnsupportedModelError(str(error), model) from error
    encoder.mean, encoder.std = pretrained_statistics(model, encoder.in_chans)
    return encoder
