"""lightly's contract of a `MaskedVisionTransformer`, for all families.

What the documentation of lightly 1.6 promises of `forward`, `encode`,
`forward_intermediates` and the steps between image and tokens. Where an encoder keeps
less, or more, a test says so under "Deviations", which the README lists.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from lightly.models import utils
from lightly.models.modules.masked_vision_transformer import MaskedVisionTransformer
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from torch import Tensor, nn

from lightly_mim import MAE
from lightly_mim.encoders import masked_encoder
from lightly_mim.encoders.transformer import MaskedTransformer

PLAIN: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES: dict[str, Any] = {
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "window_size": 4,
}
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", PLAIN),
    "ViT with registers": ("vit_tiny_patch16_224", {**PLAIN, "reg_tokens": 2}),
    "ViT without class token": (
        "vit_tiny_patch16_224",
        {**PLAIN, "class_token": False, "global_pool": "avg"},
    ),
    "ViT of any size": ("vit_tiny_patch16_224", {**PLAIN, "dynamic_img_size": True}),
    "Beit": ("beit_base_patch16_224", {**PLAIN, "init_values": 0.1}),
    "Eva": ("eva02_tiny_patch14_224", PLAIN),
}
SWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "Swin": ("swin_tiny_patch4_window7_224", STAGES),
    "SwinV2": (
        "swinv2_tiny_window8_256",
        {**STAGES, "pretrained_window_sizes": (0, 0)},
    ),
}
FAMILIES = {**VITS, **SWINS}
BATCH = 2


def build(family: str, mask_token: bool = True) -> MaskedTransformer:
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    encoder = masked_encoder(name, img_size=32, **options)
    assert isinstance(encoder, MaskedTransformer)
    if mask_token:
        encoder.add_mask_token()
    return encoder.eval()


def draw() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 32, 32, generator=generator)


def token_mask(encoder: MaskedTransformer) -> tuple[Tensor, Tensor]:
    """(idx_keep, idx_mask) as lightly draws them; of the prefix all are kept."""
    prefix = encoder.num_prefix_tokens
    patches = encoder.sequence_length - prefix
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(BATCH, patches, generator=generator).argsort(dim=1) + prefix
    first = torch.arange(prefix).expand(BATCH, -1)
    return torch.cat([first, order[:, : patches // 2]], dim=1), order[:, patches // 2 :]


def as_bool(encoder: MaskedTransformer, index: Tensor) -> Tensor:
    mask = torch.zeros(BATCH, encoder.sequence_length, dtype=torch.bool)
    return mask.scatter(1, index, True)


def output_tokens(encoder: MaskedTransformer) -> int:
    """Number of output tokens of whole images."""
    height, width = encoder.img_size
    cells = (height // encoder.stride[0]) * (width // encoder.stride[1])
    return encoder.num_prefix_tokens + cells


@pytest.mark.parametrize("family", FAMILIES)
class TestAllFamilies:
    def test_sequence_length(self, family: str) -> None:
        encoder = build(family)
        assert isinstance(encoder, MaskedVisionTransformer)
        patches = encoder.images_to_tokens(draw())
        assert patches.shape == (
            BATCH,
            encoder.sequence_length - encoder.num_prefix_tokens,
            encoder.patch_dim,
        )

    def test_mask_token(self, family: str) -> None:
        encoder = build(family)
        assert isinstance(encoder.mask_token, nn.Parameter)
        assert encoder.mask_token.shape == (1, 1, encoder.patch_dim)

    @pytest.mark.parametrize("masked", ["nothing", "index", "bool"])
    def test_forward_and_encode(self, family: str, masked: str) -> None:
        encoder = build(family)
        _, idx_mask = token_mask(encoder)
        options: dict[str, Any] = {
            "nothing": {},
            "index": {"idx_mask": idx_mask},
            "bool": {"mask": as_bool(encoder, idx_mask)},
        }[masked]
        features = encoder(draw(), **options)
        assert features.shape == (BATCH, encoder.embed_dim)
        assert features.isfinite().all()
        tokens = encoder.encode(draw(), **options)
        assert tokens.shape == (BATCH, output_tokens(encoder), encoder.embed_dim)
        assert tokens.isfinite().all()
        out, intermediates = encoder.forward_intermediates(draw(), **options)
        torch.testing.assert_close(out, tokens)
        assert len(intermediates) == encoder.num_layers

    def test_index_and_bool_say_the_same(self, family: str) -> None:
        encoder = build(family)
        _, idx_mask = token_mask(encoder)
        by_index = encoder.encode(draw(), idx_mask=idx_mask)
        by_bool = encoder.encode(draw(), mask=as_bool(encoder, idx_mask))
        torch.testing.assert_close(by_index, by_bool)
        assert not torch.allclose(by_index, encoder.encode(draw()))

    def test_empty_mask_changes_nothing(self, family: str) -> None:
        encoder = build(family)
        empty = torch.zeros(BATCH, encoder.sequence_length, dtype=torch.bool)
        torch.testing.assert_close(
            encoder.encode(draw(), mask=empty), encoder.encode(draw())
        )
        none = torch.zeros(BATCH, 0, dtype=torch.int64)
        torch.testing.assert_close(
            encoder.encode(draw(), idx_mask=none), encoder.encode(draw())
        )

    def test_masked_tokens_are_not_seen(self, family: str) -> None:
        encoder = build(family)
        every = torch.ones(BATCH, encoder.sequence_length, dtype=torch.bool)
        every[:, : encoder.num_prefix_tokens] = False
        torch.testing.assert_close(
            encoder.encode(draw(), mask=every), encoder.encode(draw() + 9, mask=every)
        )

    def test_both_masks_are_refused(self, family: str) -> None:
        encoder = build(family)
        _, idx_mask = token_mask(encoder)
        options: dict[str, Any] = {
            "idx_mask": idx_mask,
            "mask": as_bool(encoder, idx_mask),
        }
        for call in (
            encoder,
            encoder.encode,
            encoder.forward_intermediates,
            encoder.preprocess,
        ):
            with pytest.raises(ValueError, match="cannot both be set at the same time"):
                call(draw(), **options)

    def test_steps_from_image_to_tokens(self, family: str) -> None:
        encoder = build(family)
        _, idx_mask = token_mask(encoder)
        tokens = encoder.prepend_prefix_tokens(encoder.images_to_tokens(draw()))
        assert tokens.shape == (BATCH, encoder.sequence_length, encoder.patch_dim)
        torch.testing.assert_close(
            encoder.add_prefix_tokens(encoder.images_to_tokens(draw())), tokens
        )
        torch.testing.assert_close(
            encoder.preprocess(draw()), encoder.add_pos_embed(tokens)
        )
        assert encoder.mask_token is not None
        masked = utils.mask_at_index(tokens, idx_mask, encoder.mask_token)
        torch.testing.assert_close(
            encoder.preprocess(draw(), idx_mask=idx_mask), encoder.add_pos_embed(masked)
        )

    def test_gradients(self, family: str) -> None:
        encoder = build(family).train()
        _, idx_mask = token_mask(encoder)
        encoder(draw(), idx_mask=idx_mask).square().sum().backward()
        assert encoder.mask_token is not None
        assert encoder.mask_token.grad is not None
        assert encoder.mask_token.grad.abs().sum() > 0
        missing = [n for n, p in encoder.named_parameters() if p.grad is None]
        assert missing == []

    def test_grad_checkpointing(self, family: str) -> None:
        encoder = build(family)
        gradients = []
        for enable in (False, True):
            encoder.zero_grad()
            encoder.set_grad_checkpointing(enable)
            encoder.encode(draw()).square().sum().backward()
            gradients.append([p.grad for p in encoder.parameters()])
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("family", VITS)
class TestThoseThatDropTokens:
    def test_idx_keep(self, family: str) -> None:
        encoder = build(family)
        idx_keep, idx_mask = token_mask(encoder)
        kept = idx_keep.shape[1]
        assert encoder(draw(), idx_keep=idx_keep).shape == (BATCH, encoder.embed_dim)
        tokens = encoder.encode(draw(), idx_keep=idx_keep)
        assert tokens.shape == (BATCH, kept, encoder.embed_dim)
        out, intermediates = encoder.forward_intermediates(draw(), idx_keep=idx_keep)
        torch.testing.assert_close(out, tokens)
        assert [tuple(each.shape) for each in intermediates] == [
            (BATCH, kept, encoder.embed_dim)
        ] * encoder.num_layers
        # Applied after the mask.
        both = encoder.preprocess(draw(), idx_mask=idx_mask, idx_keep=idx_mask[:, :0])
        assert both.shape == (BATCH, 0, encoder.patch_dim)

    def test_idx_keep__all_of_them(self, family: str) -> None:
        encoder = build(family)
        every = torch.arange(encoder.sequence_length).expand(BATCH, -1)
        torch.testing.assert_close(
            encoder.encode(draw(), idx_keep=every), encoder.encode(draw())
        )
        torch.testing.assert_close(encoder(draw(), idx_keep=every), encoder(draw()))

    def test_idx_keep__dropped_tokens_are_not_seen(self, family: str) -> None:
        encoder = build(family)
        idx_keep, idx_mask = token_mask(encoder)
        masked = as_bool(encoder, idx_mask)[:, encoder.num_prefix_tokens :]
        pixels = masked.view(BATCH, 1, 4, 4).repeat_interleave(8, 2)
        changed = torch.where(pixels.repeat_interleave(8, 3), 9.0, draw())
        torch.testing.assert_close(
            encoder.encode(changed, idx_keep=idx_keep),
            encoder.encode(draw(), idx_keep=idx_keep),
        )

    def test_forward_intermediates__norm(self, family: str) -> None:
        encoder = build(family)
        out, intermediates = encoder.forward_intermediates(draw(), norm=True)
        torch.testing.assert_close(intermediates[-1], out)
        _, plain = encoder.forward_intermediates(draw())
        norm = nn.Sequential(encoder.vit.norm, getattr(encoder.vit, "fc_norm"))  # noqa: B009
        for normed, each in zip(intermediates, plain, strict=True):
            torch.testing.assert_close(normed, norm(each))


def lightlys(family: str) -> MaskedVisionTransformerTIMM:
    """lightly's own class around the same weights."""
    return MaskedVisionTransformerTIMM(
        build(family).vit, weight_initialization="skip", pos_embed_initialization="skip"
    ).eval()


