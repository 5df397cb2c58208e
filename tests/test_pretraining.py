from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from lightly.data import LightlyDataset
from lightly.data.multi_view_collate import MultiViewCollate
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightly_mim import defaults
from lightly_mim.checkpoints import read_encoder
from lightly_mim.data import BrokenImageError
from lightly_mim.masking import Mask
from lightly_mim.methods import MAE, MaskedImageModel, SimMIM
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.pretraining import (
    Pretraining,
    check_pretraining,
    default_precision,
    pretrain,
)
from lightly_mim.training.logs import MetricsLogger
from lightly_mim.transforms import SimMIMTransform

from .conftest import SHORT_RUN, TINY_VIT

DROPPING = TINY_VIT | {"drop_path_rate": 0.3}


def build() -> SimMIM:
    return SimMIM(**DROPPING)


def run(out: Path, data: Any, **options: Any) -> Any:
    return pretrain(out, data, **(SHORT_RUN | {"method": build} | options))


def weights(path: Path) -> dict[str, Tensor]:
    state = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    return {name: t for name, t in state.items() if name.startswith("method.")}


def rows_of(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Compares all weights but the keys' bias.

    A softmax over keys does not see it: its gradient is rounding, which AdamW scales.
    """
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        other = b[name]
        if name.endswith("attn.qkv.bias"):
            tensor, other = (
                torch.cat([each.chunk(3)[0], each.chunk(3)[2]])
                for each in (tensor, other)
            )
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(out, photos, reconstruct_every=2)
    return out


def test_pretrain__writes_the_run_directory(finished: Path) -> None:
    assert json.loads((finished / "finished.json").read_text())["steps"] == 12
    assert {p.name for p in (finished / "reconstructions").iterdir()} == {
        "epoch_0002.png",
        "epoch_0003.png",
    }
    with Image.open(finished / "reconstructions" / "epoch_0003.png") as picture:
        assert picture.mode == "RGB"
    spec = read_encoder(finished).spec
    assert spec["name"] == "vit_tiny_patch16_224"
    rows = rows_of(finished)
    assert {
        "train_loss",
        "val_loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "train_loss_step",
        "epoch",
        "step",
    } <= set(rows[0])
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert len([row for row in rows if row["val_loss"]]) == 3


def test_pretrain__same_seed_same_run(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    run(tmp_path / "again", photos, num_workers=1)
    assert_same(weights(tmp_path / "again"), weights(finished))
    run(tmp_path / "other", photos, seed=1)
    other = weights(tmp_path / "other")["method.head.weight"]
    assert not torch.equal(other, weights(finished)["method.head.weight"])


class Interrupt(Callback):
    """Ends a run with an error before a batch, like a power cut would."""

    def __init__(self, epoch: int, batch: int, save: Path | None = None) -> None:
        self.place = (epoch, batch)
        self.save = save

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self.place:
            raise InterruptedError

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, out: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.save and (trainer.current_epoch, batch_idx + 1) == self.place:
            trainer.save_checkpoint(self.save)


class Cut(MetricsLogger):
    """Raises instead of logging, the n-th time."""

    after: ClassVar[int]

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        Cut.after -= 1
        if Cut.after == 0:
            raise InterruptedError
        super().log_metrics(*arguments, **options)


@pytest.mark.parametrize(
    ("log_every", "save_every_minutes"), [(1, 1e-9), (2, 1e-9), (2, 0)]
)
def test_pretrain__cut_as_it_writes_a_row(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_every: int,
    save_every_minutes: float,
) -> None:
    """The checkpoint is made before the row: the row is there after all."""

    def rows(out: Path) -> list[dict[str, str]]:
        return [{**row, "images_per_second": ""} for row in rows_of(out)]

    options: dict[str, Any] = {
        "epochs": 2,
        "log_every": log_every,
        "save_every_minutes": save_every_minutes,
    }
    run(tmp_path / "whole", photos, **options)
    expected = rows(tmp_path / "whole")
    monkeypatch.setattr("lightly_mim.training.trainer.MetricsLogger", Cut)
    for number in range(1, len(expected) + 1):
        out, Cut.after = tmp_path / str(number), number
        with pytest.raises(InterruptedError):
            run(out, photos, **options)
        run(out, photos, **options, resume=True)
        assert rows(out) == expected


class OwnAxis(Callback):
    """Logs `step`, by which Lightning lets a user choose the axis of metrics."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("step", float(trainer.current_epoch))


def test_pretrain__goes_on_with_an_axis_of_ones_own(
    photos: Path, tmp_path: Path
) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(InterruptedError):
        run(tmp_path, photos, callbacks=[OwnAxis(), Interrupt(1, 1)])
    assert torch.load(last)["metrics_row"]["step"] == 0
    run(
        tmp_path,
        photos,
        callbacks=[OwnAxis()],
        resume=True,
        allow_changes=["callbacks"],
    )
    epochs = [row["step"] for row in rows_of(tmp_path) if row["train_loss"]]
    assert epochs == ["0", "1", "2"]


class SaveWithin(Callback):
    """Saves within a window of accumulated gradients, where no row is due."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, out: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 0):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "within.ckpt")


def test_pretrain__checkpoint_within_a_window_has_no_row(
    photos: Path, tmp_path: Path
) -> None:
    options = {
        "log_every": 1,
        "accumulate": 2,
        "callbacks": [SaveWithin()],
    }
    run(tmp_path, photos, **options)
    assert torch.load(tmp_path / "within.ckpt")["metrics_row"] is None


@pytest.mark.parametrize(
    ("epoch", "batch", "save"),
    [(1, 0, False), (2, 0, False), (2, 3, False), (1, 2, True), (2, 1, True)],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_pretrain__resumed_run_ends_the_same(
    finished: Path,
    photos: Path,
    tmp_path: Path,
    epoch: int,
    batch: int,
    save: bool,
    num_workers: int,
) -> None:
    out = tmp_path / "run"
    checkpoint = out / "checkpoints" / "last.ckpt" if save else None
    with pytest.raises(InterruptedError):
        run(out, photos, callbacks=[Interrupt(epoch, batch, checkpoint)])
    assert not (out / "finished.json").exists()
    assert not (out / "encoder.safetensors").exists()
    # Whatever the process has drawn meanwhile must not matter.
    torch.manual_seed(123)
    callbacks = [Interrupt(99, 99)]  # recorded like the first run's
    run(out, photos, callbacks=callbacks, resume=True, num_workers=num_workers)
    assert_same(weights(out), weights(finished))
    rows = rows_of(out)
    expected = rows_of(finished)
    assert [(row["epoch"], row["step"]) for row in rows] == [
        (row["epoch"], row["step"]) for row in expected
    ]
    for name in ("train_loss", "val_loss", "lr", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name


def test_pretrain__finished_run_returns_at_once(finished: Path, photos: Path) -> None:
    before = (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    method = run(finished, photos, reconstruct_every=2, resume=True)
    assert (finished / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    trained = weights(finished)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, trained[f"method.{name}"])


def test_pretrain__cut_after_the_last_epoch(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "finished.json").unlink()
    (out / "encoder.safetensors").unlink()
    run(out, photos, reconstruct_every=2, resume=True)
    assert json.loads((out / "finished.json").read_text())["steps"] == 12
    theirs, ours = read_encoder(finished), read_encoder(out)
    assert_same(ours.state_dict, theirs.state_dict)
    assert rows_of(out) == rows_of(finished)


def test_pretrain__config_runs_again(finished: Path, tmp_path: Path) -> None:
    from lightly_mim.cli import main

    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["method"]["class_path"].endswith("SimMIM")
    main(
        [
            "pretrain",
            "--config",
            str(finished / "config.yaml"),
            "--out",
            str(tmp_path / "again"),
        ]
    )
    assert_same(weights(tmp_path / "again"), weights(finished))


def test_pretrain__instance_is_trained_in_place(photos: Path, tmp_path: Path) -> None:
    method: Any = build()
    before = method.head.weight.clone()
    assert run(tmp_path / "a", photos, method=method, epochs=1) is method
    assert not torch.equal(method.head.weight, before)


class OneMask(SimMIM):
    """Masks the same patches of every image, so that batches may be cut anywhere."""

    def draw_mask(self, images: Tensor, generator: Any = None) -> Any:
        mask = torch.arange(16).view(1, 4, 4) < 10  # 0.6 of 16
        return mask.expand(len(images), -1, -1)


@pytest.mark.parametrize(
    "options", [{"grad_checkpointing": True}, {"accumulate": 2}, {"accumulate": 4}]
)
def test_pretrain__options_change_no_weights(
    photos: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    for name, chosen in {"plain": {}, "other": options}.items():
        run(tmp_path / name, photos, method=lambda: OneMask(**TINY_VIT), **chosen)
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "other")
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-4)
    # AdamW forgives a gradient of another scale; its norm does not.
    norms = [
        [float(row["grad_norm"]) for row in rows_of(tmp_path / n) if row["grad_norm"]]
        for n in ("plain", "other")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_pretrain__validates_on_fixed_masks(photos: Path, tmp_path: Path) -> None:
    method = SimMIM(**TINY_VIT)
    seen: list[Mask] = []

    class Watch(Callback):
        def on_validation_batch_end(self, *arguments: Any) -> None:
            seen.append(masks[-1])

    masks: list[Mask] = []
    forward = method.forward

    def watched(images: Tensor, mask: Any = None) -> Any:
        masks.append(mask)
        return forward(images, mask)

    method.forward = watched  # type: ignore[method-assign]
    watched_run = {"method": method, "callbacks": [Watch()], "rank_every": 0}
    run(tmp_path / "a", photos, epochs=2, **watched_run)
    batches = len(seen) // 2
    assert batches == 2
    for first, second in zip(seen[:batches], seen[batches:], strict=True):
        assert torch.equal(first.cells, second.cells)


def test_pretrain__validate_false_leaves_them_alone(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", photos, epochs=1, validate=False, tensorboard=True)
    assert "no validation images" in capsys.readouterr().out
    assert "val_loss" not in rows_of(tmp_path / "a")[0]
    assert list((tmp_path / "a" / "tensorboard").glob("events.*"))


def test_pretrain__prints_a_line_per_epoch(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", photos, epochs=2, progress=False)
    lines = [row for row in capsys.readouterr().out.splitlines() if "epoch 2/2" in row]
    assert len(lines) == 1
    for name in ("train_loss", "val_loss", "images_per_second"):
        assert name in lines[0]
    run(tmp_path / "b", photos, epochs=1, progress=True)
    assert "train_loss" in capsys.readouterr().out


def test_pretrain__second_checkpoint_callback(photos: Path, tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    run(tmp_path / "a", photos, callbacks=[best])
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_pretrain__half_precision(photos: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", photos, precision="bf16-mixed")
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "a").values())


def test_no_host_sync_in_a_step(photos: Path, tmp_path: Path) -> None:
    """Nothing reads a tensor's value between two logs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                self.reads += 1
            return func(*args, **(kwargs or {}))

    counter: Any = Count
    counts = []

    class Watch(Callback):
        def on_train_batch_start(self, *arguments: Any) -> None:
            self.mode: Any = counter()
            self.mode.__enter__()

        def on_before_zero_grad(self, *arguments: Any) -> None:
            pass

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.mode.__exit__(None, None, None)
            counts.append(self.mode.reads)

    run(tmp_path / "a", photos, epochs=1, callbacks=[Watch()], validate=False)
    assert counts == [0, 0, 0, 0]
    with counter() as mode:
        torch.ones(()).item()
    assert mode.reads == 1


@pytest.mark.slow
def test_pretrain__compiled_run_is_the_run(photos: Path, tmp_path: Path) -> None:
    for compile in (False, True):
        out = tmp_path / str(compile)
        run(out, photos, method=lambda: SimMIM(**TINY_VIT), compile=compile)
    plain, compiled = weights(tmp_path / "False"), weights(tmp_path / "True")
    assert compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)


