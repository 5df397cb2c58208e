from __future__ import annotations

import pytest
import torch
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
from lightly.models.utils import get_at_index, repeat_token, set_at_index

from lightly_mim.decoders import MAEDecoder
from lightly_mim.masking import RandomMasking, mask_to_index
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
    idx_keep, idx_mask = mask_to_index(mask, 12, num_prefix_tokens)
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
def test_decoder__refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAEDecoder(*arguments)