@pytest.mark.parametrize("family", ["ViT", "ViT with registers", "ViT of any size"])
class TestAsLightlysClass:
    def test_same_numbers(self, family: str) -> None:
        encoder, theirs = build(family), lightlys(family)
        assert encoder.mask_token is not None
        theirs.vit, theirs.mask_token = encoder.vit, encoder.mask_token
        idx_keep, idx_mask = token_mask(encoder)
        for options in (
            {},
            {"idx_mask": idx_mask},
            {"mask": as_bool(encoder, idx_mask)},
            {"idx_keep": idx_keep},
            {"idx_mask": idx_keep, "idx_keep": idx_keep},
        ):
            for name in ("encode", "forward", "preprocess"):
                torch.testing.assert_close(
                    getattr(encoder, name)(draw(), **options),
                    getattr(theirs, name)(draw(), **options),
                )
        torch.testing.assert_close(
            encoder.forward_intermediates(draw(), norm=True),
            theirs.forward_intermediates(draw(), norm=True),
        )


class TestDeviations:
    """The README's list, one test per entry."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_mask_token_is_there_when_asked_for(self, family: str) -> None:
        assert build(family, mask_token=False).mask_token is None

    def test_mask_token_is_drawn(self) -> None:
        token = build("ViT").mask_token
        assert token is not None
        assert token.abs().sum() > 0  # lightly's begins at zero

    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_and_positions_are_timms(self, family: str) -> None:
        name, options = FAMILIES[family]
        vit = timm.create_model(name, img_size=32, num_classes=0, **options)
        before = {name: value.clone() for name, value in vit.state_dict().items()}
        encoder = masked_encoder(vit)
        for key, value in encoder.vit.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_start_of_lightlys_mae_is_an_argument(self) -> None:
        vit = MAE("vit_tiny_patch16_224", img_size=32, **PLAIN).encoder.vit
        assert not vit.pos_embed.requires_grad
        assert not vit.cls_token.std() == 0
        weight = vit.blocks[0].attn.qkv.weight  # Xavier: a uniform distribution
        bound = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5
        assert bound * 0.95 < weight.abs().max() <= bound

    @pytest.mark.parametrize(
        "option", ["antialias", "weight_initialization", "pos_embed_initialization"]
    )
    def test_options_of_lightlys_class(self, option: str) -> None:
        options: dict[str, Any] = {option: True}
        with pytest.raises(ValueError, match=option):
            masked_encoder("vit_tiny_patch16_224", **options)
        with pytest.raises(ValueError, match=option):
            masked_encoder(timm.create_model("test_vit"), **options)

    @pytest.mark.parametrize("family", ["ViT without class token", "Beit", "Eva"])
    def test_mean_is_normalised_as_in_timm(self, family: str) -> None:
        encoder = build(family)
        tokens = encoder.vit.forward_features(draw())
        expected = encoder.vit.forward_head(tokens)
        torch.testing.assert_close(encoder(draw()), expected)
        plain = tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
        assert not torch.allclose(plain, expected)  # which is lightly's

    def test_one_feature_without_a_pooling(self) -> None:
        vit: Any = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, global_pool="", **PLAIN
        )
        # lightly's and timm's return all tokens.
        assert masked_encoder(vit)(draw()).shape == (BATCH, 32)

    def test_eva__idx_keep_begins_with_the_prefix(self) -> None:
        encoder = build("Eva")
        with pytest.raises(ValueError, match="idx_keep begins with the 1 prefix"):
            encoder.encode(draw(), idx_keep=torch.tensor([[3, 0], [5, 0]]))

    @pytest.mark.parametrize("family", SWINS)
    def test_swin__keeps_all_tokens(self, family: str) -> None:
        encoder = build(family)
        idx_keep = torch.tensor([[1, 2], [3, 4]])
        for call in (
            encoder,
            encoder.encode,
            encoder.forward_intermediates,
            encoder.preprocess,
        ):
            with pytest.raises(ValueError, match=r"idx_keep.*full grid of tokens"):
                call(draw(), idx_keep=idx_keep)

    @pytest.mark.parametrize("family", SWINS)
    def test_swin__output_tokens_are_fewer(self, family: str) -> None:
        encoder = build(family)
        assert encoder.sequence_length == 64
        assert encoder.encode(draw()).shape == (BATCH, 16, 32)
        _, stages = encoder.forward_intermediates(draw())
        assert [tuple(each.shape) for each in stages] == [(2, 64, 16), (2, 16, 32)]

    @pytest.mark.parametrize("family", SWINS)
    def test_swin__norm_is_for_the_last_stage(self, family: str) -> None:
        encoder = build(family)
        out, normed = encoder.forward_intermediates(draw(), norm=True)
        _, plain = encoder.forward_intermediates(draw())
        torch.testing.assert_close(normed[-1], out)
        torch.testing.assert_close(normed[0], plain[0])

    def test_sizes_that_do_not_fit_are_errors(self) -> None:
        encoder = build("ViT of any size")
        assert encoder(draw()[:, :, :24]).shape == (BATCH, 32)  # lightly's: squares
        with pytest.raises(ValueError, match="does not divide into patch_size"):
            encoder(draw()[:, :, :30])
