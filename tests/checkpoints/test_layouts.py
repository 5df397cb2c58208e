"""Every layout that is read: names, order of channels, and what the models compute."""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lightly_mim.checkpoints import read_weights
from lightly_mim.encoders.statistics import imagenet_statistics
from lightly_mim.evaluation import load_encoder
from lightly_mim.masking import Mask
from lightly_mim.methods import MAE, SimMIM
from lightly_mim.targets import (
    LocallyNormalizedPixels,
    PatchNormalizedPixels,
    Pixels,
)

from . import official


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pictures(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side)


def layer_norm(x: Tensor, state: official.State, name: str, eps: float) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def plain_block(
    x: Tensor, state: official.State, name: str, heads: int, bias: Tensor | None = None
) -> Tensor:
    """A transformer block of tokens (N, D), one head after the other."""
    y = layer_norm(x, state, f"{name}.norm1", 1e-6)
    y = y @ state[f"{name}.attn.qkv.weight"].T
    if f"{name}.attn.qkv.bias" in state:
        y = y + state[f"{name}.attn.qkv.bias"]
    queries, keys, values = y.chunk(3, dim=1)
    if f"{name}.attn.q_bias" in state:  # none for the keys
        queries = queries + state[f"{name}.attn.q_bias"]
        values = values + state[f"{name}.attn.v_bias"]
    size = queries.shape[1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = queries[:, part] @ keys[:, part].T / size**0.5
        if bias is not None:
            scores = scores + bias[:, :, head]
        outputs.append(scores.softmax(dim=1) @ values[:, part])
    y = torch.cat(outputs, dim=1) @ state[f"{name}.attn.proj.weight"].T
    y = y + state[f"{name}.attn.proj.bias"]
    x = x + y * state.get(f"{name}.gamma_1", torch.ones(1))
    y = layer_norm(x, state, f"{name}.norm2", 1e-6)
    y = y @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"]
    y = functional.gelu(y) @ state[f"{name}.mlp.fc2.weight"].T
    y = y + state[f"{name}.mlp.fc2.bias"]
    return x + y * state.get(f"{name}.gamma_2", torch.ones(1))


def embed(image: Tensor, state: official.State, prefix: str = "") -> Tensor:
    weight = state[f"{prefix}patch_embed.proj.weight"]
    bias = state[f"{prefix}patch_embed.proj.bias"]
    tokens = functional.conv2d(image[None], weight, bias, stride=weight.shape[-1])
    return tokens[0].flatten(1).T


# MAE.


def plain_mae(image: Tensor, cells: Tensor, state: official.State) -> Tensor:
    """The picture with the masked patches painted in, from an official state dict."""
    visible = [i for i in range(16) if not cells[i]]
    tokens = embed(image, state) + state["pos_embed"][0, 1:]
    first = state["cls_token"][0] + state["pos_embed"][0, :1]
    x = torch.cat([first, tokens[visible]])
    for number in range(2):
        x = plain_block(x, state, f"blocks.{number}", heads=3)
    x = layer_norm(x, state, "norm", 1e-6)
    x = x @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
    y = state["mask_token"][0].repeat(17, 1)
    y[[0, *(i + 1 for i in visible)]] = x
    y = plain_block(y + state["decoder_pos_embed"][0], state, "decoder_blocks.0", 16)
    y = layer_norm(y, state, "decoder_norm", 1e-6)
    y = y @ state["decoder_pred.weight"].T + state["decoder_pred.bias"]
    painted = image.clone()
    for i in range(16):
        if cells[i]:
            top, left = i // 4 * 16, i % 4 * 16
            patch = y[1 + i].view(16, 16, 3).permute(2, 0, 1)  # rows of (p, q, c)
            painted[:, top : top + 16, left : left + 16] = patch
    return painted


def test_official_mae__paints_what_a_plain_restatement_does(tmp_path: Path) -> None:
    state = official.mae()
    args = argparse.Namespace(norm_pix_loss=False, blr=1.5e-4, output_dir=Path("a"))
    args.output_dir = "a"
    torch.save(
        {"model": state, "epoch": 799, "scaler": {"scale": 1.0}, "args": args},
        tmp_path / "anything",  # its name does not matter
    )
    model = MAE.from_pretrained(tmp_path / "anything").eval()
    assert isinstance(model.target, Pixels)
    assert model.encoder.pool == "cls"
    images = pictures()
    mask = Mask.of(model.draw_mask(images))
    expected = [
        plain_mae(image, cells, state)
        for image, cells in zip(images, mask.cells.flatten(1), strict=True)
    ]
    torch.testing.assert_close(
        model.reconstruct(images, mask), torch.stack(expected), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("said", "target"), [(True, PatchNormalizedPixels), (None, 0)])
def test_official_mae__target(tmp_path: Path, said: Any, target: Any) -> None:
    beside = {} if said is None else {"args": argparse.Namespace(norm_pix_loss=said)}
    torch.save({"model": official.mae(), **beside}, tmp_path / "a.pth")
    model = MAE.from_pretrained(tmp_path / "a.pth")
    assert isinstance(model.target, target or PatchNormalizedPixels)


def test_official_mae__encoder_alone_and_fine_tuned(tmp_path: Path) -> None:
    state = official.mae(full=False)
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0
    ).eval()
    model.load_state_dict(state)
    torch.save({"model": state}, tmp_path / "a.pth")
    images = pictures()
    encoder = load_encoder(tmp_path / "a.pth").eval()
    torch.testing.assert_close(encoder(images), model(images))

    state = official.mae(tuned=True)
    torch.save({"model": state}, tmp_path / "b.pth")
    weights = read_weights(tmp_path / "b.pth")
    assert weights.left_out == ("head.weight", "head.bias")
    model = timm.create_model(
        *("vit_tiny_patch16_224", False), img_size=64, depth=2, num_classes=10,
        global_pool="avg",
    ).eval()  # fmt: skip
    model.load_state_dict(state)
    encoder = load_encoder(tmp_path / "b.pth").eval()
    assert encoder.pool == "mean"
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(encoder(images), pooled)


