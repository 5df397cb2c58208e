"""From a file to a picture of 8 bits and a known number of channels.

PIL decodes, and the transforms go on with uint8 tensors: for a photo of 512 x 341 that
was 1.3 times as fast as cropping and resizing with PIL. torchvision's own JPEG decoder
is deprecated as of 0.29, and PIL images are what lightly's transforms take. The JPEG
decoder's own scaling made the decoding of a 2560 x 1708 photo 3 times as fast.

PIL drops the warnings of its JPEG decoder, which are all that tells of a hole in a
file. simplejpeg runs the same decoder, passes them on, and gives the same pixels.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from lightly_mim.arguments import PositiveInt, checked
from lightly_mim.data.depth import ValueRange, read_coding, to_8_bit
from lightly_mim.data.notes import printable, say
from lightly_mim.data.opening import BrokenImageError, read_regular

DecodeSize = Callable[[tuple[int, int]], tuple[int, int]]

# What is read, by PIL's names, and under which endings. Nothing else is: some of PIL's
# formats start another program (EPS), others would take nearly any file for theirs.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "PPM": (".pgm", ".ppm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "QOI": (".qoi",),
}
PICTURE_EXTENSIONS = tuple(ending for endings in FORMATS.values() for ending in endings)
ARRAY_EXTENSIONS = (".npy",)

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_HARMLESS = "Metadata Warning"  # how PIL begins to speak of a tag with too many values
# Pixels that one byte of a file can hold at most, by PIL's name of the decoder.
_DENSEST = {"raw": 8, "zip": 8 * 1032, "qoi": 62, "jpeg": 4096}

_LOOKED_AT = 50  # pictures, for what is said of a value range
_SMALLEST_DRAFT = 8  # below, some sizes of the JPEG decoder are the same
_JPEG_COLOURS = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_JPEG_REST = 2**28  # bytes beyond the largest JPEG of that size: previews, a video


@checked
def decode_image(
    path: str | os.PathLike[str],
    in_chans: PositiveInt = 3,
    min_size: tuple[PositiveInt, PositiveInt] | None = None,
    decode_size: DecodeSize | None = None,
    value_range: ValueRange | None = None,
) -> Image.Image | Tensor:
    """Reads a picture as a viewer shows it, with 8 bits per channel.

    - EXIF orientation is applied, and ignored if it is damaged. Colour profiles are
      ignored.
    - 16 bits are scaled linearly from 0..65535, or `value_range`, to 0..255, not
      clipped; 12 bits of a TIFF file from 0..4095.
    - Transparency is laid on white.
    - Palette, 1-bit, CMYK and the like become RGB; colour becomes grey by ITU-R 601
      luma, and grey becomes colour by repetition, as `in_chans` says.
    - Of an animation or a file of several pages, the first one is read.

    Args:
        path:
            The file: a format of `FORMATS`, by its content, for 1 or 3 channels, a
            `.npy` file of a uint8 array with shape (channels, height, width) for other
            numbers.
        in_chans:
            1 for grey, 3 for colour, or the number of channels of the `.npy` file.
        min_size:
            Smallest (height, width) that is accepted. None accepts any.
        decode_size:
            Function from the picture's (height, width) to the smallest (height, width)
            that it may be decoded at; JPEG files are then decoded at 1/2, 1/4 or 1/8 of
            their size where that is enough. None decodes at full size.
        value_range:
            The values of 16-bit pictures that become 0 and 255, such as (0, 4095) for a
            camera of 12 bits. None takes (0, 65535), and warns of the first picture
            that uses less than a sixteenth of it.

    Returns:
        PIL image of mode L or RGB, or uint8 tensor with shape (channels, height, width)
        if `in_chans` is neither 1 nor 3.

    Raises:
        BrokenImageError: A ValueError that names the file, if it is missing, empty,
            truncated, not an image, no regular file, of 32 bits, signed, beyond
            `value_range`, too large for memory or PIL's limit
            (`PIL.Image.MAX_IMAGE_PIXELS`), smaller than `min_size`, or if the decoder
            finds it damaged.
        ValueError: If `in_chans` is less than 1, or `value_range` no range.
    """
    name = os.fspath(path)

    def read(file: BinaryIO) -> Image.Image | Tensor:
        if in_chans in (1, 3):
            mode = "L" if in_chans == 1 else "RGB"
            return _decode_picture(name, file, mode, min_size, decode_size, value_range)
        return _read_array(name, in_chans, min_size)

    return read_regular(name, "image", read)


# For data sets, which check what they pass once and not for every picture.
decode_unchecked: Callable[..., Image.Image | Tensor] = inspect.unwrap(decode_image)


def say_unused_range(
    value_range: ValueRange, paths: Sequence[Path], root: Path
) -> None:
    """Prints it if a range is given for pictures of 16 bits, and there are none.

    Args:
        value_range:
            See `decode_image`.
        paths:
            The pictures, of which up to 50 are looked at.
        root:
            Their folder, for the message.
    """
    count = min(len(paths), _LOOKED_AT)
    modes = []
    for number in range(count):
        with suppress(BrokenImageError):
            path = str(paths[number * len(paths) // count])
            is_array = path.endswith(ARRAY_EXTENSIONS)
            modes.append("" if is_array else read_regular(path, "image", _mode))
    if modes and not any(mode.startswith("I") for mode in modes):
        low, high = value_range
        say(
            f"The value range {low} to {high} is for grey pictures of 16 bits. None of "
            f"{len(modes)} that were looked at in {printable(str(root))} is one: it "
            "changes nothing for them."
        )


def _mode(file: BinaryIO) -> str:
    with open_picture(file, picture_formats()) as image:
        return image.mode


@functools.cache
def picture_formats() -> list[str]:
    """Returns the formats that are read and that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1, upright, if there is none or it is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as for pictures
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _decode_picture(
    path: str,
    file: BinaryIO,
    mode: str,
    min_size: tuple[int, int] | None,
    decode_size: DecodeSize | None,
    value_range: ValueRange | None,
) -> Image.Image:
    if os.fstat(file.fileno()).st_size == 0:
        raise ValueError("it is empty.")
    with open_picture(file, picture_formats()) as image:
        coding = read_coding(image)
        orientation = read_orientation(image)
        swapped = orientation in TRANSPOSED
        width, height = reversed(image.size) if swapped else image.size
        _check_size(path, (height, width), min_size)
        if decode_size is not None:
            size = decode_size((height, width))
            _draft(image, size if swapped else (size[1], size[0]))
        picture = load_picture(image, file)
        picture = to_8_bit(picture, coding, value_range, printable(path))
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation])
        return picture if picture.mode == mode else picture.convert(mode)


