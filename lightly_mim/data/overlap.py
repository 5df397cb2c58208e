"""Finds test images that are training images: by another path, a link or a copy."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lightly_mim.data.notes import printable
from lightly_mim.data.opening import BrokenImageError, read_regular

# Test images that are looked at, and training images that are read for them.
MAX_TEST, MAX_READ = 2000, 20_000
_HEAD = 4096  # bytes that tell most files of one size apart


def overlap_notes(train: Sequence[Path], test: Sequence[Path]) -> list[str]:
    """Returns what a reader of results must know of images on both sides.

    Files are the same if they are one on the disk, or have the same bytes. Only those
    of equal size are read.

    Args:
        train:
            Files of the training images.
        test:
            Files of the test images.
    """
    looked = _spread(test, MAX_TEST)
    wanted = {found[2] for path in looked if (found := _identity(path))}
    by_size: dict[int, list[Path]] = {}
    identities = set()
    for path in train:
        found = _identity(path)
        if found and found[2] in wanted:
            identities.add(found)
            by_size.setdefault(found[2], []).append(path)
    alike = sum(map(len, by_size.values()))
    share = max(alike / MAX_READ, 1.0)
    contents = {
        size: _Contents(_spread(paths, max(int(len(paths) / share), 1)))
        for size, paths in by_size.items()
    }
    same = []
    for path in looked:
        found = _identity(path)
        if not found:
            continue
        if found in identities or (
            found[2] in contents and contents[found[2]].have(path)
        ):
            same.append(path)
    if not same:
        return []
    less = " that were looked at" if len(looked) < len(test) else ""
    return [
        f"{len(same)} of the {len(looked)} test images{less} are training images as "
        f"well, such as {printable(str(same[0]))}: the same files, or files with the "
        "same bytes. The results say too much."
    ]


class _Contents:
    """Files of one size, read as far as it takes to tell them from others."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._by_head: dict[str, list[Path]] | None = None
        self._hashes: dict[Path, str] = {}

    def have(self, path: Path) -> bool:
        """Returns whether one of them has the same bytes as a file."""
        if self._by_head is None:
            self._by_head = {}
            for each in self._paths:
                self._by_head.setdefault(_hash(each, _HEAD), []).append(each)
        near = self._by_head.get(_hash(path, _HEAD), [])
        return bool(near) and self._whole(path) in map(self._whole, near)

    def _whole(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = _hash(path, -1)
        return self._hashes[path]


def _hash(path: Path, count: int) -> str:
    """Returns a hash of the first bytes, of the path itself if it cannot be read."""
    with suppress(BrokenImageError):
        content = read_regular(str(path), "image", lambda file: file.read(count))
        return hashlib.sha256(content).hexdigest()
    return str(path)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Returns what a file is on the disk, and its size; None if it is no image."""
    try:
        found = path.stat()
    except OSError:  # for the evaluation to say
        return None
    if not (stat.S_ISREG(found.st_mode) and found.st_size):  # empty ones are all alike
        return None
    return found.st_dev, found.st_ino, found.st_size


def _spread(paths: Sequence[Path], count: int) -> Sequence[Path]:
    """Returns so many of the paths, from all over the list."""
    total = len(paths)
    count = min(count, total)
    return [paths[number * total // count] for number in range(count)]
