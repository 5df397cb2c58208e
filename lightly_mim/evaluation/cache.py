"""Features on disk: written shard by shard, read as memory maps, never trusted blindly.

CACHE/<hash of the key>/    one encoder on one set of images
    key.json                everything that the features depend on
    images.json             labels and names of the images
    layer11-mean.npy        one file per layer and pooling, float16 or float32
    layer11-mean.json       its shape, dtype, checksum, and the time it took
    shards/                 of a pass that is not finished

A pass that was cut goes on at the first shard that is missing. A file that is not what
its checksum says is made again. Several processes may share a directory: all of them
write the same, and a file appears as a whole or not at all.

Features are kept in half precision if that changes no column by more than 1/256 of its
own spread (root mean square of the rounding over standard deviation), which holds for
nearly all encoders; else in float32, as when a value lies outside float16's range or
when all images have nearly the same feature.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import (
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightly_mim.arguments import Device, PositiveInt, Workers, checked
from lightly_mim.checkpoints import hash_tensors
from lightly_mim.data import KeyedLoader
from lightly_mim.data.loading import default_num_workers
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    Key,
    Precision,
    batch_images,
    collect_features,
)
from lightly_mim.evaluation.fingerprints import hash_key
from lightly_mim.evaluation.processes import World
from lightly_mim.files import atomic_write, read_sealed, sealed

# Counts up when the same weights and images give other features than before.
FEATURES_VERSION = 1
SHARD_SIZE = 1024  # images; 3 MB of a ViT-B's pooled features, 600 MB of its tokens

_TOLERANCE = 1 / 256  # rounding over spread; a probe does not see less than that
_NO_SPREAD = 1e-6  # deviation over mean that is float32's own rounding
_ATTEMPTS = 3


@checked
class FeatureStore:
    """The directory of one encoder's features of one set of images.

    Attributes:
        path:
            The directory, named by the hash of the key.
        key:
            Everything that the features depend on. Can be written as JSON.
        num_images:
            Number of images.
        shard_size:
            Number of images in a shard.
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
        self.shard_size = shard_size

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_images // self.shard_size)

    def shard(self, number: int) -> range:
        """Returns the numbers of the images of a shard."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Returns the keys whose file is not there or not whole.

        Args:
            keys:
                The (layer, pooling) of each feature.
        """
        if self._read_images() is None:
            return list(keys)
        return [key for key in keys if self._open(key) is None]

    def missing_in_shard(self, number: int, keys: Sequence[Key]) -> list[Key]:
        """Returns the keys that no file of a shard holds.

        Args:
            number:
                Number of the shard.
            keys:
                The (layer, pooling) of each feature.
        """
        there: set[str] = set()
        for file in self._shard_files(number):
            if _is_whole(file, len(self.shard(number))):
                there.update(_names(file))
            else:  # of a disk that was full, or of a process that was killed
                file.unlink(missing_ok=True)
        return [key for key in keys if key_name(key) not in there]

    def write_shard(self, number: int, features: Features) -> None:
        """Writes the features of a shard.

        Args:
            number:
                Number of the shard.
            features:
                Features, labels and names of its images.

        Raises:
            OSError: If it cannot be written.
        """
        self._write_key()
        tensors = {key_name(key): value for key, value in features.values.items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        tensors["labels"] = features.labels
        metadata = {
            "filenames": json.dumps(features.filenames),
            "seconds": repr(features.seconds),
        }
        text = "".join(metadata.values())
        metadata["sha256"] = hash_tensors(sorted(tensors.items()), text)
        names = hash_key({"keys": sorted(tensors)})[:8]
        file = self.path / "shards" / f"{number:06d}-{names}.safetensors"
        try:
            with atomic_write(file) as temporary:
                save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(f"Cannot write {file}: {error}") from error

    def merge(self, keys: Sequence[Key]) -> None:
        """Joins the shards to one file per key, and removes those no longer needed.

        Nothing happens to a key whose shards are not all there: another process may
        have joined and removed them meanwhile.

        Args:
            keys:
                The (layer, pooling) of each feature.

        Raises:
            OSError: If a file cannot be written.
        """
        try:
            shards = [self._shard_files(number) for number in range(self.num_shards)]
            if self._read_images() is None:
                self._merge_images(shards)
            for key in self.missing(keys):
                holding = [_holding(files, key_name(key)) for files in shards]
                if all(holding):
                    self._merge_key(key, [file for file in holding if file])
        except (FileNotFoundError, SafetensorError):
            return  # another process has removed the shards
        self._remove_shards()

    def read(self, keys: Sequence[Key]) -> Features | None:
        """Opens the features as memory maps.

        Args:
            keys:
                The (layer, pooling) of each feature.

        Returns:
            The features, float16 or float32, or None if a file is not there.
        """
        images = self._read_images()
        opened = {key: self._open(key, verify=False) for key in keys}
        if images is None or any(value is None for value in opened.values()):
            return None
        passes: dict[str, float] = {}
        for key in keys:
            passes |= read_sealed(self._sidecar(key), "Delete it.")["passes"]
        return Features(
            {key: torch.from_numpy(array) for key, array in opened.items()},
            torch.tensor(images["labels"], dtype=torch.int64),
            list(images["filenames"]),
            sum(passes.values()),
        )

    def _open(self, key: Key, verify: bool = True) -> Any:
        """Returns a memory map, or None if the file is missing or damaged."""
        try:
            said = read_sealed(self._sidecar(key), "It is made again.")
            # Copy on write: torch wants memory that it may write to.
            array = np.lib.format.open_memmap(self._file(key), mode="c")
        except Exception:  # NumPy's own depend on where the damage is
            return None
        shape = list(array.shape)
        if shape[:1] != [self.num_images] or shape != said.get("shape"):
            return None
        if str(array.dtype) != said.get("dtype"):
            return None
        if verify and _checksum(array) != said.get("crc32"):
            return None
        return array

    def _merge_key(self, key: Key, files: Sequence[Path]) -> None:
        name = key_name(key)
        dtype = _sufficient_dtype(_tensors(files, name))
        passes: dict[str, float] = {}
        for file in files:
            with safe_open(file, framework="pt") as content:
                seconds = float(content.metadata()["seconds"])
            keys = file.stem.partition("-")[2]
            passes[keys] = passes.get(keys, 0.0) + seconds
        shape: list[int] = []
        crc = 0
        with atomic_write(self._file(key)) as temporary:
            array: Any = None
            start = 0
            for part in _tensors(files, name):
                if array is None:
                    shape = [self.num_images, *part.shape[1:]]
                    array = np.lib.format.open_memmap(
                        temporary, mode="w+", dtype=dtype, shape=tuple(shape)
                    )
                values = part.numpy().astype(dtype)
                array[start : start + len(values)] = values
                crc = zlib.crc32(_bytes(values), crc)
                start += len(values)
            array.flush()
            del array
        said = {"shape": shape, "dtype": dtype, "crc32": crc, "passes": passes}
        with atomic_write(self._sidecar(key)) as temporary:
            temporary.write_text(json.dumps(sealed(said), indent=2) + "\n")

    def _merge_images(self, shards: Sequence[Sequence[Path]]) -> None:
        if not all(shards):
            return
        labels: list[int] = []
        filenames: list[str] = []
        for files in shards:
            with safe_open(files[0], framework="pt") as content:
                labels += content.get_tensor("labels").tolist()
                filenames += json.loads(content.metadata()["filenames"])
        images = {"labels": labels, "filenames": filenames}
        with atomic_write(self.path / "images.json") as temporary:
            temporary.write_text(json.dumps(sealed(images)) + "\n")

    def _remove_shards(self) -> None:
        """Removes the shards whose features have all been joined.

        Others are of a pass with other layers, which was cut or is under way.
        """
        for file in sorted((self.path / "shards").glob("*.safetensors")):
            with suppress(FileNotFoundError, SafetensorError):
                names = [name for name in _names(file) if name != "labels"]
                if all((self.path / f"{name}.json").exists() for name in names):
                    file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or removed by another process
            (self.path / "shards").rmdir()

    def _read_images(self) -> dict[str, Any] | None:
        try:
            said = read_sealed(self.path / "images.json", "It is made again.")
        except (OSError, ValueError):
            return None
        return said if len(said.get("labels", ())) == self.num_images else None

    def _shard_files(self, number: int) -> list[Path]:
        return sorted((self.path / "shards").glob(f"{number:06d}-*.safetensors"))

    def _write_key(self) -> None:
        file = self.path / "key.json"
        if not file.exists():
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(self.key, indent=2) + "\n")

    def _file(self, key: Key) -> Path:
        return self.path / f"{key_name(key)}.npy"

    def _sidecar(self, key: Key) -> Path:
        return self.path / f"{key_name(key)}.json"


