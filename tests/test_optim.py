from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from lightly_mim.encoders import masked_encoder
from lightly_mim.evaluation.supervised.finetune import FineTuned
from lightly_mim.methods import MAE
from lightly_mim.optim import (
    Recipe,
    build_optimizer,
    layer_ids,
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


@pytest.mark.parametrize(
    ("name", "epochs", "warmup"),
    [
        ("vit_base_1600ep", 800, 40),
        ("vit_base_1600ep", 3200, 40),
        ("vit_base_1600ep", 1000, 40),
        ("vit_base_1600ep", 400, 20),
        ("vit_base_1600ep", 100, 5),
        ("vit_large_800ep", 1600, 40),
        ("vit_large_800ep", 200, 10),
        # Its own warm-up is as long as that of longer runs.
        ("vit_large_400ep", 400, 40),
        ("vit_large_400ep", 800, 40),
        ("vit_large_400ep", 100, 10),
    ],
)
def test_for_epochs__warm_up_of_mae(name: str, epochs: int, warmup: float) -> None:
    stretched = MAE.recipe(name).for_epochs(epochs)
    assert (stretched.epochs, stretched.warmup_epochs) == (epochs, warmup)
    # By way of another length it is the same.
    again = MAE.recipe(name).for_epochs(50).for_epochs(epochs)
    assert again.warmup_epochs == pytest.approx(warmup)


def test_exempt__takes_whole_parts_of_names() -> None:
    names = {"a.cpb_mlp.0.weight", "cpb_mlp", "a.cpb_mlp2", "vit.pos_embed"}
    decaying = dataclasses.replace(RECIPE, weight_decay_on=("cpb_mlp", "mlp", "x"))
    assert decaying.exempt(names) == {"a.cpb_mlp2", "vit.pos_embed"}
    assert RECIPE.exempt(names) == names


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
        ({"schedule": "linear"}, "one of 'cosine', 'step', got"),
        ({"epochs": 0}, "epochs of Recipe is a whole number of at least 1"),
        ({"warmup_epochs": 21}, "warmup_epochs=21"),
        ({"lr": 0.0}, "lr of Recipe is a number above 0"),
        ({"min_lr": -1.0}, "min_lr of Recipe is a number of at least 0"),
        ({"batch_size": True}, "batch_size of Recipe"),
        ({"betas": (0.9, 1.0)}, "betas of Recipe"),
        ({"clip_grad": float("nan")}, "clip_grad of Recipe"),
        ({"source": None}, "source of Recipe is text"),
    ],
)
def test_recipe__refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)  # type: ignore[arg-type]


SMALL = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
STAGES = {"img_size": 32, "window_size": 4, "depths": (1, 2), "embed_dim": 12}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 2}),
    # The ViT of SimMIM: fine-tuned with a table of relative positions for each block.
    "beit": (
        "beit_base_patch16_224",
        SMALL
        | {
            "use_shared_rel_pos_bias": True,
            "use_rel_pos_bias": False,
            "use_fc_norm": False,
        },
    ),
    "eva": ("eva02_tiny_patch14_224", SMALL | {"img_size": 28}),
    "swin": ("swin_tiny_patch4_window7_224", STAGES | {"num_heads": (1, 2)}),
    "swinv2": ("swinv2_tiny_window8_256", STAGES | {"num_heads": (1, 2)}),
}

