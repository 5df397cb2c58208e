from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from lightly.data import LightlyDataset
from PIL import Image
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.data import ImageDataset, open_data, seed_from
from lightly_mim.data.decode import decode_unchecked
from lightly_mim.evaluation import Linear, extract_features
from lightly_mim.evaluation.label_free_measures import rank_me
from lightly_mim.methods import SimMIM
from lightly_mim.monitoring import FeatureWatch, OnlineProbe
from lightly_mim.monitoring.watch import Look, alignment_scores, is_worse, knn_scores
from lightly_mim.pretraining import Pretraining
from lightly_mim.transforms import EvalTransform, SimMIMTransform

from .conftest import TINY_VIT
from .test_pretraining import (
    DROPPING,
    Interrupt,
    assert_same,
    rows_of,
    run,
    weights,
)

TRANSFORM = EvalTransform(32, normalize=None)


class Watch(Callback):
    """Notes the random state, the modes and the gradients at the start of epochs."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        modes = [module.training for module in pl_module.modules()]
        grads = [p.grad is None for p in pl_module.parameters()]
        state = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
        self.seen.append((grads, modes, state))


def seed_all() -> None:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002


@pytest.fixture(scope="module")
def plain(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    """A run that nothing looks at, with dropout in it."""
    out, watch = tmp_path_factory.mktemp("runs") / "plain", Watch()
    seed_all()
    run(out, photos, rank_every=0, callbacks=[watch])
    return out, watch


def column(path: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows_of(path) if row.get(name)]


@pytest.mark.parametrize(
    ("validate", "probe"), [(True, "linear"), (False, "linear"), (True, "attentive")]
)
def test_probe_and_alarm__change_nothing(
    plain: tuple[Path, Watch],
    photos: Path,
    tmp_path: Path,
    validate: bool,
    probe: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch = Watch()
    seed_all()
    run(
        tmp_path / "run",
        photos,
        probe=probe,
        probe_every=2,
        rank_every=1,
        callbacks=[watch],
        validate=validate,
        progress=False,
    )
    assert_same(weights(tmp_path / "run"), weights(plain[0]))
    # Without a validation Lightning drops the gradients earlier.
    first = 0 if validate else 1
    assert [e[first:] for e in watch.seen] == [e[first:] for e in plain[1].seen]
    assert column(tmp_path / "run", "train_loss") == column(plain[0], "train_loss")
    # Before the first step, after every second epoch, and after the last one.
    rows = [row for row in rows_of(tmp_path / "run") if row["probe_top1"]]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert [int(row["step"]) for row in rows] == [0, 7, 11]
    assert all(0 <= float(row["probe_top1"]) <= 1 for row in rows)
    for name in ("rankme", "uniformity", "knn_top1"):
        assert len(column(tmp_path / "run", name)) == 4
    printed = capsys.readouterr().out
    value = float(rows[0]["probe_top1"])
    assert f"before training: probe_top1 {value:.4g}\n" in printed
    assert "kNN on 32 training images: " in printed
    lines = [line for line in printed.splitlines() if line.startswith("epoch ")]
    assert ["probe_top1" in line for line in lines] == [False, True, True]
    assert all("rankme" in line for line in lines)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["probe"], config["probe_every"]) == (probe, 2)


WATCHED: dict[str, Any] = {"probe": "linear", "probe_every": 1, "rank_every": 1}
ALONE: dict[str, Any] = {"rank_every": 0}


def logged_rows(path: Path) -> list[dict[str, str]]:
    names = ("step", "epoch", "probe_top1", "rankme", "knn_top1", "train_loss")
    return [{name: row[name] for name in names} for row in rows_of(path)]


@pytest.fixture(scope="module")
def watched_rows(
    photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """The rows of a run that was watched and not cut."""
    out = tmp_path_factory.mktemp("runs") / "watched"
    run(out, photos, **WATCHED, tensorboard=True)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("probe_top1", "rankme", "knn_top1"):
        assert events.Scalars(name)[0].step == 0
    return logged_rows(out)


@pytest.mark.parametrize(
    ("first", "then", "epoch", "batch", "save"),
    [
        (WATCHED, WATCHED, 1, 2, True),
        (WATCHED, WATCHED, 2, 0, False),
        (WATCHED, ALONE, 1, 2, True),
        (ALONE, WATCHED, 1, 2, True),
    ],
)
def test_probe__resumed_run_ends_the_same(
    plain: tuple[Path, Watch],
    watched_rows: list[dict[str, str]],
    photos: Path,
    tmp_path: Path,
    first: dict[str, Any],
    then: dict[str, Any],
    epoch: int,
    batch: int,
    save: bool,
) -> None:
    """Also if it was begun with the probe and goes on without, or the other way."""
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt" if save else None
    with pytest.raises(InterruptedError):
        interrupt = Interrupt(epoch, batch, checkpoint)
        run(tmp_path / "run", photos, callbacks=[interrupt], **first)
    torch.manual_seed(123)
    run(tmp_path / "run", photos, callbacks=[Interrupt(9, 9)], resume=True, **then)
    assert_same(weights(tmp_path / "run"), weights(plain[0]))
    if first is WATCHED and then is WATCHED:
        assert logged_rows(tmp_path / "run") == watched_rows
    expected = (epoch + 1 if first is WATCHED else 0) + (
        3 - epoch if then is WATCHED else 0
    )
    for name in ("probe_top1", "rankme"):
        assert len(column(tmp_path / "run", name)) == expected


def test_probe__is_the_evaluation(photos: Path) -> None:
    """Whole images, evaluation mode, and nothing but features in between."""
    torch.manual_seed(0)
    method = SimMIM(**DROPPING).train()
    train, test = open_data(photos, transform=TRANSFORM)
    assert test is not None
    probe = OnlineProbe(train, test, num_workers=0)
    accuracy = probe.score(method)
    assert probe.seconds > 0
    assert method.training
    parts = {}
    for name, data in (("train", train), ("test", test)):
        parts[name] = extract_features(method.encoder, data, num_workers=0)
    # The images in the order that the probe has drawn them.
    names = [train[i][2] for i in probe._draw(train, "train")]
    order = [parts["train"].filenames.index(name) for name in names]
    settings = probe.protocol
    assert isinstance(settings, Linear)
    shuffled = extract_features(
        method.encoder,
        torch.utils.data.Subset(train, order),
        num_workers=0,
    )
    (outcome,) = settings(shuffled, parts["test"], 2, seed=seed_from(0, "probe"))
    expected = (outcome.ranked[:, 0] == parts["test"].labels).double().mean()
    assert accuracy == pytest.approx(float(expected))


class Coloured(Dataset[Any]):
    """Pictures whose brightness is their class."""

    def __init__(self, num_images: int, start: int = 0, classes: int = 2) -> None:
        self.numbers = range(start, start + num_images)
        self.classes = [str(number) for number in range(classes)]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        number = self.numbers[index]
        self.read.append(number)
        label = number % len(self.classes)
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(60, (3, 32, 32), generator=generator) + 150 * label
        return pixels.to(torch.uint8), label, str(number)


def test_probe__learns(photos: Path) -> None:
    method = SimMIM(**TINY_VIT)
    assert OnlineProbe(Coloured(40), Coloured(20, 50)).score(method) > 0.9
    assert OnlineProbe(Coloured(60)).score(method) > 0.9
    attentive = OnlineProbe(Coloured(40), Coloured(20, 50), "attentive")
    assert attentive.max_images == 1000
    state = torch.get_rng_state()
    assert attentive.score(method) > 0.9
    assert torch.equal(torch.get_rng_state(), state)


def test_probe__reads_each_image_once_and_never_the_test_images() -> None:
    data = Coloured(60)
    probe = OnlineProbe(data, max_images=20, num_workers=0)
    method = SimMIM(**TINY_VIT)
    first = probe.score(method)
    assert probe.score(method) == first
    # A fifth of 40 drawn ones to score on, at most 20 to fit on, none of them twice.
    assert len(data.read) == len(set(data.read)) == 28
    test = Coloured(30, 100)
    probe = OnlineProbe(data, test, max_images=20, num_workers=0)
    probe.read()
    assert len(test.read) == 20
    assert probe._parts is not None
    assert probe._parts[0].images.dtype == torch.uint8


def test_pretrain__probe_leaves_validation_images_alone(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    from lightly_mim.data import folder

    def watched(path: Any, *arguments: Any) -> Any:
        read.append(Path(path))
        return decode_unchecked(path, *arguments)

    monkeypatch.setattr(folder, "decode_unchecked", watched)
    run(tmp_path / "a", photos, epochs=1, probe="linear", validate=False)
    assert read
    assert not [path for path in read if "val" in path.parent.parent.name]


def test_probe__with_ones_own_trainer(photos: Path, tmp_path: Path) -> None:
    data = Coloured(32)
    module = Pretraining(SimMIM(**TINY_VIT), batch_size=8)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    best = ModelCheckpoint(tmp_path, monitor="probe_top1", mode="max")
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            OnlineProbe(data, Coloured(10, 40), every_n_epochs=1),
            FeatureWatch(data, every_n_epochs=1),
            best,
        ],
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*num_workers.*|.*logging interval.*|.*no `val_dataloader`.*"
        )
        trainer.fit(module, loader)
    assert float(trainer.callback_metrics["probe_top1"]) == best.best_model_score
    assert trainer.callback_metrics["rankme"] > 1


# Bad input: nothing is written.


@pytest.fixture
def flat(photos: Path, tmp_path: Path) -> Path:
    """Images without classes."""
    root = tmp_path / "flat"
    root.mkdir()
    for number, path in enumerate(sorted((photos / "train").rglob("*.jpg"))):
        shutil.copy(path, root / f"{number}.jpg")
    return root


def test_pretrain__probe_needs_labels(flat: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"flat have no labels.*leave the probe out"):
        run(tmp_path / "run", flat, probe="linear")
    with pytest.raises(ValueError, match="have no labels"):
        run(tmp_path / "run", photos / "train", val=flat, probe="linear")
    one = tmp_path / "one"
    shutil.copytree(photos / "train" / "temple", one / "temple")
    with pytest.raises(ValueError, match="all 13 that .* are of one"):
        run(tmp_path / "run", one, probe="linear", batch_size=4)
    assert not (tmp_path / "run").exists()


def test_pretrain__probe_needs_images_without_augmentation(
    photos: Path, tmp_path: Path
) -> None:
    transform: Any = SimMIMTransform(32)
    views = LightlyDataset(str(photos / "train"), transform=transform)
    with pytest.raises(ValueError, match="has a transform of its own"):
        run(tmp_path / "run", views, probe="linear")
    assert not (tmp_path / "run").exists()
    # The alarm takes what there is.
    run(tmp_path / "run", views, epochs=1)
    assert column(tmp_path / "run", "rankme")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"probe": "quadratic"},
            "probe of pretrain is .*'linear', 'attentive', got probe='quadratic'",
        ),
        ({"probe": "linear", "probe_every": -1}, "probe_every=-1"),
        ({"rank_every": 1.5}, "rank_every=1.5"),
    ],
)
def test_pretrain__refuses(
    photos: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", photos, **options)
    assert not (tmp_path / "run").exists()


def test_probe__too_few_images() -> None:
    with pytest.raises(ValueError, match="got 4 training images and no validation"):
        OnlineProbe(Coloured(4)).read()


# Collapse.


def test_alarm__measures_whole_images() -> None:
    torch.manual_seed(0)
    method = SimMIM(**DROPPING).train()
    data = Coloured(40)
    measured = FeatureWatch(data, num_workers=0).measure(method).values
    features = extract_features(method.encoder, data, num_workers=0)
    (values,) = features.values.values()
    assert measured["rankme"] == pytest.approx(rank_me(values), rel=1e-6)
    assert method.training
    alarm = FeatureWatch(data, num_images=10, num_workers=0)
    data.read.clear()
    alarm.measure(method)
    alarm.measure(method)
    assert data.read == list(range(0, 40, 4))


class Collapse(Callback):
    """Makes the encoder give every image the same feature."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            norm = pl_module.method.encoder.vit.norm
            norm.weight.data.zero_()
            norm.bias.data.fill_(1)
            norm.requires_grad_(False)


