"""From what a user calls an encoder to the encoder."""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from lightly.models.modules.masked_vision_transformer_torchvision import (
    MaskedVisionTransformerTorchvision,
)
from torch import nn

from lightly_mim.arguments import PositiveInt, Seed, check_arguments, checked
from lightly_mim.checkpoints import Weights, encoder_spec, read_weights
from lightly_mim.checkpoints.hub import fetch, is_hub_name
from lightly_mim.data.seeding import keyed_random_state
from lightly_mim.encoders import (
    Encoder,
    MaskedEncoder,
    UnsupportedModelError,
    masked_encoder,
    resize_encoder,
)
from lightly_mim.encoders.build import near
from lightly_mim.encoders.tables import Tables
from lightly_mim.evaluation.features import evaluating
from lightly_mim.evaluation.foreign_encoders import (
    AdaptedEncoder,
    AnyEncoder,
    FeatureFunction,
    FunctionEncoder,
    RawPixels,
    TimmEncoder,
    TorchvisionEncoder,
)
from lightly_mim.patches import Size


@checked
def load_encoder(
    encoder: Encoder | Path,
    *,
    img_size: Size | None = None,
    tables: Tables | None = None,
    in_chans: PositiveInt = 3,
    pretrained: bool = True,
    feature_function: FeatureFunction | None = None,
) -> AnyEncoder:
    """Finds or builds an encoder.

    Args:
        encoder:
            One of:

            - the directory of a pretraining run, its `encoder.safetensors`, or one of
              its checkpoints; the directory of a run that has not finished stands for
              its last checkpoint
            - a file or folder of weights in another layout, see
              `lightly_mim.checkpoints.read_weights`
            - the name of a timm model, or hf-hub:OWNER/MODEL or local-dir:FOLDER
            - the name of a model on the Hugging Face hub, OWNER/MODEL
            - a timm model, whose classifier is removed if it is of a family that can
              encode masked images; see `TimmEncoder` for the others
            - lightly's `MaskedVisionTransformerTIMM`, whose timm model is taken, or
              `MaskedVisionTransformerTorchvision`
            - one of our encoders, which is returned as it is
            - any module, with a `feature_function`
        img_size:
            For a run, the name of a timm model, a timm model that takes any size, and a
            module with a feature function: height and width of the images in pixels.
            By default those that the model was made for. The encoder of a run is
            resized, see `lightly_mim.encoders.resize_encoder`.
        tables:
            For a run and an img_size: how the tables of relative positions of a Swin
            are resampled, see there. By default as its recipe's code does.
        in_chans:
            For the name of a timm model and for a module with a feature function:
            number of image channels.
        pretrained:
            For the name of a timm model: whether timm loads its pretrained weights.
        feature_function:
            For a module: function from normalised images with shape (batch_size,
            channels, height, width) to features with shape (batch_size, dim), or to a
            dictionary of them by names of one's own. Images are normalised with the
            module's `mean` and `std`, if it has them, else as ImageNet is.

    Returns:
        The encoder, on the CPU unless it was passed as a module.

    Raises:
        ValueError: If there is neither such a run nor such a timm model, if its weights
            cannot be loaded, if the run trained a module that was passed by hand, or if
            it is not clear how a module makes features.
    """
    if isinstance(encoder, str) and is_hub_name(encoder):
        encoder = fetch(encoder)
    saved = not isinstance(encoder, nn.Module) and Path(encoder).exists()
    if tables is not None and not (saved and img_size is not None):
        raise ValueError(
            f"tables={tables!r} is how the encoder of a run goes to another img_size: "
            "pass a run and img_size as well, or leave tables out."
        )
    if feature_function is not None:
        return _with_function(encoder, feature_function, img_size, in_chans)
    if not isinstance(encoder, nn.Module) and saved:
        weights = read_weights(encoder, parts=False)
        encoder = build_saved(weights, encoder)
        for note in weights.notes:
            print(note)
        if img_size is not None:
            encoder = resize_encoder(encoder, img_size, tables)
    if isinstance(encoder, nn.Module):
        return _adapt(encoder, img_size, in_chans)
    name = str(encoder)
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(
            f"'{name}' is neither the directory of a run, nor a file of weights, nor "
            "the name of a timm model. "
            + (near(name) or "Check the path, or see timm.list_models() for names.")
        )
    return _build_timm(name, img_size, in_chans, pretrained)