# Bad input. Nothing is written.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 33}, "1 to all 32 images.*batch_size=33"),
        ({"batch_size": 8, "accumulate": 3}, "8 does not divide"),
        ({"accumulate": 0}, "accumulate=0"),
        (
            {"method": "SimMIM"},
            "method of pretrain is .*a function .*got method=.SimMIM",
        ),
        ({"log_every": 0}, "log_every=0"),
        ({"batch_size": 4.0}, "batch_size=4.0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1"),
        ({"accelerator": "cuda", "devices": 3}, "accelerator='cuda'"),
        ({"epochs": 0}, "epochs=0"),
        ({"recipe": "mae"}, "no recipe 'mae'.*swin_base_100ep"),
        (
            {
                "method": lambda: SimMIM(
                    **(TINY_VIT | {"img_size": 40, "mask_patch_size": 16})
                )
            },
            "40 x 40",
        ),
        (
            {"method": lambda: SimMIM(**(TINY_VIT | {"mask_patch_size": 32}))},
            "masks 1 of 1",
        ),
        ({"resume": True, "overwrite": True}, "resume or overwrite, not both"),
    ],
)
def test_pretrain__refuses(
    photos: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", photos, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "recipe"), [(m, recipe) for m in (SimMIM, MAE) for recipe in m.recipes]
)
def test_check_pretraining__published_recipes(
    method: type[MaskedImageModel], recipe: str
) -> None:
    # ViT-H, too, at once: without memory for weights.
    before = torch.get_rng_state()
    build = partial(method.from_recipe, recipe, pretrained=True)
    check_pretraining({"method": build, "recipe": recipe})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": SimMIM}, "method is a method or a function"),
        ({"epochs": 0}, "epochs=0"),
        ({"recipe": "best"}, "no recipe 'best'"),
        ({"batch_size": 0}, "batch_size=0"),
        (
            {"method": lambda: SimMIM(**DROPPING, mask_ratio=2)},
            "mask_ratio of SimMIM is .*a number strictly",
        ),
        ({"method": lambda: SimMIM(**DROPPING, colour="red")}, "colour"),
        ({"method": partial(cast(Any, build), "x")}, "cannot be built like that"),
        (
            {"method": lambda: SimMIM(**DROPPING | {"mask_patch_size": 32})},
            "masks 1 of 1 block",
        ),
    ],
)
def test_check_pretraining__refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pretraining({"method": build} | arguments)


