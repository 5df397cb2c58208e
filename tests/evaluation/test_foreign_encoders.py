from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightly.models.modules.masked_vision_transformer_timm import (
    MaskedVisionTransformerTIMM,
)
from lightly.models.modules.masked_vision_transformer_torchvision import (
    MaskedVisionTransformerTorchvision,
)
from torch import Tensor, nn

from lightly_mim.encoders import MaskedEncoder
from lightly_mim.evaluation import at_random, evaluate, extract_features, load_encoder
from lightly_mim.evaluation.foreign_encoders import (
    FunctionEncoder,
    TimmEncoder,
    TorchvisionEncoder,
)

CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def small(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    for parameter in model.parameters():  # norms start at 1 and 0, which hides them
        nn.init.normal_(parameter, std=0.2)
    return model


def test_timm_encoder__convolutions_equal_timm() -> None:
    model = small("convnext_atto", **CONVNEXT)
    encoder = load_encoder(model, img_size=64)
    assert isinstance(encoder, TimmEncoder)
    assert encoder.model is model
    assert (encoder.img_size, encoder.in_chans, encoder.num_layers) == ((64, 64), 3, 4)
    assert encoder.mean == tuple(model.pretrained_cfg["mean"])
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = encoder.embed_layers(images, [0, -1], ["mean", "tokens"])
        maps = model.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(found[-1, "mean"], model(images))
    torch.testing.assert_close(found[0, "mean"], maps[0].mean(dim=(2, 3)))
    assert found[-1, "tokens"].shape == (2, 4, 32)
    torch.testing.assert_close(found[0, "tokens"][1, 3], maps[0][1].flatten(1)[:, 3])


def test_timm_encoder__tokens_leave_prefix_out() -> None:
    model = small("deit_tiny_distilled_patch16_224", img_size=32, depth=2)
    encoder = load_encoder(model)
    assert isinstance(encoder, TimmEncoder)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_features(images)
        found = encoder.embed_layers(images, [1], ["mean", "tokens"])
    assert torch.equal(found[1, "tokens"], tokens[:, 2:])
    torch.testing.assert_close(found[1, "mean"], tokens[:, 2:].mean(dim=1))
    with pytest.raises(ValueError, match=r"any of mean, tokens, got 'cls'"):
        encoder.embed_layers(images, [1], ["cls"])


def test_timm_encoder__attention_pooling_is_left_out() -> None:
    model = small("vit_base_patch16_siglip_224", img_size=32, depth=1)
    encoder = load_encoder(model)
    assert isinstance(encoder, TimmEncoder)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(images).mean(dim=1)
        found = encoder.embed_layers(images, [-1], ["mean"])[-1, "mean"]
    torch.testing.assert_close(found, expected)


def test_timm_encoder__other_pooling_is_refused() -> None:
    encoder = load_encoder(small("convnext_atto", global_pool="max", **CONVNEXT))
    with pytest.raises(ValueError, match="pools by 'max'"):
        encoder.embed_layers(torch.randn(1, 3, 64, 64), [-1], ["mean"])


def test_load_encoder__timm_name_of_any_family() -> None:
    encoder = load_encoder("resnet10t", img_size=(32, 64), in_chans=1, pretrained=False)
    assert isinstance(encoder, TimmEncoder)
    assert (encoder.name, encoder.img_size, encoder.in_chans) == (
        "resnet10t",
        (32, 64),
        1,
    )
    assert len(encoder.mean) == 1
    first, again, other = (at_random(encoder, seed) for seed in (0, 0, 1))
    states = [each.state_dict() for each in (first, again, other)]
    name = "model.layer1.0.conv1.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])
    assert first.img_size == encoder.img_size


def test_load_encoder__lightlys_timm_wrapper() -> None:
    vit: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    encoder = load_encoder(MaskedVisionTransformerTIMM(vit))
    assert isinstance(encoder, MaskedEncoder)
    assert encoder.vit is vit


def test_load_encoder__lightlys_torchvision_wrapper() -> None:
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48)
    wrapper = MaskedVisionTransformerTorchvision(vit).eval()
    encoder = load_encoder(wrapper)
    assert isinstance(encoder, TorchvisionEncoder)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = encoder.embed_layers(images, [0, -1], ["cls", "mean", "tokens"])
        tokens = wrapper.encode(images)
        torch.testing.assert_close(found[-1, "cls"], wrapper(images))
    assert encoder.num_layers == 2
    torch.testing.assert_close(found[-1, "tokens"], tokens[:, 1:])
    torch.testing.assert_close(found[-1, "mean"], tokens[:, 1:].mean(dim=1))
    assert not torch.allclose(found[0, "mean"], found[-1, "mean"])
    with pytest.raises(ValueError, match="passed by hand"):
        at_random(encoder, 0)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.dropout = nn.Dropout(0.5)
        self.mean, self.std = (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)

    def describe(self, images: Tensor) -> Tensor:
        features: Tensor = self.dropout(self.linear(images.mean(dim=(2, 3))))
        return features


