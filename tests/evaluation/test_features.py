from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from lightly.data.multi_view_collate import MultiViewCollate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision

from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation.features import (
    EncoderFeatures,
    collect_features,
    extract_features,
    normalize_images,
)
from lightly_mim.evaluation.foreign_encoders import RawPixels


class Pictures(Dataset[Any]):
    """uint8 images with labels and names."""

    def __init__(self, num_images: int = 7, size: tuple[int, int] = (32, 48)) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (num_images, 3, *size)
        self.images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(num_images) % 3

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        return self.images[index], int(self.labels[index]), f"{index}.png"


def vit(**options: Any) -> MaskedEncoder:
    sizes: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 2}
    return masked_encoder(
        "vit_tiny_patch16_224", img_size=(32, 48), **(sizes | options)
    )


def normalized(data: Pictures, encoder: MaskedEncoder) -> Tensor:
    mean, std = list(encoder.mean), list(encoder.std)
    images: Tensor = vision.normalize(data.images / 255, mean, std)
    return images


@pytest.mark.parametrize(
    ("options", "pools"),
    [
        ({}, ["mean", "cls", "cls+mean"]),
        ({"reg_tokens": 2}, ["mean", "cls"]),
        ({"class_token": False, "global_pool": "avg"}, ["mean"]),
        ({"fc_norm": True}, ["mean", "cls+mean"]),
    ],
)
def test_extract_features__equals_embed(
    options: dict[str, Any], pools: list[Any]
) -> None:
    encoder, data = vit(**options), Pictures()
    features = extract_features(
        encoder, data, layers=[0, -1, -2], pools=pools, batch_size=3, num_workers=0
    )
    assert set(features.values) == {(layer, p) for layer in range(3) for p in pools}
    images = normalized(data, encoder)
    encoder.eval()
    key: Any
    for key, value in features.values.items():
        layer, pool = key
        assert value.dtype == torch.float32
        with torch.no_grad():
            expected = encoder.embed(images, pool, layer)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(features.labels, data.labels)
    assert features.filenames == [f"{index}.png" for index in range(7)]
    assert len(features) == 7


