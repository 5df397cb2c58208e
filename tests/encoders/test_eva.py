from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from lightly_mim.encoders import masked_encoder
from lightly_mim.encoders.eva import MaskedEva

from .masked import TINY, check_encode, check_masked_encoding, draw, perturb

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "EVA-02, fc_norm": ("eva02_base_patch14_448", {}),
    "positions only": ("eva_giant_patch14_224", {}),
    "RoPE and positions": ("vit_small_patch16_rope_ape_224", {}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "mixed and positions": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "DINOv3, dynamic size": ("vit_small_patch16_dinov3", {"dynamic_img_size": True}),
    "DINOv3, one size": ("vit_small_patch16_dinov3", {"dynamic_img_size": False}),
    "MRoPE": (
        "vit_small_patch16_rope_224",
        {
            "rope_type": "mrope",
            "rope_mrope_section": (2, 3, 3),
            "rope_grid_indexing": "ij",
        },
    ),
    "no prefix tokens": (
        "vit_small_patch16_rope_224",
        {"class_token": False, "global_pool": "avg"},
    ),
    "EVA-02, one channel": ("eva02_tiny_patch14_224", {"in_chans": 1}),
}


def build(variant: str) -> MaskedEva:
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    encoder = masked_encoder(name, **{**TINY, **options})
    assert isinstance(encoder, MaskedEva)
    encoder.add_mask_token()
    perturb(encoder)
    return encoder.eval()


def plain_encode(
    encoder: MaskedEva, images: Tensor, mask: Tensor, drop: bool
) -> Tensor:
    """SimMIM (drop=False) and MAE (drop=True) with timm's blocks on all tokens.

    For MAE nobody may look at the masked tokens: minus infinity is added to the
    attention they get.
    """
    vit, num_prefix = encoder.vit, encoder.num_prefix_tokens
    assert encoder.mask_token is not None
    masked = torch.zeros(3, num_prefix + 24, dtype=torch.bool)
    for image in range(3):
        for row in range(4):
            for column in range(6):
                token = num_prefix + 6 * row + column
                masked[image, token] = mask[image, row // 2, column // 2]
    embedded = vit.patch_embed(images)
    if not drop:
        flat = embedded.view(3, 24, -1).clone()
        for image in range(3):
            for patch in range(24):
                if masked[image, num_prefix + patch]:
                    flat[image, patch] = encoder.mask_token[0, 0]
        embedded = flat.view_as(embedded)
    tokens: Tensor
    tokens, rope = vit._pos_embed(embedded)
    tokens = vit.norm_pre(tokens)
    nobody = torch.zeros(3, 1, 1, num_prefix + 24)
    if drop:
        nobody = nobody.masked_fill(masked[:, None, None, :], float("-inf"))
    for number, block in enumerate(vit.blocks):
        own = rope[number] if vit.rope_mixed else rope
        tokens = block(tokens, rope=own, attn_mask=nobody)
    tokens = vit.fc_norm(vit.norm(tokens))
    if drop:
        tokens = torch.stack([tokens[image][~masked[image]] for image in range(3)])
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
class TestVariants:
    def test_encode(self, variant: str) -> None:
        check_encode(build(variant))

    @pytest.mark.parametrize("drop", [False, True])
    def test_encode_masked_and_visible(self, variant: str, drop: bool) -> None:
        encoder = build(variant)
        images, mask = draw(encoder)
        expected = plain_encode(encoder, images, mask, drop)
        check_masked_encoding(encoder, images, mask, drop, expected)

    def test_idx_keep(self, variant: str) -> None:
        encoder = build(variant)
        images, mask = draw(encoder)
        num_prefix = encoder.num_prefix_tokens
        prefix = torch.arange(num_prefix)
        expected = encoder.encode_visible(images, mask)
        fine = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        kept = [torch.nonzero(~row).flatten() + num_prefix for row in fine]
        # The patches come back in the order in which they are kept.
        order = torch.randperm(16)
        idx_keep = torch.stack([torch.cat([prefix, row[order]]) for row in kept])
        tokens = encoder.encode(images, idx_keep=idx_keep)
        expected = expected[:, torch.cat([prefix, num_prefix + order])]
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)

    def test_forward__as_timms(self, variant: str) -> None:
        encoder = build(variant)
        images, _ = draw(encoder)
        vit = encoder.vit
        features = vit.forward_features(images)
        torch.testing.assert_close(encoder(images), vit.forward_head(features))
        expected = vit.fc_norm(vit.pool(features, "avg"))
        torch.testing.assert_close(encoder.embed(images), expected)

    def test_forward_intermediates(self, variant: str) -> None:
        encoder = build(variant)
        images, _ = draw(encoder)
        tokens, layers = encoder.forward_intermediates(images)
        _, expected = encoder.vit.forward_intermediates(images, output_fmt="NLC")
        torch.testing.assert_close(tokens, encoder.encode(images))
        assert len(layers) == len(expected) == encoder.num_layers
        for layer, patches in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer[:, encoder.num_prefix_tokens :], patches)

    def test_every_parameter_takes_part(self, variant: str) -> None:
        encoder = build(variant).train()
        images, mask = draw(encoder)
        tokens = encoder.encode_masked(images, mask)
        tokens[:, encoder.num_prefix_tokens :].square().sum().backward()
        unused = [n for n, p in encoder.named_parameters() if p.grad is None]
        assert unused == []


