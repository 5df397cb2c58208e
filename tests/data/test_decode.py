from __future__ import annotations

import pickle
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

from lightly_mim.data import BrokenImageError
from lightly_mim.data.decode import decode_image
from lightly_mim.transforms import EvalTransform


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])  # 640 x 427


def _array(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


def _to(size: tuple[int, int]) -> Callable[[tuple[int, int]], tuple[int, int]]:
    return lambda _: size


def _ramp(dtype: type, high: int) -> np.ndarray:
    return np.linspace(0, high, 64 * 4).round().astype(dtype).reshape(4, 64)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp"])
def test_decode__lossless(
    tmp_path: Path, photo: Image.Image, extension: str, in_chans: int
) -> None:
    path = tmp_path / f"x.{extension}"
    photo.save(path, lossless=True)
    image = decode_image(path, in_chans)
    assert image.mode == {1: "L", 3: "RGB"}[in_chans]
    assert (_array(image) == _array(photo.convert(image.mode))).all()


def test_decode__jpeg_as_torchvision(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "x.jpg", quality=90)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchvision_decode(str(tmp_path / "x.jpg"), ImageReadMode.RGB)
    ours = _array(decode_image(tmp_path / "x.jpg")).transpose(2, 0, 1)
    assert np.abs(ours - theirs.numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode__exif_orientation(
    tmp_path: Path, photo: Image.Image, orientation: int
) -> None:
    # How the stored picture must be turned to be upright: EXIF 2.3, tag 0x0112, in
    # numpy's words.
    stored_from_upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    upright = _array(photo)
    stored = Image.fromarray(
        np.ascontiguousarray(stored_from_upright(upright)).astype(np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.png", "x.jpg", "x.webp"):
        stored.save(tmp_path / name, exif=exif, quality=95)
        image = decode_image(tmp_path / name, min_size=(427, 640))
        assert image.size == (640, 427)
        assert np.abs(_array(image) - upright).mean() < 3
    with pytest.raises(BrokenImageError, match="427 x 640 pixels"):
        decode_image(tmp_path / "x.jpg", min_size=(428, 1))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_decode__16_bit_is_scaled(tmp_path: Path, name: str, in_chans: int) -> None:
    values = _ramp(np.uint16, 65535)
    Image.fromarray(values).save(tmp_path / name)
    image = _array(decode_image(tmp_path / name, in_chans))
    expected = np.round(values / 257)
    if in_chans == 3:
        expected = np.repeat(expected[..., None], 3, axis=2)
    assert (image == expected).all()


def test_decode__16_bit_png_that_pil_opens_as_32_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow before 11.? gives mode I.
    values = _ramp(np.uint16, 65535)
    Image.fromarray(values).save(tmp_path / "x.png")
    monkeypatch.setitem(
        __import__("PIL.PngImagePlugin").PngImagePlugin._MODES, (16, 0), ("I", "I;16B")
    )
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.mode == "I"
    image = _array(decode_image(tmp_path / "x.png", 1))
    assert (image == np.round(values / 257)).all()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (_ramp(np.int32, 70000), "32-bit whole"),
        (_ramp(np.float32, 1), "32-bit floating-point"),
    ],
)
def test_decode__32_bit_is_refused(
    tmp_path: Path, values: np.ndarray, kind: str
) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(BrokenImageError, match=rf"x\.tif: .*{kind}.*16-bit PNG"):
        decode_image(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_decode__alpha_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    alpha = Image.fromarray(_ramp(np.uint8, 255))
    image = Image.new("RGB", alpha.size, (40, 40, 40)).convert(mode[:-1])
    image.putalpha(alpha)
    path = tmp_path / "x.png"
    image.save(path)
    weight = _array(alpha) / 255
    expected = 40 * weight + 255 * (1 - weight)
    assert np.abs(_array(decode_image(path, 1)) - expected).max() <= 1
    assert np.abs(_array(decode_image(path, 3)) - expected[..., None]).max() <= 1


def test_decode__transparent_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1] * 4)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "x.png", transparency=0)
    opaque = _array(decode_image(tmp_path / "opaque.png"))
    assert opaque[0, :2].tolist() == [[10, 20, 30], [200, 100, 50]]
    transparent = _array(decode_image(tmp_path / "x.png"))
    assert transparent[0, :2].tolist() == [[255, 255, 255], [200, 100, 50]]
    image.save(tmp_path / "y.png", transparency=bytes([255, 51]))
    translucent = _array(decode_image(tmp_path / "y.png"))
    assert translucent[0, :2].tolist() == [[10, 20, 30], [244, 224, 214]]