@checked
def cached_features(
    functions: Mapping[str, EncoderFeatures],
    stores: Mapping[str, FeatureStore],
    data: Dataset[Any],
    *,
    batch_size: PositiveInt = 64,
    num_workers: Workers | None = None,
    device: Device = "cpu",
    precision: Precision = "32",
    description: str = "Encoding images",
    progress: bool = False,
    world: World = World(),  # noqa: B008, frozen
) -> dict[str, Features]:
    """Reads features from the disk, and makes those that are missing in one pass.

    Only the images of missing shards are read.

    Args:
        functions:
            Feature functions by name.
        stores:
            Where the features of each one lie.
        data:
            Data set of (image, label, filename).
        batch_size:
            Number of images at a time.
        num_workers:
            Number of processes that read images. By default chosen by the loader.
        device:
            Where to compute.
        precision:
            See `collect_features`.
        description:
            What stands beside the progress bar.
        progress:
            Whether to show it.
        world:
            The processes that the shards are dealt out over. All of them call this
            function with the same arguments and get the same features; the directory
            must be one that they share.

    Returns:
        The features of each function.

    Raises:
        ValueError: See `collect_features`.
        OSError: If the features cannot be written.
    """
    if not len(data):  # type: ignore[arg-type]
        raise ValueError("data holds no images to take features of.")
    if lacking := sorted(functions.keys() - stores.keys()):
        raise ValueError(f"stores has a place for each function, none of {lacking}.")
    for _ in range(_ATTEMPTS):
        # One process looks what is missing, since the others may be changing it.
        plan = world.from_first(lambda: _plan(functions, stores))
        _make_shards(
            functions,
            stores,
            plan.shards[world.rank :: world.size],
            data,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            precision=precision,
            description=description,
            progress=progress,
        )
        world.wait()
        if world.rank == 0:
            for name, keys in plan.missing.items():
                stores[name].merge(keys)
        world.wait()
        found = {name: stores[name].read(functions[name].keys) for name in functions}
        whole = all(features is not None for features in found.values())
        if all(world.from_all(whole)):
            return {name: each for name, each in found.items() if each is not None}
    root = next(iter(stores.values())).path.parent
    raise OSError(
        f"The features in {root} vanish while they are read. Is another process "
        "deleting them, or do the processes not share the directory?"
    )