def test_set_grad_checkpointing() -> None:
    encoder = build("mixed").train()
    images, mask = draw(encoder)
    calls: list[int] = []
    encoder.vit.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for enable in (False, True):
        encoder.zero_grad()
        encoder.set_grad_checkpointing(enable)
        encoder.encode_visible(images, mask).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert len(calls) == 3
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("variant", ["EVA-02", "mixed", "DINOv3"])
def test_bfloat16_autocast(variant: str) -> None:
    encoder = build(variant)
    images, mask = draw(encoder)
    exact = encoder.encode_visible(images, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = encoder.encode_visible(images, mask)
    assert (output.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_idx_keep__refuses_what_would_be_turned_wrongly() -> None:
    encoder = build("DINOv3")
    images, _ = draw(encoder)
    for kept in ([1, 0, 2, 3, 4, 5, 6], [0, 1, 2, 3, 5, 6], [0, 1, 2, 3, 4, 7, 2]):
        idx_keep = torch.tensor([kept]).expand(3, -1)
        with pytest.raises(ValueError, match="begins with the 5 prefix tokens"):
            encoder.encode(images, idx_keep=idx_keep)


def test_augmented_positions__are_drawn_once_for_all_blocks() -> None:
    encoder = build("DINOv3").train()
    encoder.vit.rope.rescale_coords = 2.0
    encoder.vit.rope.aug_active = True
    images, mask = draw(encoder)
    outputs = []
    for seed in (2, 3, 2):
        torch.manual_seed(seed)
        outputs.append(encoder.encode_visible(images, mask))
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=0)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (64, 64)])
def test_dynamic_img_size(size: tuple[int, int]) -> None:
    encoder = build("DINOv3, dynamic size")
    images = torch.randn(2, 3, *size)
    expected = encoder.vit.forward_features(images)
    torch.testing.assert_close(encoder.encode(images), expected)
    everything = torch.arange(expected.shape[1]).expand(2, -1)
    output = encoder.encode(images, idx_keep=everything)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_no_weight_decay() -> None:
    encoder = build("mixed and positions")
    assert encoder.no_weight_decay() == {
        "mask_token",
        "vit.cls_token",
        "vit.pos_embed",
        "vit.rope.freqs",
    }


def test_deepcopy_and_pickle() -> None:
    encoder = build("DINOv3")
    images, mask = draw(encoder)
    expected = encoder.encode_visible(images, mask)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        torch.testing.assert_close(other.encode_visible(images, mask), expected)


def test_refuses_patch_dropout() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", **TINY, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        masked_encoder(model)
