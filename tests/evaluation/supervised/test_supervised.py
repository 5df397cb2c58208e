"""The training that `LinearMAE` and `FineTune` share, through both of them."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation.base import ImageProtocol, LabelledImages, TrainingRun
from lightly_mim.evaluation.supervised import supervised
from lightly_mim.evaluation.supervised.finetune import FineTune
from lightly_mim.evaluation.supervised.linear_mae import LinearMAE
from lightly_mim.evaluation.supervised.supervised import Classifier, plan_batches
from lightly_mim.optim import NonFiniteLossError
from lightly_mim.training.machine import ONE, choose_layout, start
from lightly_mim.training.signals import Preempted

OPTIONS: dict[str, Any] = {
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 2,
}
FINETUNE = FineTune(epochs=2, batch_size=8, micro_batch_size=4)
LINEAR = LinearMAE(epochs=2, batch_size=8, micro_batch_size=4, lr=6.4)
PROTOCOLS: list[ImageProtocol] = [FINETUNE, LINEAR]


class Stripes(Dataset[Any]):
    """Stripes across or along, with noise: (image, label, filename)."""

    def __init__(
        self,
        num_images: int,
        transform: Callable[[Any], Any] | None = None,
        size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        num_classes: int = 2,
    ) -> None:
        generator = torch.Generator().manual_seed(num_images)
        height, width = size
        rows = (torch.arange(height) // 4 % 2 * 150)[:, None].expand(size)
        columns = (torch.arange(width) // 4 % 2 * 150).expand(size)
        self.labels = [number % num_classes for number in range(num_images)]
        noise = torch.randint(
            100, (num_images, in_chans, height, width), generator=generator
        )
        clean = torch.stack([rows if label % 2 else columns for label in self.labels])
        self.images = (clean[:, None] + noise).to(torch.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        image = self.images[index]
        sample = image if self.transform is None else self.transform(image)
        return sample, self.labels[index], str(index)


def stripes(num_train: int = 20, num_test: int = 10, **options: Any) -> LabelledImages:
    return LabelledImages(
        lambda transform: Stripes(num_train, transform, **options),
        Stripes(num_test, **options),
    )


@pytest.fixture(scope="module")
def encoder() -> MaskedEncoder:
    torch.manual_seed(0)
    return masked_encoder("vit_tiny_patch16_224", img_size=16, **OPTIONS)


def run(
    protocol: ImageProtocol, encoder: MaskedEncoder, out: Path, **options: Any
) -> Tensor:
    settings: dict[str, Any] = {"num_workers": 0} | options
    outcomes = protocol(encoder, stripes(), 2, TrainingRun(out, **settings))
    assert len(outcomes) == 1
    return outcomes[0].ranked


def checkpoint(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        out / supervised.CHECKPOINT_FILE, map_location="cpu", weights_only=True
    )
    return content


def trained(out: Path) -> dict[str, Tensor]:
    """Weights and statistics, by their names in the part that is trained."""
    state = checkpoint(out)["state_dict"]
    names = (re.sub(r"^model\.(probe\.)?", "", name) for name in state)
    return {
        name: value
        for name, value in zip(names, state.values(), strict=True)
        if not name.startswith("train_loss")
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__a_cut_training_ends_with_the_same_weights(
    protocol: ImageProtocol,
    encoder: MaskedEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(protocol, encoder, tmp_path / "whole", seed=3)
    parts = 0
    step = Classifier.training_step

    def cut_after(self: Classifier, batch: Any, batch_idx: int) -> Tensor:
        nonlocal parts
        parts += 1
        if parts in (2, 5, 8, 12):  # of 2 x 2 x 2 parts of steps, some made again
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", cut_after)
    monkeypatch.setattr(supervised, "SAVE_EVERY_MINUTES", 1e-9)
    cuts = 0
    while cuts < 10:
        torch.rand(cuts + 1)  # what was drawn before does not matter
        try:
            again = run(protocol, encoder, tmp_path / "cut", seed=3)
            break
        except KeyboardInterrupt:
            cuts += 1
    # Two of the cuts fell on the second part of a step, whose first one was lost.
    assert (cuts, parts) == (4, 8 + 4 + 2)
    assert_same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))
    assert again.equal(whole)

    # A training that is done is scored again, without a step.
    before = parts
    assert run(protocol, encoder, tmp_path / "cut", seed=3).equal(whole)
    assert parts == before


def test_train_and_score__a_signal_saves_and_ends(
    encoder: MaskedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(FINETUNE, encoder, tmp_path / "whole")
    step = Classifier.training_step

    def stopped(self: Classifier, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (1, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", stopped)
        with pytest.raises(Preempted):
            run(FINETUNE, encoder, tmp_path / "cut")
    loader = checkpoint(tmp_path / "cut")["train_loader"]
    assert (loader["epoch"], loader["batch"]) == (1, 2)  # one step of two parts
    assert run(FINETUNE, encoder, tmp_path / "cut").equal(whole)
    assert_same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))


def test_train_and_score__says_how_it_goes(
    encoder: MaskedEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(FINETUNE, encoder, tmp_path)
    said = capsys.readouterr().out
    assert "finetune: 2 epochs of 2 steps of 8 images, 1 x cpu, 32-true" in said
    assert re.search(r"epoch 2/2  train_loss \S+  images_per_second", said)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"lr", "grad_norm", "train_loss", "train_loss_step"} <= rows[0].keys()
    assert rows[-1]["epoch"] == "1"


def test_train_and_score__a_checkpoint_without_what_is_frozen(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    run(LINEAR, encoder, tmp_path)
    names = {*checkpoint(tmp_path)["state_dict"]}
    assert {name for name in names if "encoder" in name} == set()
    assert {"model.probe.0.running_mean", "model.probe.1.weight"} <= names


@pytest.mark.slow
def test_train_and_score__several_processes_make_the_weights_of_one(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    """Each test image is scored once, in its place."""
    in_two_processes(tmp_path, "score_in_processes(path, processes=2)")
    score_in_processes(tmp_path, processes=1)
    for number in range(len(PROTOCOLS)):
        one, first, second = (
            torch.load(tmp_path / f"{number}-{name}.pt", weights_only=True)
            for name in ("1-0", "2-0", "2-1")
        )
        assert len(one) == 11
        assert first.equal(second)
        torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-5)
        found, expected = (trained(tmp_path / f"{number}-{count}") for count in (2, 1))
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        other = checkpoint(tmp_path / f"{number}-1")["identity"]
        assert checkpoint(tmp_path / f"{number}-2")["identity"] == other | {
            "processes": 2
        }


def in_two_processes(path: Path, call: str) -> None:
    """Runs a function of this file, which starts a second process."""
    (path / "script.py").write_text(
        "from pathlib import Path\n"
        "from tests.evaluation.supervised.test_supervised import *\n"
        'if __name__ == "__main__":\n'
        f"    path = Path({str(path)!r})\n"
        f"    {call}\n"
    )
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, str(path / "script.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        check=True,
        timeout=600,
    )


def score_in_processes(out: Path, processes: int) -> None:
    """Keeps the logits of both protocols: runs in each of so many processes."""
    layout = ONE
    if processes > 1:
        layout = choose_layout(processes, None)
        start(layout, "cpu")
    torch.manual_seed(0)
    encoder = masked_encoder("vit_tiny_patch16_224", img_size=16, **OPTIONS)
    images = stripes(20, 11, num_classes=3)
    for number, protocol in enumerate(PROTOCOLS):
        module = importlib.import_module(type(protocol).__module__)

        def keep(*arguments: Any, number: int = number, **options: Any) -> Tensor:
            logits = supervised.train_and_score(*arguments, **options)
            torch.save(logits, out / f"{number}-{processes}-{layout.rank}.pt")
            return logits

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "train_and_score", keep)
            place = out / f"{number}-{processes}"
            settings = TrainingRun(place, num_workers=0, layout=layout)
            protocol(encoder, images, 3, settings)


def cut_in_processes(out: Path) -> None:
    """Stops a training of two processes, of which one is told to, and goes on."""
    layout = choose_layout(2, None)
    start(layout, "cpu")
    torch.manual_seed(0)
    encoder = masked_encoder("vit_tiny_patch16_224", img_size=16, **OPTIONS)
    run(FINETUNE, encoder, out / "whole", layout=layout)
    step = Classifier.training_step

    def stopped(self: Classifier, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx, self.global_rank) == (1, 0, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", stopped)
        patch.setattr(supervised, "LOG_EVERY", 1)
        with pytest.raises(Preempted):
            run(FINETUNE, encoder, out / "cut", layout=layout)
    assert checkpoint(out / "cut")["global_step"] == 3  # of 4
    run(FINETUNE, encoder, out / "cut", layout=layout)


@pytest.mark.slow
def test_train_and_score__several_processes_go_on(tmp_path: Path) -> None:
    in_two_processes(tmp_path, "cut_in_processes(path)")
    assert_same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))


def test_train_and_score__refuses_float16_on_a_cpu(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match='"16" is for GPUs'):
        run(FINETUNE, encoder, tmp_path, precision="16")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_train_and_score__on_a_gpu(
    encoder: MaskedEncoder, tmp_path: Path, precision: str
) -> None:
    run(FINETUNE, encoder, tmp_path / "cpu")
    run(FINETUNE, encoder, tmp_path / "gpu", device="cuda", precision=precision)
    found, expected = trained(tmp_path / "gpu"), trained(tmp_path / "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_train_and_score__gradient_checkpointing_changes_nothing(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    plain = FineTune(epochs=1, batch_size=8, drop_path=0.5)
    run(plain, encoder, tmp_path / "plain")
    again = dataclasses.replace(plain, grad_checkpointing=True)
    run(again, encoder, tmp_path / "again")
    assert_same(trained(tmp_path / "again"), trained(tmp_path / "plain"))


@pytest.mark.slow
def test_train_and_score__compiled(encoder: MaskedEncoder, tmp_path: Path) -> None:
    short = FineTune(epochs=1, batch_size=8)
    run(short, encoder, tmp_path / "plain")
    run(short, encoder, tmp_path / "compiled", compile=True)
    found, expected = trained(tmp_path / "compiled"), trained(tmp_path / "plain")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__leaves_everything_as_it_was(
    protocol: ImageProtocol, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    encoder = copy.deepcopy(encoder)
    encoder.add_mask_token()
    encoder.vit.pos_embed.requires_grad_(False)
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modules = str(encoder)
    torch.manual_seed(1)
    old: Any = np.random.get_state()  # noqa: NPY002
    states = torch.get_rng_state(), old[1], random.getstate()
    run(protocol, encoder, tmp_path)
    assert torch.get_rng_state().equal(states[0])
    new: Any = np.random.get_state()  # noqa: NPY002
    assert (new[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert_same(encoder.state_dict(), before)
    assert str(encoder) == modules
    assert encoder.training
    assert [n for n, p in encoder.named_parameters() if not p.requires_grad] == [
        "vit.pos_embed"
    ]
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__is_a_function_of_the_seed(
    protocol: ImageProtocol, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    run(protocol, encoder, tmp_path / "0", seed=0)
    run(protocol, encoder, tmp_path / "workers", seed=0, num_workers=1)
    run(protocol, encoder, tmp_path / "1", seed=1)
    assert_same(trained(tmp_path / "0"), trained(tmp_path / "workers"))
    other = trained(tmp_path / "1")
    assert any(not other[name].equal(w) for name, w in trained(tmp_path / "0").items())


def test_train_and_score__refuses_another_checkpoint(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    run(LINEAR, encoder, tmp_path)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        run(LINEAR, encoder, tmp_path, seed=1)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.vit.norm.bias[3] += 1e-3
    with pytest.raises(ValueError, match="encoder was"):
        run(LINEAR, other, tmp_path)
    with pytest.raises(ValueError, match="num_images"):
        LINEAR(encoder, stripes(30), 2, TrainingRun(tmp_path, num_workers=0))


def test_train_and_score__refuses_labels_that_are_no_class(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Labels lie in \[0, 2\), got 0 to 2"):
        LINEAR(encoder, stripes(num_classes=3), 2, TrainingRun(tmp_path, num_workers=0))


def test_train_and_score__a_broken_loss_is_not_saved(
    encoder: MaskedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "SAVE_EVERY_MINUTES", 1e-9)
    broken = copy.deepcopy(encoder)
    with torch.no_grad():
        broken.vit.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="NaN .* step 0 .* rate of"):
        run(LINEAR, broken, tmp_path)
    assert list(tmp_path.glob("*.ckpt")) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_train_and_score__bf16(
    protocol: ImageProtocol, encoder: MaskedEncoder, tmp_path: Path
) -> None:
    ranked = run(protocol, encoder, tmp_path, precision="bf16", progress=True)
    assert ranked.shape == (10, 2)
    assert all(value.dtype != torch.bfloat16 for value in trained(tmp_path).values())


def test_plan_batches() -> None:
    assert plan_batches(1_281_167, 16_384, 512) == (16_384, 32, 78)
    assert plan_batches(100, 48, 20) == (48, 3, 2)  # 16 at a time
    assert plan_batches(100, 48, 20, multiple=2) == (48, 3, 2)
    assert plan_batches(100, 30, 20, multiple=2) == (30, 3, 3)  # not 15, which is odd
    # Fewer images than a batch: nearly all of them, in equal parts.
    assert plan_batches(1968, 16_384, 512) == (1968, 4, 1)
    assert plan_batches(1967, 16_384, 512) == (1964, 4, 1)
    assert plan_batches(7, 16_384, 512) == (7, 1, 1)
    assert plan_batches(7, 16_384, 512, multiple=2) == (6, 1, 1)
    # Each of several processes takes as many of them.
    assert plan_batches(1_281_167, 1024, 128, 2, processes=8) == (1024, 8, 1251)
    assert plan_batches(1_281_167, 1024, 128, 2, processes=32) == (1024, 32, 1251)
    assert plan_batches(100, 48, 20, processes=2) == (48, 4, 2)
    assert plan_batches(1967, 16_384, 512, processes=8) == (1960, 8, 1)
    with pytest.raises(ValueError, match="multiple of 6"):
        plan_batches(100, 32, 20, 2, processes=3)
    with pytest.raises(ValueError, match="batch_size=31"):
        plan_batches(100, 31, 20, multiple=2)
    with pytest.raises(ValueError, match="at least 2"):
        plan_batches(1, 16, 16, multiple=2)