@checked
def at_random(encoder: AnyEncoder, seed: Seed) -> AnyEncoder:
    """Builds the same encoder once more, at random initialisation.

    Args:
        encoder:
            An encoder that was built by its timm name.
        seed:
            Decides the weights; the global random state is left as it was.

    Returns:
        An encoder that takes the same images.

    Raises:
        ValueError: If the encoder was built by hand.
    """
    if encoder.name is None:
        raise ValueError(
            "The baseline at random initialisation builds the encoder anew by its timm "
            "name, and this one was passed by hand. Leave the baseline out, or "
            "evaluate a second module with random weights."
        )
    other: AnyEncoder
    with keyed_random_state(seed, "evaluation", "random"):
        if isinstance(encoder, MaskedEncoder):
            other = _build(
                encoder.name,
                encoder.img_size,
                encoder.in_chans,
                encoder.pos_embed,
                encoder.options,
                encoder.init,
            )
            other.pool, other.norm_eps = encoder.pool, encoder.norm_eps
        else:
            other = _build_timm(
                encoder.name, encoder.img_size, encoder.in_chans, pretrained=False
            )
    other.mean, other.std = encoder.mean, encoder.std
    return other


def origin_notes(encoder: AnyEncoder, resized: bool = False) -> list[str]:
    """Returns what a reader of results must know of where the weights come from.

    `resized` says whether the size of the images was asked for.
    """
    notes = []
    if resized and getattr(encoder, "tables", "timm") == "simmim":
        notes.append(
            "Tables of relative positions go to another size by the cubic spline of "
            "SimMIM's code; tables='timm' takes timm's way."
        )
    place = getattr(encoder, "unfinished", None)
    if place is None:
        return notes
    epoch, step = (
        f"{place[name]}" + (f" of {place[total]}" if place[total] else "")
        for name, total in (("epoch", "epochs"), ("step", "steps"))
    )
    notes.append(
        f"The encoder is from a checkpoint of a run that had not finished: epoch "
        f"{epoch}, after optimiser step {step}."
    )
    return notes


@checked
def describe_encoder(encoder: AnyEncoder) -> dict[str, Any]:
    """Returns what a record says of an encoder.

    Args:
        encoder:
            The encoder.

    Returns:
        What to build it from, see `lightly_mim.checkpoints.EncoderCheckpoint`. `name`
        is None for a model that was passed by hand; `kind` tells how one that is not
        one of ours was adapted.
    """
    if isinstance(encoder, MaskedEncoder):
        return encoder_spec(encoder)
    return {
        "kind": type(encoder).__name__,
        "name": encoder.name,
        "model": type(encoder.model).__name__,
        "img_size": list(encoder.img_size),
        "in_chans": encoder.in_chans,
        "options": {"size": encoder.size} if isinstance(encoder, RawPixels) else {},
        "pos_embed": None,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "version": importlib.metadata.version("lightly-mim"),
    }


def _with_function(
    encoder: Encoder | Path,
    function: FeatureFunction,
    img_size: Size | None,
    in_chans: int,
) -> FunctionEncoder:
    if not isinstance(encoder, nn.Module) or isinstance(encoder, MaskedEncoder):
        raise ValueError(
            "feature_function tells how a module makes features, and goes with a "
            f"module of your own, got {type(encoder).__name__}. Leave it out."
        )
    if img_size is None:
        raise ValueError(
            "A module with a feature_function does not tell which images it takes: "
            "pass img_size=224, or (height, width), as well."
        )
    return FunctionEncoder(encoder, function, img_size, in_chans)


def _adapt(module: nn.Module, img_size: Size | None, in_chans: int) -> AnyEncoder:
    """Wraps a module; an img_size or in_chans that does not fit is an error."""
    if isinstance(module, AdaptedEncoder):
        return module
    if isinstance(module, MaskedVisionTransformerTorchvision):
        return TorchvisionEncoder(module)
    if isinstance(module, MaskedVisionTransformerTIMM):
        module = module.vit
    try:
        return masked_encoder(module, img_size=img_size, in_chans=in_chans)
    except UnsupportedModelError:
        return TimmEncoder(module, img_size=img_size)


