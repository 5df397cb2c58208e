"""What the tests of Beit and Eva share: small images, masks, and comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightly_mim.encoders import MaskedEncoder
from lightly_mim.masking import Mask

SIZE = (32, 48)
TINY: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
}


def perturb(encoder: MaskedEncoder) -> None:
    """Biases, tables and layer scales near zero would hide mistakes."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def draw(encoder: MaskedEncoder) -> tuple[Tensor, Tensor]:
    """Three images and masks over cells of 2 x 2 patches, a third of them masked."""
    torch.manual_seed(1)
    images = torch.randn(3, encoder.in_chans, *SIZE)
    order = torch.rand(3, 6).argsort(dim=1)
    return images, (order < 2).view(3, 2, 3)


def check_encode(encoder: MaskedEncoder) -> None:
    """Compares tokens without a mask with timm's."""
    images, mask = draw(encoder)
    expected = encoder.vit.fc_norm(encoder.vit.forward_features(images))
    torch.testing.assert_close(encoder.encode(images), expected)
    output = encoder.encode_masked(images, Mask(torch.zeros_like(mask), 0))
    torch.testing.assert_close(output, expected)
    assert encoder.sequence_length == expected.shape[1]


def check_masked_encoding(
    encoder: MaskedEncoder, images: Tensor, mask: Tensor, drop: bool, expected: Tensor
) -> None:
    """Compares tokens and every gradient of SimMIM (drop=False) or MAE (drop=True)."""
    if drop:
        output = encoder.encode_visible(images, mask)
    else:
        output = encoder.encode_masked(images, mask)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    weights = torch.randn_like(output)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True)
        for x in (output, expected)
    ]
    scale = max(g.abs().max() for g in gradients[1] if g is not None)
    for got, want in zip(*gradients, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-5)
