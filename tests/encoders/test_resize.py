from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import make_interp_spline
from timm.models import beit, eva, swin_transformer, swin_transformer_v2
from timm.models import vision_transformer as vit
from torch import nn

from lightly_mim.encoders import MaskedEncoder, masked_encoder, resize_encoder
from lightly_mim.encoders.tables import spline_table

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
STAGES = {"depths": [2, 2, 1, 1], "embed_dim": 16, "num_heads": [1, 1, 2, 2]}


def build(name: str, img_size: int | tuple[int, int], **options: Any) -> MaskedEncoder:
    encoder = masked_encoder(name, img_size=img_size, **options)
    with torch.no_grad():
        for parameter in encoder.vit.parameters():
            nn.init.normal_(parameter, std=0.1)
    return encoder.eval()


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@pytest.mark.parametrize(
    ("family", "name", "old", "new", "options"),
    [
        (vit, "vit_tiny_patch16_224", 64, (96, 48), SMALL),
        (vit, "vit_base_patch16_rope_reg1_gap_256", 64, (96, 48), SMALL),
        (beit, "beit_base_patch16_224", 64, (96, 48), SMALL),
        (
            beit,
            "beit_base_patch16_224",
            64,
            96,
            {**SMALL, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        ),
        (eva, "eva02_tiny_patch14_224", 56, (84, 56), SMALL),
        (
            swin_transformer,
            "swin_tiny_patch4_window7_224",
            192,
            224,
            {**STAGES, "window_size": 6},
        ),
        (
            swin_transformer_v2,
            "swinv2_tiny_window8_256",
            192,
            (224, 192),
            {**STAGES, "window_size": 12},
        ),
    ],
)
def test_resize_encoder__equals_timms_loading_at_the_new_size(
    family: ModuleType,
    name: str,
    old: int,
    new: int | tuple[int, int],
    options: dict[str, Any],
) -> None:
    encoder = build(name, old, **options)
    encoder.add_mask_token()
    encoder.mean = (0.1, 0.2, 0.3)
    weights = {key: value.clone() for key, value in encoder.vit.state_dict().items()}
    resized = resize_encoder(encoder, new)
    assert resized.img_size == (new if isinstance(new, tuple) else (new, new))
    assert resized.mask_token is encoder.mask_token is not None
    assert (resized.name, resized.mean) == (name, (0.1, 0.2, 0.3))

    fresh = masked_encoder(name, img_size=resized.img_size, **resized.options).eval()
    fresh.vit.load_state_dict(family.checkpoint_filter_fn(weights, fresh.vit))
    images = torch.randn(2, 3, *resized.img_size)
    assert torch.equal(resized(images), fresh(images))


def restated(z: np.ndarray, new: int) -> np.ndarray:
    """SimMIM's resampling of a square table, by one spline along each side."""
    half = len(z) // 2
    low, high = 1.01, 1.5
    while high - low > 1e-9:
        ratio = (low + high) / 2
        if sum(ratio**i for i in range(half)) > new // 2:
            high = ratio
        else:
            low = ratio
    places = [0.0]
    for i in range(half):
        places = [places[0] - ratio**i, *places, places[-1] + ratio**i]
    at = np.clip(np.arange(-(new // 2), new // 2 + 1.0), places[0], places[-1])
    for _ in range(2):
        z = make_interp_spline(places, z, k=3)(at).T
    return z


@pytest.mark.parametrize(("window", "new"), [(6, 224), (12, 224), (6, 192), (6, 384)])
def test_resize_encoder__simmims_tables(window: int, new: int) -> None:
    name = "swin_tiny_patch4_window7_224"
    options = {**STAGES, "window_size": window}
    # Its last stage has a grid of 6: windows of 12 are of 6 there.
    old = build(name, 192, **options)
    tables = [
        (block.attn, block.attn.relative_position_bias_table.detach().double().numpy())
        for stage in old.vit.layers
        for block in stage.blocks
    ]
    tables = [(attention, table.copy()) for attention, table in tables]
    resized = resize_encoder(old, new, tables="simmim")
    for attention, table in tables:
        side = 2 * attention.window_size[0] - 1
        found = attention.relative_position_bias_table
        assert found.requires_grad
        assert found.shape == (side**2, table.shape[1])
        for head in range(table.shape[1]):
            square = table[:, head].reshape(round(len(table) ** 0.5), -1)
            expected = square if new == 192 else restated(square, side)
            expected = torch.from_numpy(expected.reshape(-1)).float()
            torch.testing.assert_close(found[:, head], expected, rtol=1e-5, atol=1e-6)
    assert resized(torch.randn(1, 3, new, new)).isfinite().all()


def test_spline_table__keeps_a_wide_smooth_table() -> None:
    """Height and width are not mixed up: a plane in either direction stays one."""
    rows = torch.arange(-5.0, 6).repeat_interleave(7)
    resampled = spline_table(torch.stack([rows, rows * 0 + 2], 1), (6, 4), (7, 6))
    first, second = resampled.view(13, 11, 2).unbind(-1)
    torch.testing.assert_close(first, first[:, :1].expand_as(first))
    assert (first.diff(dim=0) > 0).all()
    torch.testing.assert_close(first[[0, 6, 12], 0], torch.tensor([-5.0, 0, 5]))
    torch.testing.assert_close(second, torch.full((13, 11), 2.0))


def test_resize_encoder__bad_tables() -> None:
    swin = build("swin_tiny_patch4_window7_224", 64, **STAGES, window_size=2)
    with pytest.raises(ValueError, match="at least 3 x 3, got 2 x 2.*tables='timm'"):
        resize_encoder(swin, 128, tables="simmim")
    vit_encoder = build("vit_tiny_patch16_224", 32, **SMALL)
    with pytest.raises(ValueError, match="for a SwinTransformer 'simmim', got 'simmi"):
        resize_encoder(vit_encoder, 64, tables="simmim")
    with pytest.raises(ValueError, match="tables is 'timm', or .*got 'cubic'"):
        resize_encoder(swin, 128, tables="cubic")  # type: ignore[arg-type]


def test_resize_encoder__same_size() -> None:
    encoder = build("vit_tiny_patch16_224", 32, **SMALL)
    assert resize_encoder(encoder, 32) is encoder


def test_resize_encoder__windows_of_the_papers() -> None:
    # 192 pixels in pretraining, 224 in fine-tuning: windows of 6 become 7, 12 become
    # 14, and SwinV2 measures distances in its first windows (reference configuration
    # PRETRAINED_WINDOW_SIZES of 12, 12, 12, 6).
    swin = build("swin_tiny_patch4_window7_224", 192, **STAGES, window_size=6)
    assert resize_encoder(swin, 224).options["window_size"] == [[7, 7]] * 4
    swin = build("swinv2_tiny_window8_256", 192, **STAGES, window_size=12)
    resized = resize_encoder(swin, 224)
    assert resized.options["window_size"] == [[14, 14]] * 3 + [[7, 7]]
    assert resized.options["pretrained_window_sizes"] == [[12, 12]] * 3 + [[6, 6]]
    for stage, unit in zip(resized.vit.layers, (12, 12, 12, 6), strict=True):
        window = stage.blocks[0].window_size[0]
        offsets = torch.arange(1 - window, window) / (unit - 1) * 8
        logarithm = offsets.sign() * (offsets.abs() + 1).log2() / 3
        table = stage.blocks[0].attn.relative_coords_table[0]
        torch.testing.assert_close(table[:, 0, 0], logarithm)
        torch.testing.assert_close(table[0, :, 1], logarithm)
    # A second time the unit stays.
    again = resize_encoder(resized, 256)
    assert again.options["window_size"] == [[16, 16]] * 3 + [[8, 8]]
    assert again.options["pretrained_window_sizes"] == [[12, 12]] * 3 + [[6, 6]]


@pytest.mark.parametrize(
    ("old", "window", "new", "windows"),
    [
        (448, 7, 224, [7, 7, 7, 7]),  # in proportion 3.5
        (224, 7, 448, [14, 14, 14, 14]),
        (192, 12, 384, [24, 24, 24, 12]),
        (384, 12, 192, [6, 6, 6, 6]),
    ],
)
def test_resize_encoder__windows(
    old: int, window: int, new: int, windows: list[int]
) -> None:
    name = "swin_tiny_patch4_window7_224"
    encoder = build(name, old, **STAGES, window_size=window)
    resized = resize_encoder(encoder, new)
    assert resized.options["window_size"] == [[n, n] for n in windows]
    assert resized(torch.randn(1, 3, new, new)).shape == (1, 128)


def test_resize_encoder__bad_sizes() -> None:
    encoder = build("vit_tiny_patch16_224", 32, **SMALL)
    with pytest.raises(ValueError, match="does not divide into patch_size 16 x 16"):
        resize_encoder(encoder, 40)
    assert encoder.vit.patch_embed.img_size == (32, 32)
    with pytest.raises(ValueError, match="img_size is one positive whole number"):
        resize_encoder(encoder, -16)
    swin = build("swin_tiny_patch4_window7_224", 96, **STAGES, window_size=3)
    with pytest.raises(ValueError, match="Use an img_size that is a multiple"):
        resize_encoder(swin, 100)
