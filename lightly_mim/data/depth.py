"""From the pixels of a file to at most 8 bits per channel, whatever their coding."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
)

from lightly_mim.arguments import NonNegativeInt, PositiveInt, Rule, fits
from lightly_mim.data.notes import is_first

_RANGE = (
    "the lowest and the highest value of 16-bit pictures, such as (0, 4095) for 12 "
    "bits, two whole numbers within 0..65535"
)


def _is_range(values: Any) -> bool:
    return fits(values, tuple[NonNegativeInt, PositiveInt]) and (
        values[0] < values[1] <= 65535
    )


ValueRange = Annotated[tuple[int, int], Rule(_RANGE, _is_range, alone=True)]

# Formats that hold at most 16 bits, of which some versions of PIL make 32.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
_WHITE_IS_ZERO = 0
_SIGNED = 2
_PLANES = 2
_LEVELS = {"1": 255, "L;2": 85, "L;4": 17}  # PIL's value of level 1, by bits
_DARK = 4096  # a sixteenth of the range of 16 bits


class Coding(NamedTuple):
    """How a file codes its pixels, where PIL's mode does not tell.

    Attributes:
        highest:
            Largest value of one channel, if it has more than 8 bits.
        inverted:
            Whether 0 is white in pictures of more than 8 bits. In others PIL inverts.
        may_be_16_bit:
            Whether whole numbers of 32 bits are 16 bits in the file.
    """

    highest: int
    inverted: bool
    may_be_16_bit: bool


def read_coding(image: ImageFile.ImageFile) -> Coding:
    """Returns how a picture that is open but not loaded is coded.

    Transparent grey levels of PNG files with less than 8 bits, which PIL leaves as they
    are in the file, are brought to those of the pixels.

    Args:
        image:
            The picture. Its `info` is changed.

    Raises:
        ValueError: If PIL would read it wrongly: signed whole numbers, or a transparent
            colour of 16 bits per channel.
    """
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(BITSPERSAMPLE, (16,)))
    if bits <= 16 and _SIGNED in tags.get(SAMPLEFORMAT, ()):
        raise ValueError(
            "its pixels are signed numbers, whose range is unknown. Convert it to "
            "unsigned ones, for example to a 16-bit PNG, which is read as 0..65535."
        )
    if (
        bits > 8
        and tags.get(PLANAR_CONFIGURATION) == _PLANES
        and image.tile[0][0] == "raw"
    ):
        raise ValueError(
            f"it holds one plane of {bits} bits after the other, of which PIL reads "
            "half. Convert it to channels side by side."
        )
    transparent = image.info.get("transparency")
    if image.format == "PNG" and transparent is not None and image.tile:
        raw = str(image.tile[0][3])
        if raw == "RGB;16B":
            raise ValueError(
                "it has 16 bits per colour and a transparent one, which only 8 bits "
                "of each would decide. Convert it to a PNG with an alpha channel."
            )
        if raw in _LEVELS and isinstance(transparent, int):
            image.info["transparency"] = transparent * _LEVELS[raw]
    return Coding(
        highest=2 ** (bits if 8 < bits < 16 else 16) - 1,
        inverted=tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO,
        may_be_16_bit=image.format in _SIXTEEN_BIT_FORMATS,
    )


def to_8_bit(
    image: Image.Image, coding: Coding, value_range: ValueRange | None, path: str
) -> Image.Image:
    """Returns a picture without transparency and with at most 8 bits per channel.

    Args:
        image:
            The picture.
        coding:
            How its file codes it.
        value_range:
            Values of 16 bits that become 0 and 255. None for all that the file can
            hold.
        path:
            The file, for a warning.

    Raises:
        ValueError: If its numbers have no known range, or leave `value_range`.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and coding.may_be_16_bit):
        return _from_16_bit(image, coding, value_range, path)
    if image.mode in ("I", "F"):
        kind = "32-bit whole" if image.mode == "I" else "32-bit floating-point"
        raise ValueError(
            f"its pixels are {kind} numbers, whose range is unknown. Convert it to 8 "
            "or 16 bits, for example to a 16-bit PNG, which is read as 0..65535."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def _from_16_bit(
    image: Image.Image, coding: Coding, value_range: ValueRange | None, path: str
) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = value_range or (0, coding.highest)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < low or highest > high:
        raise ValueError(
            f"its values go from {lowest} to {highest}, beyond the range {low} to "
            f"{high}. Give a value_range that holds them."
        )
    dark = value_range is None and coding.highest == 65535 and 0 < highest < _DARK
    if dark and is_first("dark 16-bit pictures"):
        bits = highest.bit_length()
        warnings.warn(
            f"{path} has 16 bits per pixel and no value above {highest}: read as "
            f"0..65535, that leaves {round(highest / 257) + 1} levels of grey. If the "
            f"camera has {bits} bits, give value_range=(0, {2**bits - 1}). This is "
            "said of the first such picture only.",
            stacklevel=2,
        )
    scaled = ((values - low) * 255 + (high - low) // 2) // (high - low)
    if coding.inverted:
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))
