from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightly_mim.checkpoints import save_encoder
from lightly_mim.encoders import MaskedEncoder, masked_encoder, resize_encoder
from lightly_mim.evaluation import at_random, load_encoder
from lightly_mim.evaluation.loading import origin_notes

OPTIONS: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def small_encoder() -> MaskedEncoder:
    encoder = masked_encoder(
        "vit_tiny_patch16_224",
        img_size=(32, 48),
        in_chans=1,
        pos_embed="sincos",
        **OPTIONS,
    )
    encoder.mean, encoder.std = (0.25,), (0.125,)
    return encoder


def test_load_encoder__run_directory_and_file(tmp_path: Path) -> None:
    encoder = small_encoder().eval()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    images = torch.randn(2, 1, 32, 48)
    for path in (tmp_path, str(tmp_path), tmp_path / "encoder.safetensors"):
        loaded: Any = load_encoder(path).eval()
        assert torch.equal(loaded(images), encoder(images))
        assert (loaded.mean, loaded.std) == ((0.25,), (0.125,))
        assert (loaded.name, loaded.options) == (encoder.name, OPTIONS)
        assert loaded.pos_embed == "sincos"
        assert not loaded.vit.pos_embed.requires_grad


def test_load_encoder__run_at_another_size(tmp_path: Path) -> None:
    save_encoder(small_encoder(), tmp_path / "encoder.safetensors")
    assert load_encoder(tmp_path, img_size=(32, 48)).img_size == (32, 48)
    encoder = load_encoder(tmp_path, img_size=64)
    assert isinstance(encoder, MaskedEncoder)
    assert encoder.img_size == (64, 64)
    assert (encoder.mean, encoder.std) == ((0.25,), (0.125,))
    assert not encoder.vit.pos_embed.requires_grad
    assert encoder(torch.randn(2, 1, 64, 64)).shape == (2, 24)
    other = at_random(encoder, 0)
    assert isinstance(other, MaskedEncoder)
    assert (other.img_size, other.pos_embed) == ((64, 64), "sincos")
    assert other.vit.pos_embed.shape == encoder.vit.pos_embed.shape
    with pytest.raises(ValueError, match="does not divide into patch_size 16 x 16"):
        load_encoder(tmp_path, img_size=50)


def test_load_encoder__module_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"built with img_size=\(32, 48\)"):
        load_encoder(small_encoder(), img_size=64)


def test_load_encoder__swin_at_another_size(tmp_path: Path) -> None:
    encoder = masked_encoder(
        "swin_tiny_patch4_window7_224",
        img_size=96,
        window_size=6,
        depths=[1, 1],
        embed_dim=16,
        num_heads=[1, 1],
    )
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    larger = load_encoder(tmp_path, img_size=128)
    assert isinstance(larger, MaskedEncoder)
    assert larger.options["window_size"] == [[8, 8], [8, 8]]
    images = torch.randn(2, 3, 128, 128)
    assert larger(images).shape == at_random(larger, 0)(images).shape == (2, 32)
    # A quarter of the size would have windows of 1.5.
    smaller = load_encoder(tmp_path, img_size=24)
    assert isinstance(smaller, MaskedEncoder)
    assert smaller.options["window_size"] == [[6, 6], [3, 3]]
    with pytest.raises(ValueError, match="do not tile. Use another img_size"):
        load_encoder(tmp_path, img_size=104)


@pytest.mark.parametrize("tables", [None, "timm", "simmim"])
@pytest.mark.parametrize("own", ["timm", "simmim"])
def test_load_encoder__tables_go_as_the_runs_recipe_says(
    tmp_path: Path, tables: Any, own: Any
) -> None:
    options: Any = {"depths": [1, 1], "embed_dim": 16, "num_heads": [1, 1]}
    encoder = masked_encoder(
        "swin_tiny_patch4_window7_224", img_size=96, window_size=6, **options
    )
    for name, parameter in encoder.vit.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(parameter)
    encoder.tables = own
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    found = load_encoder(tmp_path, img_size=128, tables=tables)
    way = tables or own
    expected = resize_encoder(load_encoder(tmp_path), 128, way)  # type: ignore
    other = resize_encoder(load_encoder(tmp_path), 128, "timm")  # type: ignore
    state, same, linear = (e.vit.state_dict() for e in (found, expected, other))  # type: ignore
    assert all(torch.equal(state[name], same[name]) for name in same)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(state[name], linear[name]) == (way == "timm")
    said = " ".join(origin_notes(found, resized=True))
    assert ("SimMIM's code; tables='timm' takes" in said) == (way == "simmim")
    assert origin_notes(found) == []
    # Where nothing is resized the words do nothing.
    for arguments in ({}, {"img_size": None}):
        if tables is not None:
            with pytest.raises(ValueError, match="pass a run and img_size as well"):
                load_encoder(tmp_path, tables=tables, **arguments)  # type: ignore
    if tables is not None:
        with pytest.raises(ValueError, match="pass a run and img_size as well"):
            load_encoder(encoder, img_size=128, tables=tables)


