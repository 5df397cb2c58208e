from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
from lightly.models.utils import get_at_index, repeat_token, set_at_index
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.decoders import CrossAttentionDecoder, MAEDecoder
from lightly_mim.masking import RandomMasking
from lightly_mim.patches import sincos_positions


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 3])
def test_decode_masked__equals_lightlys_decoder(num_prefix_tokens: int) -> None:
    torch.manual_seed(0)
    lightlys = MaskedVisionTransformerDecoderTIMM(
        num_patches=16,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_prefix_tokens=num_prefix_tokens,
    )
    ours = MAEDecoder((4, 4), 24, 2, 3, num_prefix_tokens)
    torch.testing.assert_close(ours.pos_embed, lightlys.pos_embed)
    ours.load_state_dict(lightlys.state_dict())

    mask = RandomMasking(1, 0.75)(2, (4, 4))
    idx_keep, idx_mask = mask.token_index(num_prefix_tokens)
    tokens = torch.randn(2, num_prefix_tokens + 4, 24)
    sequence = repeat_token(lightlys.mask_token, (2, num_prefix_tokens + 16))
    sequence = set_at_index(sequence, idx_keep, tokens)
    expected = lightlys(sequence)
    decoded = ours.decode_masked(tokens, idx_keep, idx_mask)
    torch.testing.assert_close(decoded, get_at_index(expected, idx_mask))
    # lightly's own interface is left.
    torch.testing.assert_close(ours(sequence), expected)


def test_decode_masked__has_positions_for_any_aspect() -> None:
    decoder = MAEDecoder((2, 6), 16, 1, 2, num_prefix_tokens=1)
    positions = sincos_positions((2, 6), 16, 1)
    assert torch.equal(decoder.pos_embed[0], positions)
    # The order of what is decoded does not matter: a position belongs to its token.
    idx_keep = torch.tensor([[0, 1, 4]])
    tokens = torch.randn(1, 3, 16)
    forward = decoder.decode_masked(tokens, idx_keep, torch.tensor([[2, 9, 12]]))
    backward = decoder.decode_masked(tokens, idx_keep, torch.tensor([[12, 9, 2]]))
    torch.testing.assert_close(forward, backward.flip(1))
    assert (forward - backward).abs().max() > 1e-3


def test_decode_masked__resamples_positions_to_other_grids() -> None:
    decoder = MAEDecoder((4, 4), 16, 1, 2, num_prefix_tokens=1)
    idx_keep, idx_mask = torch.tensor([[0, 1]]), torch.tensor([[23, 24]])
    decoded = decoder.decode_masked(torch.randn(1, 2, 16), idx_keep, idx_mask, (4, 6))
    assert decoded.shape == (1, 2, 16)
    assert decoded.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 2), 16, 0, 2), "at least 1 block, got depth 0"),
        (((2, 2), 16, 1, 3), "got 16 and 3"),
        (((2, 2), 18, 1, 2), "multiple of 4, got 18"),
    ],
)
def test_decoder__refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAEDecoder(*arguments)
    with pytest.raises(ValueError, match=message):
        grid, embed_dim, depth, num_heads = arguments
        CrossAttentionDecoder(grid, 20, embed_dim, depth, num_heads)


def cross_decoder(num_feature_maps: int | None = None) -> CrossAttentionDecoder:
    torch.manual_seed(0)
    decoder = CrossAttentionDecoder(
        (3, 4), 20, 24, 2, 3, num_prefix_tokens=2, num_feature_maps=num_feature_maps
    )
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return decoder


def plain_cross_decoder(
    decoder: CrossAttentionDecoder, tokens: Tensor, idx_mask: Tensor
) -> Tensor:
    """The same with PyTorch's own attention."""
    positions = sincos_positions((3, 4), 24, 2)
    x = decoder.mask_token + positions[idx_mask]
    block: Any
    for i, block in enumerate(decoder.blocks):
        context = tokens
        if decoder.map_weights is not None:
            context = torch.zeros_like(tokens[0])
            for weight, features in zip(decoder.map_weights[i], tokens, strict=True):
                context = context + weight * features
            norm: Any = decoder.map_norms[i]
            context = functional.layer_norm(context, (20,), norm.weight, norm.bias)
        attention = nn.MultiheadAttention(24, 3, kdim=20, vdim=20, batch_first=True)
        key, value = block.key_value.weight.chunk(2)
        attention.load_state_dict(
            {
                "q_proj_weight": block.query.weight,
                "k_proj_weight": key,
                "v_proj_weight": value,
                "in_proj_bias": torch.cat([block.query.bias, block.key_value.bias]),
                "out_proj.weight": block.proj.weight,
                "out_proj.bias": block.proj.bias,
            }
        )
        x = x + attention(block.norm1(x), context, context)[0]
        h = functional.gelu(block.mlp.fc1(block.norm2(x)))
        x = x + block.mlp.fc2(h)
    output: Tensor = decoder.norm(x)
    return output


@pytest.mark.parametrize("num_feature_maps", [None, 5])
def test_cross_attention__equals_pytorch(num_feature_maps: int | None) -> None:
    decoder = cross_decoder(num_feature_maps)
    maps = () if num_feature_maps is None else (num_feature_maps,)
    tokens = torch.randn(*maps, 2, 5, 20)
    idx_keep = torch.tensor([[0, 1, 2, 5, 13], [0, 1, 3, 4, 12]])
    idx_mask = torch.tensor([[3, 4, 6, 12], [2, 5, 6, 13]])
    decoded = decoder.decode_masked(tokens, idx_keep, idx_mask)
    expected = plain_cross_decoder(decoder, tokens, idx_mask)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
    # What is decoded beside a token makes no difference to it.
    part = decoder.decode_masked(tokens, idx_keep, idx_mask[:, 1:3])
    torch.testing.assert_close(part, decoded[:, 1:3])


def test_cross_attention__resamples_positions_to_other_grids() -> None:
    decoder = cross_decoder()
    idx = torch.tensor([[0, 1]]), torch.tensor([[25]])
    assert decoder.decode_masked(torch.randn(1, 2, 20), *idx, (4, 6)).isfinite().all()
