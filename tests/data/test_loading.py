from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightly_mim.data import BrokenImageError, loading
from lightly_mim.data.folder import ImageDataset
from lightly_mim.data.items import KeyedDataset, collate
from lightly_mim.data.loading import GlobalBatches, KeyedLoader, default_num_workers
from lightly_mim.transforms import EvalTransform, SimMIMTransform

_PHOTO = Image.fromarray(load_sample_images().images[1])


class Numbers(Dataset[Any]):
    """Item i is a view of i and of what three random generators say."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        noise = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return [torch.tensor([index, *noise])], index % 3, f"{index}.jpg"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(10):
        path = tmp_path / "photos" / f"{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        _PHOTO.crop((30 * index, 0, 30 * index + 90, 70)).save(path)
    return tmp_path / "photos"


def _views(loader: KeyedLoader) -> list[Tensor]:
    return [views[0] for views, _, _ in loader]


def _assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestGlobalBatches:
    def test_training__shuffles_and_drops(self) -> None:
        batches = GlobalBatches(10, 4, seed=3)
        epochs = []
        for epoch in (0, 1, 0):
            batches.set_epoch(epoch)
            epochs.append([index for keys in batches for _, index in keys])
            assert {key[0] for keys in batches for key in keys} == {epoch}
        assert len(batches) == 2
        assert all(len(set(indices)) == 8 for indices in epochs)
        assert epochs[0] == epochs[2] != epochs[1]
        assert epochs[0] != [
            i for keys in GlobalBatches(10, 4, seed=4) for _, i in keys
        ]

    def test_training__every_image_is_used_over_the_epochs(self) -> None:
        batches = GlobalBatches(10, 4)
        seen = set()
        for epoch in range(10):
            batches.set_epoch(epoch)
            seen |= {index for keys in batches for _, index in keys}
        assert seen == set(range(10))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("world_size", [2, 4])
    def test_ranks_share_each_batch(self, training: bool, world_size: int) -> None:
        def read(rank: int, size: int) -> list[list[tuple[int, int]]]:
            options: dict[str, Any] = {
                "training": training,
                "rank": rank,
                "world_size": size,
            }
            return list(GlobalBatches(23, 8, **options))

        whole = read(0, 1)
        parts = [read(rank, world_size) for rank in range(world_size)]
        for batch, slices in zip(whole, zip(*parts, strict=True), strict=True):
            assert [key for part in slices for key in part] == batch
            assert all(slices)

    @pytest.mark.parametrize("num_images", range(2, 20))
    @pytest.mark.parametrize("world_size", [1, 2])
    def test_evaluation__everything_once_in_order(
        self, num_images: int, world_size: int
    ) -> None:
        ranks = [
            GlobalBatches(
                num_images, 4, training=False, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        batches = []
        for rank in ranks:
            rank.set_epoch(3)
            keys = list(rank)
            assert len(keys) == len(rank) == len(ranks[0])
            assert all(keys)
            batches.append(keys)
        order = [
            key for row in zip(*batches, strict=True) for part in row for key in part
        ]
        assert order == [(0, index) for index in range(num_images)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 11}, "11 images is larger than the dataset, which has 10"),
            ({"batch_size": 5, "world_size": 2}, "multiple of .* 2, got 5"),
            ({"batch_size": 0}, "at least 1, got batch_size=0"),
            ({"batch_size": 4, "rank": 1}, r"rank must be in 0\.\.0"),
            (
                {"batch_size": 12, "world_size": 12, "training": False},
                "10 images are too few for 12",
            ),
        ],
    )
    def test_refuses(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GlobalBatches(10, **arguments)


def run_program(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        timeout=120,
    )


class TestKeyedLoader:
    def test_batches__same_for_any_number_of_workers(self, photos: Path) -> None:
        dataset = ImageDataset(photos, SimMIMTransform(32, normalize=None))
        passes = {}
        for num_workers in (0, 1, 2):
            loader = KeyedLoader(dataset, 4, seed=1, num_workers=num_workers)
            torch.manual_seed(num_workers)
            random.seed(num_workers)
            passes[num_workers] = [_views(loader) for _ in range(2)]
        for num_workers in (1, 2):
            for epoch in range(2):
                _assert_same(passes[0][epoch], passes[num_workers][epoch])
        assert passes[0][0][0].shape == (4, 3, 32, 32)
        assert not torch.equal(passes[0][0][0], passes[0][1][0])

    def test_batches__same_with_spawned_workers(self, photos: Path) -> None:
        # macOS and Windows spawn: everything has to be picklable.
        dataset = ImageDataset(photos, SimMIMTransform(32))
        spawned = KeyedLoader(
            dataset, 4, num_workers=1, multiprocessing_context="spawn"
        )
        _assert_same(_views(spawned), _views(KeyedLoader(dataset, 4, num_workers=0)))

    def test_batches__same_for_any_world_size(self) -> None:
        whole = _views(KeyedLoader(Numbers(10), 4, num_workers=0))
        ranks = [
            _views(KeyedLoader(Numbers(10), 4, num_workers=0, rank=rank, world_size=2))
            for rank in range(2)
        ]
        _assert_same(whole, [torch.cat(parts) for parts in zip(*ranks, strict=True)])

    def test_random_state_is_left_alone(self) -> None:
        def draw() -> tuple[float, float, float]:
            return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

        def seed() -> None:
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)

        seed()
        expected = draw()
        for num_workers in (0, 1):
            loader = KeyedLoader(Numbers(8), 2, num_workers=num_workers)
            seed()
            assert len(_views(loader)) == 4
            assert draw() == expected

    def test_passes(self) -> None:
        loader = KeyedLoader(Numbers(8), 2, num_workers=0)
        first, second = _views(loader), _views(loader)
        assert not torch.equal(first[0], second[0])
        loader.set_epoch(0)
        _assert_same(_views(loader), first)
        loader.set_epoch(1)
        next(iter(loader))  # cut short: the next pass begins again
        _assert_same(_views(loader), second)

    def test_evaluation__fixed_passes_over_everything(self, photos: Path) -> None:
        dataset = ImageDataset(photos, EvalTransform(32))
        loader = KeyedLoader(dataset, 4, training=False, num_workers=0)
        batches = list(loader)
        assert [len(samples) for samples, _, _ in batches] == [4, 4, 2]
        assert batches[0][0].shape == (4, 3, 32, 32)
        assert (
            torch.cat([targets for _, targets, _ in batches]).tolist()
            == [0] * 5 + [1] * 5
        )
        assert [name for _, _, names in batches for name in names] == dataset.filenames
        random_views = KeyedLoader(Numbers(7), 4, training=False, num_workers=0)
        first = _views(random_views)
        random_views.set_epoch(5)
        _assert_same(_views(random_views), first)

    def test_data_sets_from_elsewhere(self, photos: Path) -> None:
        transform: Any = SimMIMTransform(32)
        lightly_dataset = LightlyDataset(str(photos), transform)
        ours = ImageDataset(photos, SimMIMTransform(32))
        first = next(iter(KeyedLoader(lightly_dataset, 4, num_workers=0)))
        second = next(iter(KeyedLoader(ours, 4, num_workers=0)))
        _assert_same(first[0], second[0])
        assert first[1:][1] == second[1:][1]
        pairs = TensorDataset(torch.arange(4.0), torch.tensor([3, 2, 1, 0]))
        samples, targets, filenames = next(iter(KeyedLoader(pairs, 4, num_workers=0)))
        assert (samples + targets == 3).all()
        assert filenames == [str(int(sample)) for sample in samples]

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_broken_file__is_named(self, photos: Path, num_workers: int) -> None:
        (photos / "0" / "4.jpg").write_bytes(b"")
        dataset = ImageDataset(photos, SimMIMTransform(32))
        loader = KeyedLoader(dataset, 10, num_workers=num_workers)
        with pytest.raises(BrokenImageError) as caught:
            next(iter(loader))
        path = str(photos / "0" / "4.jpg")
        assert str(caught.value) == (
            f"Cannot read the image {path}: it is empty. Mend or remove the file, or "
            'leave such files out with on_error="skip".'
        )
        assert caught.value.path == path
        if num_workers:  # saves the 5 s that torch waits if a cycle is collected
            workers: Any = loader._iterator
            workers._shutdown_workers()

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_broken_file__replaced_and_reported(
        self, photos: Path, num_workers: int
    ) -> None:
        for name in ("0/4.jpg", "1/7.jpg"):
            content = (photos / name).read_bytes()
            (photos / name).write_bytes(content[: len(content) // 2])
        dataset = ImageDataset(photos, SimMIMTransform(32), on_error="skip")
        loader = KeyedLoader(dataset, 5, num_workers=num_workers)
        batches = list(loader)
        assert [len(filenames) for _, _, filenames in batches] == [5, 5]
        assert sorted(loader.unreadable) == ["0/4.jpg", "1/7.jpg"]
        assert "4.jpg: " in loader.unreadable["0/4.jpg"]
        reference = KeyedLoader(dataset, 5, num_workers=0)
        _assert_same([views[0] for views, _, _ in batches], _views(reference))
        for _, targets, filenames in batches:
            assert not set(filenames) & set(loader.unreadable)
            assert targets.tolist() == [int(name[0]) for name in filenames]

    @pytest.mark.parametrize("num_read", [0, 1])
    def test_signals_of_slurm_do_not_reach_workers(self, num_read: int) -> None:
        # Before the first batch, a worker may not have run a line yet.
        iterator = KeyedLoader(Numbers(64), 2, num_workers=2)._get_iterator()
        batches = [next(iterator) for _ in range(num_read)]
        workers = iterator._workers
        for name in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1):
            for worker in workers:
                os.kill(worker.pid, name)
        batches += list(iterator)
        assert len(batches) == 32
        assert all(worker.is_alive() for worker in workers)

    @pytest.mark.parametrize(
        ("hanging", "said"), [("1", "15\n"), ("0 3", "15\n"), ("0 2 4", "")]
    )
    def test_workers_that_do_not_begin_are_forked_again(
        self, hanging: str, said: str
    ) -> None:
        """A lock that another thread held at the fork would be waited for for ever."""
        program = (
            "import os, sys, time\n"
            "import torch\n"
            "from torch.utils.data import TensorDataset\n"
            "from lightly_mim.data import loading\n"
            "forks = []\n"
            "def hang():\n"
            "    time.sleep(600 if str(len(forks) - 1) in sys.argv[1:] else 0)\n"
            "os.register_at_fork(before=lambda: forks.append(1), after_in_child=hang)\n"
            "loading._SECONDS_TO_BEGIN = (2, 2, 2)\n"
            "pairs = TensorDataset(torch.arange(6), torch.zeros(6))\n"
            "loader = loading.KeyedLoader(\n"
            "    pairs, 2, training=False, num_workers=2, labels=False\n"
            ")\n"
            "print(sum(int(batch[0].sum()) for batch in loader))\n"
        )
        done = run_program(program, *hanging.split())
        assert done.stdout == said, done.stderr
        assert ("did not begin within 2 s, nor before" in done.stderr) == (not said)

    def test_workers_end_with_the_program(self) -> None:
        # They ignore the SIGTERM with which multiprocessing would end them.
        program = (
            "import torch\n"
            "from torch.utils.data import TensorDataset\n"
            "from lightly_mim.data.loading import KeyedLoader\n"
            "pairs = TensorDataset(torch.zeros(99), torch.zeros(99))\n"
            "iterator = iter(KeyedLoader(pairs, 2, num_workers=1, labels=False))\n"
            "next(iterator)\n"
        )
        done = run_program(program)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_workers_end_before_torch_waits_for_them(self) -> None:
        # What PyTorch before 2.14 registers for workers that pin memory.
        program = (
            "import atexit, torch\n"
            "from torch.utils.data import TensorDataset, dataloader\n"
            "from lightly_mim.data.loading import KeyedLoader\n"
            "class Iterator(dataloader._MultiProcessingDataLoaderIter):\n"
            "    def __init__(self, loader):\n"
            "        super().__init__(loader)\n"
            "        loader.pin_memory = True\n"
            "        atexit.register(lambda: print(self._workers[0].is_alive()))\n"
            "dataloader._MultiProcessingDataLoaderIter = Iterator\n"
            "pairs = TensorDataset(torch.zeros(99), torch.zeros(99))\n"
            "iterator = iter(KeyedLoader(pairs, 2, num_workers=1, labels=False))\n"
            "next(iterator)\n"
        )
        done = run_program(program)
        assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")

    def test_a_forked_process_leaves_the_workers_of_its_parent(self) -> None:
        # From Python 3.13 on, multiprocessing's children run functions at their exit.
        loader = KeyedLoader(Numbers(12), 2, num_workers=1)
        iterator = iter(loader)
        next(iterator)
        child = os.fork()
        if child == 0:
            loading._end_workers()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(list(iterator)) == 5


class TestState:
    def test_state__counts_what_was_handed_out(self) -> None:
        loader = KeyedLoader(Numbers(12), 2, num_workers=1)
        expected = _views(loader) + _views(loader)
        loader.set_epoch(0)
        states, batches = [], []
        for _ in range(2):
            for batch in loader:
                batches.append(batch[0][0])
                states.append(pickle.loads(pickle.dumps(loader.state_dict())))
        _assert_same(batches, expected)
        assert [(s["epoch"], s["batch"]) for s in states] == [
            (number // 6, number % 6) for number in range(1, 13)
        ]
        for done in (1, 5, 6, 8):
            resumed = KeyedLoader(Numbers(12), 2, num_workers=0)
            resumed.load_state_dict(states[done - 1])
            rest: list[Tensor] = []
            while len(rest) < 12 - done:
                rest += _views(resumed)
            _assert_same(rest, expected[done:])

    def test_state__of_other_batches_is_refused(self) -> None:
        state = KeyedLoader(Numbers(12), 2, num_workers=0).state_dict()
        other = KeyedLoader(Numbers(13), 3, num_workers=0)
        with pytest.raises(
            ValueError, match="batch_size was 2 and is 3, num_images was 12 and is 13"
        ):
            other.load_state_dict(state)

    def test_state__keeps_what_was_unreadable(self) -> None:
        loader = KeyedLoader(Numbers(12), 2, num_workers=0)
        loader.unreadable["a.jpg"] = "it is empty"
        other = KeyedLoader(Numbers(12), 2, num_workers=0)
        other.load_state_dict(loader.state_dict())
        assert other.unreadable == {"a.jpg": "it is empty"}


class Recorder(pl.LightningModule):
    """Writes down what it sees; stops at a given batch as a signal would make it."""

    def __init__(self, stop_after: int | None = None, path: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.seen: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.stop_after = stop_after
        self.path = path

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, _, _ = batch
        self.seen.append(views[0])
        loss: Tensor = (views[0] * self.weight).sum()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch[0][0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.seen) == self.stop_after:
            assert self.path is not None
            self.trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


_LENGTH, _BATCH, _EPOCHS = 13, 3, 3  # 4 batches per epoch


def _fit(
    module: Recorder,
    num_workers: int = 0,
    checkpoint: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    hook: bool = False,
    **options: Any,
) -> None:
    def make_loader() -> KeyedLoader:
        return KeyedLoader(Numbers(_LENGTH), _BATCH, num_workers=num_workers)

    if hook:  # Lightning patches DataLoader.__init__ while it calls the hook
        module.train_dataloader = make_loader  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **{"max_epochs": _EPOCHS, **options},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*callbacks used to create.*")
        val = KeyedLoader(Numbers(4), 2, training=False, num_workers=0)
        trainer.fit(module, None if hook else make_loader(), val, ckpt_path=checkpoint)


@pytest.fixture(scope="module")
def uncut() -> list[Tensor]:
    module = Recorder()
    _fit(module)
    return module.seen


class TestLightning:
    def test_fit__epochs_differ_and_validation_does_not(
        self, uncut: list[Tensor]
    ) -> None:
        module = Recorder()
        _fit(module, num_workers=1, hook=True)
        _assert_same(module.seen, uncut)
        loader = KeyedLoader(Numbers(_LENGTH), _BATCH, num_workers=0)
        _assert_same(uncut, [view for _ in range(_EPOCHS) for view in _views(loader)])
        _assert_same(module.validated[-2:], module.validated[:2])

    @pytest.mark.parametrize("num_workers", [0, 1])
    @pytest.mark.parametrize("stop_after", [1, 4, 6, 8, 11])
    def test_fit__cut_between_batches(
        self, tmp_path: Path, uncut: list[Tensor], stop_after: int, num_workers: int
    ) -> None:
        first = Recorder(stop_after, tmp_path / "cut.ckpt")
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            _fit(first, num_workers)
        second = Recorder()
        _fit(second, num_workers, tmp_path / "cut.ckpt")
        _assert_same(first.seen + second.seen, uncut)

    @pytest.mark.parametrize("max_steps", [3, 4, 6])
    def test_fit__stopped_by_max_steps(
        self, tmp_path: Path, uncut: list[Tensor], max_steps: int
    ) -> None:
        saver = pl.callbacks.ModelCheckpoint(
            tmp_path, every_n_train_steps=1, save_last=True, filename="x"
        )
        first = Recorder()
        _fit(first, max_steps=max_steps, max_epochs=-1, callbacks=[saver])
        assert len(first.seen) == max_steps
        second = Recorder()
        _fit(second, checkpoint=tmp_path / "last.ckpt", max_steps=12, max_epochs=-1)
        _assert_same(first.seen + second.seen, uncut)

    def test_fit__after_each_epoch(self, tmp_path: Path, uncut: list[Tensor]) -> None:
        saver = pl.callbacks.ModelCheckpoint(
            tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True
        )
        _fit(Recorder(), callbacks=[saver])
        for epoch in range(_EPOCHS - 1):
            module = Recorder()
            _fit(module, checkpoint=tmp_path / f"epoch={epoch}.ckpt")
            _assert_same(module.seen, uncut[4 * (epoch + 1) :])

    def test_fit__limited_epochs(self, tmp_path: Path, uncut: list[Tensor]) -> None:
        first = Recorder(5, tmp_path / "cut.ckpt")
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            _fit(first, limit_train_batches=2)
        second = Recorder()
        _fit(second, 0, tmp_path / "cut.ckpt", limit_train_batches=2)
        expected = uncut[0:2] + uncut[4:6] + uncut[8:10]
        _assert_same(first.seen + second.seen, expected)


def test_collate__error_and_images() -> None:
    error = BrokenImageError("x")
    assert collate([(torch.zeros(1), 0, "a"), error]) is error
    same = (torch.zeros(3, 4, 4), 0, "a")
    with pytest.raises(ValueError, match=r"c has .*5.* and a .*4, 4"):
        collate([same, same, (torch.zeros(3, 4, 5), 0, "c")])


class Listed(Dataset[Any]):
    """Items of a list."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


