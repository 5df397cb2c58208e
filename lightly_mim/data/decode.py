"""From a file to a picture of 8 bits and a known number of channels.

PIL decodes, and the transforms go on with uint8 tensors: for a photo of 512 x 341 that
was 1.3 times as fast as cropping and resizing with PIL. torchvision's own JPEG decoder
is deprecated as of 0.29, and PIL images are what lightly's transforms take. The JPEG
decoder's own scaling made the decoding of a 2560 x 1708 photo 3 times as fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

DecodeSize = Callable[[tuple[int, int]], tuple[int, int]]

# Formats that hold at most 16 bits, of which some versions of PIL make 32.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class BrokenImageError(ValueError):
    """A file that cannot be used: damaged, of a kind not supported, or too small.

    Attributes:
        path:
            The file. None if the error comes out of a worker of a plain DataLoader,
            which passes on the message alone.
    """

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.path)


def decode_image(
    path: str | os.PathLike[str],
    in_chans: int = 3,
    min_size: tuple[int, int] | None = None,
    decode_size: DecodeSize | None = None,
) -> Image.Image | Tensor:
    """Reads a picture as a viewer shows it, with 8 bits per channel.

    - EXIF orientation is applied. Colour profiles are ignored.
    - 16 bits are scaled linearly from 0..65535 to 0..255, not clipped.
    - Transparency is laid on white.
    - Palette, 1-bit, CMYK and the like become RGB; colour becomes grey by ITU-R 601
      luma, and grey becomes colour by repetition, as `in_chans` says.
    - Of an animation or a file of several pages, the first one is read.

    Args:
        path:
            The file: any format that PIL reads for 1 or 3 channels, a `.npy` file of a
            uint8 array with shape (channels, height, width) for other numbers.
        in_chans:
            1 for grey, 3 for colour, or the number of channels of the `.npy` file.
        min_size:
            Smallest (height, width) that is accepted. None accepts any.
        decode_size:
            Function from the picture's (height, width) to the smallest (height, width)
            that it may be decoded at; JPEG files are then decoded at 1/2, 1/4 or 1/8 of
            their size where that is enough. None decodes at full size.

    Returns:
        PIL image of mode L or RGB, or uint8 tensor with shape (channels, height, width)
        if `in_chans` is neither 1 nor 3.

    Raises:
        BrokenImageError: A ValueError that names the file, if it is missing, empty,
            truncated, not an image, of 32 bits, too large for PIL's limit
            (`PIL.Image.MAX_IMAGE_PIXELS`) or smaller than `min_size`.
        ValueError: If `in_chans` is less than 1.
    """
    if in_chans < 1:
        raise ValueError(f"in_chans must be 1 or more, got {in_chans}.")
    name = os.fspath(path)
    try:
        if in_chans in (1, 3):
            mode = "L" if in_chans == 1 else "RGB"
            return _decode_picture(name, mode, min_size, decode_size)
        return _read_array(name, in_chans, min_size)
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:  # PIL lets nearly any kind through on damaged files
        reason = str(error) or type(error).__name__
        where = "" if name in reason else f" {name}"
        message = f"Cannot read the image{where}: {reason}"
        raise BrokenImageError(message, name) from error


def _decode_picture(
    path: str,
    mode: str,
    min_size: tuple[int, int] | None,
    decode_size: DecodeSize | None,
) -> Image.Image:
    if Path(path).stat().st_size == 0:
        raise BrokenImageError(f"Cannot read the image {path}: it is empty.", path)
    with Image.open(path) as image:
        format = image.format
        swapped = image.getexif().get(ExifTags.Base.Orientation) in TRANSPOSED
        width, height = reversed(image.size) if swapped else image.size
        _check_size(path, (height, width), min_size)
        if decode_size is not None:
            size = decode_size((height, width))
            image.draft(None, size if swapped else (size[1], size[0]))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        picture = _to_8_bit(image, format, path)
        return picture if picture.mode == mode else picture.convert(mode)


def _to_8_bit(image: Image.Image, format: str | None, path: str) -> Image.Image:
    """Returns the image without transparency and with at most 8 bits per channel."""
    sixteen_bit = image.mode.startswith("I;16") or (
        image.mode == "I" and format in _SIXTEEN_BIT_FORMATS
    )
    if sixteen_bit:
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit whole" if image.mode == "I" else "32-bit floating-point"
        raise BrokenImageError(
            f"Cannot read the image {path}: its pixels are {kind} numbers, whose range "
            f"is unknown. Convert it to 8 or 16 bits, for example to a 16-bit PNG, "
            f"which is read as 0..65535.",
            path,
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image


def _read_array(
    path: str, in_chans: int, min_size: tuple[int, int] | None
) -> torch.Tensor:
    if not path.lower().endswith(".npy"):
        raise BrokenImageError(
            f"Cannot read the image {path} with {in_chans} channels: pictures are read "
            f"as 1 or 3 channels. Save it as a .npy file of a uint8 array with shape "
            f"(channels, height, width), or pass a Dataset of your own.",
            path,
        )
    array = np.load(path, allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim != 3 or len(array) != in_chans:
        raise BrokenImageError(
            f"Cannot read the image {path}: a uint8 array with shape ({in_chans}, "
            f"height, width) is expected, it holds {array.dtype} with shape "
            f"{array.shape}.",
            path,
        )
    _check_size(path, array.shape[1:], min_size)
    return torch.from_numpy(array)


def _check_size(
    path: str, size: tuple[int, int], min_size: tuple[int, int] | None
) -> None:
    if min_size is not None and (size[0] < min_size[0] or size[1] < min_size[1]):
        raise BrokenImageError(
            f"The image {path} is too small: {size[0]} x {size[1]} pixels (height x "
            f"width), at least {min_size[0]} x {min_size[1]} are needed. Remove it, "
            f'leave it out with on_error="skip", or train at a smaller size.',
            path,
        )
