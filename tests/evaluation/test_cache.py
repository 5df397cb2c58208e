from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.evaluation.cache import cached_features
from lightly_mim.evaluation.feature_files import FeatureStore, check_room, key_name
from lightly_mim.evaluation.features import EncoderFeatures, Features, Key
from lightly_mim.evaluation.fingerprints import (
    data_fingerprint,
    encoder_fingerprint,
    hash_key,
)
from lightly_mim.evaluation.foreign_encoders import RawPixels
from lightly_mim.evaluation.processes import World

MEAN, STD = (0.5,) * 3, (0.25,) * 3
ALONE = World()
KEYS: list[Key] = [(0, "mean"), (1, "mean"), (1, "tokens")]


class Pictures(Dataset[Any]):
    """uint8 images that count how often each one is read."""

    def __init__(self, num_images: int = 22) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (num_images, 3, 8, 8)
        self.images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.reads = [0] * num_images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        self.reads[index] += 1
        return self.images[index], index % 3, f"{index}.png"


class Function(EncoderFeatures):
    """Features that are easy to check, of any layers and poolings."""

    def __init__(
        self,
        keys: list[Key] = KEYS,
        change: Callable[[Tensor], Tensor] = lambda values: values,
        fail_at: int = 1_000_000,
    ) -> None:
        self.encoder = RawPixels(8)
        self.encoder.mean, self.encoder.std = MEAN, STD
        self.keys = list(keys)
        self.change = change
        self.fail_at = fail_at  # number of images
        self.seen: dict[Key, int] = dict.fromkeys(keys, 0)

    def __call__(self, images: Tensor, keys: Any = None) -> dict[Key, Tensor]:
        count = len(images) if images.any() else 0  # zeros tell the shapes
        if max(self.seen.values()) + count > self.fail_at:
            raise KeyboardInterrupt
        found = {}
        for key in self.keys if keys is None else keys:
            self.seen[key] += count
            layer, pool = key
            values = images.flatten(2).transpose(1, 2) * ((layer or 0) + 1)
            values = values if pool == "tokens" else values.mean(dim=1)
            found[key] = self.change(values) if count else values
        return found


def stores(root: Path, num_images: int = 22, **names: Any) -> dict[str, FeatureStore]:
    return {
        name: FeatureStore(root, {"name": name, "n": 1}, num_images, shard_size=8)
        for name in names
    }


def run(
    root: Path, data: Pictures, world: World = ALONE, **functions: Function
) -> dict[str, Features]:
    return cached_features(
        functions,
        stores(root, len(data), **functions),
        data,
        batch_size=5,
        num_workers=0,
        world=world,
    )


def expected(data: Pictures, key: Key) -> Tensor:
    images = (data.images / 255 - 0.5) / 0.25
    return Function()(images)[key]


def test_cached_features__made_once_and_read_again(tmp_path: Path) -> None:
    data, function = Pictures(), Function()
    first = run(tmp_path, data, a=function)["a"]
    assert list(first.values) == KEYS
    for key, value in first.values.items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(
            value.float(), expected(data, key), rtol=2**-11, atol=1e-6
        )
    assert first.labels.tolist() == [n % 3 for n in range(22)]
    assert first.filenames == [f"{n}.png" for n in range(22)]
    assert first.seconds > 0
    again = run(tmp_path, data, a=(unused := Function()))["a"]
    assert data.reads == [1] * 22
    assert set(unused.seen.values()) == {0}
    for key, value in again.values.items():
        assert torch.equal(value, first.values[key])
    assert again.seconds == first.seconds
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "key.json").read_text()) == {"name": "a", "n": 1}
    assert folder.name == hash_key({"n": 1, "name": "a"})
    assert sorted(file.name for file in folder.glob("*.npy")) == [
        "layer00-mean.npy",
        "layer01-mean.npy",
        "layer01-tokens.npy",
    ]
    assert not (folder / "shards").exists()


def test_cached_features__only_what_is_missing(tmp_path: Path) -> None:
    data = Pictures()
    run(tmp_path, data, a=Function(KEYS[:1]))
    function, other = Function(), Function([(None, "pixels")])
    found = run(tmp_path, data, a=function, b=other)
    assert data.reads == [2] * 22  # one pass for both functions
    assert list(function.seen.values()) == [0, 22, 22]
    assert list(found["a"].values) == KEYS
    assert found["b"].values[None, "pixels"].shape == (22, 3)


