"""The same words everywhere: whatever stands for weights goes through every door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from lightly_mim import evaluate
from lightly_mim.checkpoints import save_encoder
from lightly_mim.cli import main
from lightly_mim.evaluation import load_encoder
from lightly_mim.masking import Mask
from lightly_mim.methods import MAE, SimMIM
from lightly_mim.methods.pretrained import from_pretrained
from lightly_mim.pretraining import pretrain
from lightly_mim.targets import PatchNormalizedPixels, Pixels

from ..conftest import SHORT_RUN, TINY_VIT
from . import official
from .test_huggingface import DECODER, SWIN, VIT, made, written

# That its checkpoints are of an earlier lightly is what a test is about.
pytestmark = pytest.mark.filterwarnings("ignore:MAEDecoderTIMM is deprecated")

# One epoch that stands still.
ONE = {**SHORT_RUN, "epochs": 1, "rank_every": 0, "lr": 1e-12}
TINY = "vit_tiny_patch16_224"


def ours(path: Path) -> Path:
    model = MAE(**TINY_VIT, decoder_dim=32, decoder_depth=1)
    pretrain(path / "run", path / "photos", model, **ONE)
    return path / "run"


def ours_alone(path: Path) -> Path:
    save_encoder(SimMIM(**TINY_VIT).encoder, path / "a.safetensors")
    return path / "a.safetensors"


def official_file(state: official.State) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        torch.save({"model": state}, path / "a.pth")
        return path / "a.pth"

    return write


def timm_file(path: Path) -> Path:
    model = timm.create_model(TINY, img_size=64, depth=1, num_classes=3)
    save_file(model.state_dict(), path / "a.safetensors")
    return path / "a.safetensors"


def timm_folder(path: Path) -> Path:
    options: dict[str, Any] = {"img_size": 64, "depth": 1, "embed_dim": 48}
    model: Any = timm.create_model(TINY, num_classes=3, **options)
    timm.models.save_for_hf(model, str(path / "a"), model_args=options)
    return path / "a"


def lightly_file(path: Path) -> Path:
    torch.save({"state_dict": Older().state_dict(), "epoch": 3}, path / "a.ckpt")
    return path / "a.ckpt"


DOORS: dict[str, Callable[[Path], Path]] = {
    "a run": ours,
    "our encoder": ours_alone,
    "official MAE": official_file(official.mae()),
    "official MAE's encoder": official_file(official.mae(full=False)),
    "official SimMIM ViT": official_file(official.simmim_vit()),
    "official SimMIM Swin": official_file(official.swin()),
    "official SimMIM SwinV2, fine-tuned": official_file(official.swin(True, True)),
    "ViTMAE": lambda p: written(made("ViTMAEForPreTraining", **VIT, **DECODER), p),
    "Swin": lambda p: written(made("SwinForMaskedImageModeling", **SWIN), p),
    "timm's file": timm_file,
    "timm's folder": timm_folder,
    "lightly's file": lightly_file,
}


@pytest.mark.parametrize("door", DOORS)
def test_same_words(door: str, tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "photos").symlink_to(photos)
    x = DOORS[door](tmp_path / "x")
    encoder: Any = load_encoder(x)
    expected = encoder.vit.state_dict()
    begun = pretrain(tmp_path / "begun", photos, init=x, **ONE)
    method = from_pretrained(x)
    assert type(begun) is type(method)
    for model in (method, type(method).from_pretrained(x), begun):
        state = model.encoder.vit.state_dict()
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-8)
    results = [
        evaluate(which, photos, ["knn"], num_workers=0, baselines=[])
        for which in (x, encoder)
    ]
    said = [result.record["encoder"] for result in results]
    assert said[0] == said[1]
    assert results[0].rows[0].top1 == results[1].rows[0].top1


def test_name_of_timm(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its weights were fetched."""
    published = timm.create_model(TINY).state_dict()
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: published
    )
    encoder: Any = load_encoder(TINY)
    assert encoder.mean == (0.5, 0.5, 0.5)  # as timm says of them
    small = MAE.from_pretrained(TINY, img_size=64)
    begun = pretrain(
        *(tmp_path / "run", photos, lambda: SimMIM(TINY, img_size=64)), init=TINY, **ONE
    )
    positions = resample_abs_pos_embed(published["pos_embed"], [4, 4], [14, 14], 1)
    for model in (small, begun):
        assert model.encoder.mean == encoder.mean
        state = model.encoder.vit.state_dict()
        for name, tensor in state.items():
            there = positions if name == "pos_embed" else published[name]
            torch.testing.assert_close(tensor, there, rtol=0, atol=1e-8)


def test_evaluate__on_the_command_line(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = official_file(official.mae(full=False))(tmp_path)
    words = f"evaluate --encoder {file} --data {photos} --num-workers 0"
    main([*words.split(), "--protocols", "knn", "--baselines", "[]"])
    assert "knn" in capsys.readouterr().out.lower()


# What a layout leaves open.


def test_official_mae__pixels_or_normalised_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files for pictures predict plain pixels, and have the layout of all others."""
    file = official_file(official.mae())(tmp_path)
    assert isinstance(MAE.from_pretrained(file).target, PatchNormalizedPixels)
    assert "pass target=Pixels() for mae_visualize_" in capsys.readouterr().out
    model = MAE.from_pretrained(file, target=Pixels())
    assert isinstance(model.target, Pixels)


class Older(nn.Module):
    """The modules of lightly's benchmark of MAE before lightly 1.6, in small."""

    def __init__(self) -> None:
        super().__init__()
        vit: Any = timm.create_model(TINY, img_size=64, depth=2)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=16,
            patch_size=16,
            embed_dim=192,
            decoder_embed_dim=32,
            decoder_depth=1,
            decoder_num_heads=16,
        )


def test_lightly__before_its_decoder_was_one_of_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Older().eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.ckpt")
    model = MAE.from_pretrained(tmp_path / "a.ckpt").eval()
    images = torch.randn(2, 3, 64, 64)
    mask = Mask.of(model.draw_mask(images))
    keep, masked = mask.on((4, 4)).token_index(1)
    encoded = theirs.decoder.embed(theirs.backbone.encode(images, idx_keep=keep))
    tokens = theirs.decoder.mask_token.repeat(2, 17, 1)
    tokens = tokens.scatter(1, keep[..., None].expand(-1, -1, 32), encoded)
    decoded = theirs.decoder.predict(theirs.decoder.decode(tokens))
    expected = decoded.gather(1, masked[..., None].expand(-1, -1, 768))
    torch.testing.assert_close(
        model(images, mask).prediction, expected, rtol=1e-5, atol=1e-5
    )


# Another size.


def test_resizing__positions_of_the_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official.mae()
    file = official_file(state)(tmp_path)
    model = MAE.from_pretrained(file, img_size=(96, 48))
    found = model.state_dict()
    for theirs, name in (
        ("pos_embed", "encoder.vit.pos_embed"),
        ("decoder_pos_embed", "decoder.pos_embed"),
    ):
        expected = resample_abs_pos_embed(state[theirs], [6, 3], [4, 4], 1)
        assert torch.equal(found[name], expected)
    assert "(img_size (64, 64) -> (96, 48))" in capsys.readouterr().out
    output = model(torch.randn(2, 3, 96, 48))
    assert output.prediction.shape[2] == 768
    # Parts for other patches do not fit, and say so.
    MAE.from_pretrained(file, patch_size=8)
    said = capsys.readouterr().out
    assert "patch_size (16, 16) -> (8, 8)" in said
    assert "The head begins anew: head.weight has shape (768, 32)" in said