_IMAGE = torch.zeros(3, 4, 4)
_TARGETS = [{"boxes": [1]}, torch.zeros(4, 4), "cat", 1.5, None, [1, 2], np.nan]


@pytest.mark.parametrize("target", _TARGETS, ids=str)
@pytest.mark.parametrize("sample", [_IMAGE, [_IMAGE]], ids=["tensor", "views"])
def test_labels__that_are_none(sample: Any, target: Any) -> None:
    dataset = Listed((sample, 3), (sample, -1), (sample, target))
    options: dict[str, Any] = {"training": False, "num_workers": 0}
    ((_, labels, names),) = KeyedLoader(dataset, 3, labels=False, **options)
    assert labels.tolist() == [0, 0, 0]
    assert list(names) == ["0", "1", "2"]
    with pytest.raises(BrokenImageError, match="label of sample 2 .*is no class"):
        list(KeyedLoader(dataset, 3, **options))


def test_labels__where_there_are_some() -> None:
    """None keeps those that are classes; True refuses the others by name."""
    labels = [3, None, 0.5, np.int64(2), 2**70, torch.zeros(2, 2)]
    items = [(torch.zeros(3, 4, 4), label, str(i)) for i, label in enumerate(labels)]
    options: dict[str, Any] = {"training": False, "num_workers": 0}
    ((_, found, _),) = KeyedLoader(items, 6, labels=None, **options)
    assert found.tolist() == [3, -1, -1, 2, -1, -1]
    with pytest.raises(ValueError, match="sample 0 .* whole numbers of 64 bits"):
        list(KeyedLoader(items[4:5], 1, **options))


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor, bool])
def test_labels__of_any_whole_number(kind: Any) -> None:
    loader = KeyedLoader(
        Listed((_IMAGE, kind(1)), (_IMAGE, -1)), 2, training=False, num_workers=0
    )
    ((_, labels, _),) = loader
    assert labels.tolist() == [1, -1]
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("sample", [None, _PHOTO, "x.jpg", [], [_PHOTO], np.zeros(3)])
def test_samples__that_cannot_be_used_are_named(sample: Any) -> None:
    loader = KeyedLoader(Listed(_IMAGE, (sample, 0)), 2, training=False, num_workers=0)
    with pytest.raises(BrokenImageError, match="Sample 1 .*cannot.*a transform"):
        list(loader)


