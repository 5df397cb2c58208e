from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

from lightly_mim.data.decode import BrokenImageError, decode_image
from lightly_mim.transforms import EvalTransform


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])  # 640 x 427


def _array(image) -> np.ndarray:
    return np.asarray(image).astype(int)


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
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "I"
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
    with pytest.raises(BrokenImageError, match=r"z\.npy.*pickle"):
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
    with pytest.raises(ValueError, match="in_chans must be 1 or more, got 0"):
        decode_image(tmp_path / "x.png", 0)


def test_broken_image_error__travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BrokenImageError("message", "x.jpg")))
    assert (str(error), error.path) == ("message", "x.jpg")
    assert BrokenImageError("message").path is None
