from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from lightly_mim.encoders import masked_encoder
from lightly_mim.encoders.beit import MaskedBeit
from lightly_mim.masking import Mask

from .masked import SIZE, TINY, check_encode, check_masked_encoding, draw, perturb

NAME = "beit_base_patch16_224"
SIMMIM: dict[str, Any] = {
    "use_shared_rel_pos_bias": True,
    "use_rel_pos_bias": False,
    "use_abs_pos_emb": False,
    "use_fc_norm": False,
    "init_values": 0.1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "SimMIM": SIMMIM,
    "a table per block, fc_norm": {},
    "a table per block": {"use_fc_norm": False},
    "both tables and positions": {
        "use_shared_rel_pos_bias": True,
        "use_abs_pos_emb": True,
        "init_values": None,
        "qkv_bias": False,
    },
    "positions only": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
    "sincos, one channel": {
        "use_rel_pos_bias": False,
        "use_abs_pos_emb": True,
        "pos_embed": "sincos",
        "in_chans": 1,
    },
}


def build(variant: str) -> MaskedBeit:
    torch.manual_seed(0)
    encoder = masked_encoder(NAME, **TINY, **VARIANTS[variant])
    assert isinstance(encoder, MaskedBeit)
    encoder.add_mask_token()
    perturb(encoder)
    return encoder.eval()


def plain_encode(
    encoder: MaskedBeit, images: Tensor, mask: Tensor, drop: bool
) -> Tensor:
    """SimMIM (drop=False) and MAE (drop=True) with timm's blocks on all tokens.

    For MAE nobody may look at the masked tokens: minus infinity is added to the
    attention they get.
    """
    vit, mask_token = encoder.vit, encoder.mask_token
    assert mask_token is not None
    masked = torch.zeros(3, 1 + 24, dtype=torch.bool)
    for image in range(3):
        for row in range(4):
            for column in range(6):
                masked[image, 1 + 6 * row + column] = mask[image, row // 2, column // 2]
    tokens = torch.cat([vit.cls_token.expand(3, 1, -1), vit.patch_embed(images)], dim=1)
    if not drop:
        for image in range(3):
            for token in range(25):
                if masked[image, token]:
                    tokens[image, token] = mask_token[0, 0]
    if vit.pos_embed is not None:
        tokens = tokens + vit.pos_embed
    bias = torch.zeros(1, 1, 25, 25)
    if vit.rel_pos_bias is not None:
        bias = bias + vit.rel_pos_bias()
    if drop:
        bias = bias.masked_fill(masked[:, None, None, :], float("-inf"))
    for block in vit.blocks:
        tokens = block(tokens, shared_rel_pos_bias=bias)
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
        expected = encoder.encode_visible(images, mask)
        fine = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        kept = [torch.nonzero(~row).flatten() + 1 for row in fine]
        idx_keep = torch.stack([torch.cat([torch.tensor([0]), row]) for row in kept])
        # The tokens come back in the order in which they are kept.
        order = torch.randperm(17)
        tokens = encoder.encode(images, idx_keep=idx_keep[:, order])
        torch.testing.assert_close(tokens, expected[:, order], rtol=1e-4, atol=1e-5)
        same = encoder.encode(images, idx_keep=torch.arange(25).expand(3, -1))
        torch.testing.assert_close(same, encoder.encode(images), rtol=1e-4, atol=1e-5)

    def test_forward__as_timms_mean(self, variant: str) -> None:
        encoder = build(variant)
        images, _ = draw(encoder)
        vit = encoder.vit
        assert vit.global_pool == "avg"
        expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encoder(images), expected)
        torch.testing.assert_close(encoder.embed(images), expected)

    def test_forward_intermediates(self, variant: str) -> None:
        encoder = build(variant)
        images, _ = draw(encoder)
        tokens, layers = encoder.forward_intermediates(images)
        _, expected = encoder.vit.forward_intermediates(
            images, return_prefix_tokens=True, output_fmt="NLC"
        )
        torch.testing.assert_close(tokens, encoder.encode(images))
        assert len(layers) == len(expected) == encoder.num_layers
        for layer, (patches, prefix) in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer, torch.cat([prefix, patches], dim=1))

    def test_every_parameter_takes_part(self, variant: str) -> None:
        encoder = build(variant).train()
        images, mask = draw(encoder)
        encoder.encode_masked(images, mask)[:, 1:].square().sum().backward()
        unused = [
            name
            for name, parameter in encoder.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        assert unused == []

    def test_set_grad_checkpointing(self, variant: str) -> None:
        encoder = build(variant).train()
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


def test_bfloat16_autocast() -> None:
    encoder = build("SimMIM")
    images, mask = draw(encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = (
            encoder.encode_masked(images, mask),
            encoder.encode_visible(images, mask),
        )
    for output, drop in zip(outputs, (False, True), strict=True):
        expected = plain_encode(encoder, images, mask, drop)
        assert (output - expected).abs().mean() < 0.05


def test_set_drop_path__as_timm() -> None:
    encoder = masked_encoder(NAME, **TINY, **SIMMIM)
    expected = timm.create_model(
        NAME, num_classes=0, drop_path_rate=0.1, **TINY, **SIMMIM
    )
    encoder.set_drop_path(0.1)
    assert repr(encoder.vit) == repr(expected)
    rates = [
        [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
        for model in (encoder.vit, expected)
    ]
    assert rates[0] == rates[1] == pytest.approx([0.05, 0.05, 0.1, 0.1])


def test_blocks_with_tables__same_noise_on_a_part_as_on_all_tokens() -> None:
    # timm's own block runs on all tokens, ours where some are left out.
    noise: dict[str, Any] = {
        "attn_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "drop_path_rate": 0.5,
    }
    encoder: Any = masked_encoder(NAME, **TINY, init_values=0.5, **noise).train()
    images = torch.randn(8, 3, *SIZE)
    outputs = []
    for idx_keep in (None, torch.arange(25).expand(8, -1)):
        torch.manual_seed(0)
        outputs.append(encoder.encode(images, idx_keep=idx_keep))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[0], encoder.eval().encode(images), atol=1e-2)


def test_no_weight_decay() -> None:
    assert build("SimMIM").no_weight_decay() == {
        "mask_token",
        "vit.cls_token",
        "vit.rel_pos_bias.relative_position_bias_table",
    }
    names = build("both tables and positions").no_weight_decay()
    assert len(names) == 3 + 1 + 3
    assert "vit.blocks.2.attn.relative_position_bias_table" in names


@pytest.mark.parametrize("variant", ["SimMIM", "a table per block"])
def test_compile(variant: str) -> None:
    encoder = build(variant)
    images, mask = draw(encoder)
    calls: list[Callable[[], Tensor]] = [
        lambda: encoder.encode_masked(images, Mask(mask, 2)),
        lambda: encoder.encode_visible(images, Mask(mask, 2)),
    ]
    for call in calls:
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(), call())


def test_deepcopy_and_pickle() -> None:
    encoder = build("SimMIM")
    images, mask = draw(encoder)
    expected = encoder.encode_masked(images, mask)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        torch.testing.assert_close(other.encode_masked(images, mask), expected)


def test_positions__none_to_replace() -> None:
    with pytest.raises(ValueError, match="without absolute positions"):
        masked_encoder(NAME, pos_embed="sincos", **TINY, **SIMMIM)


def test_other_size() -> None:
    encoder = build("SimMIM")
    with pytest.raises(ValueError, match=r"32 x 48.*48 x 32.*img_size=\(48, 32\)"):
        encoder.encode(torch.zeros(1, 3, 48, 32))