def open_picture(file: BinaryIO, formats: list[str]) -> ImageFile.ImageFile:
    """Returns a picture of which only the header is read, and that may be true.

    Args:
        file:
            The open file.
        formats:
            PIL's names of the formats that it may have.

    Raises:
        ValueError: If the header of a TIFF file is damaged, or if more pixels are
            claimed than the file has room for.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise ValueError(
                f"cannot identify its format, or its header is damaged; "
                f"{', '.join(formats)} are read."
            ) from None
    for warning in caught if image.format == "TIFF" else ():
        if not str(warning.message).startswith(_HARMLESS):
            raise ValueError(f"its header is damaged ({warning.message}).")
    width, height = image.size
    codec = image.tile[0][0] if image.tile else ""
    num_bytes = os.fstat(file.fileno()).st_size
    if width * height > num_bytes * _DENSEST.get(codec, width * height):
        raise ValueError(
            f"it claims {height} x {width} pixels (height x width), which "
            f"{num_bytes} bytes cannot hold; it is damaged or truncated."
        )
    return image  # type: ignore[no-any-return, unused-ignore]


def load_picture(image: ImageFile.ImageFile, file: BinaryIO) -> Image.Image:
    """Returns the pixels of an open picture.

    Args:
        image:
            The picture.
        file:
            Its file.

    Raises:
        ValueError: If a JPEG decoder warns, or a checksum of a PNG file is wrong.
    """
    if image.format in ("JPEG", "MPO"):
        return _decode_jpeg(image, file)
    image.load()
    if image.format == "PNG":  # PIL does not look at those of pixels
        file.seek(0)
        Image.open(file, formats=["PNG"]).verify()
    return image


def _draft(image: ImageFile.ImageFile, size: tuple[int, int]) -> None:
    """Sets a smaller (width, height) that the JPEG decoder is to scale to."""
    if min(size) >= _SMALLEST_DRAFT:
        image.draft(None, size)


def _decode_jpeg(image: ImageFile.ImageFile, file: BinaryIO) -> Image.Image:
    """Returns the pixels that PIL returns too, which hides the decoder's warnings."""
    width, height = image.size
    file.seek(0)
    try:
        pixels = simplejpeg.decode_jpeg(
            file.read(_JPEG_REST + 8 * 64 * width * height),
            _JPEG_COLOURS[image.mode],
            # The smallest of the decoder's sizes that holds the one that was set.
            min_height=height,
            min_width=width,
        )
    except ValueError as error:
        if "subsampling" in str(error):  # a rare one, of which only PIL makes a picture
            image.load()
            return image
        raise ValueError(f"it is damaged or truncated ({error}).") from error
    if image.mode == "CMYK":
        return Image.frombytes("CMYK", (width, height), (255 - pixels).tobytes())
    return Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels)


