from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.utils.lars import LARS
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.data import KeyedLoader
from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation import TrainingRun
from lightly_mim.evaluation.features import normalize_images
from lightly_mim.evaluation.supervised.linear_mae import LinearMAE, build_lars
from lightly_mim.transforms import MAETransform

from .test_supervised import OPTIONS, Stripes, stripes, trained


@pytest.fixture(scope="module")
def encoder() -> MaskedEncoder:
    torch.manual_seed(0)
    return masked_encoder("vit_tiny_patch16_224", img_size=16, **OPTIONS)


def lars_step(
    value: Tensor, gradient: Tensor, velocity: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """The formula once more: momentum 0.9, trust coefficient 0.001."""
    if value.ndim > 1:
        weight_norm = math.sqrt(float((value**2).sum()))
        gradient_norm = math.sqrt(float((gradient**2).sum()))
        if weight_norm > 0 and gradient_norm > 0:
            gradient = gradient * (0.001 * weight_norm / gradient_norm)
    velocity = 0.9 * velocity + gradient
    return value - lr * velocity, velocity


@pytest.mark.parametrize("scale", [1.0, 0.0])  # weights of zero are not scaled
def test_build_lars__equals_a_plain_restatement(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64) * scale
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    parameters = [nn.Parameter(weight.clone()), nn.Parameter(bias.clone())]
    optimizer = build_lars(parameters, lr=6.4)
    values, velocities = [weight, bias], [0 * weight, 0 * bias]
    for step in range(7):
        rate = 6.4 * (step + 1) / 7
        for group in optimizer.param_groups:
            group["lr"] = rate
        for i, parameter in enumerate(parameters):
            gradient = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            parameter.grad = gradient
            values[i], velocities[i] = lars_step(
                values[i], gradient, velocities[i], rate
            )
        optimizer.step()
        for parameter, value in zip(parameters, values, strict=True):
            torch.testing.assert_close(parameter.data, value, rtol=1e-12, atol=0)


def test_build_lars__scales_where_lightly_does_not() -> None:
    def change(make: Any, options: dict[str, Any]) -> float:
        parameter = nn.Parameter(torch.ones(2, 2))
        optimizer = make([parameter], lr=1.0, momentum=0.9, **options)
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
        return float((1 - parameter[0, 0]).detach())

    assert change(build_lars, {}) == pytest.approx(0.001, rel=1e-4)
    assert change(LARS, {"weight_decay": 0.0}) == pytest.approx(1.0)


def test_linear_mae__equals_a_plain_restatement(
    encoder: MaskedEncoder, tmp_path: Path
) -> None:
    """Three epochs of two steps of two micro-batches each."""
    settings = LinearMAE(
        epochs=3, batch_size=10, micro_batch_size=5, lr=6.4, warmup_epochs=1
    )
    settings(encoder, stripes(23), 2, TrainingRun(tmp_path, seed=4, num_workers=0))
    found = trained(tmp_path)

    transform = MAETransform(16, min_scale=0.08, normalize=None)
    loader = KeyedLoader(Stripes(23, transform), 5, seed=4, num_workers=0)
    norm = nn.BatchNorm1d(24, eps=1e-6, affine=False)
    # The initial weights are the protocol's own: found by a run without a way.
    LinearMAE(epochs=3, batch_size=10, micro_batch_size=5, lr=1e-30)(
        encoder, stripes(23), 2, TrainingRun(tmp_path / "start", seed=4, num_workers=0)
    )
    weight = trained(tmp_path / "start")["1.weight"]
    assert float(weight.std()) == pytest.approx(0.01, rel=0.25)
    bias = torch.zeros(2)
    velocities = [torch.zeros(2, 24), torch.zeros(2)]
    step = 0
    encoder.eval()
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = list(loader)
        for first in (
            0,
            2,
        ):  # of four micro-batches
            weight.requires_grad_(True)
            bias.requires_grad_(True)
            loss = torch.zeros(())
            for views, labels, _ in batches[first : first + 2]:
                images = normalize_images(views[0], encoder.mean, encoder.std)
                with torch.no_grad():
                    features = encoder.encode(images)[:, 0]
                logits = functional.linear(norm(features), weight, bias)
                loss = loss + functional.cross_entropy(logits, labels) / 2
            gradients = torch.autograd.grad(loss, [weight, bias])
            share = (
                step / 2 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 4)
            )
            rate = 6.4 * 10 / 256 * share
            weight, velocities[0] = lars_step(
                weight.detach(), gradients[0], velocities[0], rate
            )
            bias, velocities[1] = lars_step(
                bias.detach(), gradients[1], velocities[1], rate
            )
            step += 1
    torch.testing.assert_close(found["1.weight"], weight, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["1.bias"], bias, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["0.running_mean"], norm.running_mean)
    torch.testing.assert_close(found["0.running_var"], norm.running_var)