@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"fc_norm": True},
    ],
)
def test_extract_features__tokens(options: dict[str, Any]) -> None:
    encoder: Any = vit(**options)
    data = Pictures()
    features = extract_features(
        encoder, data, layers=[0, -1], pools=["mean", "tokens"], num_workers=0
    )
    with torch.no_grad():
        encoder.eval()
        images = normalized(data, encoder)
        expected, outputs = encoder.forward_intermediates(images)
    first = encoder.num_prefix_tokens
    last = features.values[2, "tokens"]
    torch.testing.assert_close(last, expected[:, first:], rtol=1e-5, atol=1e-6)
    tokens = features.values[0, "tokens"]
    torch.testing.assert_close(tokens, outputs[0][:, first:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.mean(dim=1), features.values[0, "mean"])
    assert list(features.select(tokens=True).values) == [(0, "tokens"), (2, "tokens")]
    assert list(features.select(tokens=False).values) == [(0, "mean"), (2, "mean")]


def test_extract_features__stages_of_a_swin() -> None:
    encoder = masked_encoder(
        "swin_tiny_patch4_window7_224",
        img_size=(32, 64),
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
    ).eval()
    data = Pictures(size=(32, 64))
    features = extract_features(encoder, data, layers=[0, 1], num_workers=0)
    assert features.values[0, "mean"].shape == (7, 8)
    with torch.no_grad():
        expected = encoder(normalized(data, encoder))
    torch.testing.assert_close(features.values[1, "mean"], expected)


def test_extract_features__last_layer_is_timms_own_feature() -> None:
    encoder, data = vit(), Pictures()
    features = extract_features(encoder, data, pools=["cls"], num_workers=0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(32, 48),
        num_classes=0,
        depth=3,
        embed_dim=24,
        num_heads=2,
    ).eval()
    model.load_state_dict(encoder.vit.state_dict())
    with torch.no_grad():
        expected = model(normalized(data, encoder))
    torch.testing.assert_close(features.values[2, "cls"], expected)


def test_extract_features__leaves_the_encoder_as_it_was() -> None:
    encoder = vit(proj_drop_rate=0.5)
    encoder.train()
    encoder.vit.blocks[0].eval()
    modes = [module.training for module in encoder.modules()]
    first = extract_features(encoder, Pictures(), num_workers=0)
    assert [module.training for module in encoder.modules()] == modes
    assert all(parameter.grad is None for parameter in encoder.parameters())
    # Dropout was off, and gradients are possible again.
    again = extract_features(encoder, Pictures(), num_workers=0)
    assert torch.equal(first.values[2, "mean"], again.values[2, "mean"])
    assert not first.values[2, "mean"].requires_grad
    assert encoder(torch.randn(1, 3, 32, 48)).requires_grad


def test_extract_features__restores_the_mode_after_an_error() -> None:
    encoder = vit().train()
    with pytest.raises(ValueError, match="32 x 48"):
        extract_features(encoder, Pictures(size=(32, 32)), num_workers=0)
    assert encoder.training


def test_extract_features__loaders_and_views() -> None:
    encoder, data = vit(), Pictures()
    expected = extract_features(encoder, data, num_workers=0)
    items = [data[index] for index in range(len(data))]
    views: Any = [([image], label, name) for image, label, name in items]
    pairs: Any = [(image, label) for image, label, _ in items]
    loaders = [
        DataLoader(data, batch_size=2),
        DataLoader(views, batch_size=3, collate_fn=MultiViewCollate()),
        DataLoader(views, batch_size=3),  # torch's own collate
    ]
    for loader in loaders:
        features = extract_features(encoder, loader)
        torch.testing.assert_close(
            features.values[2, "mean"], expected.values[2, "mean"]
        )
        assert torch.equal(features.labels, expected.labels)
        assert features.filenames == expected.filenames
    assert extract_features(encoder, DataLoader(pairs, 4)).filenames == []


def test_extract_features__bf16() -> None:
    encoder, data = vit(), Pictures()
    exact = extract_features(encoder, data, num_workers=0).values[2, "mean"]
    features = extract_features(encoder, data, num_workers=0, precision="bf16")
    value = features.values[2, "mean"]
    assert value.dtype == torch.float32
    assert not torch.equal(value, exact)
    torch.testing.assert_close(value, exact, rtol=0.05, atol=0.05)


def test_collect_features__one_pass_for_several_functions() -> None:
    data, encoder = Pictures(), vit().eval()
    reads: list[int] = []

    def batches() -> Any:
        for batch in DataLoader(data, batch_size=4):
            reads.append(len(batch[0]))
            yield batch

    pixels = RawPixels((32, 48), size=(4, 6))
    pixels.mean, pixels.std = encoder.mean, encoder.std
    features = collect_features(
        {"encoder": EncoderFeatures(encoder), "pixels": EncoderFeatures(pixels)},
        batches(),
    )
    assert EncoderFeatures(pixels).keys == [(None, "pixels")]
    assert reads == [4, 3]
    alone = extract_features(encoder, data, batch_size=4, num_workers=0)
    torch.testing.assert_close(
        features["encoder"].values[2, "mean"], alone.values[2, "mean"]
    )
    expected = vision.resize(
        normalized(data, encoder), [4, 6], vision.InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(
        features["pixels"].values[None, "pixels"], expected.flatten(1)
    )
    assert torch.equal(features["pixels"].labels, data.labels)


def test_normalize_images() -> None:
    data, encoder = Pictures(), vit()
    torch.testing.assert_close(
        normalize_images(data.images, encoder.mean, encoder.std),
        normalized(data, encoder),
    )
    floats = torch.randn(1, 3, 4, 4)
    assert normalize_images(floats, encoder.mean, encoder.std) is floats
    with pytest.raises(ValueError, match=r"3 channel.*in_chans=3"):
        normalize_images(data.images, [0.5], [0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, r"0 to 2 .* got \[3\]"),
        ({"layers": [-4]}, r"0 to 2 .* got \[-4\]"),
        ({"layers": []}, "layers of .* one or more"),
        ({"pools": []}, "pools of .* one or more"),
        ({"pools": ["max"]}, "pools of .* each one of 'mean'"),
        ({"pools": ["cls+max"]}, "pools of .* each one of 'mean'"),
        ({"precision": "64"}, "precision of .* is one of"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_extract_features__bad_arguments(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(vit(), Pictures(), **({"num_workers": 0} | arguments))


def test_extract_features__no_class_token() -> None:
    encoder = vit(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="this encoder has none"):
        extract_features(encoder, Pictures(), pools=["mean", "cls"])


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([-1]), ["cat"]]
)
def test_collect_features__bad_labels(labels: Any) -> None:
    batch = (torch.zeros(1, 3, 8, 8), labels, ["a.png"])
    with pytest.raises(ValueError, match="one class per image"):
        collect_features({"pixels": EncoderFeatures(RawPixels(8))}, [batch])


def test_collect_features__no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        collect_features({"pixels": EncoderFeatures(RawPixels(8))}, [])


def test_extract_features__broken_weights() -> None:
    encoder = vit()
    with torch.no_grad():
        encoder.vit.blocks[1].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 2, pooling 'mean' hold NaN"):
        extract_features(encoder, Pictures(), num_workers=0)
    first = extract_features(encoder, Pictures(), layers=[0], num_workers=0)
    assert first.values[0, "mean"].isfinite().all()