# Every parameter behind the number of its layer, by the rules of the code of MAE and
# SimMIM, for fine-tuning with mean pooling.
LAYERS = {
    "vit": """
    0: cls_token reg_token pos_embed patch_embed.proj.weight
        patch_embed.proj.bias
    1: blocks.0.norm1.weight blocks.0.norm1.bias blocks.0.attn.qkv.weight
        blocks.0.attn.qkv.bias blocks.0.attn.proj.weight blocks.0.attn.proj.bias
        blocks.0.norm2.weight blocks.0.norm2.bias blocks.0.mlp.fc1.weight
        blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias
    2: blocks.1.norm1.weight blocks.1.norm1.bias blocks.1.attn.qkv.weight
        blocks.1.attn.qkv.bias blocks.1.attn.proj.weight blocks.1.attn.proj.bias
        blocks.1.norm2.weight blocks.1.norm2.bias blocks.1.mlp.fc1.weight
        blocks.1.mlp.fc1.bias blocks.1.mlp.fc2.weight blocks.1.mlp.fc2.bias
    3: fc_norm.weight fc_norm.bias head.weight head.bias
    """,
    "beit": """
    0: cls_token patch_embed.proj.weight patch_embed.proj.bias
    1: blocks.0.gamma_1 blocks.0.gamma_2 blocks.0.norm1.weight
        blocks.0.norm1.bias blocks.0.attn.q_bias blocks.0.attn.v_bias
        blocks.0.attn.relative_position_bias_table blocks.0.attn.qkv.weight
        blocks.0.attn.proj.weight blocks.0.attn.proj.bias blocks.0.norm2.weight
        blocks.0.norm2.bias blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias
        blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias
    2: blocks.1.gamma_1 blocks.1.gamma_2 blocks.1.norm1.weight
        blocks.1.norm1.bias blocks.1.attn.q_bias blocks.1.attn.v_bias
        blocks.1.attn.relative_position_bias_table blocks.1.attn.qkv.weight
        blocks.1.attn.proj.weight blocks.1.attn.proj.bias blocks.1.norm2.weight
        blocks.1.norm2.bias blocks.1.mlp.fc1.weight blocks.1.mlp.fc1.bias
        blocks.1.mlp.fc2.weight blocks.1.mlp.fc2.bias
    3: fc_norm.weight fc_norm.bias head.weight head.bias
    """,
    "eva": """
    0: cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias
    1: blocks.0.norm1.weight blocks.0.norm1.bias blocks.0.attn.q_bias
        blocks.0.attn.v_bias blocks.0.attn.qkv.weight blocks.0.attn.proj.weight
        blocks.0.attn.proj.bias blocks.0.norm2.weight blocks.0.norm2.bias
        blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight
        blocks.0.mlp.fc2.bias
    2: blocks.1.norm1.weight blocks.1.norm1.bias blocks.1.attn.q_bias
        blocks.1.attn.v_bias blocks.1.attn.qkv.weight blocks.1.attn.proj.weight
        blocks.1.attn.proj.bias blocks.1.norm2.weight blocks.1.norm2.bias
        blocks.1.mlp.fc1.weight blocks.1.mlp.fc1.bias blocks.1.mlp.fc2.weight
        blocks.1.mlp.fc2.bias
    3: fc_norm.weight fc_norm.bias head.weight head.bias
    """,
    "swin": """
    0: patch_embed.proj.weight patch_embed.proj.bias patch_embed.norm.weight
        patch_embed.norm.bias
    1: layers.0.blocks.0.norm1.weight layers.0.blocks.0.norm1.bias
        layers.0.blocks.0.attn.relative_position_bias_table
        layers.0.blocks.0.attn.qkv.weight layers.0.blocks.0.attn.qkv.bias
        layers.0.blocks.0.attn.proj.weight layers.0.blocks.0.attn.proj.bias
        layers.0.blocks.0.norm2.weight layers.0.blocks.0.norm2.bias
        layers.0.blocks.0.mlp.fc1.weight layers.0.blocks.0.mlp.fc1.bias
        layers.0.blocks.0.mlp.fc2.weight layers.0.blocks.0.mlp.fc2.bias
        layers.1.downsample.norm.weight layers.1.downsample.norm.bias
        layers.1.downsample.reduction.weight
    2: layers.1.blocks.0.norm1.weight layers.1.blocks.0.norm1.bias
        layers.1.blocks.0.attn.relative_position_bias_table
        layers.1.blocks.0.attn.qkv.weight layers.1.blocks.0.attn.qkv.bias
        layers.1.blocks.0.attn.proj.weight layers.1.blocks.0.attn.proj.bias
        layers.1.blocks.0.norm2.weight layers.1.blocks.0.norm2.bias
        layers.1.blocks.0.mlp.fc1.weight layers.1.blocks.0.mlp.fc1.bias
        layers.1.blocks.0.mlp.fc2.weight layers.1.blocks.0.mlp.fc2.bias
    3: layers.1.blocks.1.norm1.weight layers.1.blocks.1.norm1.bias
        layers.1.blocks.1.attn.relative_position_bias_table
        layers.1.blocks.1.attn.qkv.weight layers.1.blocks.1.attn.qkv.bias
        layers.1.blocks.1.attn.proj.weight layers.1.blocks.1.attn.proj.bias
        layers.1.blocks.1.norm2.weight layers.1.blocks.1.norm2.bias
        layers.1.blocks.1.mlp.fc1.weight layers.1.blocks.1.mlp.fc1.bias
        layers.1.blocks.1.mlp.fc2.weight layers.1.blocks.1.mlp.fc2.bias
    4: norm.weight norm.bias head.weight head.bias
    """,
    "swinv2": """
    0: patch_embed.proj.weight patch_embed.proj.bias patch_embed.norm.weight
        patch_embed.norm.bias
    1: layers.0.blocks.0.attn.logit_scale layers.0.blocks.0.attn.q_bias
        layers.0.blocks.0.attn.v_bias layers.0.blocks.0.attn.cpb_mlp.0.weight
        layers.0.blocks.0.attn.cpb_mlp.0.bias
        layers.0.blocks.0.attn.cpb_mlp.2.weight
        layers.0.blocks.0.attn.qkv.weight layers.0.blocks.0.attn.proj.weight
        layers.0.blocks.0.attn.proj.bias layers.0.blocks.0.norm1.weight
        layers.0.blocks.0.norm1.bias layers.0.blocks.0.mlp.fc1.weight
        layers.0.blocks.0.mlp.fc1.bias layers.0.blocks.0.mlp.fc2.weight
        layers.0.blocks.0.mlp.fc2.bias layers.0.blocks.0.norm2.weight
        layers.0.blocks.0.norm2.bias layers.1.downsample.reduction.weight
        layers.1.downsample.norm.weight layers.1.downsample.norm.bias
    2: layers.1.blocks.0.attn.logit_scale layers.1.blocks.0.attn.q_bias
        layers.1.blocks.0.attn.v_bias layers.1.blocks.0.attn.cpb_mlp.0.weight
        layers.1.blocks.0.attn.cpb_mlp.0.bias
        layers.1.blocks.0.attn.cpb_mlp.2.weight
        layers.1.blocks.0.attn.qkv.weight layers.1.blocks.0.attn.proj.weight
        layers.1.blocks.0.attn.proj.bias layers.1.blocks.0.norm1.weight
        layers.1.blocks.0.norm1.bias layers.1.blocks.0.mlp.fc1.weight
        layers.1.blocks.0.mlp.fc1.bias layers.1.blocks.0.mlp.fc2.weight
        layers.1.blocks.0.mlp.fc2.bias layers.1.blocks.0.norm2.weight
        layers.1.blocks.0.norm2.bias
    3: layers.1.blocks.1.attn.logit_scale layers.1.blocks.1.attn.q_bias
        layers.1.blocks.1.attn.v_bias layers.1.blocks.1.attn.cpb_mlp.0.weight
        layers.1.blocks.1.attn.cpb_mlp.0.bias
        layers.1.blocks.1.attn.cpb_mlp.2.weight
        layers.1.blocks.1.attn.qkv.weight layers.1.blocks.1.attn.proj.weight
        layers.1.blocks.1.attn.proj.bias layers.1.blocks.1.norm1.weight
        layers.1.blocks.1.norm1.bias layers.1.blocks.1.mlp.fc1.weight
        layers.1.blocks.1.mlp.fc1.bias layers.1.blocks.1.mlp.fc2.weight
        layers.1.blocks.1.mlp.fc2.bias layers.1.blocks.1.norm2.weight
        layers.1.blocks.1.norm2.bias
    4: norm.weight norm.bias head.weight head.bias
    """,
}