class _Plan(NamedTuple):
    """What is missing."""

    missing: dict[str, list[Key]]  # of each function, the keys without a file
    shards: list[tuple[int, dict[str, list[Key]]]]  # number, and keys to be made


def _plan(
    functions: Mapping[str, EncoderFeatures], stores: Mapping[str, FeatureStore]
) -> _Plan:
    missing = {
        name: keys
        for name, function in functions.items()
        if (keys := stores[name].missing(function.keys))
    }
    shards: list[tuple[int, dict[str, list[Key]]]] = []
    for number in range(next(iter(stores.values())).num_shards):
        wanted = {
            name: left
            for name, keys in missing.items()
            if (left := stores[name].missing_in_shard(number, keys))
        }
        if wanted:
            shards.append((number, wanted))
    return _Plan(missing, shards)


def _make_shards(
    functions: Mapping[str, EncoderFeatures],
    stores: Mapping[str, FeatureStore],
    shards: Sequence[tuple[int, dict[str, list[Key]]]],
    data: Dataset[Any],
    *,
    batch_size: int,
    num_workers: int | None,
    device: torch.device | str,
    precision: Precision,
    description: str,
    progress: bool,
) -> None:
    """Reads the images of some shards, and writes their features."""
    if not shards:
        return
    store = next(iter(stores.values()))
    images = [store.shard(number) for number, _ in shards]
    loader = KeyedLoader(
        Subset(data, list(itertools.chain.from_iterable(images))),
        batch_size,
        training=False,
        num_workers=default_num_workers(data) if num_workers is None else num_workers,
    )
    batches = track(loader, description, disable=not progress)
    parts = _split(batches, [len(numbers) for numbers in images])
    for (number, wanted), part in zip(shards, parts, strict=True):
        made = collect_features(
            {name: functions[name] for name in wanted},
            _regroup(part, batch_size),
            keys=wanted,
            device=device,
            precision=precision,
        )
        for name, features in made.items():
            stores[name].write_shard(number, features)


