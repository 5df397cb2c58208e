"""Folders that transformers itself wrote, as it writes them: eps of 1e-12 included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lightly_mim.checkpoints import read_weights
from lightly_mim.conversion import convert
from lightly_mim.evaluation import load_encoder
from lightly_mim.evaluation.loading import at_random
from lightly_mim.masking import Mask
from lightly_mim.methods import MAE, SimMIM
from lightly_mim.patches import sincos_positions
from lightly_mim.pretraining import pretrain
from lightly_mim.targets import PatchNormalizedPixels, Pixels

from ..conftest import SHORT_RUN

VIT: dict[str, Any] = {
    **{"image_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 64},
}
DECODER: dict[str, Any] = {
    **{"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1},
    **{"decoder_num_attention_heads": 2, "decoder_intermediate_size": 128},
}
SWIN: dict[str, Any] = {
    **{"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]},
    **{"window_size": 4, "encoder_stride": 8},
}


def made(name: str, add_pooling_layer: bool = False, **options: Any) -> Any:
    """A model of transformers, with every weight moved from where it begins."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    pooling = {"add_pooling_layer": True} if add_pooling_layer else {}
    model = cls(cls.config_class(**options), **pooling)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Tokens are as small as trained ones begin, so that 1e-6 beside their
            # variance would be seen.
            deviation = 0.01 if key.endswith("_token") else 0.05
            parameter.data += deviation * torch.randn_like(parameter)
        elif "pos" in key:  # as published weights of MAE have them, zero here
            positions = sincos_positions((4, 4), parameter.shape[-1], 1)
            parameter.data.copy_(positions)
    return model.eval()


def written(model: Any, folder: Path, kind: str = "safetensors") -> Path:
    """Writes it as safetensors, in shards, or as transformers did before: a pickle."""
    shard = "40KB" if kind == "shards" else "5GB"
    model.save_pretrained(folder, max_shard_size=shard)
    if kind == "bin":
        file = folder / "model.safetensors"
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    return folder


def pictures(side: int = 64) -> Tensor:
    images = torch.randn(2, 3, side, side)
    images[1] = 0  # grey: its patches are their positions alone
    return images


KINDS = ["safetensors", "shards", "bin"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalised", [True, False])
def test_vit_mae(tmp_path: Path, kind: str, normalised: bool) -> None:
    theirs = made("ViTMAEForPreTraining", **VIT, **DECODER, norm_pix_loss=normalised)
    folder = written(theirs, tmp_path / "a", kind)
    assert (len(list(folder.glob("model-*"))) > 2) == (kind == "shards")
    ours = MAE.from_pretrained(folder).eval()
    assert isinstance(ours.target, PatchNormalizedPixels if normalised else Pixels)
    images = pictures()
    expected = theirs(images, noise=torch.rand(2, 16))
    mask = Mask.of(expected.mask.bool().view(2, 4, 4))
    output = ours(images, mask)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    logits = expected.logits[expected.mask.bool()].view(output.prediction.shape)
    torch.testing.assert_close(output.prediction, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTForMaskedImageModeling", VIT),
        ("SwinForMaskedImageModeling", SWIN),
        ("SwinForMaskedImageModeling", {**SWIN, "layer_norm_eps": 1e-3}),
        ("Swinv2ForMaskedImageModeling", SWIN),
    ],
)
def test_masked_image_modeling(
    tmp_path: Path, kind: str, name: str, options: dict[str, Any]
) -> None:
    theirs = made(name, **options)
    ours = SimMIM.from_pretrained(written(theirs, tmp_path / "a", kind)).eval()
    images = pictures()
    mask = Mask.of(ours.draw_mask(images))
    cells = mask.on(ours.encoder.grid).cells.flatten(1)
    expected = theirs(images, bool_masked_pos=cells)
    assert ours(images, mask).loss.item() == pytest.approx(
        expected.loss.item(), rel=1e-5
    )
    painted = torch.where(mask.pixels((64, 64)), expected.reconstruction, images)
    torch.testing.assert_close(
        ours.reconstruct(images, mask), painted, rtol=1e-5, atol=1e-6
    )


