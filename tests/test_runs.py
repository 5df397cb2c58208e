"""Run directories: what a cut run is good for, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightly_mim.checkpoints import read_encoder
from lightly_mim.evaluation import evaluate, load_encoder
from lightly_mim.methods import MAE, SimMIM
from lightly_mim.pretraining import Pretraining

from .conftest import TINY_VIT
from .test_pretraining import (
    Interrupt,
    few_batches,
    lightly_loader,
    no_validation,
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
        assert encoder.unfinished == place  # type: ignore[union-attr]
        for name, tensor in encoder.vit.state_dict().items():  # type: ignore[union-attr]
            assert torch.equal(tensor, trained[f"method.encoder.vit.{name}"])
    results = evaluate(cut, photos, protocols=["knn"], num_workers=0)
    assert results.record["encoder"]["unfinished"] == place
    assert any("epoch 2 of 3, after optimiser step 6 of 12" in n for n in results.notes)
    resized = load_encoder(cut, img_size=64)
    assert resized.unfinished == place  # type: ignore[union-attr]


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
    assert encoder.unfinished is None  # type: ignore[union-attr]
    assert torch.equal(
        encoder.vit.norm.weight,  # type: ignore[union-attr]
        module.method.encoder.vit.norm.weight,
    )