def test_decode__one_bit(tmp_path: Path) -> None:
    bits = np.arange(64).reshape(8, 8) % 3 == 0
    Image.fromarray(bits).save(tmp_path / "x.png")
    assert (_array(decode_image(tmp_path / "x.png", 1)) == bits * 255).all()


def test_decode__cmyk_jpeg(tmp_path: Path, photo: Image.Image) -> None:
    photo.convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.mode == "CMYK"
    assert np.abs(_array(decode_image(tmp_path / "x.jpg")) - _array(photo)).mean() < 2


def test_decode__grey_to_colour_and_back(tmp_path: Path, photo: Image.Image) -> None:
    photo.convert("L").save(tmp_path / "x.png")
    colour = _array(decode_image(tmp_path / "x.png"))
    assert (colour == _array(photo.convert("L"))[..., None]).all()
    photo.save(tmp_path / "y.png")
    luma = _array(photo) @ [0.299, 0.587, 0.114]
    assert np.abs(_array(decode_image(tmp_path / "y.png", 1)) - luma).max() <= 1


def test_decode__smaller_is_close_and_never_too_small(
    tmp_path: Path, photo: Image.Image
) -> None:
    large = photo.resize((2560, 1708), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "x.jpg", quality=95)
    large.rotate(90, expand=True).save(tmp_path / "y.jpg", quality=95, exif=exif)
    transform = EvalTransform(224, normalize=None)
    whole = transform(decode_image(tmp_path / "x.jpg"))
    for name in ("x.jpg", "y.jpg"):
        small = decode_image(tmp_path / name, decode_size=transform.decode_size)
        assert small.size == (1280, 854)
        assert (transform(small).int() - whole.int()).abs().float().mean() < 1
    # The limit is on the picture of the file.
    decode_image(tmp_path / "x.jpg", 3, (1708, 2560), transform.decode_size)


def test_decode__array(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
    np.save(tmp_path / "x.npy", values)
    image = decode_image(tmp_path / "x.npy", 5)
    assert isinstance(image, torch.Tensor)
    assert (image.numpy() == values).all()
    with pytest.raises(BrokenImageError, match=r"\(4, height, width\).*\(5, 6, 7\)"):
        decode_image(tmp_path / "x.npy", 4)
    with pytest.raises(BrokenImageError, match="6 x 7 pixels"):
        decode_image(tmp_path / "x.npy", 5, (8, 7))
    np.save(tmp_path / "y.npy", values.astype(np.float32))
    with pytest.raises(BrokenImageError, match=r"uint8.*holds float32"):
        decode_image(tmp_path / "y.npy", 5)
    np.save(tmp_path / "z.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BrokenImageError, match=r"z\.npy.*Python objects"):
        decode_image(tmp_path / "z.npy", 5)


def _broken_files(folder: Path, photo: Image.Image) -> dict[str, str]:
    """Writes broken files; returns a part of each one's error message."""
    photo.save(folder / "whole.jpg")
    photo.save(folder / "whole.png")
    jpeg = (folder / "whole.jpg").read_bytes()
    png = (folder / "whole.png").read_bytes()
    contents = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header_only.jpg": (jpeg[:20], "Cannot read"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "damaged.png": (png[:20000] + b"\0" * 999 + png[21000:], "Cannot read"),
        "empty.jpg": (b"", "it is empty"),
        "text.jpg": (b"this is no image\n" * 9, "cannot identify"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: message for name, (_, message) in contents.items()}


def test_decode__broken_files_are_named(tmp_path: Path, photo: Image.Image) -> None:
    for name, message in _broken_files(tmp_path, photo).items():
        with pytest.raises(BrokenImageError, match=message) as caught:
            decode_image(tmp_path / name)
        assert str(caught.value).count(str(tmp_path / name)) == 1
        assert caught.value.path == str(tmp_path / name)
    with pytest.raises(BrokenImageError, match=r"missing\.jpg"):
        decode_image(tmp_path / "missing.jpg")
    with pytest.raises(BrokenImageError, match=str(tmp_path)):
        decode_image(tmp_path)


def test_decode__decompression_bomb(
    tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImageError, match=r"x\.png.*decompression bomb"):
        decode_image(tmp_path / "x.png")


def test_decode__other_channels_from_a_picture(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(BrokenImageError, match=r"x\.png with 4 channels.*\.npy"):
        decode_image(tmp_path / "x.png", 4)
    with pytest.raises(ValueError, match="at least 1, got in_chans=0"):
        decode_image(tmp_path / "x.png", 0)


def test_broken_image_error__travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BrokenImageError("message", "x.jpg")))
    assert (str(error), error.path) == ("message", "x.jpg")
    assert BrokenImageError("message").path is None


def test_decode__damaged_jpegs_are_noticed(tmp_path: Path, photo: Image.Image) -> None:
    # PIL reads nearly all of them, without a word.
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        photo.save(tmp_path / "whole.jpg", quality=90, **options)
        whole = (tmp_path / "whole.jpg").read_bytes()
        expected = _array(decode_image(tmp_path / "whole.jpg"))
        rng = np.random.default_rng(0)
        missed = 0
        for hole in [1, 16, 256, 1024] * 5:
            start = int(rng.integers(1000, len(whole) - hole - 2))
            damaged = whole[:start] + b"\0" * hole + whole[start + hole :]
            (tmp_path / "x.jpg").write_bytes(damaged)
            try:
                image = _array(decode_image(tmp_path / "x.jpg"))
            except BrokenImageError as error:
                assert "x.jpg: it is damaged or truncated (" in str(error)
            else:
                missed += hole > 1 and (image != expected).any()
        assert missed < 3  # the decoder finds its way back without noticing


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 1}])
def test_decode__jpeg_as_pil(
    tmp_path: Path, photo: Image.Image, mode: str, options: dict[str, Any]
) -> None:
    photo.convert(mode).save(tmp_path / "x.jpg", **options)
    for scale in (1, 2, 4, 8):
        size = 427 // scale, 640 // scale
        with Image.open(tmp_path / "x.jpg") as image:
            image.draft(None, size[::-1])
            expected = _array(image.convert("RGB"))
        ours = decode_image(tmp_path / "x.jpg", decode_size=_to(size))
        assert np.array_equal(_array(ours), expected)