def test_check_pretraining__leaves_what_looks_at_weights_or_files() -> None:
    def item(method: SimMIM) -> None:
        assert method.encoder.vit.norm.weight.sum().item() == 32

    def array(method: SimMIM) -> None:
        np.asarray(method.encoder.vit.norm.weight.detach())

    def device(method: SimMIM) -> None:
        assert method.encoder.vit.norm.weight.device.type == "cpu"

    for look in (item, array, device):
        look(build())
        check_pretraining({"method": lambda look=look: (m := build(), look(m))[0]})

    def missing() -> SimMIM:
        method: SimMIM = torch.load("/on/the/nodes/alone.pt")
        return method

    check_pretraining({"method": missing})


def test_pretrain__refuses_to_write_among_the_images(photos: Path) -> None:
    with pytest.raises(ValueError, match="lies in the folder of the images"):
        run(photos / "train" / "run", photos)
    assert not (photos / "train" / "run").exists()


def test_pretrain__refuses_skip_for_a_data_set_of_ones_own(
    photos: Path, tmp_path: Path
) -> None:
    dataset = LightlyDataset(str(photos / "train"))
    with pytest.raises(ValueError, match='on_error="skip" is for folders'):
        run(tmp_path / "run", dataset, on_error="skip")


def test_pretrain__refuses_other_images_on_resume(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", data, callbacks=[Interrupt(2, 0)])
    (data / "train" / "temple" / "00.jpg").rename(data / "train" / "temple" / "zz.jpg")
    with pytest.raises(ValueError, match=r"(?s)data: .32 images.*--allow-changes data"):
        run(tmp_path / "run", data, callbacks=[Interrupt(9, 9)], resume=True)


def test_pretrain__half_a_row_of_metrics_is_dropped(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InterruptedError):
        run(out, photos, callbacks=[Interrupt(2, 3)])
    metrics = (out / "metrics.csv").read_text()
    (out / "metrics.csv").write_text(metrics[:-9])
    run(out, photos, callbacks=[Interrupt(9, 9)], resume=True)
    rows = [(row["epoch"], row["step"]) for row in rows_of(out)]
    assert rows == [(row["epoch"], row["step"]) for row in rows_of(finished)]


def test_pretrain__killed_run_goes_on(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    """SIGKILL: no finally, no exit handler."""
    out = tmp_path / "run"
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\n"
        "from pathlib import Path\n"
        "from pytorch_lightning.callbacks import Callback\n"
        "from lightly_mim.methods import SimMIM\n"
        "from lightly_mim.pretraining import pretrain\n"
        "class Interrupt(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if (trainer.current_epoch, batch_idx) == (2, 1):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "def build():\n"
        f"    return SimMIM(**{DROPPING!r})\n"
        f"pretrain({str(out)!r}, {str(photos)!r}, build, epochs=3, batch_size=8,"
        " lr=0.002, precision='32-true', accelerator='cpu', devices=1, num_workers=0,"
        " tensorboard=False, log_every=2, reconstruct_every=2)\n".replace(
            "log_every=2, rec", "log_every=2, callbacks=[Interrupt()], rec"
        )
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, script], env=environment, timeout=240)
    assert done.returncode == -9
    config = yaml.safe_load((out / "config.yaml").read_text())
    # The callback of the script has another name than those here.
    config["callbacks"] = None
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    run(out, photos, reconstruct_every=2, resume=True)
    assert_same(weights(out), weights(finished))