@pytest.mark.parametrize("name", MODELS)
def test_build_optimizer__decays_the_rate_from_layer_to_layer(name: str) -> None:
    encoder, options = MODELS[name]
    module = FineTuned(masked_encoder(encoder, **options), 3, "mean", head_std=0.02)
    _, scheduler = build_optimizer(module, RECIPE, 512, 7, 140, layer_decay=0.5)
    rates = {
        id(parameter): rate
        for group, rate in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True
        )
        for parameter in group["params"]
    }
    expected = {}
    lines = LAYERS[name].split()
    for word in lines:
        if word.endswith(":"):
            layer = int(word[:-1])
        else:
            expected[word] = RECIPE.lr * 0.5 ** (layer_of_head(lines) - layer)
    assert {
        parameter.removeprefix("encoder.vit."): pytest.approx(rates[id(value)])
        for parameter, value in module.named_parameters()
    } == expected


def test_build_optimizer__ends_that_do_not_decay_equal_timms() -> None:
    # As SimMIM's fine-tuning has it: timm takes the ends as they are for every group.
    encoder, options = MODELS["vit"]
    module = FineTuned(masked_encoder(encoder, **options), 3, "mean", head_std=0.02)
    optimizer, ours = build_optimizer(
        module, RECIPE, 512, STEPS_PER_EPOCH, STEPS, layer_decay=0.5, decay_ends=False
    )
    highest = ours.base_lrs
    assert len(set(highest)) > 3
    theirs = CosineLRScheduler(
        torch.optim.SGD(
            [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in highest]
        ),
        t_initial=STEPS,
        lr_min=RECIPE.min_lr,
        warmup_lr_init=RECIPE.warmup_lr,
        warmup_t=4 * STEPS_PER_EPOCH,
        t_in_epochs=False,
    )
    for step in range(STEPS):
        theirs.step_update(step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [group["lr"] for group in theirs.optimizer.param_groups], rel=1e-12
        )
        optimizer.step()
        ours.step()


