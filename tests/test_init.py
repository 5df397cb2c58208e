"""A run that begins with weights that are there."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightly_mim.checkpoints import (
    put_encoder,
    read_encoder,
    read_weights,
    save_encoder,
)
from lightly_mim.checkpoints.ours import METHOD_KEY
from lightly_mim.cli import main
from lightly_mim.config import to_config
from lightly_mim.conversion import convert
from lightly_mim.evaluation import load_encoder
from lightly_mim.heads import InverseSwinHead, MLPHead
from lightly_mim.masking import RandomMasking
from lightly_mim.methods import MAE, MaskedImageModel, SimMIM
from lightly_mim.pretraining import Pretraining, pretrain
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
    expected: Any = load_encoder(first, img_size=(32, 48))
    for name, tensor in begun.encoder.vit.state_dict().items():
        there = expected.vit.state_dict()[name]
        torch.testing.assert_close(tensor, there, rtol=0, atol=1e-8)


def test_init__is_kept_by_a_run_that_goes_on(
    first: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "second"
    done = pretrain(out, photos, init=first, **ONE)
    (out / "finished.json").unlink()
    again = pretrain(out, photos, init=first, resume=True, **ONE)
    assert same(done, again)
    assert same(done, pretrain(out, resume=True))  # by out alone
    # By another path, or a link, to the same run; not by one to another.
    (tmp_path / "link").symlink_to(first)
    monkeypatch.chdir(first.parent)
    for word in (
        "first",
        "./first/",
        f"../{first.parent.name}/first",
        tmp_path / "link",
    ):
        assert same(done, pretrain(out, photos, init=word, resume=True, **ONE))
    (first.parent / "other").mkdir(exist_ok=True)
    for word in ("other", "first/encoder.safetensors", "nowhere"):
        with pytest.raises(ValueError, match="Leave init out to go on"):
            pretrain(out, photos, init=word, resume=True, **ONE)
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
    swin: dict[str, Any] = {"encoder": "swin_tiny_patch4_window7_224", "img_size": 32}
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


@pytest.mark.parametrize(
    ("head", "other"),
    [
        (None, MLPHead()),
        (MLPHead(), None),
        (InverseSwinHead(depths=(2, 2)), InverseSwinHead(depths=(4, 2))),
    ],
)
def test_init__another_head_begins_anew(
    head: Any, other: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = SimMIM(**TINY_VIT, head=head)
    checkpoint: dict[str, Any] = {
        "state_dict": Pretraining(method).state_dict(),
        METHOD_KEY: json.dumps(to_config(method)),
    }
    put_encoder(method.encoder, checkpoint, None)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    begun = SimMIM.from_pretrained(tmp_path / "a.ckpt", head=other)
    said = capsys.readouterr().out
    assert (
        "takes the encoder, its mask token. The head begins anew: the weights" in said
    )
    assert f"are of another one, and {begun.init_args['head']} is asked for." in said
    assert type(begun.head) is type(SimMIM(**TINY_VIT, head=other).head)
    # A part of a head is damage, not another one.
    del checkpoint["state_dict"][
        next(n for n in checkpoint["state_dict"] if n.startswith("method.head"))
    ]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="weights of the head .* missing or unexpecte"):
        SimMIM.from_pretrained(tmp_path / "a.ckpt")


def test_init__statistics_of_the_weights_last(
    first: Path, photos: Path, tmp_path: Path
) -> None:
    """A run that goes on has its images normalised as when it began."""
    trained = load_encoder(first)
    assert trained.mean != MAE(**TINY_VIT).encoder.mean
    for name, build in {"a": None, "b": lambda: SimMIM(**TINY_VIT)}.items():
        out = tmp_path / name
        pretrain(out, photos, build, init=first, **ONE)
        (out / "finished.json").unlink()
        again = pretrain(out, resume=True)
        assert (again.encoder.mean, again.encoder.std) == (trained.mean, trained.std)
    out = tmp_path / "c"  # what is said goes first
    own = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    assert pretrain(out, photos, init=first, normalize=own, **ONE).encoder.mean == (
        *(0.5, 0.4, 0.3),
    )


def test_init__values_of_16_bits_last(tmp_path: Path) -> None:
    """Weights take the range of their images along, through every door."""
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for number in range(9):
        pixels = generator.integers(0, 4096, (40, 40), dtype=np.uint16)
        Image.fromarray(pixels).save(images / f"{number}.png")
    options: dict[str, Any] = {**ONE, "lr": 1e-3}
    first = tmp_path / "first"
    grey = partial(MAE, **TINY_VIT, in_chans=1, decoder_depth=1)
    pretrain(first, images, grey, value_range=(0, 4095), **options)
    assert MAE.from_pretrained(first).encoder.value_range == (0, 4095)
    for out, kept in (
        (convert(first, "safetensors", tmp_path / "file"), (0, 4095)),
        (tmp_path / "second", (0, 4095)),
        (tmp_path / "third", (0, 8191)),
    ):
        if not out.exists():
            more: dict[str, Any] = {"value_range": kept} if kept[1] == 8191 else {}
            pretrain(out, images, init=first, **options, **more)
            config = yaml.safe_load((out / "config.yaml").read_text())
            assert config["value_range"] == list(kept)
            (out / "finished.json").unlink()
            assert pretrain(out, resume=True).encoder.value_range == kept
        file = out / "encoder.safetensors"
        assert read_encoder(file).spec["value_range"] == list(kept)


def test_init__tables_go_on_as_their_code_has_them(tmp_path: Path) -> None:
    swin: dict[str, Any] = {"encoder": "swin_tiny_patch4_window7_224", "img_size": 32}
    swin |= {"window_size": 4, "depths": [1, 1], "embed_dim": 16, "num_heads": [1, 1]}
    model = SimMIM(**swin, mask_patch_size=8)
    model.encoder.tables = "simmim"
    save_encoder(model.encoder, tmp_path / "a.safetensors")
    assert SimMIM.from_pretrained(tmp_path / "a.safetensors").encoder.tables == "simmim"
    # Of a run that goes on it is the checkpoint that says it.
    module = Pretraining(SimMIM(**swin, mask_patch_size=8))
    for said, expected in (("timm", "timm"), ("simmim", "simmim")):
        checkpoint: dict[str, Any] = {}
        model.encoder.tables = said  # type: ignore[assignment]
        put_encoder(model.encoder, checkpoint, None)
        module.on_load_checkpoint(checkpoint)
        assert module.method.encoder.tables == expected
