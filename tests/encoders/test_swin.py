from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from lightly_mim.encoders import masked_encoder
from lightly_mim.encoders.swin import MaskedSwin
from lightly_mim.masking import Mask

V1 = "swin_tiny_patch4_window7_224"
V2 = "swinv2_tiny_window8_256"
TINY = {
    "img_size": (64, 128),
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2, 2, 1),
    "num_heads": (1, 2, 2),
    "pretrained_window_sizes": (0, 0, 0),
}


def options(name: str, **changes: Any) -> dict[str, Any]:
    chosen = {**TINY, **changes}
    if name == V1:
        del chosen["pretrained_window_sizes"]
    return chosen


def build(name: str, **changes: Any) -> MaskedSwin:
    torch.manual_seed(0)
    encoder = masked_encoder(name, **options(name, **changes))
    assert isinstance(encoder, MaskedSwin)
    encoder.add_mask_token()
    # SwinV2's residual branches start at zero, which would hide mistakes.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


def draw(
    encoder: MaskedSwin, size: tuple[int, int] = (64, 128)
) -> tuple[Tensor, Tensor]:
    """Images and masks of 32 x 32 pixels, two per image."""
    torch.manual_seed(1)
    images = torch.randn(3, encoder.in_chans, *size)
    h, w = size[0] // 32, size[1] // 32
    order = torch.rand(3, h * w).argsort(dim=1)
    return images, (order < 2).view(3, h, w)


