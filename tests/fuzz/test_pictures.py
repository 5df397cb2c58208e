"""Damaged and hostile pictures: an error that names the file, or its pixels.

Bits are flipped, pieces cut out, zeroed, repeated and swapped, of pictures in every
format and mode that PIL writes. PNG carries checksums: what is read of it is what was
written. Of the others is counted what no decoder notices.
"""

from __future__ import annotations

import collections
import io
import random
import resource
import signal
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from lightly_mim.data import BrokenImageError, ImageDataset, KeyedLoader, decode_image
from lightly_mim.transforms import EvalTransform

SECONDS = 10  # for one picture
MEGABYTES = 600  # for all of them
COPIES = 22
SEEDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("RGB", "jpg", {"quality": 90}),
    "jpeg grey": ("L", "jpg", {"quality": 70}),
    "jpeg progressive": ("RGB", "jpg", {"progressive": True}),
    "jpeg cmyk": ("CMYK", "jpg", {}),
    "jpeg restarts": ("RGB", "jpg", {"restart_marker_rows": 1}),
    "png": ("RGB", "png", {}),
    "png grey": ("L", "png", {}),
    "png alpha": ("RGBA", "png", {}),
    "png palette": ("P", "png", {"transparency": 3}),
    "png 1": ("1", "png", {}),
    "png 16": ("I;16", "png", {}),
    "webp": ("RGB", "webp", {}),
    "webp lossless": ("RGBA", "webp", {"lossless": True}),
    "tiff": ("RGB", "tif", {}),
    "tiff lzw": ("RGB", "tif", {"compression": "tiff_lzw"}),
    "tiff zip": ("L", "tif", {"compression": "tiff_adobe_deflate"}),
    "tiff jpeg": ("RGB", "tif", {"compression": "jpeg"}),
    "tiff 16": ("I;16", "tif", {}),
    "bmp": ("RGB", "bmp", {}),
    "bmp palette": ("P", "bmp", {}),
    "gif": ("P", "gif", {}),
    "pgm": ("L", "pgm", {}),
    "ppm": ("RGB", "ppm", {}),
    "jp2": ("RGB", "jp2", {}),
    "avif": ("RGB", "avif", {}),
}
WITH_CHECKSUM = [name for name in SEEDS if name.startswith("png")]
NEEDS = {"webp": "webp", "jp2": "jpg_2000", "avif": "avif"}


def draw(mode: str) -> Image.Image:
    rows, columns = np.mgrid[:40, :48]
    noise = np.random.default_rng(0).integers(0, 60, (40, 48, 3))
    pixels = np.stack([rows * 4, columns * 3, rows + columns], axis=-1) + noise
    if mode == "I;16":
        return Image.fromarray((pixels[..., 0] * 250).astype(np.uint16))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def damage(content: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Returns what was done to a file, and what has become of it."""
    data = bytearray(content)
    start = rng.randrange(len(data))
    length = rng.choice([1, 4, 16, len(data) // 8])
    how = rng.choice(["bit", "bits", "header", "cut", "hole", "zeros", "twice", "mix"])
    if how in ("bit", "bits"):
        for _ in range(1 if how == "bit" else rng.randint(2, 30)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "header":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    elif how == "cut":
        del data[start:]
    elif how == "hole":
        del data[start : start + length]
    elif how == "zeros":
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif how == "twice":
        data[start:start] = data[start : start + length]
    else:
        data[start:] = other[start:]
    return how, bytes(data)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of damaged pictures, and what the whole ones look like."""
    root = tmp_path_factory.mktemp("broken")
    rng = random.Random(14)
    contents, whole = {}, {}
    for name, (mode, ending, options) in SEEDS.items():
        if ending in NEEDS and not features.check(NEEDS[ending]):
            continue
        path = root / "whole" / f"{name}.{ending}"
        path.parent.mkdir(exist_ok=True)
        file = io.BytesIO()
        written = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM", "jp2": "JPEG2000"}
        draw(mode).save(file, written.get(ending, ending.upper()), **options)
        contents[name] = file.getvalue()
        path.write_bytes(contents[name])
        whole[name] = np.asarray(decode_image(path))
    (root / "damaged").mkdir()
    for name, content in contents.items():
        ending = SEEDS[name][1]
        for number in range(COPIES):
            how, data = damage(content, rng.choice([*contents.values()]), rng)
            if data != content:
                (root / "damaged" / f"{name}_{number}_{how}.{ending}").write_bytes(data)
    return root, whole


def _too_long(_: int, __: FrameType | None) -> None:
    raise TimeoutError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pictures(broken: tuple[Path, dict[str, Any]]) -> None:
    root, whole = broken
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: collections.Counter[str] = collections.Counter()
    otherwise: collections.Counter[str] = collections.Counter()
    wrong, refused = [], set()
    signal.signal(signal.SIGALRM, _too_long)
    for path in sorted((root / "damaged").iterdir()):
        name = path.name.split("_")[0]
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = np.asarray(decode_image(path))
        except BrokenImageError as error:
            counts["refused"] += 1
            refused.add(path.name)
            if path.name not in str(error):
                wrong.append(f"{path.name}: the message does not name it: {error}")
            continue
        except BaseException as error:
            wrong.append(f"{path.name}: raw {error!r}")
            continue
        finally:
            signal.alarm(0)
        same = np.array_equal(pixels, whole[name])
        counts["read as it was" if same else "read otherwise"] += 1
        otherwise[name] += not same
        if not same and name in WITH_CHECKSUM:
            wrong.append(f"{path.name}: read wrongly in silence")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{sum(counts.values())} damaged pictures: {dict(counts)}, {grown:.0f} MB")
    print(f"Read otherwise: {dict(+otherwise)}")
    assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong])
    assert sum(counts.values()) >= 500 and grown < MEGABYTES

    # A run goes past the same ones.
    images = ImageDataset(
        root, EvalTransform(16, normalize=None), on_error="skip", min_size=1
    )
    loader = KeyedLoader(images, 32, training=False, num_workers=0)
    assert sum(len(labels) for _, labels, _ in loader) == len(images)
    assert {Path(file).name for file in loader.unreadable} == refused
