"""Damage is noticed: every file of a run and of an evaluation, at random places."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from lightly_mim.checkpoints import load_whole, read_encoder
from lightly_mim.evaluation import FeatureStore, evaluate, evaluate_dense
from lightly_mim.evaluation.resume import Kept
from lightly_mim.files import read_sealed
from lightly_mim.pretraining import Pretraining, pretrain
from lightly_mim.runs import RunDirectory
from lightly_mim.training.logs import MetricsLogger
from lightly_mim.training.saving import AtomicCheckpointIO

from .test_pretraining import Interrupt, assert_same, build, rows_of, run, weights

# The function `evaluate` hides the module of this name.
ENTRY: Any = sys.modules["lightly_mim.evaluation.evaluate"]

OTHER: list[Callback] = [Interrupt(9, 9)]
EVALUATION: dict[str, Any] = {"device": "cpu", "num_workers": 0, "batch_size": 8}
RAW = r"weights_only|zip archive|EOFError|KeyError|Traceback"


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut in its second epoch, and the same one that was not."""
    root = tmp_path_factory.mktemp("httpruns")
    last = root / "cut" / "checkpoints" / "last.ckpt"
    with pytest.raises(InterruptedError):
        run(root / "cut", photos, callbacks=[Interrupt(1, 2, last)])
    run(root / "whole", photos)
    return root


@pytest.fixture
def cut(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "cut", tmp_path / "cut"))


