"""Weights for other images, against timm's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import Tensor, nn

from lightly_mim.encoders import MaskedEncoder, fit_encoder, masked_encoder

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}
STAGES: dict[str, Any] = {"depths": [2, 2], "embed_dim": 16, "num_heads": [1, 2]}
SWIN = {**STAGES, "window_size": 4}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")


def build(name: str, **options: Any) -> tuple[MaskedEncoder, dict[str, Tensor]]:
    torch.manual_seed(0)
    encoder = masked_encoder(name, img_size=64, **options)
    for parameter in encoder.vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = encoder.vit.state_dict()
    return encoder, {name: tensor.clone() for name, tensor in state.items()}


def test_fit_encoder__nothing_to_do() -> None:
    encoder, _ = build("vit_tiny_patch16_224", **SMALL)
    same, said = fit_encoder(encoder, img_size=64, patch_size=16, in_chans=3)
    assert same is encoder
    assert said == ""


def test_fit_encoder__vit() -> None:
    encoder, old = build("vit_tiny_patch16_224", **SMALL)
    encoder.add_mask_token()
    fitted, said = fit_encoder(
        encoder, img_size=(48, 96), patch_size=(8, 16), in_chans=1
    )
    new = fitted.vit.state_dict()
    changed = {"pos_embed", "patch_embed.proj.weight"}
    for name in old.keys() - changed:
        assert torch.equal(new[name], old[name]), name
    expected = resample_abs_pos_embed(old["pos_embed"], [6, 6], [4, 4], 1)
    assert torch.equal(new["pos_embed"], expected)
    grey = adapt_input_conv(1, old["patch_embed.proj.weight"])
    expected = resample_patch_embed(grey, [8, 16])
    assert torch.equal(new["patch_embed.proj.weight"], expected)
    assert said == (
        "The weights were made for another encoder and are interpolated "
        "(img_size (64, 64) -> (48, 96); patch_size (16, 16) -> (8, 16); "
        "in_chans 3 -> 1)."
    )
    assert fitted.options == {**SMALL, "patch_size": [8, 16]}
    assert len(fitted.mean) == 1
    assert fitted.mask_token is encoder.mask_token
    assert fitted(torch.randn(2, 1, 48, 96)).shape == (2, 32)
    # What is recorded builds it again.
    again = masked_encoder(
        "vit_tiny_patch16_224", img_size=(48, 96), in_chans=1, **fitted.options
    )
    again.vit.load_state_dict(new)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_fit_encoder__channels(channels: int) -> None:
    encoder, old = build("swin_tiny_patch4_window7_224", **SWIN)
    fitted, _ = fit_encoder(encoder, in_chans=channels)
    name = "patch_embed.proj.weight"
    expected = adapt_input_conv(channels, old[name])
    assert torch.equal(fitted.vit.state_dict()[name], expected)
    assert torch.equal(
        fitted.vit.state_dict()["patch_embed.proj.bias"], old["patch_embed.proj.bias"]
    )
    assert fitted(torch.randn(2, channels, 64, 64)).shape == (2, 32)


def test_fit_encoder__beit() -> None:
    encoder, old = build("beit_base_patch16_224", **SMALL)
    fitted, _ = fit_encoder(encoder, img_size=(96, 80))
    name = "blocks.1.attn.relative_position_bias_table"
    expected = resize_rel_pos_bias_table(old[name], (6, 5), (11 * 9 + 3, 2))
    assert torch.equal(fitted.vit.state_dict()[name], expected)


@pytest.mark.parametrize(
    ("wanted", "windows"),
    [
        ({"img_size": 96}, [(6, 6), (6, 6)]),
        ({"window_size": 8}, [(8, 8), (8, 8)]),
        ({"img_size": 64, "window_size": (2, 4)}, [(2, 4), (2, 4)]),
        ({"img_size": 128, "window_size": 4}, [(4, 4), (4, 4)]),
        ({"img_size": 32, "patch_size": 2}, [(4, 4), (4, 4)]),
    ],
)
def test_fit_encoder__swin(wanted: Any, windows: list[tuple[int, int]]) -> None:
    encoder, old = build("swin_tiny_patch4_window7_224", **SWIN)
    fitted, _ = fit_encoder(encoder, **wanted)
    new = fitted.vit.state_dict()
    for stage, (height, width) in enumerate(windows):
        assert tuple(fitted.vit.layers[stage].blocks[0].window_size) == (height, width)
        name = f"layers.{stage}.blocks.1.attn.relative_position_bias_table"
        shape = ((2 * height - 1) * (2 * width - 1), stage + 1)
        expected = old[name]
        if (height, width) != (4, 4):
            expected = resize_rel_pos_bias_table(expected, (height, width), shape)
        assert torch.equal(new[name], expected)
    if "patch_size" in wanted:
        name = "patch_embed.proj.weight"
        assert torch.equal(new[name], resample_patch_embed(old[name], [2, 2]))


@pytest.mark.parametrize(
    ("name", "options", "wanted", "message"),
    [
        ("vit_tiny_patch16_224", SMALL, {"img_size": 50}, "does not divide"),
        ("vit_tiny_patch16_224", SMALL, {"patch_size": 12}, "does not divide"),
        ("vit_tiny_patch16_224", SMALL, {"window_size": 7}, "has no windows"),
        ("vit_tiny_patch16_224", SMALL, {"in_chans": 0}, "0"),
        (
            *("vit_tiny_patch16_224", {**SMALL, "in_chans": 1}),
            *({"in_chans": 3}, r"1 channel\(s\) do not tell what to make of 3"),
        ),
        (
            *("vit_tiny_patch16_224", {**SMALL, "in_chans": 4}),
            *({"in_chans": 1}, r"Take images with in_chans=4"),
        ),
        ("swin_tiny_patch4_window7_224", SWIN, {"window_size": 5}, "do not tile"),
        ("swin_tiny_patch4_window7_224", SWIN, {"img_size": 72}, "tile|divide"),
    ],
)
def test_fit_encoder__no_sense(
    name: str, options: dict[str, Any], wanted: Any, message: str
) -> None:
    encoder, _ = build(name, **options)
    with pytest.raises(ValueError, match=message):
        fit_encoder(encoder, **wanted)
