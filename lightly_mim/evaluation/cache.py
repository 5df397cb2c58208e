"""Features of a data set: read from the disk, and what is missing made in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch.utils.data import Dataset, Subset

from lightly_mim.arguments import Device, PositiveInt, Workers, checked
from lightly_mim.data import KeyedLoader
from lightly_mim.data.loading import default_num_workers
from lightly_mim.evaluation.feature_files import FeatureStore, check_room
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    Features,
    Key,
    Precision,
    batch_images,
    collect_features,
)
from lightly_mim.evaluation.processes import World

_ATTEMPTS = 6  # at a whole set of files: damage, another process, or other precision


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
            What makes features, by name; the encoders are on the device.
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

    Raises:
        ValueError: See `collect_features`.
        OSError: If the features cannot be written, or if there is no room for them.
    """
    count = len(data)  # type: ignore[arg-type]
    if not count:
        raise ValueError("data holds no images to take features of.")
    if lacking := sorted(functions.keys() - stores.keys()):
        raise ValueError(f"stores has a place for each function, none of {lacking}.")
    for name, each in stores.items():
        if each.num_images != count:
            raise ValueError(
                f"data holds {count} images, and the place of {name} in stores is for "
                f"{each.num_images}."
            )

    def make(shards: Sequence[tuple[int, dict[str, list[Key]]]]) -> None:
        if not shards:
            return
        store = next(iter(stores.values()))
        images = [store.shard(number) for number, _ in shards]
        workers = default_num_workers(data) if num_workers is None else num_workers
        indices = list(itertools.chain.from_iterable(images))
        loader = KeyedLoader(
            Subset(data, indices), batch_size, training=False, num_workers=workers
        )
        stream = _one_by_one(track(loader, description, disable=not progress))
        for (number, wanted), numbers in zip(shards, images, strict=True):
            made = collect_features(
                {name: functions[name] for name in wanted},
                _next_batches(stream, len(numbers), batch_size),
                keys=wanted,
                device=device,
                precision=precision,
            )
            for name, features in made.items():
                stores[name].write_shard(number, features)
        for _ in stream:  # the progress bar ends when the loader does
            raise AssertionError("The loader yields more images than were asked for.")

    for _ in range(_ATTEMPTS):
        # One process looks what is missing, since the others may be changing it.
        plan = world.from_first(lambda: _plan(functions, stores))
        if plan.begins and world.size > 1:
            # The first shard decides the precision, so that one process makes it.
            make(plan.shards[:1] if world.rank == 0 else [])
            world.wait()
            continue
        make(plan.shards[world.rank :: world.size])
        world.wait()
        if world.rank == 0:
            for name, keys in plan.missing.items():
                stores[name].finish(keys)
        world.wait()
        found = {
            name: stores[name].read(function.keys, verify=world.rank == 0)
            for name, function in functions.items()
        }
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
    begins: bool  # whether the file of a key has to be made first


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
    needed = 0
    for name, keys in missing.items():
        shapes = functions[name].shapes
        needed += sum(stores[name].bytes_to_write(key, shapes[key]) for key in keys)
    if needed:
        check_room(next(iter(stores.values())).path, needed)
    begins = any(
        not stores[name].file(key).exists()
        for name, keys in missing.items()
        for key in keys
    )
    return _Plan(missing, shards, begins)


def _one_by_one(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        yield from zip(batch_images(batch), *batch[1:], strict=True)


def _next_batches(images: Iterator[Any], count: int, size: int) -> Iterator[Any]:
    """Makes batches of the next images of a stream, the images of a shard.

    The last digit of a feature may depend on how many images are in its batch. Like
    this it does not depend on which shards were made before a pass was cut.
    """
    for start in range(0, count, size):
        batch = itertools.islice(images, min(size, count - start))
        pixels, labels, names = zip(*batch, strict=True)
        yield torch.stack(pixels), torch.stack(labels), names
