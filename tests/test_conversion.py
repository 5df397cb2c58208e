"""Every door out: what other libraries compute with what is written."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from lightly.models.modules import (
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from lightly_mim.checkpoints import save_encoder
from lightly_mim.checkpoints.ours import METHOD_KEY
from lightly_mim.cli import main
from lightly_mim.config import to_config
from lightly_mim.conversion import convert
from lightly_mim.encoders import masked_encoder
from lightly_mim.evaluation import load_encoder
from lightly_mim.masking import Mask
from lightly_mim.methods import MAE, MaskedImageModel, SimMIM
from lightly_mim.pretraining import Pretraining
from lightly_mim.targets import PatchNormalizedPixels, Pixels

VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 64,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
WIDE = {**VIT, "embed_dim": 192, "num_heads": 3}  # as wide as a published one
SWIN: dict[str, Any] = {
    "encoder": "swin_tiny_patch4_window7_224",
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [1, 2],
}
SWIN_V2 = {**SWIN, "encoder": "swinv2_tiny_window8_256"}
BEIT = {**VIT, "encoder": "beit_base_patch16_224"}
EVA = {**VIT, "encoder": "eva02_tiny_patch14_224", "patch_size": 16}
SHARED = {
    **BEIT,
    **{"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    **{"use_fc_norm": False, "use_abs_pos_emb": True},
}
DECODER: dict[str, Any] = {
    **{"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 16}
}


def moved(model: Any) -> Any:
    """Nothing at its initial value, so that nothing can be mixed up unseen."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def saved(model: MaskedImageModel, path: Path) -> Path:
    """As a run saves it."""
    module = Pretraining(model)
    encoder: dict[str, Any] = {}
    from lightly_mim.checkpoints import put_encoder

    put_encoder(model.encoder, encoder, None)
    described = json.dumps(to_config(model))
    state = {"state_dict": module.state_dict(), METHOD_KEY: described, **encoder}
    torch.save(state, path)
    return path


def pictures(model: Any) -> Tensor:
    return torch.randn(2, 3, *model.img_size)


def equal(one: nn.Module, other: nn.Module, but: tuple[str, ...] = ()) -> None:
    state, there = one.state_dict(), other.state_dict()
    assert state.keys() == there.keys()
    for name, tensor in state.items():
        if not name.startswith(but or ("-",)):
            assert torch.equal(tensor, there[name]), name


# timm.


@pytest.mark.parametrize("options", [VIT, SWIN, SWIN_V2, BEIT, SHARED])
def test_timm(tmp_path: Path, options: dict[str, Any]) -> None:
    model = moved(SimMIM(**options))
    file = saved(model, tmp_path / "a.ckpt")
    out = convert(file, "timm", tmp_path / "out")
    images = pictures(model.encoder)
    expected = model.encoder(images)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-5)
    # By its name, with all that the encoder was built with.
    rest = {k: v for k, v in model.encoder.options.items()}
    path = str(out / "model.safetensors")
    timm.create_model(
        options["encoder"], checkpoint_path=path, num_classes=0, img_size=64, **rest
    )
    again: Any = load_encoder(out).eval()
    equal(again.vit, model.encoder.vit)
    assert torch.equal(again(images), expected)
    assert (again.mean, again.std) == (model.encoder.mean, model.encoder.std)


# Hugging Face.


