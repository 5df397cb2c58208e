from __future__ import annotations

from pathlib import Path

import pytest

import lightly_mim
from lightly_mim.evaluation import evaluate_dense
from lightly_mim.evaluation.loading import load_encoder
from lightly_mim.files import atomic_write, expand_user


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("~/photos", "HOME/photos"),
        (Path("~/photos"), Path("HOME/photos")),
        ("~", "HOME"),
        ("imagenette", "imagenette"),
        ("a/~/b", "a/~/b"),
        ("~nobody-has-this-name/x", "~nobody-has-this-name/x"),
        (None, None),
        ([1, 2], [1, 2]),
    ],
)
def test_expand_user(
    given: object, read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    @expand_user("data")
    def function(data: object, other: object = "~/x") -> tuple[object, object]:
        return data, other

    if isinstance(read, str | Path):
        read = type(read)(str(read).replace("HOME", str(tmp_path)))
    assert function(given) == function(data=given) == (read, "~/x")


def test_expand_user__at_every_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    for function in (lightly_mim.evaluate, evaluate_dense):
        with pytest.raises(ValueError, match=f"{tmp_path}/file is a file"):
            function("vit_tiny_patch16_224", "~/x", out="~/file")
    with pytest.raises(ValueError, match=f"{tmp_path}/x"):
        load_encoder("~/x")


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o444


def test_atomic_write__failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
