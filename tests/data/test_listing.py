from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightly_mim.data.decode import FORMATS, PICTURE_EXTENSIONS, decode_image
from lightly_mim.data.folder import ImageDataset
from lightly_mim.data.listing import find_images


def _write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


@pytest.mark.parametrize("extension", PICTURE_EXTENSIONS)
def test_formats__all_that_are_listed_are_read(tmp_path: Path, extension: str) -> None:
    name = next(name for name, endings in FORMATS.items() if extension in endings)
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    Image.fromarray(grey).convert("RGB").save(tmp_path / f"x{extension.upper()}", name)
    images: Any = ImageDataset(tmp_path)
    (image, _, filename), *others = images
    assert (filename, others) == (f"x{extension.upper()}", [])
    assert np.abs(np.asarray(image)[..., 0].astype(int) - grey).max() < 12


@pytest.mark.parametrize("extension", ["eps", "ps", "psd", "tga", "ico", "heic"])
def test_formats__others_are_neither_listed_nor_read(
    tmp_path: Path, extension: str
) -> None:
    assert f".{extension}" not in PICTURE_EXTENSIONS
    if extension in ("eps", "tga", "ico"):
        Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", extension)
        with pytest.raises(ValueError, match=r"x\.jpg: cannot identify"):
            decode_image(tmp_path / "x.jpg")


def test_left_out__is_counted_by_kind_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _write(tmp_path, "a/0.png", "a/1.PNG", "b/0.gif", "b/0.psd", "b/1.PSD", "n")
    assert len(find_images(root).filenames) == 3
    out = capsys.readouterr().out
    assert out == (
        f"{root}: 3 images; left out: 3 other files (2 x .psd, 1 x no ending).\n"
    )
    find_images(root)
    assert capsys.readouterr().out == ""
    find_images(_write(tmp_path / "b"), (".psd",))
    assert "2 images; left out: 1 other files (1 x .gif)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "folder",
    [
        "@eaDir",
        "a/@eaDir/x.jpg",
        ".thumbnails",
        "__MACOSX/a",
        "a/Thumbnails",
        "#recycle",
    ],
)
def test_system_folders__are_no_classes_and_no_images(
    tmp_path: Path, folder: str
) -> None:
    root = _write(tmp_path, "a/0.png", "b/0.png", "b/Thumbs.db", f"{folder}/0.png")
    images = find_images(root)
    assert images.classes == ["a", "b"]
    assert images.filenames == ["a/0.png", "b/0.png"]


@pytest.mark.parametrize(
    ("stray", "shown"),
    [
        (["cover.png"], "cover.png lies beside the folders a, b"),
        (["0.jpg", "1.gif"], "0.jpg, 1.gif lie beside"),
    ],
)
def test_stray_images__take_the_classes_away_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stray: list[str], shown: str
) -> None:
    images = find_images(_write(tmp_path, "a/0.png", "b/0.png", *stray))
    assert (images.classes, set(images.targets)) == ([], {0})
    assert shown in capsys.readouterr().out


def test_stray_images__of_one_folder_are_no_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_images(_write(tmp_path, "a/0.png", "1.png"))
    assert capsys.readouterr().out == ""


def test_linked_folders__do_not_multiply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{letter}/{letter}.png" for letter in "abcdefghij"]
    root = _write(tmp_path, *names)
    for folder in "abcdefghij":
        for other in "abcdefghij":
            (root / folder / f"to_{other}").symlink_to(root / other)
    images = find_images(root)
    assert images.filenames == names
    assert "link to a folder that is read already" in capsys.readouterr().out


def test_linked_folders__keep_the_name_of_the_real_one(tmp_path: Path) -> None:
    root = _write(tmp_path / "root", "z/0.png")
    _write(tmp_path / "out", "1.png", "deep/2.png")
    (root / "a").symlink_to(root / "z")
    (root / "y").symlink_to(tmp_path / "out")
    images = find_images(root)
    assert images.filenames == ["y/1.png", "y/deep/2.png", "z/0.png"]
    assert images.classes == ["y", "z"]


def test_no_files__are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _write(tmp_path, "a/0.png")
    os.mkfifo(root / "a" / "fifo.png")
    (root / "a" / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(root / "s.png"))
    (root / "loop.png").symlink_to(root / "loop.png")
    assert find_images(root).filenames == ["a/0.png", "loop.png"]
    assert "3 x FIFO, socket or device" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"Cannot read the image: .*loop\.png"):
        ImageDataset(root)[1]


def test_unreadable_folder__is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(ValueError, match="Cannot look for images in .*denied"):
        find_images(tmp_path)