def test_alarm__goes_off_once(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(out, photos, rank_every=1, callbacks=[Collapse()])
    said = [str(w.message) for w in seen if "collapsed" in str(w.message)]
    assert len(said) == 1
    assert "seems to have collapsed: in epoch 2" in said[0]
    ranks = column(out, "rankme")[1:]
    assert ranks[0] > 1.5 > ranks[1]
    # A resumed run remembers both.
    state = torch.load(out / "checkpoints" / "last.ckpt")["callbacks"]
    (alarm,) = (state[key] for key in state if "CollapseAlarm" in key)
    assert alarm["warned"]
    assert alarm["highest"] >= max(ranks)


def test_alarm__fall_to_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        global_step, current_epoch, max_epochs, max_steps = 0, 0, 9, -1
        is_global_zero, precision = True, "32-true"
        loggers = ()

        class strategy:
            broadcast = staticmethod(lambda value: value)

    class Module:
        method = SimMIM(**TINY_VIT)
        log_dict = staticmethod(lambda values: None)

    # A rank that is low alone is no alarm: the features must be worse as well.
    looks = iter([(40, 30), (40, 40), (40, 7.9), (20, 8.1), (20, 7.9), (20, 7.0)])

    def measure(*_: Any) -> Look:
        right, rank = next(looks)
        return look(right, 40, rankme=rank)

    alarm = FeatureWatch(Coloured(4), every_n_epochs=1)
    monkeypatch.setattr(alarm, "measure", measure)
    trainer: Any = Trainer()
    alarm.on_train_start(trainer, Module())  # type: ignore[arg-type]
    for _ in range(3):
        alarm.on_train_epoch_end(trainer, Module())  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="7.9 directions .*40.0 at most"):
        alarm.on_train_epoch_end(trainer, Module())  # type: ignore[arg-type]
    alarm.on_train_epoch_end(trainer, Module())  # type: ignore[arg-type]


