"""What the tests of MAE and its relatives share: small models, images, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from lightly_mim.masking import BlockMasking, GridMasking
from lightly_mim.methods import MAE

Method = TypeVar("Method", bound=MAE)

DECODER: dict[str, Any] = {
    "decoder_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}
VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 64,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    **DECODER,
}
BEIT: dict[str, Any] = {**VIT, "encoder": "beit_base_patch16_224"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "class token": VIT,
    "no class token": {**VIT, "class_token": False, "global_pool": ""},
    "fc_norm": {**VIT, "class_token": False, "global_pool": "avg"},
    "registers": {**VIT, "reg_tokens": 3},
    "registers without positions": {**VIT, "reg_tokens": 3, "no_embed_class": True},
    "non-square": {**VIT, "img_size": (48, 80)},
    "one channel, oblong patches": {
        **VIT,
        "img_size": (32, 64),
        "patch_size": (8, 16),
        "in_chans": 1,
    },
    "blocks of 2 x 2 patches": {
        **VIT,
        "patch_size": 8,
        "mask_patch_size": 16,
        "reg_tokens": 7,
    },
    "blocks of 1 x 2 patches": {**VIT, "mask_patch_size": (16, 32), "mask_ratio": 0.5},
    "large rectangles": {**VIT, "patch_size": 8, "masking": BlockMasking(8, 0.75)},
    "grid": {**VIT, "masking": GridMasking(16)},
    "Beit": BEIT,
    "Beit, shared table": {
        **BEIT,
        "use_shared_rel_pos_bias": True,
        "use_rel_pos_bias": False,
    },
    "EVA-02": {**VIT, "encoder": "eva02_tiny_patch14_224", "patch_size": 16},
    "RoPE, mixed": {**VIT, "encoder": "vit_small_patch16_rope_mixed_224"},
    "DINOv3": {**VIT, "encoder": "vit_small_patch16_dinov3"},
}


@overload
def build(options: Mapping[str, Any], **more: Any) -> MAE: ...


@overload
def build(options: Mapping[str, Any], method: type[Method], **more: Any) -> Method: ...


def build(options: Mapping[str, Any], method: type[MAE] = MAE, **more: Any) -> MAE:
    """A model whose every weight matters and none is at its initial value."""
    torch.manual_seed(0)
    model = method(**{**options, **more}).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images(model: MAE, batch_size: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.encoder.img_size
    shape = (batch_size, model.encoder.in_chans, *size)
    return 0.5 + 2 * torch.randn(shape, generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_gradients_equal(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """To 1e-5 of the largest of all."""
    assert ours.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * largest, name