@pytest.mark.parametrize("batch_size", [64, 512, 4096])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_build_optimizer__absolute_min_lr(
    batch_size: int, layer_decay: float | None
) -> None:
    encoder, options = MODELS["vit"]
    module = FineTuned(masked_encoder(encoder, **options), 3, "mean", head_std=0.02)
    recipe = dataclasses.replace(RECIPE, min_lr=1e-6, min_lr_is_absolute=True)
    optimizer, schedule = build_optimizer(
        module, recipe, batch_size, 7, 140, layer_decay=layer_decay
    )
    for _ in range(140):
        optimizer.step()
        schedule.step()
    # MAE's code multiplies by the share of the layer what the schedule gives.
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-6 * group.get("lr_scale", 1.0))
    scaled = dataclasses.replace(recipe, min_lr_is_absolute=False)
    _, schedule = build_optimizer(module, scaled, batch_size, 7, 140)
    last = schedule.lr_lambdas[0](140) * schedule.base_lrs[0]
    assert last == pytest.approx(1e-6 * batch_size / 512)


def layer_of_head(words: list[str]) -> int:
    return int([word for word in words if word.endswith(":")][-1][:-1])


def test_build_optimizer__layers_warm_up_together() -> None:
    encoder, options = MODELS["vit"]
    module = FineTuned(masked_encoder(encoder, **options), 3, "mean", head_std=0.02)
    optimizer, scheduler = build_optimizer(module, RECIPE, 512, 7, 140, layer_decay=0.5)
    for step in range(40):
        shares = [
            group["lr"] / rate
            for group, rate in zip(
                optimizer.param_groups, scheduler.base_lrs, strict=True
            )
        ]
        factor = learning_rate_factor(step, 7, 140, RECIPE)
        assert shares == pytest.approx([factor] * len(shares))
        optimizer.step()
        scheduler.step()
    decays = {
        id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
    }
    vit = module.encoder.vit
    assert decays[id(vit.blocks[0].attn.qkv.weight)] == RECIPE.weight_decay
    assert decays[id(vit.blocks[0].attn.qkv.bias)] == 0
    assert decays[id(module.head.weight)] == RECIPE.weight_decay


def test_layer_ids__differs_from_timm_where_the_references_do() -> None:
    def timm_ids(model: Any) -> dict[str, int]:
        ids: dict[str, int] = timm.models.group_parameters(
            model, model.group_matcher(), reverse=True
        )
        return ids

    def differences(name: str) -> dict[str, tuple[int, int]]:
        encoder, options = MODELS[name]
        model = timm.create_model(encoder, num_classes=0, **options)
        theirs = timm_ids(model)
        return {
            parameter: (theirs[parameter], layer)
            for parameter, layer in layer_ids(model).items()
            if theirs[parameter] != layer
        }

    norm = {"norm.weight": (2, 3), "norm.bias": (2, 3)}
    assert differences("vit") == norm
    table = {"rel_pos_bias.relative_position_bias_table": (0, 3)}
    assert differences("beit") == norm | table
    assert differences("swin") == {
        "layers.1.downsample.norm.weight": (2, 1),
        "layers.1.downsample.norm.bias": (2, 1),
        "layers.1.downsample.reduction.weight": (2, 1),
        "norm.weight": (3, 4),
        "norm.bias": (3, 4),
    }


def test_layer_ids__refuses_other_models() -> None:
    for model in (nn.Linear(2, 2), timm.create_model("resnet10t", num_classes=0)):
        with pytest.raises(ValueError, match="layers of a .* are not known"):
            layer_ids(model)