def test_pretrain__config_says_what_was_chosen(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["precision"] == "32-true"
    assert config["recipe"]["weight_decay"] == 0.05
    assert config["recipe"]["lr"] == 0.002
    assert "overwrite" not in config
    assert "resume" not in config


def test_pretrain__refuses_a_run_that_is_there(finished: Path, photos: Path) -> None:
    before = weights(finished)
    with pytest.raises(ValueError, match="a finished run .* overwrite to replace"):
        run(finished, photos, reconstruct_every=2)
    with pytest.raises(ValueError, match=r"lr: 0.002 in the run, 0.2 now"):
        run(finished, photos, reconstruct_every=2, lr=0.2, resume=True)
    # Another way to write the same folder is the same folder.
    run(finished, Path(f"{photos}/"), reconstruct_every=2, resume=True)
    run(finished, f"{photos}/", reconstruct_every=2, resume=True)
    assert_same(weights(finished), before)


def test_pretrain__overwrite_removes_only_runs(photos: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("...")
    (tmp_path / "config.yaml").write_text("title: thesis\n")  # of another program
    with pytest.raises(ValueError, match="is not a run directory"):
        run(tmp_path, photos, overwrite=True)
    assert precious.read_text() == "..."

    out = tmp_path / "run"
    run(out, photos, epochs=1)
    (out / "notes.txt").write_text("mine")
    run(out, photos, epochs=2, overwrite=True)
    assert json.loads((out / "finished.json").read_text())["epochs"] == 2
    assert (out / "notes.txt").read_text() == "mine"
    assert len(rows_of(out)) == 9  # the first one is of the encoder as it was


class Poison(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            pl_module.method.head.bias.data[0] = float("nan")


def test_pretrain__non_finite_loss_stops_the_run(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        NonFiniteLossError,
        match=r"step 6 at a learning rate of \S+\. The last good .*last.ckpt",
    ):
        run(out, photos, callbacks=[Poison(6)], log_every=100)
    state = weights(out)  # of the first epoch
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert torch.load(out / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert not (out / "finished.json").exists()


def test_pretrain__non_finite_loss_never_reaches_a_checkpoint(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(NonFiniteLossError, match="none was written yet"):
        run(out, photos, callbacks=[Poison(2)], log_every=100)
    assert not (out / "checkpoints" / "last.ckpt").exists()


# Files that cannot be read.


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """The photos with one truncated and one empty file."""
    root = tmp_path / "damaged"
    shutil.copytree(photos, root)
    whole = (root / "train" / "temple" / "03.jpg").read_bytes()
    (root / "train" / "temple" / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "flower" / "05.jpg").write_bytes(b"")
    return root


def test_pretrain__broken_file_is_named(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenImageError, match=r'\.jpg.*with on_error="skip"\.$'):
        run(tmp_path / "run", damaged)


def test_pretrain__broken_files_are_replaced_and_reported(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", damaged, on_error="skip", num_workers=1)
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["steps"] == 12
    assert {Path(name).as_posix() for name in finished["unreadable"]} == {
        "temple/03.jpg",
        "flower/05.jpg",
    }
    said = capsys.readouterr().out
    assert "2 files could not be read, and others took their place" in said
    lines = said.partition("2 files could not")[2].splitlines()[1:3]
    assert sorted(line.startswith("  1: Cannot read the image ") for line in lines)
    assert any("flower/05.jpg: it is empty." in line for line in lines)
    run(tmp_path / "again", damaged, on_error="skip", num_workers=0)
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "run"))


# One process and several.


DDP_SCRIPT = """
import sys
from pathlib import Path
from lightly_mim.methods import SimMIM
from lightly_mim.pretraining import pretrain

def build():
    return SimMIM(**{vit!r})

if __name__ == "__main__":
    devices = int(sys.argv[2])
    pretrain(
        sys.argv[1], {data!r}, build, epochs=2, batch_size=8, lr=0.002,
        precision="32-true", accelerator="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", num_workers=0, tensorboard=False,
        resume=len(sys.argv) > 3,
    )
"""


@pytest.mark.slow
def test_pretrain__two_processes_give_the_weights_of_one(
    photos: Path, tmp_path: Path
) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP_SCRIPT.format(vit=TINY_VIT, data=str(photos)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        subprocess.run(
            [sys.executable, script, tmp_path / str(devices), str(devices)],
            check=True,
            env=environment,
            timeout=240,
        )
    assert_near(weights(tmp_path / "1"), weights(tmp_path / "2"))
    rows = [rows_of(tmp_path / str(n)) for n in (1, 2)]
    for name in ("train_loss", "val_loss"):
        assert [float(row[name]) for row in rows[0] if row[name]] == pytest.approx(
            [float(row[name]) for row in rows[1] if row[name]], rel=1e-4
        )


# The module in a Trainer of one's own.


def trainer(path: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 1} | options),
    )


# The Trainer of these tests has no validation.
no_validation = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
few_batches = pytest.mark.filterwarnings("ignore:The number of training batches")


def lightly_loader(data: Path, **options: Any) -> DataLoader[Any]:
    transform: Any = SimMIMTransform(input_size=32)
    dataset: Any = LightlyDataset(str(data / "train"), transform=transform)
    return DataLoader(
        dataset,
        collate_fn=MultiViewCollate(),
        drop_last=True,
        **({"batch_size": 8} | options),
    )


@no_validation
@few_batches
def test_pretraining__takes_lightlys_loader(photos: Path, tmp_path: Path) -> None:
    # 100-epoch recipe: 2e-4 per 512 images, and 8 images in a step.
    for recipe, rate in (
        (None, defaults.learning_rate(8)),
        (SimMIM.recipe(), 2e-4 * 8 / 512),
    ):
        module = Pretraining(SimMIM(**TINY_VIT), recipe)
        fit = trainer(tmp_path)
        fit.fit(module, lightly_loader(photos))
        schedule: Any = module.lr_schedulers()
        assert schedule.base_lrs[0] == pytest.approx(rate)
        assert fit.global_step == 4


@no_validation
@few_batches
@pytest.mark.parametrize("words", [(), ("relative_position_bias_table",)])
def test_pretraining__decays_what_the_recipe_says(
    photos: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    recipe = dataclasses.replace(SimMIM.recipe(), weight_decay_on=words)
    method = SimMIM(**TINY_VIT | {"encoder": "beit_base_patch16_224"})
    module = Pretraining(method, recipe=recipe)
    trainer(tmp_path, limit_train_batches=1).fit(module, lightly_loader(photos))
    decaying, others = ids_of_groups(module)
    tables = [
        block.attn.relative_position_bias_table for block in vit_of(module).blocks
    ]
    assert len(tables) == 2
    for table in tables:
        assert id(table) in (decaying if words else others)
    assert id(method.encoder.mask_token) in others
    assert id(vit_of(module).blocks[0].attn.qkv.weight) in decaying


def vit_of(module: Pretraining) -> Any:
    return module.method.encoder.vit


def ids_of_groups(module: Pretraining) -> tuple[set[int], set[int]]:
    """Returns the parameters that decay, and those that do not."""
    ids: tuple[set[int], set[int]] = (set(), set())
    for group in module.optimizers().param_groups:  # type: ignore[union-attr]
        ids[group["weight_decay"] == 0].update(map(id, group["params"]))
    return ids


def test_pretraining__normalises_bytes_and_passes_floats(photos: Path) -> None:
    module = Pretraining(SimMIM(**TINY_VIT))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = (pixels / 255 - mean) / std
    torch.testing.assert_close(module._views(([pixels], None, None), 1)[0], expected)
    assert module._views((expected, None), 1)[0] is expected


def test_pretraining__refuses_two_views() -> None:
    module = Pretraining(SimMIM(**TINY_VIT))
    views = [torch.zeros(2, 3, 32, 32)] * 2
    with pytest.raises(ValueError, match="takes 1 view.*has 2"):
        module._views((views, None, None), 1)


@no_validation
@few_batches
def test_pretraining__refuses_runs_without_length(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(
            Pretraining(SimMIM(**TINY_VIT)), lightly_loader(photos)
        )
    loader = lightly_loader(photos, batch_size=1)
    loader = DataLoader(loader.dataset, batch_size=None)
    with pytest.raises(ValueError, match="batch_size="):
        trainer(tmp_path).fit(Pretraining(SimMIM(**TINY_VIT)), loader)


def test_default_precision__is_float32_where_bf16_is_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported in (True, False):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s
        )
        expected = "bf16-mixed" if supported else "32-true"
        assert default_precision("cpu") == default_precision("auto") == expected
    assert default_precision("mps") == "32-true"