def mutations(content: bytes, number: int, seed: int = 0) -> list[bytes]:
    """Flips bits, cuts, and replaces a piece, at places that the seed says."""
    chance = random.Random(seed)
    made = [b"", content[:-1], content[: len(content) // 2]]
    for _ in range(number):
        place = chance.randrange(len(content))
        piece = bytearray(content)
        piece[place] ^= 1 << chance.randrange(8)
        made.append(bytes(piece))
        made.append(content[: chance.randrange(len(content))])
        length = chance.randrange(1, 64)
        made.append(content[:place] + bytes(length) + content[place + length :])
    return made


def check(
    path: Path, read: Callable[[], Any], number: int = 25, names: str = ""
) -> int:
    """Returns how many mutations of a file were noticed; others must change nothing."""
    content, expected, noticed = path.read_bytes(), read(), 0
    for mutation in mutations(content, number):
        path.write_bytes(mutation)
        try:
            found = read()
        except ValueError as error:
            noticed += 1
            assert names or str(path) in str(error)
            for word in RAW.split("|"):
                assert word not in str(error)
        else:
            assert same(found, expected), mutation[:200]
    path.write_bytes(content)
    assert same(read(), expected)
    return noticed


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        # The name of a checksum may have changed, and it is one more entry then.
        return a.keys() >= b.keys() and all(same(a[name], b[name]) for name in b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_files_of_a_run__are_whole_or_damaged(runs: Path, cut: Path) -> None:
    directory = RunDirectory(cut)
    for path in (directory.checkpoint, directory.previous):
        io = AtomicCheckpointIO(
            lambda: None, {directory.checkpoint: directory.previous}
        )
        assert check(path, partial(io.load_checkpoint, path), 20) > 50
    assert check(directory.checkpoint, lambda: tuple(read_encoder(cut)), 20) > 50
    assert check(directory.config, directory.stored_config) > 60
    assert check(directory.history, directory._stored_history) > 60
    encoder = shutil.copy(runs / "whole" / "encoder.safetensors", cut)
    assert check(Path(encoder), lambda: tuple(read_encoder(cut)), 20) > 50
    marker = Path(shutil.copy(runs / "whole" / "finished.json", cut))
    assert check(marker, lambda: read_sealed(marker, "Do.")) > 60


def test_metrics__damage_is_named(cut: Path) -> None:
    path, logger = cut / "metrics.csv", MetricsLogger(cut, lambda: None)
    content = path.read_bytes()
    for mutation in [*mutations(content, 40), content.replace(b"step", b"stop")]:
        path.write_bytes(mutation)
        for act in (
            lambda: logger.go_on(6, None, [logger]),
            # What Lightning asks for before it restores anything.
            lambda: MetricsLogger(cut, lambda: None).experiment,
        ):
            try:
                act()
            except ValueError as error:
                assert "metrics.csv is damaged" in str(error)
    path.unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        with pytest.raises(ValueError, match=r"metrics\.csv is damaged: it is a"):
            logger.go_on(6, None, [logger])
        path.unlink()


def test_resume__from_the_checkpoint_before(runs: Path, cut: Path) -> None:
    directory = RunDirectory(cut)
    content = bytearray(directory.checkpoint.read_bytes())
    content[len(content) // 2] ^= 4
    directory.checkpoint.write_bytes(content)
    ways: list[dict[str, Any]] = [{}, {"seed": 0}]
    for words in ways:
        with pytest.raises(
            ValueError, match=r"last\.ckpt is damaged.*rename .*previous"
        ):
            pretrain(cut, resume=True, callbacks=OTHER, **words)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged.*previous\.ckpt"):
        read_encoder(cut)
    assert read_encoder(directory.previous).spec["unfinished"]["step"] == 4
    directory.checkpoint.unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is gone.*rename"):
        pretrain(cut, resume=True, callbacks=OTHER)
    directory.previous.rename(directory.checkpoint)
    pretrain(cut, resume=True, callbacks=OTHER)
    assert_same(weights(cut), weights(runs / "whole"))
    assert len(rows_of(cut)) == len(rows_of(runs / "whole"))
    assert not directory.previous.exists()  # it has finished


def test_checkpoint_before__behind_a_link(photos: Path, tmp_path: Path) -> None:
    """Lightning writes to where the link points."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InterruptedError):
        run(tmp_path / "link" / "out", photos, callbacks=[Interrupt(2, 0)])
    directory = RunDirectory(tmp_path / "real" / "out")
    steps = [
        torch.load(path)["global_step"]
        for path in (directory.previous, directory.checkpoint)
    ]
    assert steps == [4, 8]


def test_resume__of_a_finished_run_without_its_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The method that is returned is in the checkpoint, so its damage is an error."""
    whole = Path(shutil.copytree(runs / "whole", tmp_path / "whole"))
    last = RunDirectory(whole).checkpoint
    content = last.read_bytes()
    for damage in (content[:-99], b"", content[:200] + b"x" + content[201:], None):
        last.unlink()
        if damage is not None:
            last.write_bytes(damage)
        with pytest.raises(
            ValueError, match=r"last\.ckpt is (damaged|gone).*encoder\.safetensors"
        ):
            pretrain(whole, resume=True)
        assert "nothing is left" not in capsys.readouterr().out
        last.touch()
    last.write_bytes(content)
    method = pretrain(whole, resume=True)
    assert "nothing is left" in capsys.readouterr().out
    assert_same(method.state_dict(), {k.removeprefix("method."): v
        for k, v in weights(whole).items()})  # fmt: skip
    assert read_encoder(whole).spec["name"] == "vit_tiny_patch16_224"


def test_resume__of_names_that_look_like_addresses(
    runs: Path, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cut.parent)
    for name in ("http", "s3"):
        shutil.copytree(cut, cut.parent / f"{name}run" / "a")
        pretrain(f"{name}run/a", resume=True, callbacks=OTHER)
        assert_same(weights(Path(f"{name}run/a")), weights(runs / "whole"))
    spec = read_encoder("httprun/a/checkpoints/last.ckpt").spec
    assert spec["name"] == "vit_tiny_patch16_224"


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_checkpoints_of_others__are_not_unpickled(
    runs: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    last = RunDirectory(cut).checkpoint
    content = torch.load(last)
    hostile: Any
    for hostile in (
        *(Evil(), {"state_dict": {}}, [], content | {"callbacks": Evil()}),
        *(content | {"metrics_row": row} for row in (3, {"step": "a"}, {"lr": 0.1})),
    ):
        torch.save(hostile, last)
        for load in (
            lambda: pretrain(cut, resume=True, callbacks=OTHER),
            lambda: Pretraining.load_from_checkpoint(last, method=build()),
        ):
            with pytest.raises(
                ValueError, match=r"last\.ckpt is not a checkpoint that"
            ):
                load()
    marked = Path(shutil.copy(runs / "whole" / "finished.json", cut))
    with pytest.raises(ValueError, match=r"last\.ckpt is not a checkpoint that"):
        pretrain(cut, resume=True, callbacks=OTHER)
    assert not Path("executed").exists() and marked.exists()
    Path("http").mkdir()
    torch.save(content, "http/a.ckpt")
    module = Pretraining.load_from_checkpoint("http/a.ckpt", method=build())
    name = "method.encoder.vit.norm.weight"
    assert torch.equal(module.state_dict()[name], content["state_dict"][name])


def test_resume__other_configurations(cut: Path) -> None:
    directory = RunDirectory(cut)
    text = directory.config.read_text()
    directory.config.write_text(text.replace("lr: 0.002", "lr: 0.003", 1))
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read: its checksum"):
        pretrain(cut, resume=True, callbacks=OTHER)
    directory.config.write_text(text.partition("\n")[2])  # of an earlier version
    assert directory.stored_config() is not None
    directory.config.write_text("[")
    assert directory.check({}, resume=False, overwrite=True) == {}


@pytest.fixture(scope="module")
def evaluated(
    runs: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """An evaluation that was cut before it wrote its results, and its results."""
    out = tmp_path_factory.mktemp("evaluations") / "cut"
    arguments = (runs / "whole", photos, ["knn", "linear"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ENTRY, "to_text", interrupt)
        with pytest.raises(InterruptedError):
            evaluate(*arguments, out=out, **EVALUATION)
    found = evaluate(*arguments, **EVALUATION)
    return {"out": out, "arguments": arguments, "rows": found.rows}


def interrupt(*_: Any) -> None:
    raise InterruptedError


def test_files_of_an_evaluation__are_whole_or_made_again(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(evaluated["out"], tmp_path / "out"))
    rows = sorted((out / "rows").iterdir())
    assert len(rows) == 2
    for path in rows:
        kept = Kept({}, (), out, None, {})
        content, expected = path.read_bytes(), kept.read(path.stem)
        assert expected is not None
        for mutation in mutations(content, 40):
            path.write_bytes(mutation)
            assert kept.read(path.stem) in (None, expected)
        assert len(kept.notes) > 100
        # Whole files in the place of others.
        swapped = [row for row in rows if row != path]
        swapped += [(out / "features").glob("**/key.json").__next__()]
        for other in swapped:
            path.write_bytes(other.read_bytes())
            assert kept.read(path.stem) is None
            assert kept.notes[-1] == f"{path} is another row. It is made again."
        path.write_bytes(content)
    features = [p for p in (out / "features").rglob("*") if p.is_file()]
    assert {p.suffix for p in features} == {".npy", ".json"}
    keys = [(1, "mean"), (1, "cls")]
    for path in features:
        key = read_sealed(path.parent / "key.json", "Do.")
        number = len(read_sealed(path.parent / "images.json", "Do.")["labels"])
        store = FeatureStore(out / "features", key, number)
        assert store.path == path.parent
        content, missed = path.read_bytes(), 0
        whole = [v.clone() for v in store.read(keys).values.values()]  # type: ignore[union-attr]
        for mutation in mutations(content, 25):
            path.write_bytes(mutation)
            if missing := store.missing(keys):
                missed += 1
                assert path.name == "images.json" or len(missing) == 1
            else:
                found = store.read(keys)
                assert found is not None
                assert same(list(found.values.values()), whole)
        assert missed > 60 or path.name == "key.json"
        path.write_bytes(content)


def test_evaluate__says_what_was_damaged(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(evaluated["out"], tmp_path / "out"))
    for path in (*(out / "rows").iterdir(), *out.rglob("*.npy")):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = evaluate(*evaluated["arguments"], out=out, **EVALUATION)
    assert sum("is damaged" in note for note in found.notes) == 2
    for row, other in zip(found.rows, evaluated["rows"], strict=True):
        assert row.top1 == other.top1 and row.confusion == other.confusion
    results = out / "results.json"
    assert read_sealed(results, "Do.")["rows"]
    assert check(results, lambda: read_sealed(results, "Do."), 100) > 250


def test_training_of_an_evaluation__its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"trained": torch.arange(99.0), "epoch": 1}, path)
    read = lambda: load_whole(path, remedy="Delete it.", foreign=f"{path}: no.")  # noqa: E731
    assert check(path, read, 40) > 80


def test_evaluate__test_images_that_are_training_images(
    runs: Path, photos: Path, tmp_path: Path
) -> None:
    encoder, note = runs / "whole", "test images are training images"
    fine = evaluate(encoder, photos, ["knn"], **EVALUATION)
    assert not any(note in each for each in fine.notes)
    train = photos / "train"
    (tmp_path / "linked").symlink_to(train)
    copied = Path(shutil.copytree(photos / "val", tmp_path / "copied"))
    for number in (1, 2):
        name = next(train.glob("flower/*.jpg")).name
        shutil.copy(train / "flower" / name, copied / "flower" / f"other{number}.jpg")
    for val, count in ((train, "32 of the 32"), (tmp_path / "linked", "32 of the 32"),
                       (copied, "2 of the 14")):  # fmt: skip
        found = evaluate(encoder, train, ["knn"], val=val, **EVALUATION)
        (said,) = [each for each in found.notes if note in each]
        assert said.startswith(count)


def test_evaluate_dense__test_images_that_are_training_images(
    runs: Path, photos: Path, tmp_path: Path
) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
        for number, path in enumerate(sorted((photos / "train").rglob("*.jpg"))[:6]):
            shutil.copy(path, tmp_path / part / "images" / f"{number}.jpg")
            mask = Image.new("L", (48, 40))
            mask.paste(1, (0, 0, 24, 40))
            mask.save(tmp_path / part / "masks" / f"{number}.png")
    found = evaluate_dense(runs / "whole", tmp_path, ["knn"], **EVALUATION)
    assert any("6 of the 6 test images are training" in each for each in found.notes)