def test_load_encoder__module_with_a_function(photos: Path) -> None:
    module = Module()
    encoder = load_encoder(module, feature_function=module.describe, img_size=16)
    assert isinstance(encoder, FunctionEncoder)
    assert (encoder.mean, encoder.std) == (module.mean, module.std)
    results = evaluate(
        module,
        str(photos),
        ["knn"],
        feature_function=lambda images: {
            "mine": module.describe(images),
            "twice": module.describe(images) * 2,
        },
        img_size=16,
        baselines=["pixels"],
        device="cpu",
        num_workers=0,
    )
    assert module.training  # as it was
    assert [row.model for row in results.rows] == ["Module", "raw pixels"]
    pooled = [entry["pooling"] for entry in results.rows[0].selection]
    assert pooled == ["mine", "twice"]
    assert results.rows[0].layer is None
    accuracies = [entry["accuracy"] for entry in results.rows[0].selection]
    assert accuracies[0] == accuracies[1]  # no dropout; cosine similarity


def test_evaluate__keeps_features_of_a_function_with_a_fingerprint(
    photos: Path, tmp_path: Path
) -> None:
    module = Module()
    seen: list[int] = []

    def function(images: Tensor) -> dict[str, Tensor]:
        seen.append(len(images))
        return {"mine": module.describe(images), "tokens": images.flatten(2).mT}

    function.fingerprint = 1  # type: ignore[attr-defined]

    def rows(out: str) -> list[Any]:
        seen.clear()
        results = evaluate(
            module,
            str(photos),
            ["knn"],
            feature_function=function,
            img_size=16,
            out=tmp_path / out,
            cache=tmp_path / "cache",
            device="cpu",
            num_workers=0,
        )
        return [(row.top1, row.selection) for row in results.rows]

    first = rows("a")
    assert sum(seen) == 32 + 12 + 2  # and two images of zeros
    assert rows("b") == first
    assert sum(seen) == 2
    function.fingerprint = 2  # type: ignore[attr-defined]
    assert rows("c") == first
    assert sum(seen) == 32 + 12 + 2


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda images: images, {}, r"one row of features per image.*\(\d+, 3, 16, 16"),
        (lambda images: {"a": images[:1, 0, 0]}, {}, "one row of features per image"),
        (lambda images: {}, {}, "empty dictionary"),
        (lambda images: images, {"pools": ["mean"]}, "leave layers and pools out"),
        (lambda images: images, {"layers": [0]}, "leave layers and pools out"),
        (lambda images: images, {"baselines": ["random"]}, "passed by hand"),
        (lambda images: images, {"img_size": None}, "pass img_size=224"),
        (lambda images: images, {"protocols": ["finetune"]}, "through the encoder"),
    ],
)
def test_evaluate__bad_feature_functions(
    photos: Path, function: Any, options: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"protocols": ["knn"], "img_size": 16} | options
    with pytest.raises(ValueError, match=message):
        evaluate(
            Module(),
            str(photos),
            feature_function=function,
            num_workers=0,
            device="cpu",
            **arguments,
        )


def test_load_encoder__function_without_a_module() -> None:
    with pytest.raises(ValueError, match="goes with a module of your own, got str"):
        load_encoder("resnet18", feature_function=lambda images: images, img_size=16)


def test_load_encoder__module_that_tells_nothing() -> None:
    with pytest.raises(ValueError, match=r"Module is not a timm model.*feature_funct"):
        load_encoder(Module())


def test_extract_features__takes_what_load_encoder_gives() -> None:
    encoder = load_encoder(small("convnext_atto", **CONVNEXT), img_size=64)
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    data: Any = [(image, n % 2) for n, image in enumerate(images)]
    features = extract_features(encoder, data, layers=[0, -1], num_workers=0)
    assert {key: tuple(v.shape) for key, v in features.values.items()} == {
        (0, "mean"): (5, 8),
        (3, "mean"): (5, 32),
    }
