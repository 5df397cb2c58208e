"""The features that a method's output has for a probe that looks on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightly_mim.encoders import MaskedEncoder, Pool
from lightly_mim.masking import Mask
from lightly_mim.methods import MAE, CrossMAE, MaskedImageModel, MaskTokenMAE, SimMIM

PLAIN: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = ("vit_tiny_patch16_224", {**PLAIN, "reg_tokens": 2})
BEIT = ("beit_base_patch16_224", PLAIN)  # normalises the mean instead of the tokens
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2},
)
DECODER: dict[str, Any] = {
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def build(cls: type[Any], name: str, **options: Any) -> MaskedImageModel:
    torch.manual_seed(0)
    options |= DECODER if issubclass(cls, MAE) else {}
    method: MaskedImageModel = cls(
        encoder=name, img_size=(32, 48), mask_patch_size=16, **options
    )
    with torch.no_grad():  # scales and norms that begin at one hide mistakes
        for parameter in method.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return method.eval()


def seen(encoder: MaskedEncoder, images: Tensor, mask: Mask, drop: bool) -> Tensor:
    """The feature that lightly's interface gives of the same masked images."""
    patches = mask.on(encoder.grid)
    idx_keep, idx_mask = patches.token_index(encoder.num_prefix_tokens)
    if drop:
        return encoder(images, idx_keep=idx_keep)  # type: ignore[no-any-return]
    return encoder(images, idx_mask=idx_mask)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("cls", "encoder", "pool"),
    [
        (SimMIM, VIT, "mean"),
        (SimMIM, SWIN, "mean"),
        (MAE, VIT, "cls"),
        (CrossMAE, VIT, "cls"),
        (MaskTokenMAE, VIT, "cls"),
        (MAE, ("vit_tiny_patch16_224", {**PLAIN, "global_pool": "avg"}), "mean"),
    ],
)
def test_features__as_the_encoders_forward(
    cls: type[MaskedImageModel], encoder: tuple[str, dict[str, Any]], pool: Any
) -> None:
    method = build(cls, encoder[0], **encoder[1])
    assert method.encoder.pool == pool
    images = torch.randn(3, 3, 32, 48)
    output = method(images)
    drop = cls in (MAE, CrossMAE)
    if encoder[1].get("global_pool") == "avg":
        assert output.features is None
        method.encoder.pool = "cls"  # of one token, the norm is the same
        output = method(images)
    pools: list[Pool] = ["cls", "mean", "cls+mean"]
    for own in [method.encoder.pool] if pool == "mean" else pools:
        method.encoder.pool = own
        output = method(images, output.mask)
        assert output.features.shape == (3, method.encoder.feature_dim)
        assert not output.features.requires_grad
        expected = seen(method.encoder, images, output.mask, drop)
        torch.testing.assert_close(output.features, expected)


@pytest.mark.parametrize("cls", [SimMIM, MAE, MaskTokenMAE])
def test_features__none_where_the_mean_is_normalised(
    cls: type[MaskedImageModel],
) -> None:
    method = build(cls, BEIT[0], **BEIT[1])
    assert method(torch.randn(2, 3, 32, 48)).features is None
    # The mean of tokens that are normalised one by one is something else.
    images = torch.randn(2, 3, 32, 48)
    tokens = method.encoder.encode(images)
    mean = method.encoder.cell_tokens(tokens).mean(dim=1)
    assert not torch.allclose(mean, method.encoder(images), atol=1e-3)


def test_pool__simmim_takes_the_mean() -> None:
    method = build(SimMIM, VIT[0], **VIT[1])
    images = torch.randn(2, 3, 32, 48)
    tokens = method.encoder.encode(images)
    expected = tokens[:, 3:].mean(dim=1)
    torch.testing.assert_close(method.encoder(images), expected)
    assert "pool='mean'" in repr(method)
    assert "pool='cls'" in repr(build(MAE, VIT[0], **VIT[1]))