def test_load_encoder__tables_of_others(tmp_path: Path) -> None:
    save_encoder(small_encoder(), tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="for a SwinTransformer 'simmim', got 'simmi"):
        load_encoder(tmp_path, img_size=64, tables="simmim")
    assert load_encoder(tmp_path, img_size=64, tables="timm").img_size == (64, 64)


def test_load_encoder__timm_name() -> None:
    encoder = load_encoder(
        "vit_tiny_patch16_224", img_size=(32, 64), in_chans=1, pretrained=False
    )
    assert encoder.img_size == (32, 64)
    assert encoder.in_chans == 1


def test_load_encoder__timm_name_and_a_size_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not take images of 50 x 50 pixels"):
        load_encoder("test_vit", img_size=50, pretrained=False)


def test_load_encoder__modules() -> None:
    encoder = small_encoder()
    assert load_encoder(encoder) is encoder
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **OPTIONS)
    assert load_encoder(model).vit is model


def test_load_encoder__neither_run_nor_name() -> None:
    with pytest.raises(ValueError, match=r"'runs/missing' is neither"):
        load_encoder("runs/missing")


def test_load_encoder__run_without_encoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither the directory of a run.*the path"):
        load_encoder(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_encoder(tmp_path)


def test_load_encoder__weights_cannot_be_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ValueError, match=r"no route to the hub.*pretrained=False"):
        load_encoder("vit_tiny_patch16_224")


def test_load_encoder__unknown_weights() -> None:
    with pytest.raises(ValueError, match=r"Cannot load timm's pretrained weights"):
        load_encoder("vit_tiny_patch16_224.nonsense")


def test_load_encoder__module_passed_by_hand(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **OPTIONS)
    save_encoder(masked_encoder(model), tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"pass the module as encoder="):
        load_encoder(tmp_path)


def test_load_encoder__weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small_encoder(), path)
    with safe_open(path, framework="pt") as content:
        metadata = content.metadata()
    weights = load_file(path)
    del weights["norm.weight"]
    said, _, _ = metadata["lightly_mim"].rpartition(
        ', "sha256"'
    )  # as before it had one
    save_file(weights, path, {"lightly_mim": said + "}"})
    with pytest.raises(ValueError, match=r"(?s)do not fit timm's.*norm\.weight"):
        load_encoder(path)


def test_at_random() -> None:
    encoder = small_encoder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first: Any = at_random(encoder, seed=0)
    assert torch.equal(torch.rand(3), expected)  # the global state is left alone
    again: Any = at_random(encoder, seed=0)
    other: Any = at_random(encoder, seed=1)
    weight = "blocks.0.mlp.fc1.weight"
    weights = [e.vit.get_parameter(weight) for e in (encoder, first, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
    assert first.vit.state_dict().keys() == encoder.vit.state_dict().keys()
    assert (first.mean, first.std) == (encoder.mean, encoder.std)
    images = torch.randn(1, 1, 32, 48)
    assert first(images).shape == encoder(images).shape


def test_at_random__other_family_of_another_size() -> None:
    encoder = load_encoder("cait_xxs24_224", img_size=(32, 48), pretrained=False)
    other = at_random(encoder, seed=0).eval()
    ((_, features),) = other.embed_layers(
        torch.randn(1, 3, 32, 48), [-1], ["mean"]
    ).items()
    assert other.img_size == (32, 48)
    assert features.shape == (1, 192)


def test_at_random__module_passed_by_hand() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **OPTIONS)
    with pytest.raises(ValueError, match="passed by hand"):
        at_random(masked_encoder(model), seed=0)
