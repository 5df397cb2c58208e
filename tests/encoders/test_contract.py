"""A backbone that is no transformer keeps the contract: a small ConvNeXt."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightly.models.modules.masked_vision_transformer import MaskedVisionTransformer
from torch import Tensor

from lightly_mim import SimMIM
from lightly_mim.checkpoints import read_encoder, save_encoder
from lightly_mim.encoders import MaskedEncoder, masked_encoder, resize_encoder
from lightly_mim.evaluation import extract_features
from lightly_mim.masking import Mask

SIZE = (64, 96)


class ConvEncoder(MaskedEncoder):
    """Patches of 4 x 4 pixels become cells of 32 x 32."""

    def __init__(self, in_chans: int = 3, **options: Any) -> None:
        vit = timm.create_model(
            "convnext_tiny",
            num_classes=0,
            in_chans=in_chans,
            depths=(1, 2, 1, 1),
            dims=(8, 8, 12, 16),
            head_norm_first=True,
            **options,
        )
        super().__init__(
            vit,
            img_size=SIZE,
            in_chans=in_chans,
            patch_size=4,
            patch_dim=8,
            stride=32,
            embed_dim=16,
            num_layers=4,
        )

    def layer_tokens(self, images: Tensor) -> list[Tensor]:
        self.input_grid(images)
        return self._stages(self.vit.stem(images))

    def encode_masked(self, images: Tensor, mask: Mask | Tensor) -> Tensor:
        mask = self.patch_mask(images, mask)
        patches = self.vit.stem(images)
        tokens = self.replace_masked(as_tokens(patches), mask.cells.flatten(1))
        return self._stages(tokens.transpose(1, 2).reshape(patches.shape))[-1]

    def _stages(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for stage in self.vit.stages:
            x = stage(x)
            outputs.append(x)
        outputs[-1] = self.vit.norm_pre(x)
        return [as_tokens(output) for output in outputs]

    def _blocks(self) -> list[torch.nn.Module]:
        return [block for stage in self.vit.stages for block in stage.blocks]


class NoStochasticDepth(ConvEncoder):
    _blocks = MaskedEncoder._blocks


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def build(**options: Any) -> ConvEncoder:
    torch.manual_seed(0)
    encoder = ConvEncoder(**options)
    encoder.add_mask_token()
    with torch.no_grad():  # layer scales near zero would hide mistakes
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


def draw(channels: int = 3, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    """Two images, and masks of 32 x 32 pixels, two per image."""
    torch.manual_seed(1)
    cells = size[0] // 32, size[1] // 32
    order = torch.rand(2, cells[0] * cells[1]).argsort(dim=1)
    return torch.randn(2, channels, *size), (order < 2).view(2, *cells)


def test_is_no_transformer() -> None:
    encoder = build()
    assert not isinstance(encoder, MaskedVisionTransformer)
    assert masked_encoder(encoder, img_size=SIZE) is encoder
    assert encoder.grid == (16, 24)
    assert encoder.stride == (32, 32)
    assert encoder.num_prefix_tokens == 0
    assert not encoder.has_class_token
    assert encoder.mask_token is not None
    assert encoder.mask_token.shape == (1, 1, 8)


@pytest.mark.parametrize("missing", ["layer_tokens", "encode_masked"])
def test_what_a_backbone_has_to_write(missing: str) -> None:
    cls = type("Unfinished", (ConvEncoder,), {missing: getattr(MaskedEncoder, missing)})
    with pytest.raises(TypeError, match=missing):
        cls()


@pytest.mark.parametrize("size", [SIZE, (64, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_features__as_timms(channels: int, size: tuple[int, int]) -> None:
    encoder = build(in_chans=channels)
    images, _ = draw(channels, size)
    vit = encoder.vit
    expected = vit.forward_features(images)
    assert expected.shape == (2, 16, size[0] // 32, size[1] // 32)
    torch.testing.assert_close(encoder.feature_map(images), expected)
    torch.testing.assert_close(encoder.encode(images), as_tokens(expected))
    pooled = vit.forward_head(expected, pre_logits=True)
    torch.testing.assert_close(encoder.embed(images), pooled)
    torch.testing.assert_close(encoder(images), pooled)
    _, stages = vit.forward_intermediates(images)
    features = encoder.embed_layers(images, [0, -1], ["mean", "tokens"])
    torch.testing.assert_close(features[0, "mean"], stages[0].mean(dim=(2, 3)))
    torch.testing.assert_close(features[0, "tokens"], as_tokens(stages[0]))
    torch.testing.assert_close(features[-1, "mean"], pooled)


def test_encode_masked() -> None:
    encoder = build()
    images, mask = draw()
    patches = encoder.vit.stem(images)
    assert encoder.mask_token is not None
    rows = []
    for image in range(2):
        for row in range(16):
            for column in range(24):
                masked = mask[image, row // 8, column // 8]
                patch = patches[image, :, row, column]
                rows.append(encoder.mask_token[0, 0] if masked else patch)
    x = torch.stack(rows).view(2, 16, 24, 8).permute(0, 3, 1, 2)
    expected = as_tokens(encoder.vit.norm_pre(encoder.vit.stages(x)))

    output = encoder.encode_masked(images, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(encoder.cell_tokens(output), expected)
    parameters = list(encoder.parameters())
    weights = torch.randn_like(output)
    got, want = (
        torch.autograd.grad((x * weights).sum(), parameters) for x in (output, expected)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    changed = torch.where(Mask(mask, 2).pixels(SIZE), 9, images)
    torch.testing.assert_close(encoder.encode_masked(changed, mask), output)
    assert not torch.allclose(encoder.encode(changed), encoder.encode(images))


def test_encode_visible__cannot() -> None:
    encoder = build()
    assert not encoder.can_drop_tokens
    with pytest.raises(
        ValueError, match=r"ConvNeXt needs the full grid.*encode_masked"
    ):
        encoder.encode_visible(*draw())


def test_bad_input() -> None:
    encoder = build()
    images, mask = draw()
    for call in (encoder, encoder.encode, encoder.feature_map, encoder.embed):
        with pytest.raises(ValueError, match=r"shape \(batch_size, 3, height"):
            call(images[:, :1])
        with pytest.raises(ValueError, match=r"60 x 96 pixels.*stride 32 x 32"):
            call(images[:, :, :60])
        with pytest.raises(ValueError, match=r"got torch\.uint8\. Convert"):
            call(images.to(torch.uint8))
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        encoder.encode_masked(images, mask[:1])
    with pytest.raises(ValueError, match=r"grid of 16 x 24"):
        encoder.encode_masked(images, torch.eye(5).bool().expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"none\. Use the pool 'mean'"):
        encoder.embed(images, pool="cls")
    with pytest.raises(ValueError, match="layers 0 to 3"):
        encoder.embed(images, layer=4)
    with pytest.raises(ValueError, match=r"Call add_mask_token\(\)"):
        ConvEncoder().encode_masked(images, mask)
    with pytest.raises(ValueError, match="resize a ConvEncoder is not known"):
        resize_encoder(encoder, 64)
    with pytest.raises(ValueError, match="ConvNeXt was built without absolute pos"):
        masked_encoder(encoder, pos_embed="sincos")


def test_set_drop_path() -> None:
    encoder = ConvEncoder()
    encoder.set_drop_path(0.3)
    expected = ConvEncoder(drop_path_rate=0.3)
    assert repr(encoder.vit) == repr(expected.vit)
    rates = [m.drop_prob for m in encoder.modules() if hasattr(m, "drop_prob")]
    assert rates == pytest.approx([0.075, 0.15, 0.225, 0.3])
    NoStochasticDepth().set_drop_path(0)
    with pytest.raises(ValueError, match=r"no stochastic depth.*0\.3\. Use 0"):
        NoStochasticDepth().set_drop_path(0.3)


def test_set_grad_checkpointing() -> None:
    encoder = build().train()
    images, mask = draw()
    calls: list[int] = []
    encoder.vit.stages[1].blocks[0].register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    gradients = []
    for enable in (False, True):
        encoder.zero_grad()
        encoder.set_grad_checkpointing(enable)
        encoder.encode_masked(images, mask).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert len(calls) == 3
    torch.testing.assert_close(gradients[0], gradients[1])


def test_no_weight_decay() -> None:
    assert build().no_weight_decay() == {"mask_token"}
    assert ConvEncoder().no_weight_decay() == set()


def test_deepcopy_and_pickle() -> None:
    encoder = build()
    images, mask = draw()
    expected = encoder.encode_masked(images, mask)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        torch.testing.assert_close(other.encode_masked(images, mask), expected)


def test_save_encoder(tmp_path: Path) -> None:
    encoder = build()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    saved = read_encoder(tmp_path / "encoder.safetensors")
    assert saved.spec["img_size"] == list(SIZE)
    other = ConvEncoder().eval()
    other.vit.load_state_dict(saved.state_dict)
    images, _ = draw()
    assert torch.equal(other(images), encoder(images))


def test_extract_features() -> None:
    encoder = build()
    images, _ = draw()
    data = [(image, label, "") for label, image in enumerate(images)]
    features = extract_features(encoder, data, layers=[0, 3], num_workers=0)  # type: ignore[arg-type]
    assert features.values[0, "mean"].shape == (2, 8)
    torch.testing.assert_close(features.values[3, "mean"], encoder(images))


def test_simmim() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(in_chans=2)
    method = SimMIM(encoder)
    assert method.encoder is encoder
    images, mask = draw(channels=2)
    output = method(images, mask)
    assert output.prediction.shape == output.target.shape == (2, 2, 32 * 32 * 2)
    output.loss.backward()
    assert [n for n, p in method.named_parameters() if p.grad is None] == []
    painted = method.eval().reconstruct(images, mask)
    seen = ~Mask(mask, 2).pixels(SIZE)
    assert torch.equal(painted * seen, images * seen)
    assert not torch.allclose(painted, images)