def test_decode__small_jpegs_are_not_scaled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for height, width in ((1, 1), (1, 9), (3, 2), (9, 5)):
        Image.fromarray(pixels[:height, :width]).save(tmp_path / "x.jpg")
        with Image.open(tmp_path / "x.jpg") as image:
            expected = _array(image)
        for size in ((1, 1), (2, 2)):
            decoded = decode_image(tmp_path / "x.jpg", decode_size=_to(size))
            assert np.array_equal(_array(decoded), expected)


@pytest.mark.parametrize("where", ["pixels", "header", "checksum"])
def test_decode__checksums_of_png(tmp_path: Path, where: str) -> None:
    Image.fromarray(_ramp(np.uint8, 255)).save(tmp_path / "x.png", compress_level=0)
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[{"pixels": 90, "header": 17, "checksum": -14}[where]] ^= 1
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BrokenImageError, match=r"x\.png"):
        decode_image(tmp_path / "x.png")


def _tiff(
    path: Path, values: np.ndarray, bits: int, photo: int = 1, **tags: int
) -> None:
    """Writes a grey TIFF file of any number of bits, as the TIFF 6.0 page says."""
    packed = "".join(f"{int(value) % 2**bits:0{bits}b}" for value in values.ravel())
    packed += "0" * (-len(packed) % 16)
    pixels = int(packed, 2).to_bytes(len(packed) // 8, "big")
    height, width = values.shape
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photo, 273: 8, 277: 1}
    entries |= {278: height, 279: len(pixels)}
    entries |= {int(tag.removeprefix("tag")): value for tag, value in tags.items()}
    content = b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels
    content += struct.pack(">H", len(entries))
    for tag, value in sorted(entries.items()):
        content += struct.pack(">HHII", tag, 4, 1, value)
    path.write_bytes(content + bytes(4))