def _read_array(
    path: str, in_chans: int, min_size: tuple[int, int] | None
) -> torch.Tensor:
    if not path.lower().endswith(ARRAY_EXTENSIONS):
        raise BrokenImageError(
            f"Cannot read the image {printable(path)} with {in_chans} channels: "
            "pictures are read as 1 or 3 channels. Save it as a .npy file of a uint8 "
            "array with shape (channels, height, width), or give a Dataset of your "
            "own.",
            path,
        )
    array = np.lib.format.open_memmap(path, mode="r")  # nothing but its header is read
    if array.dtype != np.uint8 or array.ndim != 3 or len(array) != in_chans:
        raise ValueError(
            f"a uint8 array with shape ({in_chans}, height, width) is expected, it "
            f"holds {array.dtype} with shape {array.shape}.{array_remedy(path)}"
        )
    if array.size == 0:
        raise ValueError(f"it has no pixels, but shape {array.shape}.")
    _check_size(path, array.shape[1:], min_size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and array[0].size > 2 * limit:  # as for pictures
        raise ValueError(
            f"it has {array[0].size} pixels, the limit is {2 * limit}: twice "
            "PIL.Image.MAX_IMAGE_PIXELS."
        )
    return torch.from_numpy(np.array(array, order="C"))


def array_remedy(path: str | os.PathLike[str]) -> str:
    """Returns what to do about a .npy file that is not what was expected, or nothing.

    Args:
        path:
            The file, of which the header is read.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        return ""
    if array.dtype != np.uint8 or array.ndim != 3:
        return " Save it as a uint8 array of three dimensions."
    if array.shape[-1] < len(array):
        return " Its channels come last: save numpy.moveaxis(array, -1, 0) instead."
    if len(array) in (1, 3):
        return f" Save arrays of {len(array)} channel(s) as pictures: PNG files."
    return f" For {len(array)} channels pass in_chans={len(array)}."


def _check_size(
    path: str, size: tuple[int, int], min_size: tuple[int, int] | None
) -> None:
    if min_size is not None and (size[0] < min_size[0] or size[1] < min_size[1]):
        raise BrokenImageError(
            f"The image {printable(path)} is too small: {size[0]} x {size[1]} pixels "
            f"(height x width), at least {min_size[0]} x {min_size[1]} are needed. "
            'Remove it, leave it out with on_error="skip", or train at a smaller size.',
            path,
        )