def test_linear_mae__learns(encoder: MaskedEncoder, tmp_path: Path) -> None:
    settings = LinearMAE(epochs=30, batch_size=8, lr=640.0, pool="mean")
    outcome = settings(
        encoder, stripes(40, 20), 2, TrainingRun(tmp_path, num_workers=0)
    )[0]
    labels = torch.arange(20) % 2
    assert float((outcome.ranked[:, 0] == labels).float().mean()) >= 0.9
    assert outcome.key == (1, "mean")
    assert outcome.hyperparameters == {
        "epochs": 30,
        "batch_size": 8,
        "learning_rate": 20.0,
    }
    assert outcome.selection == []


@pytest.mark.parametrize(
    ("name", "options", "settings", "key"),
    [
        ("vit_tiny_patch16_224", OPTIONS, {}, (1, "cls")),
        ("vit_tiny_patch16_224", OPTIONS, {"pool": "cls+mean", "layer": 0}, None),
        (
            "vit_tiny_patch16_224",
            OPTIONS | {"class_token": False, "global_pool": "avg"},
            {},
            (1, "mean"),
        ),
        (
            "swin_tiny_patch4_window7_224",
            {
                "window_size": 4,
                "depths": (1, 1),
                "embed_dim": 12,
                "num_heads": (1, 2),
                "in_chans": 1,
            },
            {"layer": 0},
            (0, "mean"),
        ),
    ],
)
def test_linear_mae__reads_the_feature_that_it_says(
    name: str,
    options: dict[str, Any],
    settings: dict[str, Any],
    key: tuple[int, str] | None,
    tmp_path: Path,
) -> None:
    encoder = masked_encoder(name, img_size=(16, 32), **options)
    images = stripes(12, 4, size=(16, 32), in_chans=encoder.in_chans)
    outcome = LinearMAE(epochs=1, batch_size=4, **settings)(
        encoder, images, 2, TrainingRun(tmp_path, num_workers=0)
    )[0]
    assert outcome.key == (key or (0, "cls+mean"))
    layer, pool = outcome.key
    pixels = torch.zeros(1, encoder.in_chans, 16, 32)
    width = encoder.eval().embed(pixels, pool, layer).shape[1]  # type: ignore[arg-type]
    assert trained(tmp_path)["1.weight"].shape == (2, width)


def test_linear_mae__published_settings() -> None:
    settings = LinearMAE()
    [warning] = settings.check(1_281_167)
    assert "use pool='mean'" in warning
    assert LinearMAE(pool="cls").check(1_281_167) == []
    recipe = settings._recipe(12)
    assert (recipe.epochs, recipe.warmup_epochs) == (90, 10)
    assert settings.lr * settings.batch_size / 256 == pytest.approx(6.4)
    assert settings._recipe(24).epochs == 50
    assert LinearMAE(epochs=18)._recipe(24).warmup_epochs == pytest.approx(3.6)


def test_linear_mae__says_what_a_small_data_set_does() -> None:
    smaller, short = LinearMAE(pool="cls").check(1968)
    assert "Batches have 1968, for which the learning rate is 0.769" in smaller
    assert "90 steps" in short
    assert LinearMAE(batch_size=256, lr=6.4, pool="cls").check(1968) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "max"}, "pool of LinearMAE is None or one of"),
        ({"lr": 0.0}, "lr of LinearMAE is a number above 0"),
        ({"lr": math.inf}, "lr of LinearMAE is a number above 0"),
        ({"momentum": 1.0}, "of at least 0 and below 1, got momentum"),
        ({"trust_coefficient": 0.0}, "above 0, got trust_coefficient"),
        ({"batch_size": 1}, "at least 2, got batch_size=1"),
        ({"batch_size": 6, "micro_batch_size": 1}, "micro-batches of at least 2"),
        ({"epochs": 0}, "at least 1, got epochs=0"),
        ({"warmup_epochs": 91.0}, "warmup_epochs=91"),
        ({"micro_batch_size": 0}, "at least 1, got micro_batch_size=0"),
    ],
)
def test_linear_mae__refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearMAE(**settings).check(1000)
