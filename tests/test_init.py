"""A run that begins with weights that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightly_mim.checkpoints import read_weights
from lightly_mim.cli import main
from lightly_mim.evaluation import load_encoder
from lightly_mim.masking import RandomMasking
from lightly_mim.methods import MAE, MaskedImageModel, SimMIM
from lightly_mim.pretraining import pretrain
from lightly_mim.targets import Pixels

from .conftest import SHORT_RUN, TINY_VIT

ONE = {**SHORT_RUN, "epochs": 1, "rank_every": 0, "lr": 1e-12}  # stands still


def same(model: MaskedImageModel, other: MaskedImageModel) -> bool:
    state, there = model.state_dict(), other.state_dict()
    assert state.keys() == there.keys()
    return all(
        torch.allclose(tensor, there[name], rtol=0, atol=1e-8)
        for name, tensor in state.items()
    )


@pytest.fixture(scope="module")
def first(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MAE on plain pixels that has come to its end."""
    out = tmp_path_factory.mktemp("runs") / "first"
    pretrain(
        out,
        photos,
        lambda: MAE(**TINY_VIT, target=Pixels(), mask_ratio=0.5, decoder_depth=1),
        **SHORT_RUN,
    )
    return out


def test_init__run_with_its_method(first: Path, photos: Path, tmp_path: Path) -> None:
    begun = pretrain(tmp_path / "second", photos, init=first, **ONE)
    assert isinstance(begun, MAE)
    assert same(begun, MAE.from_pretrained(first))
    # Its parts, without anyone saying them again.
    assert repr(begun.masking) == repr(RandomMasking(8, 0.5))
    assert isinstance(begun.target, Pixels)
    assert begun.init_args["decoder_depth"] == 1
    trained, _ = load_encoder(first), load_encoder(tmp_path / "second")
    assert begun.encoder.mean == trained.mean
    config = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert config["init"] == str(first)
    assert config["method"]["init_args"]["encoder"] == "vit_tiny_patch16_224"


@pytest.mark.parametrize("part", ["", "checkpoints/last.ckpt"])
def test_init__all_of_a_run_or_its_checkpoint(first: Path, part: str) -> None:
    model = MAE.from_pretrained(first / part)
    state = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["state_dict"][f"method.{name}"])


def test_init__a_method_of_ones_own(
    first: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger: dict[str, Any] = {**TINY_VIT, "img_size": (32, 48)}
    begun = pretrain(tmp_path, photos, lambda: SimMIM(**larger), init=first, **ONE)
    said = capsys.readouterr().out
    assert "takes the encoder." in said
    assert "img_size (32, 32) -> (32, 48)" in said
    assert "What SimMIM has besides begins anew" in said
    expected = load_encoder(first, img_size=(32, 48))
    for name, tensor in begun.encoder.vit.state_dict().items():
        there = expected.vit.state_dict()[name]
        torch.testing.assert_close(tensor, there, rtol=0, atol=1e-8)


def test_init__is_kept_by_a_run_that_goes_on(
    first: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "second"
    done = pretrain(out, photos, init=first, **ONE)
    (out / "finished.json").unlink()
    again = pretrain(out, photos, init=first, resume=True, **ONE)
    assert same(done, again)
    assert same(done, pretrain(out, resume=True))  # by out alone
    assert yaml.safe_load((out / "config.yaml").read_text())["init"] == str(first)


def test_init__is_not_resume(first: Path, photos: Path, tmp_path: Path) -> None:
    for init in (first, first / "encoder.safetensors"):
        with pytest.raises(ValueError, match="of the run in out itself.* pass resume"):
            pretrain(first, photos, init=init, **SHORT_RUN)
    with pytest.raises(ValueError, match="Leave init out to go on"):
        pretrain(first, photos, init="elsewhere", resume=True, **SHORT_RUN)
    with pytest.raises(ValueError, match=r"begin another run with them: init="):
        pretrain(first, resume=True, epochs=7)
    with pytest.raises(ValueError, match="There are no weights 'nowhere.pth'"):
        pretrain(tmp_path / "a", photos, init="nowhere.pth", **SHORT_RUN)
    assert not (tmp_path / "a").exists()


def test_init__another_encoder(first: Path, photos: Path, tmp_path: Path) -> None:
    deeper = {**TINY_VIT, "depth": 3}
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.attn.* depth=2"):
        pretrain(tmp_path / "a", photos, lambda: MAE(**deeper), init=first, **ONE)
    wider = {**TINY_VIT, "embed_dim": 48}
    with pytest.raises(ValueError, match=r"of another shape: cls_token"):
        pretrain(tmp_path / "a", photos, lambda: MAE(**wider), init=first, **ONE)
    swin = {"encoder": "swin_tiny_patch4_window7_224", "img_size": 32}
    swin |= {"window_size": 4, "depths": [1, 1], "embed_dim": 16, "num_heads": [1, 1]}
    with pytest.raises(ValueError, match="of another encoder"):
        pretrain(tmp_path / "a", photos, lambda: SimMIM(**swin), init=first, **ONE)
    assert not (tmp_path / "a").exists()


def test_init__on_the_command_line(
    first: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"pretrain --out {tmp_path / 'a'} --data {photos} --init {first} --epochs 1"
    words += " --batch-size 8 --accelerator cpu --devices 1 --num-workers 0"
    main(words.split())
    assert "MAE from" in capsys.readouterr().out
    assert read_weights(tmp_path / "a").method_name == "MAE"


def test_from_pretrained__options(first: Path) -> None:
    model = MAE.from_pretrained(first, mask_ratio=0.75, img_size=64, drop_path_rate=0.1)
    assert model.masking.ratio == 0.75  # type: ignore[attr-defined]
    assert model.encoder.img_size == (64, 64)
    assert model.encoder.options["drop_path_rate"] == 0.1
    with pytest.raises(ValueError, match="another encoder"):
        MAE.from_pretrained(first, depth=4)
    with pytest.raises(ValueError, match="does not divide into patch_size"):
        MAE.from_pretrained(first, img_size=30)
    simmim = SimMIM.from_pretrained(first)
    assert isinstance(simmim, SimMIM)
    assert not isinstance(simmim.target, Pixels)