@pytest.mark.parametrize("fail_at", [1, 8, 9, 17, 21])
def test_cached_features__goes_on_where_it_was_cut(
    tmp_path: Path, fail_at: int
) -> None:
    data = Pictures()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, a=Function(fail_at=fail_at))
    written = [n for part in range(3) for n in range(part, 22, 3)]  # 8, 7 and 7 images
    written = written[: max(n for n in (0, 8, 15, 22) if n <= fail_at)]
    rest = Function()
    found = run(tmp_path, data, a=rest)["a"]
    assert rest.seen == dict.fromkeys(KEYS, 22 - len(written))
    assert [data.reads[n] for n in written] == [1] * len(written)
    whole = run(tmp_path / "whole", Pictures(), a=Function())["a"]
    for key in KEYS:
        assert torch.equal(found.values[key], whole.values[key])
    assert torch.equal(found.labels, whole.labels)
    assert found.filenames == whole.filenames


def test_cached_features__are_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second copy, not even while a pass is under way."""
    store = FeatureStore(tmp_path, {"name": "a", "n": 1}, 22, 8)
    sizes = []
    finish = FeatureStore.finish

    def look(each: FeatureStore, keys: Any) -> None:
        sizes.append(sum(p.stat().st_size for p in each.path.rglob("*.npy")))
        assert {p.suffix for p in each.path.rglob("*") if p.is_file()} <= {
            ".npy",
            ".json",
        }
        finish(each, keys)

    monkeypatch.setattr(FeatureStore, "finish", look)
    run(tmp_path, Pictures(), a=Function())
    after = sum(p.stat().st_size for p in store.path.rglob("*.npy"))
    assert sizes == [after]
    assert after == 22 * (3 + 3 + 64 * 3) * 2 + 3 * 128  # half precision and headers


def test_cached_features__a_look_reads_no_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, Pictures(), a=Function())
    store = FeatureStore(tmp_path, {"name": "a", "n": 1}, 22, 8)
    checks = []
    is_whole = FeatureStore._is_whole

    def counted(each: FeatureStore, *given: Any) -> bool:
        checks.append(given)
        return is_whole(each, *given)

    monkeypatch.setattr(FeatureStore, "_is_whole", counted)
    assert store.missing(KEYS) == []
    assert not checks
    run(tmp_path, Pictures(), a=Function())
    assert len(checks) == len(KEYS)  # once, when they are read
    # A copy has another time: its checksums are compared once, and noted.
    store.file(KEYS[0]).touch()
    assert store.missing(KEYS) == store.missing(KEYS) == []
    assert len(checks) == len(KEYS) + 1


def test_cached_features__damage_that_keeps_size_and_time(tmp_path: Path) -> None:
    before = run(tmp_path, Pictures(), a=Function())["a"].values[1, "mean"].clone()
    file = FeatureStore(tmp_path, {"name": "a", "n": 1}, 22).file((1, "mean"))
    stat = file.stat()
    spoil(file, 0.9, b"\xaa")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    function = Function()
    after = run(tmp_path, Pictures(), a=function)["a"].values[1, "mean"]
    assert torch.equal(before, after)
    assert list(function.seen.values()) == [0, 22, 0]


def test_cached_features__no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 22 * (3 + 3 + 64 * 3) * 2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    data = Pictures()
    with pytest.raises(OSError, match=r"take .* GB in .* are free"):
        run(tmp_path, data, a=Function())
    assert sum(data.reads) == 0 and not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    run(tmp_path, data, a=Function())
    with pytest.raises(OSError, match="as cache, fewer layers"):
        check_room(tmp_path / "not" / "there", needed + 1)


def test_cached_features__later_values_out_of_range(tmp_path: Path) -> None:
    """The second shard has values that half precision has not."""

    def far(values: Tensor) -> Tensor:
        return values * (1e7 if len(values) == 2 else 1)  # not in the first shard

    data, function = Pictures(), Function(KEYS[:1], far)
    found = run(tmp_path, data, a=function)["a"].values[0, "mean"]
    whole = run(tmp_path / "b", Pictures(), a=Function(KEYS[:1]))["a"]
    assert found.dtype == torch.float32 and bool(found.isfinite().all())
    near = found.abs() < 100
    exact = expected(data, (0, "mean"))
    assert bool(near.any(dim=0).all()) and not bool(near.all())
    assert torch.equal(found[near], exact[near])
    assert whole.values[0, "mean"].dtype == torch.float16


def test_cached_features__cut_between_the_finished_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, finish = Pictures(), FeatureStore._finish_key

    def cut(store: FeatureStore, key: Key, journals: Any) -> None:
        if key == KEYS[1]:
            raise KeyboardInterrupt
        finish(store, key, journals)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureStore, "_finish_key", cut)
        run(tmp_path, data, a=Function())
    rest = Function()
    assert list(run(tmp_path, data, a=rest)["a"].values) == KEYS
    assert set(rest.seen.values()) == {0}


def test_cached_features__batches_begin_with_the_shard(tmp_path: Path) -> None:
    # The last digit of a feature may depend on the size of its batch.
    sizes: list[int] = []

    def note(values: Tensor) -> Tensor:
        sizes.append(len(values))
        return values

    data, keys = Pictures(), KEYS[:1]
    run(tmp_path / "whole", data, a=Function(keys, change=note))
    assert sizes == [5, 3, 5, 2, 5, 2]  # shards of 8, 7 and 7 in batches of 5
    sizes.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, a=Function(keys, fail_at=9))
    run(tmp_path, data, a=Function(keys, change=note))
    assert sizes == [5, 2, 5, 2]


def test_cached_features__leaves_the_shards_of_other_layers(tmp_path: Path) -> None:
    data = Pictures()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, a=Function(KEYS[:1], fail_at=17))
    run(tmp_path, data, a=Function(KEYS[1:2]))
    rest = Function(KEYS[:1])
    run(tmp_path, data, a=rest)
    assert list(rest.seen.values()) == [22 - 15]
    (folder,) = tmp_path.iterdir()
    assert not (folder / "shards").exists()


def spoil(file: Path, where: float, value: bytes | None) -> None:
    content = file.read_bytes()
    place = int(len(content) * where)
    after = b"" if value is None else value + content[place + 1 :]
    file.write_bytes(content[:place] + after)


@pytest.mark.parametrize("name", ["layer01-mean.npy", "layer01-mean.json"])
@pytest.mark.parametrize(
    ("where", "value"), [(0.9, b"\xaa"), (0.9, None), (0.0, None), (0.01, b"\xaa")]
)
def test_cached_features__damaged_files_are_made_again(
    tmp_path: Path, name: str, where: float, value: bytes | None
) -> None:
    data = Pictures()
    before = run(tmp_path, data, a=Function())["a"].values[1, "mean"].clone()
    (folder,) = tmp_path.iterdir()
    if not (name.endswith("json") and value):  # a letter of a JSON may not matter
        spoil(folder / name, where, value)
        function = Function()
        after = run(tmp_path, data, a=function)["a"].values[1, "mean"]
        assert torch.equal(before, after)
        assert list(function.seen.values()) == [0, 22, 0]


@pytest.mark.parametrize("value", [b"\xaa", None])
def test_cached_features__damaged_shards_and_labels(
    tmp_path: Path, value: bytes | None
) -> None:
    data = Pictures()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, a=Function(fail_at=20))
    (folder,) = tmp_path.iterdir()
    shards = sorted((folder / "shards").iterdir())
    spoil(shards[0], 0.95, value)
    function = Function()
    found = run(tmp_path, data, a=function)["a"]
    assert set(function.seen.values()) == {15}  # shards 0 and 2
    torch.testing.assert_close(
        found.values[1, "mean"].float(), expected(data, (1, "mean")), rtol=1e-3, atol=0
    )
    images = json.loads((folder / "images.json").read_text())
    images["labels"][3] = 2
    (folder / "images.json").write_text(json.dumps(images))
    assert run(tmp_path, data, a=Function())["a"].labels[3] == 0


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda values: values, "float16"),
        (lambda values: values * 1e7, "float32"),  # out of range
        (lambda values: values * 1e-7, "float32"),  # underflow
        (lambda values: values * 1e-3 + 10, "float32"),  # spread lost beside the mean
        (lambda values: values * 0 + 0.1, "float16"),  # constant: nothing to lose
    ],
)
def test_cached_features__half_precision_where_it_is_enough(
    tmp_path: Path, change: Callable[[Tensor], Tensor], dtype: str
) -> None:
    data = Pictures()
    found = run(tmp_path, data, a=Function([(0, "mean")], change))["a"].values[
        0, "mean"
    ]
    assert str(found.dtype) == f"torch.{dtype}"
    exact = change(expected(data, (0, "mean")))
    if dtype == "float32":
        assert torch.equal(found, exact)
    spread = exact.double().std(dim=0, correction=0)
    rounding = (found.double() - exact.double()).square().mean(dim=0).sqrt()
    assert bool((rounding <= spread / 256).all()) or bool((spread < 1e-7).all())


def test_cached_features__checksum_is_that_of_the_values(tmp_path: Path) -> None:
    run(tmp_path, Pictures(), a=Function())
    (folder,) = tmp_path.iterdir()
    said = json.loads((folder / "layer01-tokens.json").read_text())
    array = np.load(folder / "layer01-tokens.npy")
    assert said["crc32"] == [zlib.crc32(array[n::3].tobytes()) for n in range(3)]
    assert (said["shape"], said["dtype"]) == ([22, 64, 3], "float16")


def distributed_worker(rank: int, root: Path, address: str) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{address}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    data, function = Pictures(), Function()
    found = run(root, data, World.distributed(), a=function)["a"]
    read = [n for n, count in enumerate(data.reads) if count]
    torch.save((found.values[1, "mean"].clone(), read), root / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_cached_features__shared_by_processes(tmp_path: Path) -> None:
    multiprocessing.start_processes(
        distributed_worker,
        (tmp_path, str(tmp_path / "rendezvous")),
        nprocs=2,
        start_method="spawn",
    )
    whole = run(tmp_path / "whole", Pictures(), a=Function())["a"].values[1, "mean"]
    reads = []
    for rank in range(2):
        values, read = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(values, whole)
        reads.append(read)
    shards = [list(range(number, 22, 3)) for number in range(3)]
    assert reads == [sorted(shards[0] + shards[1]), shards[2]]


def test_cached_features__files_that_vanish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureStore, "read", lambda store, keys, verify: None)
    with pytest.raises(OSError, match="vanish while they are read"):
        run(tmp_path, Pictures(3), a=Function())


def test_world__without_processes() -> None:
    with pytest.raises(ValueError, match="has not been initialised"):
        World.distributed()


def test_key_name() -> None:
    assert key_name((3, "cls+mean")) == "layer03-cls+mean"
    assert key_name((None, "pixels")) == "pixels"


@pytest.fixture
def photo_folder(photos: Path, tmp_path: Path) -> Iterator[Path]:
    for kind in ("temple", "flower"):
        (tmp_path / kind).mkdir()
        for n in range(2):
            content = (photos / "train" / kind / f"{n:02d}.jpg").read_bytes()
            (tmp_path / kind / f"{n}.jpg").write_bytes(content)
    yield tmp_path


def test_data_fingerprint__of_a_folder(photo_folder: Path) -> None:
    from lightly_mim.data import ImageDataset

    def fingerprint(**options: Any) -> Any:
        return data_fingerprint(ImageDataset(photo_folder, **options))

    first = fingerprint()
    assert fingerprint() == first == json.loads(json.dumps(first))
    assert fingerprint(in_chans=1) != first
    file = photo_folder / "temple" / "0.jpg"
    content = file.read_bytes()
    file.write_bytes(content + b" ")
    grown = fingerprint()
    assert grown != first
    file.rename(photo_folder / "temple" / "5.jpg")
    assert fingerprint() not in (first, grown)


def test_data_fingerprint__of_a_data_set() -> None:
    data = Pictures()
    assert data_fingerprint(data) is None
    data.fingerprint = "2026-11-22"  # type: ignore[attr-defined]
    known = {"fingerprint": "2026-11-22", "num_images": 22}
    assert data_fingerprint(data) == known


def test_encoder_fingerprint() -> None:
    from lightly_mim.evaluation import load_encoder

    def build(**options: Any) -> Any:
        from lightly_mim.encoders import masked_encoder

        torch.manual_seed(0)
        sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
        return masked_encoder("vit_tiny_patch16_224", **(sizes | options))

    encoder = build()
    first = encoder_fingerprint(encoder)
    assert encoder_fingerprint(build()) == first == json.loads(json.dumps(first))
    encoder.add_mask_token()  # no part of the features
    assert encoder_fingerprint(encoder) == first
    # The same weights, another image size, statistics or module.
    assert encoder_fingerprint(build(img_size=16)) != first
    encoder.mean = (0.1, 0.2, 0.3)
    assert encoder_fingerprint(encoder) != first
    encoder.mean = build().mean
    encoder.vit.blocks[0].norm1.eps = 0.5
    assert encoder_fingerprint(encoder) != first
    encoder = build()
    with torch.no_grad():
        encoder.vit.blocks[0].mlp.fc1.bias[0] += 1e-6
    assert encoder_fingerprint(encoder) != first

    module = torch.nn.Linear(2, 2)

    def function(images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))

    adapted = load_encoder(module, feature_function=function, img_size=8)
    assert encoder_fingerprint(adapted) is None
    function.fingerprint = 3  # type: ignore[attr-defined]
    known = encoder_fingerprint(adapted)
    assert known is not None
    assert known["function"] == "3"