# Better or worse than before the training.


def look(right: int, total: int, rankme: float = 10.0, name: str = "knn_top1") -> Look:
    scores = (torch.arange(total) < right).float()
    values = {"rankme": rankme, "uniformity": -1.0, name: float(scores.mean())}
    return Look(values, scores, images=1, step=1)


def test_watch__is_worse_beyond_chance() -> None:
    # Of 100 images n are worse and none is better: 2^-n, 3.1 % for 5, 6.3 % for 4.
    assert is_worse(look(60, 100), look(55, 100))
    assert not is_worse(look(60, 100), look(56, 100))
    assert not is_worse(look(60, 100), look(80, 100))
    assert not is_worse(look(60, 100), look(60, 100))
    # Without labels both must be worse.
    start = look(60, 100, 10.0, "alignment")
    assert is_worse(start, look(40, 100, 5.9, "alignment"))
    assert not is_worse(start, look(40, 100, 6.1, "alignment"))
    assert not is_worse(start, look(60, 100, 1.0, "alignment"))


def test_watch__knn_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3 * 7  # numbers need not be consecutive
    features = torch.randn(90, 6, generator=generator) * torch.arange(1, 7)
    features += labels[:, None] / 7
    mine = knn_scores(features, labels)
    scaled = StandardScaler().fit_transform(features.numpy())

    def vote(distances: Any) -> Any:  # cosine distances
        return np.exp((1 - distances) / 0.07)

    model = KNeighborsClassifier(20, metric="cosine", weights=vote)
    predicted = cross_val_predict(model, scaled, labels.numpy(), cv=LeaveOneOut())
    assert mine.tolist() == (predicted == labels.numpy()).astype(float).tolist()
    assert 0.4 < mine.mean() < 1


