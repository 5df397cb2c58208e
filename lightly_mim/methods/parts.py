"""What the constructors of methods share: parts are chosen, checked and built."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from lightly_mim.config import Recorded, constructor_arguments
from lightly_mim.encoders import Encoder, Init, MaskedEncoder, masked_encoder
from lightly_mim.heads import Head
from lightly_mim.losses import Loss
from lightly_mim.masking import Masking, RandomMasking, UnitMasking
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.patches import Size
from lightly_mim.targets import Target


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