def _split(batches: Iterable[Any], sizes: Sequence[int]) -> Iterator[list[Any]]:
    """Cuts a stream of batches into lists of so many images."""
    stream = iter(batches)
    rest: Any = None
    for size in sizes:
        part: list[Any] = []
        while size:
            batch = next(stream) if rest is None else rest
            count = len(batch[1])
            taken = min(count, size)
            part.append(_take(batch, slice(taken)))
            rest = _take(batch, slice(taken, None)) if taken < count else None
            size -= taken
        yield part
    # The progress bar ends when the loader does.
    for _ in stream:
        raise AssertionError("The loader yields more images than it was asked for.")


def _regroup(parts: Iterable[Any], batch_size: int) -> Iterator[Any]:
    """Cuts the images of a shard into batches that begin with the shard.

    The last digit of a feature may depend on how many images are in its batch. Like
    this it does not depend on which shards were made before a pass was cut.
    """
    rest: Any = None
    for part in parts:
        rest = part if rest is None else _append(rest, part)
        while len(rest[1]) >= batch_size:
            yield _take(rest, slice(batch_size))
            rest = _take(rest, slice(batch_size, None))
    if rest is not None and len(rest[1]):
        yield rest


def _append(batch: Any, other: Any) -> tuple[Any, ...]:
    return tuple(
        torch.cat([a, b]) if isinstance(a, Tensor) else [*a, *b]
        for a, b in zip(batch, other, strict=True)
    )


def _take(batch: Any, part: slice) -> tuple[Any, ...]:
    return (batch_images(batch)[part], *(entry[part] for entry in batch[1:]))


# Files.


def key_name(key: Key) -> str:
    """Returns the name of a feature's file, such as "layer11-mean".

    Args:
        key:
            (layer, pooling).
    """
    layer, pool = key
    return pool if layer is None else f"layer{layer:02d}-{pool}"


def _holding(files: Sequence[Path], name: str) -> Path | None:
    return next((file for file in files if name in _names(file)), None)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as content:
        return list(content.keys())


def _tensors(files: Iterable[Path], name: str) -> Iterator[Tensor]:
    for file in files:
        with safe_open(file, framework="pt") as content:
            yield content.get_tensor(name)


def _is_whole(file: Path, num_images: int) -> bool:
    try:
        with safe_open(file, framework="pt") as content:
            said = dict(content.metadata() or {})
            names = sorted(content.keys())
            sizes = {content.get_slice(name).get_shape()[0] for name in names}
            tensors = ((name, content.get_tensor(name)) for name in names)
            text = said.get("filenames", "") + said.get("seconds", "")
            return sizes == {num_images} and (
                said.get("sha256") == hash_tensors(tensors, text)
            )
    except (SafetensorError, OSError, ValueError, IndexError):
        return False


def _sufficient_dtype(parts: Iterable[Tensor]) -> str:
    """Returns the dtype that keeps every feature apart, see above."""
    shift: Any = None
    count = 0
    for part in parts:
        rows = part.flatten(0, -2).double()  # of tokens, each one is a row
        if shift is None:
            # Sums of squares lose the spread of features far from zero.
            shift = rows[0]
            total = square = rounding = torch.zeros_like(shift)
        halves = rows.half().double()
        if not bool(halves.isfinite().all()):
            return "float32"
        total = total + (rows - shift).sum(dim=0)
        square = square + (rows - shift).square().sum(dim=0)
        rounding = rounding + (rows - halves).square().sum(dim=0)
        count += len(rows)
    variance = square / count - (total / count).square()
    mean = shift + total / count
    constant = variance <= (_NO_SPREAD * mean).square()
    fine = rounding / count <= _TOLERANCE**2 * variance
    return "float16" if bool((fine | constant).all()) else "float32"


def _bytes(array: Any) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")


def _checksum(array: Any) -> int:
    crc = 0
    for start in range(0, len(array), SHARD_SIZE):
        crc = zlib.crc32(_bytes(array[start : start + SHARD_SIZE]), crc)
    return crc