def test_official_mae__positions_tell_its_encoder(tmp_path: Path) -> None:
    # As published: fixed sines and cosines, and no classifier.
    made = MAE("vit_tiny_patch16_224", img_size=64, depth=2, decoder_depth=1)
    torch.save({"model": made.encoder.vit.state_dict()}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert (weights.method, weights.spec["pos_embed"]) == ("MAE", "sincos")
    assert weights.licence is not None and "CC-BY-NC" in weights.licence
    torch.save({"model": official.mae(full=False)}, tmp_path / "b.pth")
    weights = read_weights(tmp_path / "b.pth")
    assert (weights.method, weights.spec["pos_embed"]) == (None, None)


# SimMIM.


def shared_bias(table: Tensor) -> Tensor:
    """(17, 17, heads) of 4 x 4 patches behind a class token, pair by pair."""
    bias = torch.empty(17, 17, table.shape[1])
    for i in range(17):
        for j in range(17):
            if i == j == 0:
                row = 51
            elif i == 0:
                row = 49
            elif j == 0:
                row = 50
            else:
                (y, x), (v, u) = divmod(i - 1, 4), divmod(j - 1, 4)
                row = (y - v + 3) * 7 + x - u + 3
            bias[i, j] = table[row]
    return bias


def shuffled(tokens: Tensor, state: official.State, stride: int, side: int) -> Tensor:
    """The decoder's 1 x 1 convolution and pixel shuffle."""
    grid = tokens.T.reshape(1, -1, side, side)
    predicted = functional.conv2d(
        grid, state["decoder.0.weight"], state["decoder.0.bias"]
    )
    return functional.pixel_shuffle(predicted, stride)[0]


def test_official_simmim_vit__paints_what_a_plain_restatement_does(
    tmp_path: Path,
) -> None:
    state = official.simmim_vit()
    torch.save({"model": state, "epoch": 799, "max_accuracy": 0.0}, tmp_path / "a")
    model = SimMIM.from_pretrained(tmp_path / "a").eval()
    assert isinstance(model.target, Pixels)
    images = pictures()
    mask = Mask.of(model.draw_mask(images))
    inner = {n.removeprefix("encoder."): t for n, t in state.items()}
    bias = shared_bias(inner["rel_pos_bias.relative_position_bias_table"])
    painted = []
    for image, cells in zip(images, mask.on((4, 4)).cells.flatten(1), strict=True):
        tokens = embed(image, inner)
        tokens[cells] = inner["mask_token"][0, 0]
        x = torch.cat([inner["cls_token"][0], tokens])
        for number in range(2):
            x = plain_block(x, inner, f"blocks.{number}", 2, bias)
        x = layer_norm(x, inner, "norm", 1e-6)[1:]
        painted.append(shuffled(x, state, 16, 4))
    expected = torch.where(mask.pixels((64, 64)), torch.stack(painted), images)
    torch.testing.assert_close(
        model.reconstruct(images, mask), expected, rtol=1e-4, atol=1e-5
    )


def timm_swin(second: bool) -> Any:
    """timm's model of `official.swin`."""
    return timm.create_model(
        "swinv2_tiny_window8_256" if second else "swin_tiny_patch4_window7_224",
        num_classes=0,
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(1, 2),
    ).eval()


def timm_names(state: official.State) -> official.State:
    """The encoder's weights, with patches merged at the beginning of a stage."""
    wanted = {
        n.removeprefix("encoder.").replace("layers.0.down", "layers.1.down"): tensor
        for n, tensor in state.items()
    }
    beside = ("index", "coords_table", "attn_mask", "mask_token")
    return {
        n: tensor
        for n, tensor in wanted.items()
        if not n.endswith(beside) and not n.startswith(("decoder.", "head."))
    }


@pytest.mark.parametrize("second", [False, True])
def test_official_simmim_swin__paints_what_timm_encodes(
    tmp_path: Path, second: bool
) -> None:
    state = official.swin(second)
    torch.save({"model": state}, tmp_path / "a")
    model = SimMIM.from_pretrained(tmp_path / "a").eval()
    target = LocallyNormalizedPixels if second else Pixels
    assert isinstance(model.target, target)
    assert model.encoder.img_size == (32, 32)
    assert model.encoder.stride == (8, 8)
    reference = timm_swin(second)
    reference.load_state_dict(timm_names(state))
    images = pictures(32)
    mask = Mask.of(model.draw_mask(images)).on((8, 8))

    def put_tokens(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(
            mask.cells[..., None], state["encoder.mask_token"][0, 0], output
        )

    reference.patch_embed.register_forward_hook(put_tokens)
    features = reference.forward_features(images).flatten(1, 2)
    encoded = model.encoder.encode_masked(images, mask)
    torch.testing.assert_close(encoded, features)
    painted = torch.stack([shuffled(x, state, 8, 4) for x in features])
    output = model(images, mask)
    for b in range(2):
        for k, cell in enumerate(output.index[b].tolist()):
            top, left = cell // 4 * 8, cell % 4 * 8
            patch = painted[b, :, top : top + 8, left : left + 8].permute(1, 2, 0)
            torch.testing.assert_close(
                output.prediction[b, k], patch.flatten(), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("second", [False, True])
def test_official_simmim_swin__fine_tuned(tmp_path: Path, second: bool) -> None:
    state = official.swin(second, tuned=True)
    torch.save({"model": state}, tmp_path / "a")
    left_out = read_weights(tmp_path / "a").left_out
    assert {"head.weight", "head.bias"} < set(left_out)
    assert any(n.endswith("relative_position_index") for n in left_out)
    reference = timm_swin(second)
    reference.load_state_dict(timm_names(state))
    images = pictures(32)
    encoder: Any = load_encoder(tmp_path / "a").eval()
    torch.testing.assert_close(encoder(images), reference(images))


def test_official_simmim_vit__fine_tuned(tmp_path: Path) -> None:
    state = official.simmim_vit(tuned=True)
    torch.save({"model": state}, tmp_path / "a")
    weights = read_weights(tmp_path / "a")
    assert weights.method is None
    assert {"head.weight", "head.bias"} < set(weights.left_out)
    images = pictures()
    expected = []
    for image in images:
        x = torch.cat([state["cls_token"][0], embed(image, state)])
        for number in range(2):
            name = f"blocks.{number}.attn.relative_position_bias_table"
            x = plain_block(x, state, f"blocks.{number}", 2, shared_bias(state[name]))
        expected.append(layer_norm(x[1:].mean(0), state, "fc_norm", 1e-6))
    encoder: Any = load_encoder(tmp_path / "a").eval()
    torch.testing.assert_close(
        encoder(images), torch.stack(expected), rtol=1e-4, atol=1e-5
    )


def test_official_swinv2__units_of_its_coordinates(tmp_path: Path) -> None:
    state = official.swin(second=True, tuned=True)
    for name in state:  # pretrained with windows of 3
        if name.endswith("relative_coords_table"):
            state[name] = official.coordinates(4, 3)
    torch.save({"model": state}, tmp_path / "a")
    options = read_weights(tmp_path / "a").spec["options"]
    assert options["pretrained_window_sizes"] == [3, 3]
    encoder: Any = load_encoder(tmp_path / "a")
    for stage in encoder.vit.layers:
        for block in stage.blocks:
            torch.testing.assert_close(
                block.attn.relative_coords_table, official.coordinates(4, 3)
            )


def test_official_simmim__its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """yacs' CfgNode beside the weights is data, though yacs is not there to read it."""
    yacs = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    node.__qualname__ = "CfgNode"
    yacs.CfgNode = node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    target = node(ENABLE=True, PATCH_SIZE=5)
    model = node(SIMMIM=node(NORM_TARGET=target))
    model.__dict__["__immutable__"] = True
    config = node(DATA=node(IMG_SIZE=32), MODEL=model)
    torch.save({"model": official.swin(), "config": config}, tmp_path / "a")
    monkeypatch.undo()
    assert repr(SimMIM.from_pretrained(tmp_path / "a").target) == repr(
        LocallyNormalizedPixels(5)
    )


# timm's and lightly's.


def test_timm__state_dict(tmp_path: Path) -> None:
    models: dict[str, dict[str, Any]] = {
        "vit_tiny_patch16_224": {"depth": 1, "reg_tokens": 2, "init_values": 0.1},
        "deit3_small_patch16_224": {"depth": 1},
        "beit_base_patch16_224": {"depth": 1, "embed_dim": 32, "num_heads": 2},
        "swin_tiny_patch4_window7_224": {"embed_dim": 16, "num_heads": (1, 1, 2, 2)},
    }
    for name, options in models.items():
        model: Any = timm.create_model(name, num_classes=5, **options).eval()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        torch.save(model.state_dict(), tmp_path / "a.pt")
        save_file(model.state_dict(), tmp_path / "a.safetensors")
        images = torch.randn(1, 3, 224, 224)
        for file in ("a.pt", "a.safetensors"):
            encoder: Any = load_encoder(tmp_path / file).eval()
            assert len(read_weights(tmp_path / file).left_out) == 2, name
            features = model.forward_features(images)
            expected = model.forward_head(features, pre_logits=True)
            torch.testing.assert_close(encoder(images), expected)


def test_timm__folder_of_its_own(tmp_path: Path) -> None:
    model: Any = timm.create_model(
        "vit_small_patch16_dinov3", img_size=64, depth=1, num_classes=3
    ).eval()
    timm.models.save_for_hf(model, str(tmp_path))
    images = pictures()
    encoder: Any = load_encoder(tmp_path).eval()
    expected = model.forward_features(images)
    torch.testing.assert_close(encoder.encode(images), expected)
    assert encoder.name == "vit_small_patch16_dinov3"


# What is not understood.


def test_unknown(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"layout that is not known \(a, \.\.\.\)"):
        read_weights(tmp_path / "a.pt")
    torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "a.pt")
    (tmp_path / "a.txt").write_text("weights")
    with pytest.raises(ValueError, match=r"a\.txt is damaged, or is neither"):
        read_weights(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="does not exist"):
        read_weights(tmp_path / "b")
    state = official.mae(dim=96)  # no published ViT is as wide
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="how many attention heads"):
        read_weights(tmp_path / "a.pt")
    assert MAE.from_pretrained(tmp_path / "a.pt", num_heads=4).encoder.embed_dim == 96


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape"])
def test_missing_and_unexpected_keys_are_listed(tmp_path: Path, kind: str) -> None:
    state = official.mae()
    if kind == "missing":
        del state["blocks.1.mlp.fc1.bias"]
    elif kind == "unexpected":
        state["blocks.1.attn.q_norm.weight"] = torch.ones(64)
    else:
        state["blocks.1.mlp.fc1.bias"] = torch.ones(7)
    torch.save({"model": state}, tmp_path / "a.pt")
    name = "q_norm" if kind == "unexpected" else r"blocks\.1\.mlp\.fc1\.bias"
    for load in (load_encoder, MAE.from_pretrained):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / "a.pt")


