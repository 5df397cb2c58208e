"""Headers made by hand: lengths, offsets and sizes that lie, in small files.

Each is an error that names the file, soon and without the memory that it claims.
"""

from __future__ import annotations

import io
import json
import resource
import signal
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightly_mim.checkpoints import read_encoder, read_weights
from lightly_mim.data import BrokenImageError, decode_image
from lightly_mim.data.segmentation import read_mask
from lightly_mim.evaluation import load_encoder
from lightly_mim.methods import MAE

SECONDS, MEGABYTES = 20, 300
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Ends a test that takes too long, and fails one that takes too much memory."""

    def too_long(*_: Any) -> None:
        raise TimeoutError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES


def refused(file: Path) -> None:
    """Checks that every door names a file of weights that it refuses."""
    for door in (read_weights, read_encoder, load_encoder, MAE.from_pretrained):
        with pytest.raises(ValueError) as caught:
            door(file)
        assert file.name in str(caught.value)
        assert type(caught.value) is ValueError


# safetensors: eight bytes of length, JSON, data.


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> Any:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DATA = bytes(16)
SAFETENSORS = {
    "length of half of all": safetensors({"a": entry()}, DATA, 2**63),
    "length of all": safetensors({"a": entry()}, DATA, 2**64 - 1),
    "length beyond the file": safetensors({"a": entry()}, DATA, 1000),
    "length one too long": safetensors({"a": entry()}, b"", 9 + 64),
    "length too short": safetensors({"a": entry()}, DATA, 9),
    "length 1": safetensors({"a": entry()}, DATA, 1),
    "length 0": safetensors({"a": entry()}, DATA, 0),
    "no bytes of it": safetensors({"a": entry((2**40,), (0, 2**42))}),
    "offsets beyond": safetensors({"a": entry(offsets=(16, 32))}, DATA),
    "offsets of terabytes": safetensors({"a": entry((2**40,), (0, 2**42))}, DATA),
    "offsets backwards": safetensors({"a": entry(offsets=(16, 0))}, DATA),
    "offsets below zero": safetensors({"a": entry(offsets=(-16, 0))}, DATA),
    "offsets of other kinds": safetensors({"a": entry(offsets=("0", 16))}, DATA),
    "one offset": safetensors({"a": entry(offsets=(0,))}, DATA),
    "shape too large": safetensors({"a": entry((2**40,))}, DATA),
    "shape too small": safetensors({"a": entry((2,))}, DATA),
    "shape that overflows": safetensors({"a": entry((2**33, 2**33))}, DATA),
    "shape that overflows to what is there": safetensors(
        {"a": entry((2**62, 4, 4))}, DATA
    ),
    "shape below zero": safetensors({"a": entry((-4,))}, DATA),
    "overlapping": safetensors({"a": entry(), "b": entry()}, DATA),
    "a hole": safetensors({"a": entry(offsets=(16, 32))}, bytes(32)),
    "unknown type": safetensors({"a": entry(dtype="F1024")}, DATA),
    "type is a list": safetensors({"a": entry(dtype=[])}, DATA),
    "metadata that is no text": safetensors(
        {"__metadata__": {"lightly_mim": {}}, "a": entry()}, DATA
    ),
    "entry is a number": safetensors({"a": 3}, DATA),
    "header is a list": safetensors([entry()], DATA),
    "deep header": safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, DATA),
    "no end": safetensors(b"{" + b" " * 5_000_000, DATA),
    "name twice": safetensors(
        b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), DATA
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(name: str, tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    file.write_bytes(SAFETENSORS[name])
    refused(file)


# Zips, as torch.save writes: parts, a directory of them, the end.


def zipped(
    parts: dict[str, bytes],
    local: Callable[[dict[str, int]], None] = lambda _: None,
    central: Callable[[dict[str, int]], None] = lambda _: None,
    end: Callable[[dict[str, int]], None] = lambda _: None,
) -> bytes:
    """Writes a zip of unpacked parts; the functions change what is said of them."""
    out, directory = io.BytesIO(), io.BytesIO()
    for name, content in parts.items():
        said = {
            **{"flags": 0, "method": 0, "crc": zlib.crc32(content)},
            **{"packed": len(content), "size": len(content), "offset": out.tell()},
        }
        here = dict(said)
        local(here)
        head = struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 20, here["flags"], here["method"], 0, 33,
            here["crc"], here["packed"], here["size"], len(name), 0,
        )  # fmt: skip
        out.write(head + name.encode() + content)
        central(said)
        directory.write(struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, said["flags"],
            said["method"], 0, 33, said["crc"], said["packed"], said["size"],
            len(name), 0, 0, 0, 0, 0, said["offset"],
        ) + name.encode())  # fmt: skip
    about = {"count": len(parts), "size": directory.tell(), "offset": out.tell()}
    about["comment"] = 0
    end(about)
    tail = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, about["count"], about["count"],
        about["size"], about["offset"], about["comment"],
    )  # fmt: skip
    return out.getvalue() + directory.getvalue() + tail


def parts_of(value: Any) -> dict[str, bytes]:
    import zipfile

    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def change(**values: int) -> Callable[[dict[str, int]], None]:
    return lambda said: said.update(values)


def add(name: str, value: int) -> Callable[[dict[str, int]], None]:
    return lambda said: said.update({name: said[name] + value})


PATCHES = "patch_embed.proj.weight"
WEIGHTS = {PATCHES: torch.ones(8, 3, 4, 4)}
ZIPS: dict[str, dict[str, Any]] = {
    "sizes of gigabytes": {"central": change(packed=2**32 - 2, size=2**32 - 2)},
    "size larger": {"central": add("size", 1)},
    "size smaller": {"central": change(size=1, packed=1)},
    "offset beyond": {"central": change(offset=2**31)},
    "all at one offset": {"central": change(offset=0)},
    "offset in the middle": {"central": add("offset", 7)},
    "checksum of another": {"central": change(crc=1)},
    "packed": {"central": change(method=8)},
    "packed by an unknown method": {"central": change(method=99)},
    "encrypted": {"central": change(flags=1)},
    "zip64 without it": {"central": change(size=2**32 - 1, packed=2**32 - 1)},
    "more parts than there are": {"end": change(count=65535)},
    "no parts": {"end": change(count=0, size=0)},
    "directory beyond": {"end": change(offset=2**31)},
    "directory of gigabytes": {"end": change(size=2**31)},
    "directory at the start": {"end": change(offset=0)},
    "comment beyond": {"end": change(comment=65535)},
}


@pytest.mark.parametrize("name", ZIPS)
def test_zips(name: str, tmp_path: Path) -> None:
    file = tmp_path / "made.pth"
    parts = parts_of({"model": WEIGHTS})
    file.write_bytes(zipped(parts))
    (whole,) = torch.load(file)["model"].values()
    assert torch.equal(whole, torch.ones(8, 3, 4, 4))
    file.write_bytes(zipped(parts, **ZIPS[name]))
    refused(file)


def test_zips__parts_that_lack_or_are_others(tmp_path: Path) -> None:
    file, parts = tmp_path / "made.pth", parts_of({"model": WEIGHTS})
    pickle = next(name for name in parts if name.endswith("data.pkl"))
    data = next(name for name in parts if "/data/" in name)
    for made in (
        {n: c for n, c in parts.items() if n != pickle},
        {n: c for n, c in parts.items() if n != data},
        parts | {data: b""},
        parts | {data: parts[data][:100]},
        parts | {pickle: b""},
        parts | {pickle: parts[pickle][:40]},
        parts | {pickle: b"\x80\x02" + b"(" * 100_000},
        {"../../" + n: c for n, c in parts.items()},
        {},
    ):
        file.write_bytes(zipped(made))
        refused(file)


def big(*shape: int) -> torch.Tensor:
    """Claims terabytes and is four bytes."""
    return torch.zeros(1).expand(*shape)


EMPTY_SPARSE = torch.sparse_coo_tensor(
    torch.zeros(3, 0, dtype=torch.int64),
    torch.zeros(0),
    (2**20, 3, 2),
    check_invariants=True,
)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "tensors",
    [
        {PATCHES: big(2**20, 3, 16, 16)},
        {PATCHES: torch.ones(1).as_strided((2**17, 3, 4, 4), (0,) * 4)},
        {PATCHES: torch.ones(8, 3, 4, 4), "pos_embed": big(1, 2**40, 8)},
        {PATCHES: torch.empty(2**20, 3, 16, 16, device="meta")},
        {PATCHES: EMPTY_SPARSE},
        {f"blocks.{n}.mlp.fc1.weight": view for n, view in
         enumerate([torch.zeros(2**17).view(2**8, 2**9)] * 99)},
    ],
)  # fmt: skip
def test_tensors_that_claim_more_than_is_there(
    tensors: dict[str, torch.Tensor], legacy: bool, tmp_path: Path
) -> None:
    state = {f"blocks.0.{n}": big(2**16, 2**16) for n in ("attn.qkv.weight",)}
    shared = {"cls_token": torch.ones(1, 1, 8), **state, **tensors}
    file = tmp_path / "made.pth"
    torch.save({"model": shared}, file, _use_new_zipfile_serialization=not legacy)
    refused(file)
    said = json.dumps({"name": "vit_tiny_patch16_224"})
    state = {f"method.encoder.vit.{name}": tensor for name, tensor in shared.items()}
    torch.save({"state_dict": state, "encoder": said}, file)
    refused(file)


# npy: a magic, two bytes of version, the length of a header that is a literal.


def npy(
    header: str, data: bytes = b"", version: int = 1, length: int | None = None
) -> bytes:
    text = header.encode()
    count = len(text) if length is None else length
    size = struct.pack("<H" if version == 1 else "<I", count)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def literal(shape: Any = (5, 8, 8), descr: Any = "|u1", order: Any = False) -> str:
    return repr({"descr": descr, "fortran_order": order, "shape": shape})


PIXELS = bytes(5 * 8 * 8)
NPY = {
    "terabytes": npy(literal((5, 2**20, 2**20)), PIXELS),
    "that overflows": npy(literal((5, 2**32, 2**32)), PIXELS),
    "one row more": npy(literal((5, 9, 8)), PIXELS),
    "below zero": npy(literal((5, -8, 8)), PIXELS),
    "two below zero": npy(literal((5, -8, -8)), PIXELS),
    "no pixels": npy(literal((5, 0, 8))),
    "of fractions": npy(literal((5, 8.0, 8)), PIXELS),
    "of words": npy(literal("abc"), PIXELS),
    "shape is a number": npy(literal(320), PIXELS),
    "objects": npy(literal((5,), "|O"), b"\x80\x04N."),
    "records": npy(literal((5, 8, 8), [("a", "|u1", (2**40,))]), PIXELS),
    "wide": npy(literal((5, 8, 8), "|V1099511627776"), PIXELS),
    "of floats": npy(literal(descr="<f8"), PIXELS * 8),
    "order is a word": npy(literal(order="x"), PIXELS),
    "code": npy("__import__('os').system('touch it-ran')", PIXELS),
    "no literal": npy("{'descr': open('x')}", PIXELS),
    "deep": npy("(" * 60_000, PIXELS),
    "more keys": npy(literal()[:-1] + ", 'more': 1}", PIXELS),
    "a key less": npy("{'descr': '|u1', 'shape': (5, 8, 8)}", PIXELS),
    "length beyond": npy(literal(), PIXELS, length=65535),
    "length of gigabytes": npy(literal(), PIXELS, version=2, length=2**32 - 1),
    "version of tomorrow": npy(literal(), PIXELS, version=9),
    "no header": b"\x93NUMPY\x01\x00",
}


@pytest.mark.parametrize("name", NPY)
def test_npy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "made.npy"
    file.write_bytes(npy(literal(), PIXELS))
    assert torch.equal(torch.as_tensor(decode_image(file, 5)), torch.zeros(5, 8, 8))
    file.write_bytes(NPY[name])
    with pytest.raises(BrokenImageError, match=r"made\.npy"):
        decode_image(file, 5)
    assert not Path("it-ran").exists()


# Pictures.


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, data: bytes = b"",
        before: bytes = b"", interlaced: int = 0) -> bytes:  # fmt: skip
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    chunks = chunk(b"IHDR", head) + before + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", size) + kind + data + checksum


def jpeg(width: int, height: int, parts: int = 1) -> bytes:
    """A small photograph that claims another size or number of colours."""
    file = io.BytesIO()
    Image.new("L", (16, 16), 99).save(file, "JPEG")
    content = bytearray(file.getvalue())
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 5] = struct.pack(">HHB", height, width, parts)
    return bytes(content)


def tiff(
    tags: dict[int, tuple[int, int, int]], next_page: int = 0, data: int = 64
) -> bytes:
    """A directory of (type, count, value or offset) behind a header of 8 bytes."""
    entries = b"".join(
        struct.pack("<HHII", tag, *said) for tag, said in sorted(tags.items())
    )
    head = b"II*\x00" + struct.pack("<IH", 8, len(tags))
    return head + entries + struct.pack("<I", next_page) + bytes(data)


SHORT, LONG = 3, 4
STRIP = 8 + 2 + 9 * 12 + 4
GREY = {
    **{256: (LONG, 1, 8), 257: (LONG, 1, 8), 258: (SHORT, 1, 8), 259: (SHORT, 1, 1)},
    **{262: (SHORT, 1, 1), 273: (LONG, 1, STRIP), 277: (SHORT, 1, 1)},
    **{278: (LONG, 1, 8), 279: (LONG, 1, 64)},
}


def sides(pixels: int) -> dict[int, tuple[int, int, int]]:
    return dict.fromkeys((256, 257), (LONG, 1, pixels))


PACKED = b"x\0\0" + zlib.compress(bytes(10**8))
PICTURES = {
    "png of all": png(2**31 - 1, 2**31 - 1, data=bytes(9)),
    "png of 4 gigapixels": png(65_000, 65_000, data=bytes(9)),
    "png of 100 megapixels": png(10_000, 10_000, colour=2, data=bytes(9)),
    "png of one row": png(2**31 - 1, 1, data=bytes(9)),
    "png of 16 bits": png(20_000, 8_000, bits=16, colour=6, data=bytes(9)),
    "png without width": png(0, 8, data=bytes(9)),
    "png beyond numbers": png(2**32 - 1, 8, data=bytes(9)),
    "png of 3 bits": png(8, 8, bits=3, data=bytes(72)),
    "png of no colour": png(8, 8, colour=5, data=bytes(72)),
    "png half there": png(8, 8, data=bytes(30)),
    "png of a long part": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13), 2**31),
    "png interlaced": png(60_000, 60_000, interlaced=1, data=bytes(9)),
    "png with a profile that unpacks": png(
        8, 8, data=bytes(30), before=chunk(b"iCCP", PACKED)
    ),
    "png with a text that unpacks": png(
        8, 8, data=bytes(30), before=chunk(b"zTXt", PACKED)
    ),
    "jpeg of all": jpeg(65_535, 65_535),
    "jpeg without height": jpeg(16, 0),
    "jpeg without width": jpeg(0, 16),
    "jpeg of 255 colours": jpeg(16, 16, 255),
    "jpeg taller": jpeg(16, 4096),
    "jpeg of a part": b"\xff\xd8\xff\xe0\xff\xff" + bytes(99),
    "jpeg of nothing": b"\xff\xd8\xff\xd9",
    "tiff of all": tiff(GREY | sides(2**32 - 1)),
    "tiff of 4 gigapixels": tiff(GREY | sides(65_000)),
    "tiff without width": tiff({k: v for k, v in GREY.items() if k != 256}),
    "tiff of no height": tiff(GREY | {257: (LONG, 1, 0)}),
    "tiff beyond its file": tiff(GREY | {273: (LONG, 1, 2**31)}),
    "tiff of long strips": tiff(GREY | {279: (LONG, 1, 2**32 - 1)}, data=8),
    "tiff of many strips": tiff(GREY | {273: (LONG, 2**30, 8), 279: (LONG, 2**30, 8)}),
    "tiff of many bits": tiff(GREY | {258: (SHORT, 2**30, 8)}),
    "tiff of many samples": tiff(GREY | {277: (SHORT, 1, 65_535)}),
    "tiff packed": tiff(GREY | {259: (SHORT, 1, 8)} | sides(60_000)),
    "tiff of no directory": b"II*\x00" + struct.pack("<I", 2**31),
    "tiff whose directory is its header": b"II*\x00" + struct.pack("<I", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, tmp_path: Path) -> None:
    kind = name.split()[0]
    file = tmp_path / f"made.{kind}"
    file.write_bytes(PICTURES[name])
    with pytest.raises(BrokenImageError, match=rf"made\.{kind}"):
        decode_image(file)
    with pytest.raises(BrokenImageError, match=rf"made\.{kind}"):
        read_mask(file)


def test_pictures__whole_ones_are_read(tmp_path: Path) -> None:
    for name, content in {
        "a.png": png(8, 8, data=bytes(72)),
        "a.jpg": jpeg(16, 16),
        "a.tif": tiff(GREY),
        # The next page of a TIFF is itself: only the first is read.
        "b.tif": tiff(GREY, next_page=8),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert np.asarray(decode_image(tmp_path / name, 1)).shape in ((8, 8), (16, 16))
