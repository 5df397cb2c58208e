from __future__ import annotations

from pathlib import Path

import pytest

from lightly_mim.files import atomic_write, expanded, is_same_place


def test_expanded__names_of_nobody() -> None:
    assert expanded("~") == Path.home()
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert not is_same_place("~nobody-of-this-name/x", "~")


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