def test_watch__alignment() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, 8, generator=generator)
    near = first + 0.01 * torch.randn(40, 8, generator=generator)
    other = torch.randn(40, 8, generator=generator)
    assert alignment_scores(first, near).mean() == 1
    assert alignment_scores(first, other).mean() == pytest.approx(0.5, abs=0.1)
    same = torch.ones(40, 8)
    assert alignment_scores(same, same).mean() == 0


class Labelled(Coloured):
    """The same pictures with other labels."""

    def __init__(self, label: Any) -> None:
        super().__init__(24)
        self.label = label

    def __getitem__(self, index: int) -> tuple[Tensor, Any, str]:
        image, number, name = super().__getitem__(index)
        return image, self.label(number, index), name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (lambda number, index: number, "knn_top1"),
        (lambda number, index: np.int64(number), "knn_top1"),
        (lambda number, index: 2**40 * number, "knn_top1"),
        (lambda number, index: 0, "alignment"),  # one class
        (lambda number, index: index, "alignment"),  # no class twice
        (lambda number, index: None, "alignment"),
        (lambda number, index: 0.5 * number, "alignment"),
        (lambda number, index: 2**70, "alignment"),
        (lambda number, index: number - 1, "alignment"),  # -1 is no class
        (lambda number, index: torch.zeros(4, 4), "alignment"),
    ],
)
def test_watch__uses_labels_where_there_are_some(label: Any, name: str) -> None:
    measured = FeatureWatch(Labelled(label), num_workers=0).measure(SimMIM(**TINY_VIT))
    assert name in measured.values
    assert len(measured.scores) == 24
    assert len(measured.values) == 3