@pytest.mark.parametrize("photo", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_decode__bits_and_white_of_tiff_are_read_rightly_or_refused(
    tmp_path: Path, bits: int, photo: int
) -> None:
    values = _ramp(np.int64, 2**bits - 1)
    _tiff(tmp_path / "x.tif", values, bits, photo)
    expected = np.round(values * 255 / (2**bits - 1))
    if photo == 0:
        expected = 255 - expected
    try:
        image = _array(decode_image(tmp_path / "x.tif", 1))
    except BrokenImageError as error:
        assert "identify" in str(error)
        assert (bits, photo) in [(12, 0), (12, 1), (16, 0)]  # big-endian
    else:
        assert np.abs(image - expected).max() <= 1 - (bits < 9)


def test_decode__tiff_of_other_programs(tmp_path: Path) -> None:
    values = _ramp(np.uint16, 65535)
    expected = np.round(values / 257)
    path = tmp_path / "x.tif"
    for compression in (None, "zlib"):
        options: dict[str, Any] = {"compression": compression}
        tifffile.imwrite(path, values, photometric="miniswhite", **options)
        assert (_array(decode_image(path, 1)) == 255 - expected).all()
        for signed in (np.int8, np.int16):
            tifffile.imwrite(path, (values // 600).astype(signed), **options)
            with pytest.raises(BrokenImageError, match="signed"):
                decode_image(path)
        planes = np.stack([values] * 3)
        tifffile.imwrite(
            path, planes, photometric="rgb", planarconfig="separate", **options
        )
        try:
            image = _array(decode_image(path))
        except BrokenImageError as error:
            assert "plane of 16 bits" in str(error)
        else:
            assert np.abs(image - expected[..., None]).max() <= 1


def test_decode__12_bit_tiff(tmp_path: Path) -> None:
    # Little-endian, which PIL reads.
    values = _ramp(np.int64, 4095)
    _tiff(tmp_path / "big.tif", values, 12)
    content = (tmp_path / "big.tif").read_bytes()
    offset = struct.unpack(">I", content[4:8])[0]
    count = struct.unpack(">H", content[offset : offset + 2])[0]
    swapped = b"II*\0" + struct.pack("<I", offset) + content[8:offset]
    swapped += struct.pack("<H", count)
    for number in range(count):
        start = offset + 2 + 12 * number
        swapped += struct.pack(
            "<HHII", *struct.unpack(">HHII", content[start : start + 12])
        )
    (tmp_path / "x.tif").write_bytes(swapped + bytes(4))
    image = _array(decode_image(tmp_path / "x.tif", 1))
    assert np.abs(image - values * 255 / 4095).max() <= 0.5


def test_decode__damaged_tiff_header(tmp_path: Path) -> None:
    photo = Image.fromarray(_ramp(np.uint8, 255))
    photo.save(tmp_path / "x.tif", tiffinfo={270: "a long description of it" * 9})
    content = (tmp_path / "x.tif").read_bytes()
    with pytest.raises(BrokenImageError, match=r"x\.tif"):
        (tmp_path / "x.tif").write_bytes(content[:150])
        decode_image(tmp_path / "x.tif")


def _png(path: Path, bits: int, kind: int, row: bytes, transparent: bytes) -> None:
    """Writes a PNG file of one row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    width = len(row) * 8 // (bits * (3 if kind == 2 else 1))
    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    chunks = {
        b"IHDR": header,
        b"tRNS": transparent,
        b"IDAT": zlib.compress(b"\0" + row),
    }
    content = b"".join(chunk(name, value) for name, value in chunks.items())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("bits", "row", "transparent", "expected"),
    [
        (16, struct.pack(">4H", 0, 1000, 1001, 65535), 1000, [0, 255, 4, 255]),
        (8, bytes([0, 10, 11, 200]), 10, [0, 255, 11, 200]),
        (4, b"\x01\x2e", 2, [0, 17, 255, 238]),
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (1, b"\x50", 1, [0, 255, 0, 255, 0, 0, 0, 0]),
        (1, b"\x50", 0, [255] * 8),
    ],
)
def test_decode__transparent_grey_of_png(
    tmp_path: Path, bits: int, row: bytes, transparent: int, expected: list[int]
) -> None:
    _png(tmp_path / "x.png", bits, 0, row, struct.pack(">H", transparent))
    for in_chans in (1, 3):
        image = _array(decode_image(tmp_path / "x.png", in_chans)).reshape(1, -1, 1)
        assert image[0, ::in_chans, 0].tolist() == expected


def test_decode__transparent_colour_of_16_bits_is_refused(tmp_path: Path) -> None:
    colour = struct.pack(">3H", 256, 513, 770)
    _png(tmp_path / "x.png", 16, 2, colour * 2, colour)
    with pytest.raises(BrokenImageError, match="16 bits per colour.*alpha channel"):
        decode_image(tmp_path / "x.png")
    _png(
        tmp_path / "x.png", 8, 2, bytes([1, 2, 3, 1, 2, 4]), struct.pack(">3H", 1, 2, 3)
    )
    assert _array(decode_image(tmp_path / "x.png")).tolist() == [[[255] * 3, [1, 2, 4]]]


def test_decode__no_other_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a program is started")

    monkeypatch.setattr(subprocess, "Popen", start)
    for format in ("EPS", "PDF", "TGA", "ICO", "PCX"):
        for name in ("x.jpg", "x.png", "x.tif"):
            Image.new("RGB", (16, 16)).save(tmp_path / name, format)
            with pytest.raises(BrokenImageError, match="cannot identify its format"):
                decode_image(tmp_path / name)
