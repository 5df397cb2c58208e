"""Run directories: what a cut run is good for, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback

from lightly_mim.checkpoints import read_encoder
from lightly_mim.config import to_config
from lightly_mim.data import ImageDataset
from lightly_mim.evaluation import evaluate, load_encoder
from lightly_mim.methods import MAE, CrossMAE, SimMIM
from lightly_mim.optim import Recipe
from lightly_mim.pretraining import Pretraining, pretrain
from lightly_mim.pretraining.images import image_facts
from lightly_mim.runs import RunDirectory, TakenOverError
from lightly_mim.targets import Pixels
from lightly_mim.training.logs import MetricsLogger

from .conftest import TINY_VIT
from .test_pretraining import (
    Interrupt,
    assert_near,
    assert_same,
    build,
    few_batches,
    lightly_loader,
    no_validation,
    rows_of,
    run,
    trainer,
    weights,
)


@pytest.fixture(scope="module")
def cut(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 epochs of 4 steps that was cut after 6 steps."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    last = out / "checkpoints" / "last.ckpt"
    with pytest.raises(InterruptedError):
        run(out, photos, callbacks=[Interrupt(1, 2, last)])
    return out


# A run that has not finished.


def test_cut_run__is_evaluated(cut: Path, photos: Path) -> None:
    place = {"epoch": 2, "epochs": 3, "step": 6, "steps": 12}
    trained = weights(cut)
    for path in (cut, cut / "checkpoints" / "last.ckpt", str(cut)):
        encoder = load_encoder(path)
        assert encoder.unfinished == place
        for name, tensor in encoder.vit.state_dict().items():  # type: ignore[union-attr]
            assert torch.equal(tensor, trained[f"method.encoder.vit.{name}"])
    results = evaluate(cut, photos, protocols=["knn"], num_workers=0)
    assert results.record["encoder"]["unfinished"] == place
    assert any("epoch 2 of 3, after optimiser step 6 of 12" in n for n in results.notes)
    resized = load_encoder(cut, img_size=64)
    assert resized.unfinished == place


def test_finished_run__its_checkpoint_is_not_marked(
    photos: Path, tmp_path: Path
) -> None:
    run(tmp_path / "run", photos, epochs=1)
    encoder, checkpoint = (
        read_encoder(tmp_path / "run" / name)
        for name in ("encoder.safetensors", "checkpoints/last.ckpt")
    )
    assert encoder.spec == checkpoint.spec
    for name, tensor in encoder.state_dict.items():
        assert torch.equal(tensor, checkpoint.state_dict[name])


@pytest.mark.parametrize("other", [{}, {"seed": 5, "compile": True}])
def test_load_from_checkpoint(cut: Path, other: dict[str, Any]) -> None:
    path = cut / "checkpoints" / "last.ckpt"
    method = SimMIM(**TINY_VIT)
    module = Pretraining.load_from_checkpoint(path, method=method, **other)
    assert module.method is method
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, weights(cut)[f"method.{name}"])
    with pytest.raises(RuntimeError, match="Unexpected key|Missing key"):
        Pretraining.load_from_checkpoint(
            path,
            method=MAE(**{k: v for k, v in TINY_VIT.items() if "mask" not in k}),
        )


@no_validation
@few_batches
def test_checkpoint_of_ones_own_trainer__is_an_encoder(
    photos: Path, tmp_path: Path
) -> None:
    module = Pretraining(SimMIM(**TINY_VIT))
    fit: pl.Trainer = trainer(tmp_path, max_epochs=2)
    fit.fit(module, lightly_loader(photos))
    fit.save_checkpoint(tmp_path / "mine.ckpt")
    encoder = load_encoder(tmp_path / "mine.ckpt")
    assert encoder.unfinished is None
    assert torch.equal(
        encoder.vit.norm.weight,
        module.method.encoder.vit.norm.weight,
    )


# Going on.


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that `cut` would have been."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out, photos)
    return out


OTHER: list[Callback] = [Interrupt(9, 9)]  # recorded like the first run's


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize(
    "options",
    [
        {"tensorboard": True},
        {"validate": False},
        {"avg_dist": True, "log_every": 1},
        {"probe": "linear", "probe_every": 1, "reconstruct_every": 1},
        {"devices": "1", "num_nodes": 1},  # as many processes, in other words
    ],
)
def test_resume__what_changes_no_weights_is_free(
    cut: Path, whole: Path, photos: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    out = copy_of(cut, tmp_path)
    run(out, photos, resume=True, callbacks=OTHER, **options)
    assert_same(weights(out), weights(whole))
    assert not json.loads((out / "history.json").read_text())["changes"]


def test_resume__validation_images_are_free(
    whole: Path, photos: Path, tmp_path: Path
) -> None:
    """Also the other way: cut without, within an epoch."""
    out = tmp_path / "run"
    last = out / "checkpoints" / "last.ckpt"
    with pytest.raises(InterruptedError):
        run(out, photos, callbacks=[Interrupt(1, 2, last)], validate=False)
    run(out, photos, callbacks=OTHER, resume=True, val=photos / "train")
    assert_same(weights(out), weights(whole))


def moved(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "scratch"))


def test_resume__images_may_move(
    cut: Path, whole: Path, photos: Path, tmp_path: Path
) -> None:
    out = copy_of(cut, tmp_path)
    run(out, moved(photos, tmp_path), resume=True, callbacks=OTHER)
    assert_same(weights(out), weights(whole))
    link = tmp_path / "link"
    link.symlink_to(photos)
    shutil.rmtree(out)
    run(copy_of(cut, tmp_path), link / ".", resume=True, callbacks=OTHER)
    assert_same(weights(out), weights(whole))


def delete(folder: Path) -> None:
    (folder / "train" / "temple" / "03.jpg").unlink()


def add(folder: Path) -> None:
    path = folder / "train" / "temple" / "03.jpg"
    for number in range(9):
        shutil.copy(path, path.with_name(f"a{number}.jpg"))


def rename(folder: Path) -> None:
    path = folder / "train" / "temple" / "03.jpg"
    path.rename(path.with_name("zz.jpg"))


def replace(folder: Path) -> None:
    path = folder / "train" / "temple" / "03.jpg"
    shutil.copy(path.with_name("04.jpg"), path)


@pytest.mark.parametrize("change", [delete, add, rename, replace])
@pytest.mark.parametrize("batch", [2, 3])
def test_resume__other_images_need_a_word(
    photos: Path, tmp_path: Path, change: Any, batch: int
) -> None:
    out, data = tmp_path / "run", moved(photos, tmp_path)
    last = out / "checkpoints" / "last.ckpt"
    with pytest.raises(InterruptedError):
        run(out, data, callbacks=[Interrupt(1, batch, last)])
    change(data)
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    with pytest.raises(ValueError, match=r"(?s)data: '32 images.*--allow-changes data"):
        run(out, data, callbacks=OTHER, resume=True)
    assert before == {path: path.read_bytes() for path in out.glob("*.*")}
    run(out, data, callbacks=OTHER, resume=True, allow_changes=["data"])
    finished = json.loads((out / "finished.json").read_text())
    assert finished["epochs"] == 3
    (change_,) = finished["changes"]
    assert change_["changes"].keys() == {"data"}
    # From now on these are its images.
    run(out, data, callbacks=OTHER, resume=True)


def as_copies(folder: Path) -> None:
    for number, path in enumerate(folder.rglob("*.jpg")):
        os.utime(path, (1, 10**9 + 1 + number))


def touch_one(folder: Path) -> None:
    next(folder.rglob("*.jpg")).touch()


def change_in_place(folder: Path, keep_time: bool = True) -> None:
    path = sorted(folder.rglob("*.jpg"))[5]
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_a_copy(folder: Path) -> None:
    change_in_place(folder)
    as_copies(folder)


def other_size(folder: Path) -> None:
    path = next(folder.rglob("*.jpg"))
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nothing, None),
        (as_copies, None),
        (touch_one, "1 of them written since"),
        (change_in_place, "others of the same names and sizes"),
        (change_a_copy, "others of the same names and sizes"),
        (other_size, "data: '32 images, names .*, sizes"),
    ],
)
def test_check_facts__images_that_change_under_their_names(
    photos: Path, tmp_path: Path, change: Any, message: str | None
) -> None:
    data = moved(photos, tmp_path) / "train"
    for path in data.rglob("*.jpg"):
        os.utime(path, (10**9, 10**9))
    directory = RunDirectory(tmp_path / "run")
    config = {"out": "x", "data": str(data), "method": {}}
    directory.begin(config, overwrite=False, facts=image_facts(ImageDataset(data)))
    directory.checkpoint.parent.mkdir()
    directory.checkpoint.write_bytes(b"")
    change(data)
    facts = image_facts(ImageDataset(data))
    if message is None:
        assert directory.check_facts(facts) == {}
        return
    with pytest.raises(ValueError, match=rf"{message}(?s:.*)--allow-changes data"):
        directory.check_facts(facts)
    assert directory.check_facts(facts, ["data"]).keys() == {"data"}


def test_resume__after_a_broken_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In mid-run: another image breaks once the first epoch is over."""
    ways: dict[str, dict[str, Any]] = {
        "skipped": {"on_error": "skip", "allow_changes": ("on_error", "data")},
        "deleted": {"allow_changes": ("data",)},
    }
    for name, options in ways.items():
        data = moved(photos, tmp_path / name)
        out, path = tmp_path / name / "run", data / "train" / "flower" / "05.jpg"
        whole_file = path.read_bytes()
        with pytest.raises(InterruptedError):
            run(out, data, callbacks=[Interrupt(1, 0)])
        path.write_bytes(whole_file[:300])
        with pytest.raises(ValueError, match="other arguments"):
            run(out, data, callbacks=OTHER, resume=True)
        path.write_bytes(b"x" * len(whole_file))  # which no size tells
        with pytest.raises(ValueError, match="others of the same names and sizes"):
            run(out, data, callbacks=OTHER, resume=True)
        if name == "deleted":
            path.unlink()
        else:
            with pytest.raises(ValueError, match="on_error: 'raise' in the run"):
                run(out, data, callbacks=OTHER, resume=True, on_error="skip")
        capsys.readouterr()
        run(out, data, callbacks=OTHER, resume=True, **options)
        assert "does not end bit for bit" in capsys.readouterr().out
        assert json.loads((out / "finished.json").read_text())["epochs"] == 3