def test_mixed_up_layouts(tmp_path: Path) -> None:
    extra = {"decoder_blocks.0.attn.extra": torch.ones(1)}
    torch.save({"model": official.mae() | extra}, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"unexpected are decoder\.blocks\.0\.attn\.ex"
    ):
        MAE.from_pretrained(tmp_path / "a.pt")
    state = official.mae()
    del state["decoder_pred.bias"]
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"missing or unexpected are head\.bias"):
        MAE.from_pretrained(tmp_path / "a.pt")
    two = official.simmim_vit()
    two["decoder.0.weight"] = torch.ones(700, 32, 1, 1)
    torch.save({"model": two}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="weights that do not fit"):
        read_weights(tmp_path / "b.pt")


def test_folder_without_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="There are no weights in"):
        read_weights(tmp_path)
    save_file(
        {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 4, 4)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="pass the folder that holds"):
        read_weights(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit it: KeyError"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="type 'dinov2'"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type"')
    with pytest.raises(ValueError, match=r"config\.json is missing or damaged"):
        read_weights(tmp_path)


def test_statistics_of_other_channels(tmp_path: Path) -> None:
    state = official.mae()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :1].clone()
    torch.save({"model": state}, tmp_path / "a.pt")
    encoder: Any = load_encoder(tmp_path / "a.pt")
    assert (encoder.mean, encoder.std) == imagenet_statistics(1)