@pytest.mark.parametrize("name", [V1, V2])
class TestFamilies:
    def test_attributes(self, name: str) -> None:
        encoder = build(name)
        assert encoder.patch_size == (4, 4)
        assert encoder.stride == (16, 16)
        assert encoder.sequence_length == 16 * 32
        assert encoder.num_prefix_tokens == 0
        assert encoder.embed_dim == encoder.feature_dim == 32
        assert encoder.num_layers == 3
        assert encoder.mask_token is not None
        assert encoder.mask_token.shape == (1, 1, 8)

    def test_encode(self, name: str) -> None:
        encoder = build(name)
        images, mask = draw(encoder)
        expected = encoder.vit.forward_features(images)
        assert expected.shape == (3, 4, 8, 32)
        torch.testing.assert_close(encoder.encode(images), expected.flatten(1, 2))
        output = encoder.encode_masked(images, Mask(torch.zeros_like(mask), 0))
        torch.testing.assert_close(output, expected.flatten(1, 2))
        feature_map = encoder.feature_map(images)
        torch.testing.assert_close(feature_map, expected.permute(0, 3, 1, 2))

    def test_encode_masked(self, name: str) -> None:
        encoder = build(name)
        images, mask = draw(encoder)
        vit = encoder.vit
        assert encoder.mask_token is not None
        # The mask token goes where the paper says: behind the embedding and its norm.
        x = vit.patch_embed.proj(images).permute(0, 2, 3, 1)
        x = vit.patch_embed.norm(x).clone()
        for image in range(3):
            for row in range(16):
                for column in range(32):
                    if mask[image, row // 8, column // 8]:
                        x[image, row, column] = encoder.mask_token[0, 0]
        expected = vit.norm(vit.layers(x)).flatten(1, 2)
        output = encoder.encode_masked(images, mask)
        torch.testing.assert_close(output, expected)

        weights = torch.randn_like(output)
        parameters = list(encoder.parameters())
        got = torch.autograd.grad((output * weights).sum(), parameters)
        want = torch.autograd.grad((expected * weights).sum(), parameters)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_lightlys_masks(self, name: str) -> None:
        encoder = build(name)
        images, mask = draw(encoder)
        expected = encoder.encode_masked(images, mask)
        tokens = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)
        idx_mask = torch.stack([torch.nonzero(row).flatten() for row in tokens])
        torch.testing.assert_close(encoder.encode(images, mask=tokens), expected)
        torch.testing.assert_close(encoder.encode(images, idx_mask=idx_mask), expected)
        pooled = encoder(images, mask=tokens)
        torch.testing.assert_close(pooled, expected.mean(dim=1))

    def test_forward__as_timms_mean(self, name: str) -> None:
        encoder = build(name)
        images, _ = draw(encoder)
        vit = encoder.vit
        expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encoder(images), expected)
        torch.testing.assert_close(encoder.embed(images), expected)

    def test_forward_intermediates(self, name: str) -> None:
        encoder = build(name)
        images, _ = draw(encoder)
        tokens, stages = encoder.forward_intermediates(images)
        _, expected = encoder.vit.forward_intermediates(images)
        torch.testing.assert_close(tokens, encoder.encode(images))
        assert [stage.shape for stage in stages] == [
            (3, 512, 8),
            (3, 128, 16),
            (3, 32, 32),
        ]
        for stage, want in zip(stages, expected, strict=True):
            torch.testing.assert_close(stage, want.flatten(2).transpose(1, 2))
        for layer in range(2):
            pooled = encoder.embed(images, layer=layer)
            torch.testing.assert_close(pooled, expected[layer].mean(dim=(2, 3)))

    def test_forward_intermediates__norm(self, name: str) -> None:
        # As in timm: the final norm is made for the last stage.
        encoder = build(name)
        images, _ = draw(encoder)
        _, stages = encoder.forward_intermediates(images, norm=True)
        _, expected = encoder.vit.forward_intermediates(images, norm=True)
        for stage, want in zip(stages, expected, strict=True):
            torch.testing.assert_close(stage, want.flatten(2).transpose(1, 2))

    def test_every_parameter_takes_part(self, name: str) -> None:
        encoder = build(name).train()
        images, mask = draw(encoder)
        encoder.encode_masked(images, mask).square().sum().backward()
        unused = [n for n, p in encoder.named_parameters() if p.grad is None]
        assert unused == []

    def test_dynamic_img_size(self, name: str) -> None:
        encoder = build(name, dynamic_img_size=True)
        images, mask = draw(encoder, (128, 64))
        expected = encoder.vit.forward_features(images)
        torch.testing.assert_close(encoder.encode(images), expected.flatten(1, 2))
        assert encoder.encode_masked(images, mask).shape == (3, 32, 32)
        assert encoder.feature_map(images).shape == (3, 32, 8, 4)
        with pytest.raises(ValueError, match=r"64 x 80.*windows of 4 x 4"):
            encoder.encode(torch.zeros(1, 3, 64, 80))

    def test_idx_keep_and_visible_raise(self, name: str) -> None:
        encoder = build(name)
        images, mask = draw(encoder)
        idx_keep = torch.zeros(3, 1, dtype=torch.int64)
        for method in ("forward", "encode", "forward_intermediates", "preprocess"):
            with pytest.raises(ValueError, match=r"idx_keep.*encode_masked"):
                getattr(encoder, method)(images, idx_keep=idx_keep)
        with pytest.raises(ValueError, match=r"encode_visible.*encode_masked"):
            encoder.encode_visible(images, mask)

    def test_cls_raises(self, name: str) -> None:
        encoder = build(name)
        with pytest.raises(ValueError, match=r"none\. Use the pool 'mean'"):
            encoder.embed(draw(encoder)[0], pool="cls")

    def test_silent_padding_raises(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"grid of 8 x 10 tokens.*fits: 20\."):
            build(name, img_size=(64, 80))
        with pytest.raises(ValueError, match=r"multiple of \(16, 16\)"):
            build(name, img_size=(64, 72))
        with pytest.raises(ValueError, match=r"62 x 64 pixels.*patch_size 4 x 4"):
            build(name, img_size=(62, 64))

    def test_fitting_windows(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"fits: 2, 3, 6, 12, 24\.$") as raised:
            build(name, img_size=96, window_size=7)
        listed = str(raised.value).split("fits: ")[1].rstrip(".").split(", ")
        for window in range(2, 25):
            if str(window) in listed:
                build(name, img_size=96, window_size=window)
            else:
                with pytest.raises(ValueError, match="do not tile"):
                    build(name, img_size=96, window_size=window)

    def test_other_size(self, name: str) -> None:
        with pytest.raises(
            ValueError, match=r"64 x 128.*128 x 64.*img_size=\(128, 64\)"
        ):
            build(name).encode(torch.zeros(1, 3, 128, 64))

    @pytest.mark.parametrize("rate", [0.0, 0.2])
    def test_set_drop_path__as_timm(self, name: str, rate: float) -> None:
        # timm's own default for Swin is 0.1.
        encoder = masked_encoder(name, **options(name))
        expected = timm.create_model(
            name, num_classes=0, drop_path_rate=rate, **options(name)
        )
        encoder.set_drop_path(rate)
        assert repr(encoder.vit) == repr(expected)
        rates = [
            [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
            for model in (encoder.vit, expected)
        ]
        assert rates[0] == rates[1]
        assert len(rates[0]) == (8 if rate else 0)

    def test_set_grad_checkpointing(self, name: str) -> None:
        encoder = build(name)
        encoder.set_drop_path(0)
        encoder.train()
        images, mask = draw(encoder)
        calls: list[int] = []
        block = encoder.vit.layers[0].blocks[0]
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        gradients = []
        for enable in (False, True):
            encoder.zero_grad()
            encoder.set_grad_checkpointing(enable)
            encoder.encode_masked(images, mask).square().sum().backward()
            gradients.append([p.grad for p in encoder.parameters()])
        assert len(calls) == 3
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_no_weight_decay(self, name: str) -> None:
        encoder = build(name)
        names = encoder.no_weight_decay()
        assert "mask_token" in names
        kinds = {"relative_position_bias_table"} if name == V1 else {"logit_scale"}
        for kind in kinds:
            assert sum(kind in one for one in names) == 5
        assert names <= {one for one, _ in encoder.named_parameters()}

    def test_compile(self, name: str) -> None:
        encoder = build(name)
        images, mask = draw(encoder)
        compiled = torch.compile(encoder.encode_masked, fullgraph=True, backend="eager")
        expected = encoder.encode_masked(images, mask)
        torch.testing.assert_close(compiled(images, Mask(mask, 2)), expected)

    def test_deepcopy_and_pickle(self, name: str) -> None:
        encoder = build(name)
        images, mask = draw(encoder)
        expected = encoder.encode_masked(images, mask)
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            torch.testing.assert_close(other.encode_masked(images, mask), expected)

    def test_bfloat16_autocast(self, name: str) -> None:
        encoder = build(name)
        images, mask = draw(encoder)
        expected = encoder.encode_masked(images, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = encoder.encode_masked(images, mask)
        assert (output - expected).abs().mean() < 0.1


def test_the_papers_size_and_window() -> None:
    encoder = masked_encoder(
        "swin_base_patch4_window7_224",
        img_size=192,
        window_size=6,
        embed_dim=8,
        depths=(1, 1, 2, 1),
        num_heads=(1, 1, 2, 4),
        in_chans=1,
    )
    assert encoder.stride == (32, 32)
    encoder.add_mask_token()
    images, mask = torch.randn(2, 1, 192, 192), torch.zeros(2, 6, 6, dtype=torch.bool)
    mask[:, 2:4] = True
    assert encoder.encode_masked(images, mask).shape == (2, 36, 64)
    with pytest.raises(ValueError, match=r"windows of 7 x 7.*2, 3, 6, 12, 24, 48"):
        masked_encoder("swin_base_patch4_window7_224", img_size=192)


def test_timms_windows_of_224() -> None:
    for name in ("swin_tiny_patch4_window7_224", "swinv2_base_window12_192"):
        depths = (1, 1, 1, 1)
        encoder = masked_encoder(name, embed_dim=8, depths=depths, num_heads=depths)
        size = encoder.img_size
        assert encoder.feature_map(torch.zeros(1, 3, *size)).shape[-1] == size[0] // 32