def test_resume__nothing_is_mixed_before_the_first_checkpoint(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = moved(photos, tmp_path), tmp_path / "run"
    (data / "train" / "flower" / "05.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"flower/05.jpg"):
        run(out, data)
    run(out, data, resume=True, on_error="skip")
    assert "bit for bit" not in capsys.readouterr().out
    run(tmp_path / "other", data, on_error="skip")
    assert_same(weights(out), weights(tmp_path / "other"))
    assert "changes" not in json.loads((out / "finished.json").read_text())


def test_resume__changes_are_listed_and_recorded(
    cut: Path, photos: Path, tmp_path: Path
) -> None:
    out = copy_of(cut, tmp_path)
    options: dict[str, Any] = {"grad_checkpointing": True, "callbacks": None}
    with pytest.raises(
        ValueError, match=r"--allow-changes callbacks grad_checkpointing\)"
    ):
        run(out, photos, resume=True, **options)
    with pytest.raises(ValueError, match=r"(?s)callbacks.*lr: .*or another folder"):
        run(out, photos, resume=True, callbacks=None, lr=0.3)
    names = ("callbacks", "grad_checkpointing")
    run(out, photos, resume=True, allow_changes=names, **options)
    history = json.loads((out / "history.json").read_text())
    (entry,) = history["changes"]
    assert entry["changes"]["grad_checkpointing"] == [False, True]
    assert entry["time"]
    assert yaml.safe_load((out / "config.yaml").read_text())["grad_checkpointing"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_changes": ["lr"], "resume": True}, "allow_changes is a list of some"),
        (
            {"allow_changes": "data", "resume": True},
            "allow_changes of pretrain is a list, each text",
        ),
        ({"allow_changes": ["data"]}, "is for a run that goes on"),
        ({"data": None}, "A run begins with data: pass a folder"),
        (
            {"method": None, "recipe": "vit_base_800ep"},
            "recipe='vit_base_800ep' is a method's: pass the method as well",
        ),
    ],
)
def test_resume__refuses(
    photos: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    data = options.pop("data", photos)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", data, **options)
    assert not (tmp_path / "run").exists()


# By its directory alone.


def test_resume__out_is_enough(
    whole: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedError):
        run(out, photos, loggers=None, callbacks=[Interrupt(2, 1)])
    with pytest.raises(ValueError, match="--allow-changes callbacks"):
        pretrain(out, resume=True)
    method = pretrain(out, resume=True, allow_changes=["callbacks"])
    assert_same(weights(out), weights(whole))
    again = pretrain(out, resume=True)
    assert again is not method
    assert_same(again.state_dict(), method.state_dict())
    # More epochs begin with its weights.
    with pytest.raises(
        ValueError, match=r"(?s)finished its 3 epochs.*with them: init="
    ):
        pretrain(out, resume=True, epochs=5)
    with pytest.raises(ValueError, match="finished its 3 epochs"):
        run(out, photos, resume=True, epochs=4, callbacks=None)
    further = run(tmp_path / "further", photos, method=again, epochs=1, lr=1e-9)
    for name, tensor in further.state_dict().items():
        torch.testing.assert_close(tensor, method.state_dict()[name])


def of_an_earlier_version(run: Path, **recipe: Any) -> None:
    """Takes out of a run's arguments what earlier versions did not record."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("weight_decay_on", "min_lr_is_absolute", "full_warmup_from"):
        del config["recipe"][name]
    config["recipe"] |= recipe
    for name in ("normalize", "minutes"):
        config.pop(name, None)
    del config["method"]["init_args"]["init"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_resume__of_an_earlier_version(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": lambda: SimMIM(**TINY_VIT, target=Pixels(), init="timm"),
        "recipe": SimMIM.recipe(),
    }
    run(tmp_path / "whole", photos, **options)
    out = tmp_path / "run"
    with pytest.raises(InterruptedError):
        run(out, photos, callbacks=[Interrupt(2, 0)], **options)
    kept = yaml.safe_load((out / "config.yaml").read_text())
    was = kept["recipe"]["weight_decay_on"]
    assert was  # of a published recipe: not what earlier versions did
    of_an_earlier_version(out, decay_mask_token=False)
    with pytest.raises(ValueError, match=r"recipe.weight_decay_on: \[\] in the run, "):
        run(out, photos, callbacks=OTHER, resume=True, **options)
    pretrain(out, resume=True, allow_changes=["callbacks"])
    found = yaml.safe_load((out / "config.yaml").read_text())
    assert found["recipe"] == kept["recipe"] | {"weight_decay_on": []}
    assert found["method"] == kept["method"]
    assert found["normalize"] is None  # ImageNet's
    assert_same(weights(out), weights(tmp_path / "whole"))  # its ViT has none of these


@pytest.mark.parametrize("decayed", [True, False])
@pytest.mark.parametrize(
    ("method", "options", "init"),
    [
        (SimMIM, {}, "timm"),
        (MAE, {}, "mae"),
        (CrossMAE, {}, "mae"),
        (MAE, {"pretrained": True}, "timm"),
    ],
)
def test_stored_config__of_an_earlier_version(
    tmp_path: Path, method: Any, options: dict[str, Any], init: str, decayed: bool
) -> None:
    config = {
        "out": "a",
        "data": "b",
        "recipe": to_config(method.recipe() if method.recipes else MAE.recipe()),
        "method": {
            "class_path": f"lightly_mim.methods.{method.__name__}",
            "init_args": {"encoder": "vit_tiny_patch16_224", "init": None},
            "dict_kwargs": options,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    of_an_earlier_version(tmp_path, decay_mask_token=decayed)
    stored = RunDirectory(tmp_path).stored_config()
    assert stored is not None
    assert stored["method"]["init_args"]["init"] == init
    recipe = stored["recipe"]
    assert recipe["weight_decay_on"] == (["mask_token"] if decayed else [])
    assert Recipe(**recipe).full_warmup_from is None


def test_resume__out_alone_with_a_change(
    cut: Path, photos: Path, tmp_path: Path
) -> None:
    out, data = copy_of(cut, tmp_path), moved(photos, tmp_path)
    allowed = ["callbacks", "on_error"]
    pretrain(out, data, resume=True, on_error="skip", allow_changes=allowed)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["data"], config["on_error"]) == (str(data), "skip")
    assert (config["lr"], config["batch_size"]) == (0.002, 8)


class Mine(SimMIM):
    """A method of somebody else."""


def test_resume__imports_nothing_that_a_file_names(
    photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedError):
        run(
            tmp_path / "run",
            photos,
            method=lambda: Mine(**TINY_VIT),
            callbacks=[Interrupt(1, 0)],
        )
    with pytest.raises(
        ValueError, match=r"Mine is not of lightly_mim.*Pass the method"
    ):
        pretrain(tmp_path / "run", resume=True)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for class_path, message in {
        "os.system": "is not of lightly_mim",
        "lightly_mim.files.os.system": "no class",
        "lightly_mim.config.importlib.import_module": "no class",
        "lightly_mim.methods.Nothing": "no class",
        "lightly_mim.pretrain": "no class",
        "lightly_mim.masking.RandomMasking": "cannot be built",
        "lightly_mim.nothing.SimMIM": "no class",
    }.items():
        stored["method"] = {"class_path": class_path, "init_args": {"command": "x"}}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stored))
        with pytest.raises(ValueError, match=message):
            pretrain(tmp_path / "run", resume=True)
    stored["method"] = {
        "class_path": "lightly_mim.methods.SimMIM",
        "init_args": {"encoder": "x", "masking": {"class_path": "builtins.print"}},
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(ValueError, match=r"builtins.print is not of lightly_mim"):
        pretrain(tmp_path / "run", resume=True)
    for arguments, message in (
        ({"encoder": "hf-hub:evil/model"}, "not one of timm's own models"),
        ({"encoder": "local-dir:/tmp"}, "not one of timm's own models"),
        ({"encoder": "x", "pretrained_cfg": {"url": "http://x"}}, "where weights come"),
        ({"encoder": "x", "checkpoint_path": "evil.pth"}, "where weights come"),
        (["encoder"], "config.yaml cannot be read"),
        ({"encoder": {"class_path": "os.system"}}, "is not of lightly_mim"),
    ):
        stored["method"]["init_args"] = arguments
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stored))
        with pytest.raises(ValueError, match=message):
            pretrain(tmp_path / "run", resume=True)


def test_resume__needs_what_words_do_not_make(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run in .* pass data and method"):
        pretrain(tmp_path / "nothing", resume=True)
    out = tmp_path / "run"

    class Stop(Exception):
        pass

    class Stopping(Callback):
        def on_fit_start(self, *_: Any) -> None:
            raise Stop

    with pytest.raises(Stop):
        run(out, photos, method=build(), callbacks=[Stopping()])
    with pytest.raises(ValueError, match="passed as an object.*has no checkpoint yet"):
        pretrain(out, resume=True)
    dataset = [(torch.rand(3, 32, 32), 0) for _ in range(16)]
    with pytest.raises(InterruptedError):
        run(out, dataset, callbacks=[Interrupt(1, 0)], overwrite=True)
    with pytest.raises(ValueError, match=r"data=<builtins.list>.*pass data="):
        pretrain(out, resume=True)
    pretrain(out, dataset, resume=True, allow_changes=["callbacks"])
    assert RunDirectory(out).finished


def test_command_line__out_is_enough(
    cut: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightly_mim.cli import main

    words = ["pretrain", "--out", str(copy_of(cut, tmp_path)), "--resume"]
    for more, message in {
        (): "--allow-changes callbacks",
        ("--lr", "3"): "lr: 0.002 in the run, 3.0 now",
        ("--allow-changes", "lr"): "allow_changes is a list of some of",
    }.items():
        with pytest.raises(SystemExit) as error:
            main([*words, *more])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    main([*words, "--allow-changes", "devices", "callbacks", "--num-workers=0"])
    assert_same(weights(tmp_path / "run"), weights(whole))
    main(words)  # finished
    assert "nothing is left to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["pretrain", "--out", str(tmp_path / "none"), "--resume"])
    assert "no run in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pretrain", "--out", str(tmp_path / "none"), "--data", "photos"])
    assert "photos does not exist" in capsys.readouterr().err


DDP_SCRIPT = """
import sys
from pytorch_lightning.callbacks import Callback
from lightly_mim.methods import SimMIM
from lightly_mim.pretraining import pretrain

class Cut(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if sys.argv[3] == "cut" and (trainer.current_epoch, batch_idx) == (1, 0):
            raise InterruptedError

def build():
    return SimMIM(**{vit!r})

if __name__ == "__main__":
    devices = int(sys.argv[2])
    pretrain(
        sys.argv[1], {data!r}, build, epochs=2, batch_size=8, lr=0.002,
        precision="32-true", accelerator="cpu", devices=devices,
        strategy="ddp", num_workers=0, tensorboard=False, callbacks=[Cut()],
        resume=True, allow_changes=sys.argv[4:],
    )
"""


@pytest.mark.slow
def test_resume__other_number_of_processes(photos: Path, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT.format(vit=TINY_VIT, data=str(photos)))

    def start(out: str, devices: int, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(tmp_path / out), str(devices)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *words],
            env=environment,
            timeout=240,
            capture_output=True,
            text=True,
        )

    assert start("whole", 1, "on").returncode == 0
    for first, then in ((1, 2), (2, 1)):
        out = f"{first}"
        assert "InterruptedError" in start(out, first, "cut").stderr
        refused = start(out, then, "on")
        assert f"devices: {first} in the run, {then} now" in refused.stderr
        assert "--allow-changes devices" in refused.stderr
        done = start(out, then, "on", "devices")
        assert done.returncode == 0, done.stderr
        assert "does not end bit for bit" in done.stdout
        assert_near(weights(tmp_path / "whole"), weights(tmp_path / out))
        finished = json.loads((tmp_path / out / "finished.json").read_text())
        assert finished["changes"][0]["changes"] == {"devices": [first, then]}


# What a kill leaves.


def test_kill_before_the_first_checkpoint__steps_are_there_once(
    whole: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedError):
        run(out, photos, callbacks=[Interrupt(0, 3)], log_every=1, tensorboard=True)
    assert len(rows_of(out)) == 4  # the first one is from before the first step
    (out / "metrics.csv").write_text("old,step\n1,0\n")  # of another version
    run(out, photos, callbacks=OTHER, resume=True, tensorboard=True)
    assert [(row["epoch"], row["step"]) for row in rows_of(out)] == [
        (row["epoch"], row["step"]) for row in rows_of(whole)
    ]
    assert "old" not in rows_of(out)[0]
    assert len(list((out / "tensorboard").glob("events.*"))) == 1
    assert_same(weights(out), weights(whole))


NEW = {"out": "x", "data": "new", "method": "m"}


def begin_killed(path: Path, how: str, count: int) -> bool:
    """Returns whether a process that begins a run was killed at its count-th change."""
    child = os.fork()
    if not child:

        def audit(event: str, arguments: Any) -> None:
            nonlocal count
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
                event == "open"
                and isinstance(arguments[2], int)
                and arguments[2] & os.O_CREAT
            )
            count -= bool(changes)
            if changes and count < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        overwrite = how == "overwrite"
        started = RunDirectory(path)
        started.check(NEW, how == "resume", overwrite)
        sys.addaudithook(audit)
        started.begin(NEW, overwrite, fresh=how == "fresh", facts={"processes": 1})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return bool(status)


@pytest.mark.parametrize("how", ["fresh", "overwrite", "resume"])
def test_kill_between_first_writes__goes_on_or_is_replaced(
    cut: Path, tmp_path: Path, how: str
) -> None:
    """SIGKILL before each change that `begin` makes to the file system, in turn."""
    for count in range(99):
        path = tmp_path / str(count)
        if how == "overwrite":
            shutil.copytree(cut, path)
            (path / "finished.json").write_text("{}")
            (path / "encoder.safetensors").write_text("old")
            (path / "results.json").write_text("{}")
        killed = begin_killed(path, how, count)
        left = RunDirectory(path)
        stored = left.stored_config()
        if left.finished:  # nothing has been done yet
            assert left.encoder.exists() and left.checkpoint.exists()
        elif stored is not None and stored["data"] != "new":
            # The old run, unfinished: as it was, or without its results.
            left.check(stored, resume=True, overwrite=False)
        else:
            assert not left.checkpoint.exists()
            assert not left.encoder.exists()
            assert not (path / "results.json").exists()
            left.check(NEW, resume=True, overwrite=False)
        left.check(NEW, resume=False, overwrite=True)
        left.begin(NEW, overwrite=True)
        names = {entry.name for entry in path.iterdir()}
        assert names == {".owner", "config.yaml", "history.json"}
        if not killed:
            break
    assert count > 5


def test_one_writer(tmp_path: Path) -> None:
    config = {"out": "x", "data": "d", "method": "m"}
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    for each in (first, second):  # both see an empty folder
        each.check(config, resume=False, overwrite=False)
    first.begin(config, overwrite=False, fresh=True)
    with pytest.raises(ValueError, match="Another process begins a run"):
        second.begin(config, overwrite=False, fresh=True)
    first.check_owner()
    logger = MetricsLogger(tmp_path, first.check_owner)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    second.begin(config, overwrite=False)  # by resume
    logger.log_metrics({"a": 2.0}, step=1)
    with pytest.raises(TakenOverError):
        logger.save()
    logger.finalize("failed")  # what Lightning does then
    assert not (tmp_path / "metrics.csv").exists()  # of the second, from its start


def test_folder_of_something_else__is_no_run(tmp_path: Path) -> None:
    config = {"out": "x", "data": "d", "method": "m"}
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".owner").write_text("Jane Doe")
    ways: list[dict[str, Any]] = [{"resume": True}, {"overwrite": True}, {}]
    for how in ways:
        with pytest.raises(ValueError, match="is not a run directory"):
            RunDirectory(tmp_path).check(
                config, **({"resume": False, "overwrite": False} | how)
            )


def test_damaged_history__is_named(cut: Path, photos: Path, tmp_path: Path) -> None:
    out = copy_of(cut, tmp_path)
    for content in ("{", ""):
        (out / "history.json").write_text(content)
        with pytest.raises(ValueError, match=r"history.json is damaged.*Delete it"):
            run(out, photos, resume=True, callbacks=OTHER)
    (out / "history.json").unlink()  # as in a run of an earlier version
    with pytest.raises(ValueError, match=r"data: .*photos0' in the run"):
        run(out, moved(photos, tmp_path), resume=True, callbacks=OTHER)
    run(out, photos, resume=True, callbacks=OTHER)
