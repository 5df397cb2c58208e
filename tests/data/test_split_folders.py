from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightly_mim.data import sources
from lightly_mim.data.segmentation import open_segmentation

# Two data sets of any kind.
open_data: Callable[..., tuple[Any, Any]] = sources.open_data


def _write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(root / name)
    return root


def _split(train: str, val: str, root: str = "") -> list[str]:
    return [f"{root}{split}/{name}/0.png" for split in (train, val) for name in "ab"]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Val"),
        ("training", "validation"),
        ("TRAIN", "valid"),
        ("train_images", "val_images"),
        ("train2017", "val2017"),
        ("training_set", "dev_set"),
        ("Training Data", "Validation Data"),
    ],
)
def test_find__spellings(tmp_path: Path, train: str, val: str) -> None:
    first, second = open_data(_write(tmp_path, *_split(train, val)))
    assert (first.root, second.root) == (tmp_path / train, tmp_path / val)
    assert first.classes == second.classes == ["a", "b"]


def test_find__train_alone(tmp_path: Path) -> None:
    first, second = open_data(_write(tmp_path, "Training/a/0.png", "@eaDir/x.png"))
    assert (first.root, second) == (tmp_path / "Training", None)


@pytest.mark.parametrize(
    ("names", "root", "classes"),
    [
        (_split("train", "val", "photos/"), "photos/train", ["a", "b"]),
        (_split("Training", "Valid", "x/"), "x/Training", ["a", "b"]),
        (["x/train/a/0.png"], "x/train", ["a"]),
        (["flower_photos/rose/0.png", "flower_photos/tulip/0.png"], "flower_photos", 2),
    ],
)
def test_find__one_wrapper_is_looked_through(
    tmp_path: Path,
    names: Any,
    root: str,
    classes: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, _ = open_data(_write(tmp_path, *names))
    assert train.root == tmp_path / root
    assert train.classes == (["rose", "tulip"] if classes == 2 else classes)
    wrapper = names[0].split("/")[0]
    assert f"{tmp_path} holds nothing but {wrapper}" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["a/0.png"], ["a/0.png", "a/x/0.png", "a/y/0.png"]])
def test_find__one_class_is_no_wrapper(
    tmp_path: Path, names: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_data(_write(tmp_path, *names))[0].root == tmp_path
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/0.png", "Train/0.png", "val/0.png"], "folders Train, train, val"),
        (["train/0.png", "testing/0.png"], "folders testing, train"),
        (["validation/0.png"], "folders validation"),
        (["photos_train/0.png", "photos_val/0.png"], "photos_train, photos_val"),
        (["test-cats/0.png", "train-cats/0.png"], "test-cats, train-cats"),
        (["fold1/0.png", "fold2/0.png", "x/0.png"], "fold1, fold2, x"),
        ([*_split("train", "val", "photos/"), "b/0.png"], "photos holds train, val"),
        (["cat/Train/0.png", "cat/Test/0.png", "dog/0.png"], "cat holds Test, Train"),
        (["a/b/training/0.png", "a/b/dev/0.png", "c/0.png"], "a/b holds dev, training"),
    ],
)
def test_find__what_looks_like_a_split_is_used_or_refused(
    tmp_path: Path, names: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*ImageDataset"):
        open_data(_write(tmp_path, *names))


@pytest.mark.parametrize(
    "names",
    [
        ("train_station/0.png", "test_tube/0.png"),
        ("2017/0.png", "2018/0.png"),
        ("evaluate me/0.png", "valley/0.png"),
        ("cat/test/0.png", "cat/other/0.png", "dog/0.png"),
    ],
)
def test_find__classes_that_are_no_splits(tmp_path: Path, names: Any) -> None:
    train, val = open_data(_write(tmp_path, *names))
    assert train.root == tmp_path
    assert val is None
    assert len(train.classes) == 2


def test_find__what_is_not_used_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_data(_write(tmp_path, *_split("train", "val"), "test/0.png", "more/0.png"))
    assert "not used: more, test." in capsys.readouterr().out
    open_data(tmp_path)
    assert capsys.readouterr().out == ""  # once


def test_find__validation_images(tmp_path: Path) -> None:
    root = _write(tmp_path, *_split("Train", "Val", "x/"), "y/a/0.png", "z/val/a/0.png")
    _, val = open_data(root / "y", root / "z")
    assert val.root == root / "z" / "val"
    with pytest.raises(ValueError, match='Give val=".*x/Val"'):
        open_data(root / "y", root / "x")


def test_find__segmentation(tmp_path: Path) -> None:
    for split in ("Training", "Validation"):
        _write(tmp_path / split, "images/0.png", "masks/0.png")
    train, val, held_out = open_segmentation(tmp_path)
    assert (train.root.name, val.root.name, held_out) == (
        "Training",
        "Validation",
        False,
    )