def _build_timm(
    name: str, img_size: Size | None, in_chans: int, pretrained: bool
) -> AnyEncoder:
    try:
        return masked_encoder(
            name, img_size=img_size, in_chans=in_chans, pretrained=pretrained
        )
    except UnsupportedModelError as error:
        return _check_size(TimmEncoder(error.model, name, img_size))
    except ValueError as error:
        # Models that take images of any size have no such argument.
        if img_size is None or not isinstance(error.__cause__, TypeError):
            raise
        try:
            masked_encoder(name, in_chans=in_chans, pretrained=pretrained)
        except UnsupportedModelError as other:
            return _check_size(TimmEncoder(other.model, name, img_size))
        raise


def _check_size(encoder: TimmEncoder) -> TimmEncoder:
    """Tries an image: families differ in which sizes they take."""
    images = torch.zeros(1, encoder.in_chans, *encoder.img_size)
    try:
        with evaluating(encoder.model, "cpu"), torch.no_grad():
            encoder.model(images)
    except (AssertionError, RuntimeError) as error:
        height, width = encoder.img_size
        raise ValueError(
            f"timm's '{encoder.name}' does not take images of {height} x {width} "
            f"pixels with {encoder.in_chans} channel(s): {error} Pass another img_size."
        ) from error
    return encoder


def build_saved(
    weights: Weights, place: Path | str, strict: bool = True
) -> MaskedEncoder:
    """Builds the encoder of weights, with them; `place` is where they were read.

    Unless `strict`, some of its weights may be missing: they are loaded later.

    Raises:
        ValueError: If the weights do not say how to build it, or if there are too few
            or too many of them.
    """
    spec = weights.spec
    if spec["name"] is None:
        raise ValueError(
            f"The encoder in {place} was passed to its run as a module, so how to "
            "build it is not recorded. Build it, load the weights with "
            "safetensors.torch.load_model, and pass the module as encoder=..."
        )
    size = tuple(spec["img_size"])
    what = spec["name"], size, spec["in_chans"]
    try:
        # First without memory: what is built is as large as the weights in the file.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are copied nowhere
            empty = _build(*what, None, spec["options"])
            empty.vit.load_state_dict(weights.encoder, strict=strict)
        encoder = _build(*what, spec["pos_embed"], spec["options"])
        encoder.vit.load_state_dict(weights.encoder, strict=strict)
    except Exception as error:  # whatever timm makes of the options in a file
        raise ValueError(
            f"The weights in {place} do not fit timm's '{spec['name']}' as this "
            f"version of timm builds it: {error}"
        ) from error
    if spec["mean"] and spec["std"]:
        encoder.mean, encoder.std = tuple(spec["mean"]), tuple(spec["std"])
    encoder.untrained = False
    encoder.init = spec.get("init", "timm")  # not said by earlier versions
    # Files that do not say it are of a version whose encoders all had the mean.
    if (pool := spec.get("pool", "mean")) is not None:
        encoder.pool = pool
    encoder.unfinished = spec.get("unfinished")
    if "value_range" in spec:
        encoder.value_range = tuple(spec["value_range"])
    encoder.tables = spec.get("tables", "timm")
    encoder.norm_eps = spec.get("norm_eps")
    return encoder


def _build(
    name: str,
    img_size: tuple[int, ...],
    in_chans: int,
    pos_embed: Any,
    options: dict[str, Any],
    init: Any = "timm",
) -> MaskedEncoder:
    height, width = img_size
    return masked_encoder(
        name,
        img_size=(height, width),
        in_chans=in_chans,
        pos_embed=pos_embed,
        init=init,
        **options,
    )


def check_loading(
    function: str, loading: Mapping[str, Any], protocols: Mapping[str, type[Any]]
) -> dict[str, Any]:
    """Checks the arguments that an evaluation hands on to `load_encoder`.

    Raises:
        TypeError: If `load_encoder` does not know one. It may be a setting of one of
            the protocols.
        ValueError: If a value is out of range.
    """
    known = inspect.signature(load_encoder).parameters.keys() - {"encoder"}
    for name in loading.keys() - known:
        hint = ""
        if name in protocols:
            kind = protocols[name].__name__
            hint = f" Settings go with their protocol: protocols=[{kind}(...)]."
        raise TypeError(f"{function}() has no argument {name!r}.{hint}")
    return check_arguments(load_encoder, loading, function)
