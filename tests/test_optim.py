from __future__ import annotations

import dataclasses

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from lightly_mim.optim import (
    Recipe,
    build_optimizer,
    learning_rate_factor,
)

RECIPE = Recipe(
    source="this test",
    encoder="vit_tiny_patch16_224",
    img_size=224,
    epochs=20,
    batch_size=64,
    lr=2e-3,
    lr_batch_size=512,
    warmup_epochs=4,
    min_scale=0.67,
    warmup_lr=1e-5,
    min_lr=1e-4,
)
STEPS_PER_EPOCH = 7
STEPS = 20 * STEPS_PER_EPOCH


def timm_rates(scheduler: CosineLRScheduler) -> list[float]:
    rates = []
    for step in range(STEPS):
        scheduler.step_update(step)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates


def our_rates(recipe: Recipe) -> list[float]:
    return [
        recipe.lr * learning_rate_factor(step, STEPS_PER_EPOCH, STEPS, recipe)
        for step in range(STEPS)
    ]


@pytest.mark.parametrize("cosine_from_warmup", [False, True])
def test_cosine__equals_timm(cosine_from_warmup: bool) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RECIPE.lr)
    warmup_steps = 4 * STEPS_PER_EPOCH
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=STEPS - warmup_steps if cosine_from_warmup else STEPS,
        lr_min=RECIPE.min_lr,
        warmup_lr_init=RECIPE.warmup_lr,
        warmup_t=warmup_steps,
        warmup_prefix=cosine_from_warmup,
        t_in_epochs=False,
    )
    recipe = dataclasses.replace(RECIPE, cosine_from_warmup=cosine_from_warmup)
    assert our_rates(recipe) == pytest.approx(timm_rates(scheduler), rel=1e-12)


def test_step__equals_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RECIPE.lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [12 * STEPS_PER_EPOCH, 16 * STEPS_PER_EPOCH], gamma=0.1
    )
    recipe = dataclasses.replace(
        RECIPE, schedule="step", step_epochs=(12, 16), warmup_epochs=0
    )
    rates = []
    for _ in range(STEPS):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert our_rates(recipe) == pytest.approx(rates, rel=1e-12)


def test_for_epochs__keeps_the_shares() -> None:
    recipe = dataclasses.replace(RECIPE, schedule="step", step_epochs=(16,))
    short = recipe.for_epochs(5)
    assert (short.epochs, short.warmup_epochs, short.step_epochs) == (5, 1, (4,))


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_build_optimizer__decays_what_it_should() -> None:
    module = Module()
    optimizer, _ = build_optimizer(
        module, RECIPE, 512, 7, 140, no_weight_decay=["token"]
    )
    decay = {
        id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
    }
    assert {
        name: decay.get(id(parameter)) for name, parameter in module.named_parameters()
    } == {
        "linear.weight": 0.05,
        "linear.bias": 0,
        "norm.weight": 0,
        "norm.bias": 0,
        "token": 0,
        "frozen": None,
    }


def test_build_optimizer__scales_the_rate() -> None:
    optimizer, scheduler = build_optimizer(
        Module(), RECIPE, batch_size=1024, steps_per_epoch=7, total_steps=140
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    # 1024 / 512 times the rate of warm-up's first step.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * RECIPE.warmup_lr)
    assert scheduler.base_lrs[0] == pytest.approx(2 * RECIPE.lr)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "linear"}, "'cosine' or 'step'"),
        ({"epochs": 0}, "at least 1 epoch"),
        ({"warmup_epochs": 21}, "warmup_epochs=21"),
        ({"lr": 0.0}, "positive"),
        ({"min_lr": -1.0}, "positive"),
    ],
)
def test_recipe__refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)  # type: ignore[arg-type]
