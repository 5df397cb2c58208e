from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lightly_mim.data import overlap
from lightly_mim.data.overlap import overlap_notes


def write(folder: Path, contents: list[bytes]) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


@pytest.fixture
def train(tmp_path: Path) -> list[Path]:
    """Files of which many have one size, and some one beginning."""
    contents = [b"%09d" % number * 999 for number in range(20)]
    contents += [b"x" * 9000 + b"%04d" % number for number in range(20)]
    return write(tmp_path / "train", contents)


def test_overlap_notes__none(train: list[Path], tmp_path: Path) -> None:
    contents = [b"%09d" % number * 999 for number in range(50, 60)]
    contents += [b"x" * 9000 + b"%04d" % number for number in range(50, 60)]
    test = write(tmp_path / "test", [*contents, b"other size", b""])
    assert overlap_notes(train, test) == []
    assert overlap_notes(train, [tmp_path / "missing.png", tmp_path]) == []


def test_overlap_notes__what_is_no_image(tmp_path: Path) -> None:
    train = write(tmp_path / "train", [b"", b"image"])
    test = write(tmp_path / "test", [b"", b"", b"other"])
    for folder in (train[0].parent, test[0].parent):
        os.mkfifo(folder / "pipe.png")
        (folder / "folder.png").mkdir()
    both = [[*paths, paths[0].parent / "pipe.png", paths[0].parent / "folder.png"]
            for paths in (train, test)]  # fmt: skip
    assert overlap_notes(*both) == []
    # An empty file that is one on the disk is an image of nobody's either.
    assert overlap_notes(train[:1], train[:1]) == []
    (note,) = overlap_notes(train, [*test, train[1]])
    assert note.startswith("1 of the 4")


@pytest.mark.parametrize(
    "how", ["folder", "link", "hard link", "folder's link", "copy"]
)
def test_overlap_notes__the_same_images(
    how: str, train: list[Path], tmp_path: Path
) -> None:
    test = write(tmp_path / "test", [b"another", b"x" * 9000 + b"abcd"])
    for number in (3, 33):
        path = tmp_path / "test" / f"copy{number}.png"
        if how == "folder":
            path = train[number].parent / ".." / "train" / train[number].name
        elif how == "folder's link":
            if not (tmp_path / "linked").exists():
                (tmp_path / "linked").symlink_to(train[0].parent)
            path = tmp_path / "linked" / train[number].name
        elif how == "link":
            path.symlink_to(train[number])
        elif how == "hard link":
            os.link(train[number], path)
        else:
            shutil.copyfile(train[number], path)
        test.append(path)
    (note,) = overlap_notes(train, test)
    assert note.startswith("2 of the 4 test images are training images as well, such")
    assert str(test[2]) in note


def test_overlap_notes__reads_some_of_many(
    train: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "MAX_TEST", 10)
    monkeypatch.setattr(overlap, "MAX_READ", 12)
    (note,) = overlap_notes(train, train)
    assert note.startswith("10 of the 10 test images that were looked at")
    copies = [Path(shutil.copyfile(p, tmp_path / p.name)) for p in train]
    read = []
    whole = overlap._hash

    def count(path: Path, number: int) -> str:
        read.append(path)
        return whole(path, number)

    monkeypatch.setattr(overlap, "_hash", count)
    overlap_notes(train, copies)
    assert len({path for path in read if path in train}) <= 12