def test_watch__takes_whole_classes_where_they_are_many(tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / f"{number:02d}"
        folder.mkdir()
        for copy in range(12):
            image = Image.new("RGB", (32, 32), (8 * number, copy, 0))
            image.save(folder / f"{copy}.png")
    data = ImageDataset(tmp_path, TRANSFORM)
    watch = FeatureWatch(data, num_images=50, num_workers=0)
    watch.measure(SimMIM(**TINY_VIT))
    assert watch._read is not None
    classes, counts = watch._read.labels.unique(return_counts=True)
    assert classes.tolist() == [0, 6, 12, 18, 24]
    assert counts.tolist() == [10] * 5


class Digits(Dataset[Any]):
    """scikit-learn's digits, 256 of them at 16 x 16 pixels."""

    in_memory = True

    def __init__(self, labels: bool = True) -> None:
        data = load_digits()
        pixels = torch.tensor(data.images[:256] * 255 / 16).to(torch.uint8)
        self.images = pixels[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
        self.labels = data.target[:256].tolist() if labels else [None] * 256

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any, str]:
        return self.images[index], self.labels[index], str(index)


def pretrain_digits(out: Path, labels: bool, **options: Any) -> list[str]:
    """Returns the warnings about the features."""

    def build() -> SimMIM:
        sizes = {"img_size": 16, "patch_size": 4, "mask_patch_size": 4}
        # A start that a few seconds can better.
        return SimMIM(**(TINY_VIT | sizes), in_chans=1, init="timm")

    options = {"batch_size": 32, "warmup_epochs": 1, "rank_every": 100, **options}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(out, Digits(labels), method=build, progress=False, **options)
    return [str(w.message) for w in seen if "are worse than before" in str(w.message)]


@pytest.mark.parametrize("labels", [True, False])
def test_watch__warns_of_a_rate_far_too_high(
    tmp_path: Path, labels: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (warning,) = pretrain_digits(tmp_path / "run", labels, lr=5.0, epochs=3)
    name = "kNN on 256" if labels else "Features of 256 training images: RankMe"
    assert name in warning
    assert "Try a lower learning rate" in warning
    assert "leave out recipe" in warning
    assert " before training, " not in capsys.readouterr().out
    values = column(tmp_path / "run", "knn_top1" if labels else "alignment")
    assert values[0] > values[-1]


@pytest.mark.parametrize("labels", [True, False])
def test_watch__praises_a_good_run(
    tmp_path: Path, labels: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not pretrain_digits(tmp_path / "run", labels, lr=6e-3, epochs=40)
    printed = capsys.readouterr().out
    if labels:
        before, after = column(tmp_path / "run", "knn_top1")
        assert before < after
        assert (
            f"kNN on 256 training images: {100 * before:.1f} % before training, "
            f"{100 * after:.1f} % after.\n"
        ) in printed
    else:
        assert "Features of 256 training images: RankMe " in printed


def test_watch__state() -> None:
    """A checkpoint of an earlier version has no looks."""
    watch = FeatureWatch(Coloured(4))
    watch.load_state_dict({"highest": 3.0, "warned": True})
    assert watch.state_dict() == {
        "highest": 3.0,
        "warned": True,
        "start": None,
        "last": None,
    }
    watch._start = watch._last = look(2, 4)
    again = FeatureWatch(Coloured(4))
    again.load_state_dict(watch.state_dict())
    assert again._start is not None
    assert torch.equal(again._start.scores, watch._start.scores)
    assert again._start.values == watch._start.values


@pytest.mark.parametrize("images", [1, 2])
def test_watch__compares_the_same_images_only(
    images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = FeatureWatch(Coloured(4))
    watch._start = look(3, 4)._replace(images=images)
    watch._last = look(4, 4)
    trainer: Any = type("Trainer", (), {"is_global_zero": True})
    watch.on_fit_end(trainer, None)  # type: ignore[arg-type]
    change = "75.0 % before training, 100.0 % after."
    if images == 2:
        change = "100.0 % after training (before it was not measured)."
    assert capsys.readouterr().out == f"kNN on 4 training images: {change}\n"


# Several processes.

DDP_SCRIPT = """
import sys
from lightly_mim.methods import SimMIM
from lightly_mim.pretraining import pretrain
from pytorch_lightning.callbacks import Callback

def build():
    return SimMIM(**{vit!r})

class Agree(Callback):
    def on_train_end(self, trainer, module):
        import json, pathlib
        seen = {{name: float(trainer.callback_metrics[name])
                for name in ("probe_top1", "rankme")}}
        path = pathlib.Path(sys.argv[1]).parent / f"rank{{trainer.global_rank}}.json"
        path.write_text(json.dumps(seen))

if __name__ == "__main__":
    watched = sys.argv[2] == "watched"
    pretrain(
        sys.argv[1], {data!r}, build, epochs=2, batch_size=8, lr=0.002,
        precision="32-true", accelerator="cpu", devices=2, strategy="ddp",
        num_workers=0, tensorboard=False, rank_every=int(watched),
        probe="linear" if watched else None, probe_every=1,
        callbacks=[Agree()] if watched else None,
    )
"""


@pytest.mark.slow
def test_probe__two_processes_agree(photos: Path, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT.format(vit=DROPPING, data=str(photos)))
    for name in ("plain", "watched"):
        subprocess.run(
            [sys.executable, script, tmp_path / name, name],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=240,
        )
    assert_same(weights(tmp_path / "watched"), weights(tmp_path / "plain"))
    first, second = ((tmp_path / f"rank{n}.json").read_text() for n in (0, 1))
    assert first == second
    assert len(column(tmp_path / "watched", "probe_top1")) == 3


def test_cli__probe(photos: Path, tmp_path: Path) -> None:
    from lightly_mim.cli import main

    from .test_cli import RUN, VIT

    words = ["--out", str(tmp_path / "run"), "--data", str(photos), *VIT, *RUN]
    main(["pretrain", *words, "--probe", "linear", "--probe_every", "1"])
    assert len(column(tmp_path / "run", "probe_top1")) == 2