RELATIVE = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True}
ABSOLUTE = {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("options", [RELATIVE, SHARED, ABSOLUTE])
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_beit_and_data2vec(
    tmp_path: Path, mean: bool, options: dict[str, Any], name: str
) -> None:
    theirs = made(name, add_pooling_layer=True, **VIT, **options, use_mean_pooling=mean)
    ours: Any = load_encoder(written(theirs, tmp_path / "a")).eval()
    images = pictures()
    output = theirs(images)
    torch.testing.assert_close(ours(images), output.pooler_output, rtol=1e-5, atol=1e-6)
    if not mean:
        hidden = output.last_hidden_state
        torch.testing.assert_close(ours.encode(images), hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # Its own norm is the encoder's, as in the published ones.
        ("BeitForMaskedImageModeling", {**VIT, **SHARED, "vocab_size": 7}),
        # There is one of the encoder, too.
        ("BeitForMaskedImageModeling", {**VIT, **SHARED, "use_mean_pooling": False}),
        ("BeitForImageClassification", {**VIT, **RELATIVE}),
        ("Data2VecVisionForImageClassification", {**VIT, **RELATIVE}),
        ("ViTForImageClassification", VIT),
        ("SwinForImageClassification", SWIN),
    ],
)
def test_other_heads__left_out(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    theirs = made(name, **options)
    folder = written(theirs, tmp_path / "a")
    names = load_file(folder / "model.safetensors").keys()
    head = {n for n in names if n.startswith(("classifier.", "lm_head."))}
    assert head and head <= set(read_weights(folder).left_out)
    images = pictures()
    hidden = theirs.base_model(images).last_hidden_state
    if name.startswith("Beit") and options.get("use_mean_pooling", True):
        norm = getattr(theirs, "layernorm", None) or theirs.beit.pooler.layernorm
        hidden = norm(hidden)
    elif name.startswith("Data2Vec"):
        hidden = theirs.base_model.pooler.layernorm(hidden)
    ours: Any = load_encoder(folder).eval()
    torch.testing.assert_close(ours.encode(images), hidden, rtol=1e-5, atol=1e-5)


def test_eps__stays_with_the_weights(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a run that begins with them, is cut and goes on, and every door out."""
    wide = {**VIT, "hidden_size": 192, "num_attention_heads": 3}
    folder = written(made("ViTForMaskedImageModeling", **wide), tmp_path / "a")
    encoder: Any = load_encoder(folder).eval()
    assert encoder.norm_eps == 1e-12
    run = tmp_path / "run"
    pretrain(run, photos, init=folder, **{**SHORT_RUN, "epochs": 1})
    (run / "finished.json").unlink()
    assert pretrain(run, resume=True).encoder.norm_eps == 1e-12
    trained: Any = load_encoder(run).eval()
    assert trained.norm_eps == at_random(trained, 0).norm_eps == 1e-12
    assert load_encoder(run, img_size=96).norm_eps == 1e-12
    images = pictures()
    expected = trained(images)
    capsys.readouterr()
    for to in ("huggingface", "safetensors", "timm", "lightly", "torch_export"):
        out = convert(run, to, tmp_path / to)
        said = "norms of timm's model add 1e-06 to the variance" in (
            capsys.readouterr().out
        )
        assert said == (to in ("timm", "lightly"))
        assert said == ("come with 1e-12: set eps" in (out / "README.md").read_text())
        if to == "torch_export":
            program = torch.export.load(out / "encoder.pt2").module()
            torch.testing.assert_close(program(images), expected)
            continue
        again: Any = load_encoder(out).eval()
        if said:
            assert not torch.allclose(again(images), expected, rtol=1e-5, atol=1e-6)
            again.norm_eps = 1e-12
        again.pool = trained.pool
        torch.testing.assert_close(again(images), expected)
    config = json.loads((tmp_path / "huggingface" / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-12


@pytest.mark.parametrize(
    ("said", "expected"),
    [(1e-6, 1e-6), (None, 1e-12), ("1", "norm_eps is"), (-1, "norm_eps is")],
)
def test_eps__as_config_says(tmp_path: Path, said: Any, expected: Any) -> None:
    folder = written(made("ViTModel", **VIT), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_norm_eps")
    if said is not None:
        config["layer_norm_eps"] = said
    (folder / "config.json").write_text(json.dumps(config))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load_encoder(folder)
    else:
        encoder: Any = load_encoder(folder)
        assert encoder.norm_eps == expected