@pytest.mark.parametrize("target", [PatchNormalizedPixels(), Pixels()])
def test_huggingface__mae(tmp_path: Path, target: Any) -> None:
    model = moved(MAE(**VIT, **DECODER, target=target, mask_ratio=0.5))
    file = saved(model, tmp_path / "a.ckpt")
    out = convert(file, "huggingface", tmp_path / "out")
    loaded: Any = transformers.ViTMAEForPreTraining.from_pretrained(
        out, output_loading_info=True
    )
    theirs, report = loaded
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys"))
    theirs.eval()
    images = pictures(model.encoder)
    expected = theirs(images, noise=torch.rand(2, 16))
    mask = expected.mask.bool().view(2, 4, 4)
    assert mask[0].sum() == 8
    output = model(images, mask)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    logits = expected.logits[expected.mask.bool()].view(output.prediction.shape)
    torch.testing.assert_close(output.prediction, logits, rtol=1e-5, atol=1e-5)
    again = MAE.from_pretrained(out)
    equal(model, again)
    assert (repr(again.target), again.masking.ratio) == (repr(target), 0.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (VIT, "ViTForMaskedImageModeling"),
        (SWIN, "SwinForMaskedImageModeling"),
        (SWIN_V2, "Swinv2ForMaskedImageModeling"),
    ],
)
def test_huggingface__simmim(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    model = moved(SimMIM(**options, target=Pixels()))
    file = saved(model, tmp_path / "a.ckpt")
    out = convert(file, "huggingface", tmp_path / "out")
    theirs, report = getattr(transformers, name).from_pretrained(
        out, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys"))
    theirs.eval()
    images = pictures(model.encoder)
    mask = Mask.of(model.draw_mask(images))
    cells = mask.on(model.encoder.grid).cells.flatten(1)
    expected = theirs(images, bool_masked_pos=cells)
    output = model(images, mask)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    painted = torch.where(mask.pixels((64, 64)), expected.reconstruction, images)
    torch.testing.assert_close(
        model.reconstruct(images, mask), painted, rtol=1e-5, atol=1e-5
    )
    equal(model, SimMIM.from_pretrained(out))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (VIT, "ViTModel"),
        (BEIT, "BeitModel"),
        (SHARED, "BeitModel"),
        (SWIN, "SwinModel"),
    ],
)
def test_huggingface__encoder_alone(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    encoder = moved(masked_encoder(**options))
    save_encoder(encoder, tmp_path / "a.safetensors")
    out = convert(tmp_path / "a.safetensors", "huggingface", tmp_path / "out")
    theirs: Any = getattr(transformers, name).from_pretrained(out).eval()
    images = pictures(encoder)
    hidden = theirs(images).last_hidden_state
    if "fc_norm.weight" in encoder.vit.state_dict():
        hidden = theirs.pooler.layernorm(hidden)
    torch.testing.assert_close(encoder.encode(images), hidden, rtol=1e-5, atol=1e-5)
    again: Any = load_encoder(out)
    equal(again.vit, encoder.vit)
    processor = transformers.AutoImageProcessor.from_pretrained(out, use_fast=False)
    picture = (np.random.default_rng(0).random((64, 64, 3)) * 255).astype(np.uint8)
    processed = processor(picture, return_tensors="pt")["pixel_values"][0]
    plain = torch.from_numpy(picture).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    torch.testing.assert_close(processed, (plain - mean) / std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {**VIT, "reg_tokens": 1},
        {**VIT, "init_values": 0.1},
        {**VIT, "class_token": False, "global_pool": "avg"},
        {**VIT, "encoder": "vit_small_patch16_dinov3"},
        {**SWIN, "img_size": (64, 96), "window_size": [[4, 8], [4, 4]]},
    ],
)
def test_huggingface__what_it_does_not_compute(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    save_encoder(masked_encoder(**options), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="Convert it to timm"):
        convert(tmp_path / "a.safetensors", "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# lightly.


class Benchmark(nn.Module):
    """The modules of lightly's benchmark of MAE, in small."""

    def __init__(self) -> None:
        super().__init__()
        vit: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder_embed = nn.Linear(192, 32)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=16, embed_dim=32, depth=1, num_heads=16
        )
        self.prediction_head = nn.Linear(32, 768)


def test_lightly__there_and_back(tmp_path: Path) -> None:
    theirs = moved(Benchmark())
    state = theirs.state_dict()
    beside = {"online_classifier.linear.weight": torch.ones(2, 192)}
    torch.save({"state_dict": {**state, **beside}, "epoch": 3}, tmp_path / "a.ckpt")
    model = MAE.from_pretrained(tmp_path / "a.ckpt").eval()
    assert isinstance(model.target, Pixels)
    images = pictures(model.encoder)
    mask = Mask.of(model.draw_mask(images))
    keep, masked = mask.on((4, 4)).token_index(1)
    encoded = theirs.decoder_embed(theirs.backbone.encode(images, idx_keep=keep))
    tokens = theirs.decoder.mask_token.repeat(2, 17, 1)
    tokens = tokens.scatter(1, keep[..., None].expand(-1, -1, 32), encoded)
    decoded = theirs.prediction_head(theirs.decoder(tokens))
    expected = decoded.gather(1, masked[..., None].expand(-1, -1, 768))
    torch.testing.assert_close(
        model(images, mask).prediction, expected, rtol=1e-5, atol=1e-5
    )

    out = convert(tmp_path / "a.ckpt", "lightly", tmp_path / "out")
    written = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    head = {n for n in state if n.startswith("backbone.vit.head")}
    assert written.keys() == state.keys() - head
    for name, tensor in written.items():
        if name != "backbone.mask_token":
            assert torch.equal(tensor, state[name]), name
    for place in (out / "last.ckpt", out):  # the folder as well
        equal(model, MAE.from_pretrained(place))
    again = convert(out, "lightly", tmp_path / "again")
    assert (again / "last.ckpt").read_bytes() == (out / "last.ckpt").read_bytes()
    # One file of weights is what the folder is, several are a question.
    (out / "other.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="It is neither the directory of a run"):
        MAE.from_pretrained(out)


def test_lightly__ours_there_and_back(tmp_path: Path) -> None:
    model = moved(MAE(**WIDE, **DECODER, target=Pixels()))
    out = convert(saved(model, tmp_path / "a.ckpt"), "lightly", tmp_path / "out")
    equal(model, MAE.from_pretrained(out / "last.ckpt"))
    simmim = moved(SimMIM(**WIDE))
    out = convert(saved(simmim, tmp_path / "b.ckpt"), "lightly", tmp_path / "b")
    again = SimMIM.from_pretrained(out / "last.ckpt", init="timm")
    equal(again, simmim, but=("head",))


def test_lightly__what_has_no_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MAE(**WIDE, **(DECODER | {"decoder_num_heads": 4}))
    convert(saved(model, tmp_path / "a.ckpt"), "lightly", tmp_path / "out")
    assert "Without the decoder: it has 4 attention heads" in capsys.readouterr().out
    file = saved(SimMIM(**SWIN), tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="got a SwinTransformer"):
        convert(file, "lightly", tmp_path / "b")


# Encoders that need no library of models.


@pytest.mark.parametrize("options", [VIT, SWIN, SWIN_V2, BEIT, EVA])
def test_onnx(tmp_path: Path, options: dict[str, Any]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder = moved(masked_encoder(**options))
    save_encoder(encoder, tmp_path / "a.safetensors")
    out = convert(tmp_path / "a.safetensors", "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(out / "encoder.onnx")
    for number in (1, 3):
        images = torch.randn(number, 3, 64, 64)
        [features] = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(features), encoder(images), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("options", [VIT, SWIN, SWIN_V2, BEIT, EVA])
def test_torch_export(tmp_path: Path, options: dict[str, Any]) -> None:
    encoder = moved(masked_encoder(**options))
    save_encoder(encoder, tmp_path / "a.safetensors")
    out = convert(tmp_path / "a.safetensors", "torch_export", tmp_path / "out")
    module = torch.export.load(out / "encoder.pt2").module()
    for number in (1, 3):
        images = torch.randn(number, 3, 64, 64)
        torch.testing.assert_close(module(images), encoder(images))


def test_safetensors(tmp_path: Path) -> None:
    model = moved(SimMIM(**SWIN))
    file = saved(model, tmp_path / "a.ckpt")
    out = convert(file, "safetensors", tmp_path / "out")
    again: Any = load_encoder(out / "encoder.safetensors")
    equal(again.vit, model.encoder.vit)
    state = load_file(out / "encoder.safetensors")
    assert state.keys() == model.encoder.vit.state_dict().keys()


def test_onnx__not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(masked_encoder(**VIT), tmp_path / "a.safetensors")
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxscript":
            raise ImportError(name, name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"onnxscript.*pip install 'lightly-mim\[onnx"):
        convert(tmp_path / "a.safetensors", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The card and the command.


@pytest.mark.parametrize("to", ["safetensors", "timm", "huggingface", "lightly"])
def test_convert__reads_once_and_says_what_is_unfinished(
    to: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from lightly_mim.checkpoints import put_encoder

    model, run = moved(MAE(**WIDE, **DECODER)), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    file = saved(model, run / "checkpoints" / "last.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    place: dict[str, int | None] = {"epoch": 1, "epochs": 5, "step": 3, "steps": None}
    put_encoder(model.encoder, checkpoint, place)
    torch.save(checkpoint, file)
    count, load = [], torch.load

    def counted(*arguments: Any, **options: Any) -> Any:
        count.append(1)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", counted)
    for number, source in enumerate((file, run)):
        (run / "config.yaml").write_text("out: a\ndata: photos\nmethod: {}\n")
        out = convert(source, to, tmp_path / f"{number}")
        said = "a run that had not finished: epoch 1 of 5, after optimiser step 3."
        assert said in capsys.readouterr().out
        assert said in (out / "README.md").read_text()
        assert len(count) == number + 1
    put_encoder(model.encoder, checkpoint, None)
    torch.save(checkpoint, file)
    out = convert(file, to, tmp_path / "finished")
    assert "had not finished" not in (out / "README.md").read_text()


def test_card_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MAE(**VIT, **DECODER)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    saved(model, run / "checkpoints" / "last.ckpt")
    save_encoder(model.encoder, run / "encoder.safetensors")
    (run / "finished.json").write_text("{}")
    (run / "config.yaml").write_text(
        "out: a\ndata: photos\nmethod: {}\ninit: mae.pth\n"
        "recipe: {source: ours, epochs: 7, lr: 0.001}\n"
    )
    row = {
        **{"model": "MAE", "protocol": "knn", "variant": "", "num_test": 50},
        **{"top1": 0.75, "top1_low": 0.625, "top1_high": 0.875},
    }
    results = {"rows": [row], "notes": ["3 test images are training images."]}
    (run / "results.json").write_text(json.dumps(results))
    out = tmp_path / "out"
    main(["convert", "--checkpoint", str(run), "--to", "timm", "--out", str(out)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"timm: written to {out}. How to load it: {out}/README.md"
    card = (out / "README.md").read_text()
    for line in (
        "vit_tiny_patch16_224, pretrained with MAE",
        "64 x 64 pixels",
        "Pretrained on `photos`",
        "- epochs: 7",
        "- began with the weights in: mae.pth",
        "| 75.0 [62.5, 87.5] | 50 |\n\n- 3 test images are training images.",
        "mae.pth, and their licence holds",
        f'timm.create_model("local-dir:{out}"',
    ):
        assert line in card
    with pytest.raises(SystemExit):
        main(["convert", "--checkpoint", str(run), "--to", "timm", "--out", str(out)])
    assert "is there already" in capsys.readouterr().err
    words = ["convert", "--checkpoint", str(run), "--to", "safetensors"]
    main([*words, "--out", str(out), "--overwrite"])
    names = {path.name for path in out.iterdir()}
    assert names == {"encoder.safetensors", "README.md"}
    (run / "README.md").write_text("# My photographs\n")
    with pytest.raises(SystemExit):
        main([*words, "--out", str(run), "--overwrite"])
    assert (run / "config.yaml").exists()
    with pytest.raises(ValueError, match="is one of .?timm.?, .?huggingface"):
        convert(run, "keras", tmp_path / "b")  # type: ignore[arg-type]
