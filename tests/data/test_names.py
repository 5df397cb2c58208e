"""Files whose names are no UTF-8, or break lines."""

from __future__ import annotations

import os
import pickle
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from lightly_mim.data import BrokenImageError, ImageDataset, KeyedLoader
from lightly_mim.data.notes import by_reason, printable, some
from lightly_mim.transforms import SimMIMTransform

_NAMES = [
    b"na\xefve.png",  # Latin-1
    b"\xff\xfe.png",
    b"two\nlines.png",
    b"tab\tand \x1b[31mred.png",
    "grün 猫.png".encode(),
]

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="its file names are UTF-8"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(_NAMES):
        path = tmp_path / str(number % 2) / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(path)
    return tmp_path


def test_loader__reads_and_keeps_its_state(folder: Path) -> None:
    dataset = ImageDataset(folder, SimMIMTransform(32))
    loader = KeyedLoader(dataset, 5, num_workers=1)
    ((_, _, filenames),) = list(loader)
    assert sorted(filenames) == sorted(dataset.filenames)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    KeyedLoader(dataset, 5, num_workers=0).load_state_dict(state)
    others = ImageDataset(folder, SimMIMTransform(32))
    others.filenames[0] += "?"
    with pytest.raises(ValueError, match="filenames was"):
        KeyedLoader(others, 5, num_workers=0).load_state_dict(state)


def test_loader__hash_of_ordinary_names_is_as_before(tmp_path: Path) -> None:
    # Checkpoints hold it.
    for name in ("a.png", "ü.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    loader = KeyedLoader(ImageDataset(tmp_path, SimMIMTransform(32)), 2, num_workers=0)
    assert loader.state_dict()["filenames"] == 2122440731


def test_broken_files__are_named_in_one_line(folder: Path) -> None:
    for path in folder.glob("*/*"):
        path.write_bytes(b"")
        with pytest.raises(BrokenImageError) as caught:
            ImageDataset(folder)[ImageDataset(folder).paths.index(path)]
        str(caught.value).encode()
        assert str(caught.value).isprintable()
        assert caught.value.path == str(path)
        Image.new("RGB", (40, 40)).save(path)


def test_broken_files__are_reported_in_one_line(folder: Path) -> None:
    for path in list(folder.glob("*/*"))[:3]:
        path.write_bytes(b"no image")
    dataset = ImageDataset(folder, SimMIMTransform(32), on_error="skip")
    loader = KeyedLoader(dataset, 5, num_workers=0)
    list(loader)
    assert len(loader.unreadable) == 3
    for name, reason in loader.unreadable.items():
        assert (name + reason).isprintable()
        assert (name + reason).encode()
        assert name in reason


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain ü 猫.png", "plain ü 猫.png"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("na\udcefve", r"na\udcefve"),
        ("\ud800", r"\ud800"),
        ("\x1b[31m\u2028", r"\x1b[31m\u2028"),
    ],
)
def test_printable(name: str, shown: str) -> None:
    assert printable(name) == shown


@pytest.mark.parametrize(
    ("reasons", "lines"),
    [
        ({}, []),
        ({"a.png": "Cannot read /x/a.png: cut"}, ["1: Cannot read /x/a.png: cut"]),
        # The file and numbers make no other kind.
        (
            {f"{n}/a{n}.png": f"/x/{n}/a{n}.png: {n} of 9 bytes" for n in range(3)}
            | {"b": "b is empty"},
            ["3, such as: /x/0/a0.png: 0 of 9 bytes", "1: b is empty"],
        ),
        (
            {"a": "a is empty", "b c": "b c is empty", "d": "d is cut"},
            ["2, such as: a is empty", "1: d is cut"],
        ),
        (
            {letter: f"Reason {letter * 2}{letter}x" for letter in "abcdefg"}
            | {f"{n}.png": f"{n}.png: no picture" for n in range(100)},
            ["100, such as: 0.png: no picture"],
        ),
    ],
)
def test_by_reason(reasons: dict[str, str], lines: list[str]) -> None:
    assert by_reason(reasons)[: len(lines)] == lines
    assert len(by_reason(reasons)) <= 6
    counted = sum(int(re.match(r"\d+", line)[0]) for line in by_reason(reasons))  # type: ignore
    assert counted == len(reasons)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 1000])
def test_some(count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    more = f" and {count - 5} more" if count > 5 else ""
    assert some(names) == ", ".join(names[:5]) + more