def test_keyed_dataset__key() -> None:
    dataset: Any = KeyedDataset(Numbers(9), seed=0)

    def noise(key: tuple[int, int]) -> Any:
        return dataset[key][0][0][1:].tolist()

    assert noise((1, 2)) == noise((1, 2))
    different = [noise(key) for key in ((1, 2), (2, 1), (1, 3), (0, 2))]
    other: Any = KeyedDataset(Numbers(9), seed=1)
    different.append(other[1, 2][0][0][1:].tolist())
    assert len({tuple(values) for values in different}) == 5


def test_default_num_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda _: set(range(12)), raising=False
    )
    dataset: Any = Numbers(3)
    assert default_num_workers(dataset) == 8
    assert default_num_workers(dataset, world_size=4) == 3
    assert default_num_workers(dataset, world_size=100) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_num_workers(dataset, world_size=4) == 6
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert default_num_workers(dataset, world_size=4) == 5
    dataset.in_memory = True
    assert default_num_workers(dataset) == 0


def test_global_batches__end_with_their_pieces() -> None:
    batches = GlobalBatches(10, 3, training=False, pieces=[4, 5, 1])
    indices = [[index for _, index in batch] for batch in batches]
    assert indices == [[0, 1, 2], [3], [4, 5, 6], [7, 8], [9]]
    assert len(batches) == 5
    refused: list[dict[str, Any]] = [
        {"training": False, "pieces": [4, 5]},
        {"training": False, "pieces": []},
        {"training": True, "pieces": [4, 6]},
        {"training": False, "pieces": [4, 6], "world_size": 3},
    ]
    for options in refused:
        with pytest.raises(ValueError, match="pieces"):
            GlobalBatches(10, 3, **options)
