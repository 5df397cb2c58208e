"""Features on disk: every row is written once, to its place in the final file.

CACHE/<hash of the key>/    one encoder on one set of images
    key.json                everything that the features depend on
    images.json             labels and names of the images
    layer11-mean.npy        one file per layer and pooling, float16 or float32
    layer11-mean.json       its size and time, checksums, and how long it took
    shards/                 what of a pass that is not finished is done

In half precision a ViT-B/16's pooled features of ImageNet's 1.28 million training
images take 2 GB, and its patch tokens 386 GB (196 tokens of 768 numbers). Whether there
is room is looked at before a pass begins.

A shard is every n-th image, 1,024 at most. A pass that was cut goes on at the first
shard that is missing. Whether a file is whole is told by its size and time, and by its
checksums where these have changed, and whenever it is read for an evaluation; one that
is not is made again. Several processes may share a directory: all of them write the
same, to the same places.

Features are kept in half precision if that changes no column by more than 1/256 of its
own spread (root mean square of the rounding over standard deviation), as the images of
the first shard have it. That holds for nearly all encoders; else in float32, as when a
value lies outside float16's range or when all images have nearly the same feature.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightly_mim.arguments import PositiveInt, checked
from lightly_mim.evaluation.features import (
    Features,
    Key,
)
from lightly_mim.evaluation.fingerprints import hash_key
from lightly_mim.files import atomic_write, read_sealed, sealed

# Counts up when the same weights and images give other features than before.
FEATURES_VERSION = 2
SHARD_SIZE = 1024  # images; 1.5 MB of a ViT-B's pooled features, 300 MB of its tokens

_TOLERANCE = 1 / 256  # rounding over spread; a probe does not see less than that
_NO_SPREAD = 1e-6  # deviation over mean that is float32's own rounding
_AGAIN = "It is made again."


@checked
class FeatureStore:
    """The directory of one encoder's features of one set of images.

    Its methods raise an OSError if they cannot write there.

    Attributes:
        path:
            The directory, named by the hash of the key.
        key:
            Everything that the features depend on. Can be written as JSON.
        num_images:
            Number of images.
        num_shards:
            Number of shards.
    """

    def __init__(
        self,
        root: Path | str,
        key: Mapping[str, Any],
        num_images: PositiveInt,
        shard_size: PositiveInt = SHARD_SIZE,
    ) -> None:
        self.key = dict(key)
        self.path = Path(root) / hash_key(self.key)
        self.num_images = num_images
        self.num_shards = -(-num_images // shard_size)

    def shard(self, number: int) -> range:
        """Returns the numbers of the images of a shard: a sample of all of them."""
        return range(number, self.num_images, self.num_shards)

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Returns the keys whose file is not there or not whole, by a look at it."""
        if self._read_images() is None:
            return list(keys)
        return [key for key in keys if self._look(key) is None]

    def missing_in_shard(self, number: int, keys: Sequence[Key]) -> list[Key]:
        """Returns the keys whose rows of a shard have not been written."""
        written = {name for said in self._journals(number) for name in said["crc32"]}
        return [
            key
            for key in keys
            if key_name(key) not in written or not self.file(key).exists()
        ]

    def forget(self, key: Key) -> None:
        """Removes what there is of a feature, to make it again."""
        for number in range(self.num_shards):
            for path in self._journal_files(number):
                if key_name(key) in self._journal(path)["crc32"]:
                    path.unlink(missing_ok=True)
        self._sidecar(key).unlink(missing_ok=True)
        self.file(key).unlink(missing_ok=True)

    def write_shard(self, number: int, features: Features) -> None:
        """Writes features, labels and names of a shard's images to their places."""
        self._write_key()
        rows = self.shard(number)
        checksums = {}
        for key, values in features.values.items():
            shape = (self.num_images, *values.shape[1:])
            array = self._layout(key)
            if array is None or array.shape != shape:
                self.forget(key)
                self._create(key, shape, _sufficient_dtype(values))
                array = self._layout(key)
                assert array is not None
            stored = values.to(getattr(torch, array.dtype.name)).numpy()
            if not np.isfinite(stored).all():  # the first shard had no such values
                self.forget(key)
                self._create(key, shape, "float32")
                stored = values.numpy()
            checksums[key_name(key)] = zlib.crc32(_bytes(stored))
            _write_rows(self.file(key), rows, stored)
        said = {
            "crc32": checksums,
            "labels": features.labels.tolist(),
            "filenames": features.filenames,
            "seconds": features.seconds,
        }
        names = hash_key({"keys": sorted(checksums)})[:8]
        with atomic_write(self._shards / f"{number:06d}-{names}.json") as temporary:
            temporary.write_text(json.dumps(sealed(said)) + "\n")

    def finish(self, keys: Sequence[Key]) -> None:
        """Says of each key whose shards are all there that its file is whole."""
        shards = [self._journals(number) for number in range(self.num_shards)]
        if self._read_images() is None and all(shards):
            self._finish_images([said[0] for said in shards])
        for key in self.missing(keys):
            name = key_name(key)
            holding = [
                next((said for said in each if name in said["crc32"]), None)
                for each in shards
            ]
            if all(holding) and self.file(key).exists():
                self._finish_key(key, [said for said in holding if said])
        for number in range(self.num_shards):
            for path in self._journal_files(number):
                # Others are of a pass with other layers, which was cut or is under way.
                written = self._journal(path)["crc32"]
                if all((self.path / f"{name}.json").exists() for name in written):
                    path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or removed by another process
            self._shards.rmdir()

    def read(self, keys: Sequence[Key], verify: bool = True) -> Features | None:
        """Opens the features as memory maps.

        Args:
            keys:
                The (layer, pooling) of each feature.
            verify:
                Whether to compare the checksums. A file that is damaged is removed.

        Returns:
            The features, float16 or float32, or None if a file is not there or not
            whole.
        """
        images = self._read_images()
        values: dict[Key, Tensor] = {}
        passes: dict[str, float] = {}
        for key in keys:
            said, array = self._look(key), self._layout(key)
            if said is None or array is None:
                continue
            if verify and not self._is_whole(array, said):
                self.forget(key)
                continue
            values[key] = torch.from_numpy(array)
            passes |= said["passes"]
        if images is None or len(values) < len(keys):
            return None
        labels = torch.tensor(images["labels"], dtype=torch.int64)
        return Features(values, labels, list(images["filenames"]), sum(passes.values()))

    def file(self, key: Key) -> Path:
        """Returns where a feature is kept, NumPy's `.npy`."""
        return self.path / f"{key_name(key)}.npy"

    def bytes_to_write(self, key: Key, shape: tuple[int, ...]) -> int:
        """Returns how much there is to write of a feature with this shape per image.

        In half precision if it is not known.
        """
        array = self._layout(key)
        size = 2 if array is None else array.dtype.itemsize
        left = [
            len(self.shard(number))
            for number in range(self.num_shards)
            if self.missing_in_shard(number, [key])
        ]
        return sum(left) * math.prod(shape) * size

    def _look(self, key: Key) -> dict[str, Any] | None:
        """Returns what is said of a file that is as it was written."""
        try:
            said = read_sealed(self._sidecar(key), _AGAIN)
            stat = self.file(key).stat()
            if (said["size"], said["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
                return said
            if not self._is_whole(self._layout(key), said):
                return None
            with suppress(OSError):  # it was copied, and can perhaps not be written
                self._say(key, said)
            return said
        except (OSError, ValueError, KeyError):
            return None

    def _layout(self, key: Key) -> Any:
        """Returns the memory map of a file, None if there is none, or part of one."""
        try:
            # Copy on write: torch wants memory that it may write to.
            array = np.lib.format.open_memmap(self.file(key), mode="c")
        except Exception:  # NumPy's own depend on where the damage is
            return None
        fits = array.dtype in (np.float16, np.float32) and array.flags.c_contiguous
        return array if fits and array.shape[:1] == (self.num_images,) else None

    def _is_whole(self, array: Any, said: Mapping[str, Any]) -> bool:
        """Returns whether a file holds what was said when it was written."""
        if array is None or _described(array) != (said["shape"], said["dtype"]):
            return False
        shards = map(self.shard, range(self.num_shards))
        found = [zlib.crc32(_bytes(array[rows.start :: rows.step])) for rows in shards]
        return bool(found == said["crc32"])

    def _create(self, key: Key, shape: tuple[int, ...], dtype: str) -> None:
        """Makes a file of zeros, which take no room yet, unless one is there."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        check_room(self.path, size)
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        with suppress(FileExistsError), self.file(key).open("xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + size)

    def _finish_key(self, key: Key, journals: Sequence[Mapping[str, Any]]) -> None:
        passes: dict[str, float] = {}
        for said in journals:
            names = ",".join(sorted(said["crc32"]))
            passes[names] = passes.get(names, 0.0) + said["seconds"]
        crc32 = [said["crc32"][key_name(key)] for said in journals]
        self._say(key, {"crc32": crc32, "passes": passes})

    def _say(self, key: Key, said: Mapping[str, Any]) -> None:
        shape, dtype = _described(self._layout(key))
        stat = self.file(key).stat()
        said = {**said, "shape": shape, "dtype": dtype}
        said |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        with atomic_write(self._sidecar(key)) as temporary:
            temporary.write_text(json.dumps(sealed(said), indent=2) + "\n")

    def _finish_images(self, journals: Sequence[Mapping[str, Any]]) -> None:
        images: dict[str, list[Any]] = {}
        for what in ("labels", "filenames"):
            images[what] = [None] * self.num_images
            for number, said in enumerate(journals):
                rows = self.shard(number)
                if len(said[what]) == len(rows):
                    images[what][number :: rows.step] = said[what]
                else:  # images without names
                    images[what] = []
        with atomic_write(self.path / "images.json") as temporary:
            temporary.write_text(json.dumps(sealed(images)) + "\n")

    def _read_images(self) -> dict[str, Any] | None:
        try:
            said = read_sealed(self.path / "images.json", _AGAIN)
        except (OSError, ValueError):
            return None
        return said if len(said.get("labels", ())) == self.num_images else None

    @property
    def _shards(self) -> Path:
        return self.path / "shards"

    def _journal_files(self, number: int) -> list[Path]:
        return sorted(self._shards.glob(f"{number:06d}-*.json"))

    def _journals(self, number: int) -> list[dict[str, Any]]:
        found = [self._journal(path) for path in self._journal_files(number)]
        return [said for said in found if said["crc32"]]

    def _journal(self, path: Path) -> dict[str, Any]:
        try:
            return read_sealed(path, _AGAIN)
        except (OSError, ValueError):  # damaged, or removed by another process
            path.unlink(missing_ok=True)
            return {"crc32": {}}

    def _write_key(self) -> None:
        file = self.path / "key.json"
        if not file.exists():
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(self.key, indent=2) + "\n")

    def _sidecar(self, key: Key) -> Path:
        return self.path / f"{key_name(key)}.json"


def check_room(path: Path, needed: int) -> None:
    """Raises an OSError if so many bytes have no room where a path lies."""
    place = next(each for each in (path, *path.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(
            f"The features take {needed / 1e9:.3g} GB in {path.parent}, where "
            f"{free / 1e9:.3g} GB are free. Give another folder as cache, fewer layers "
            "and pools, or leave protocols on patch tokens out."
        )


def key_name(key: Key) -> str:
    """Returns the name of a feature's file, such as "layer11-mean"."""
    layer, pool = key
    return pool if layer is None else f"layer{layer:02d}-{pool}"


def _described(array: Any) -> tuple[list[int], str]:
    return list(array.shape), str(array.dtype)


def _write_rows(file: Path, rows: range, values: Any) -> None:
    """Writes rows of an array to their places, not through a memory map.

    That would end the process where the disk is full.
    """
    size = values[:1].nbytes
    data = _bytes(values)
    with file.open("r+b") as opened:
        first = file.stat().st_size - size * len(np.lib.format.open_memmap(file, "r"))
        if rows.step == 1:
            opened.seek(first)
            opened.write(data)
            return
        for number, row in enumerate(rows):
            opened.seek(first + size * row)
            opened.write(data[number * size : (number + 1) * size])


def _sufficient_dtype(values: Tensor) -> str:
    """Returns the dtype that keeps every feature apart, see above."""
    rows = values.flatten(0, -2).double()  # of tokens, each one is a row
    halves = rows.half().double()
    if not bool(halves.isfinite().all()):
        return "float32"
    # Sums of squares lose the spread of features far from zero.
    shift = rows[0]
    count = len(rows)
    total = (rows - shift).sum(dim=0)
    variance = (rows - shift).square().sum(dim=0) / count - (total / count).square()
    rounding = (rows - halves).square().sum(dim=0)
    mean = shift + total / count
    constant = variance <= (_NO_SPREAD * mean).square()
    fine = rounding / count <= _TOLERANCE**2 * variance
    return "float16" if bool((fine | constant).all()) else "float32"


def _bytes(array: Any) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
