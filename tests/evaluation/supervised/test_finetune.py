from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor, nn

from lightly_mim.data import keyed_random_state
from lightly_mim.encoders import MaskedEncoder, masked_encoder
from lightly_mim.evaluation import TrainingRun
from lightly_mim.evaluation.supervised import finetune, recipes
from lightly_mim.evaluation.supervised.augmentation import (
    FineTuneTransform,
    mixed_loss,
)
from lightly_mim.evaluation.supervised.finetune import FineTune, FineTuned
from lightly_mim.evaluation.supervised.recipes import RECIPES, default_recipe
from lightly_mim.optim import learning_rate_factor

from .test_supervised import OPTIONS, stripes, trained

CPU = torch.device("cpu")
MEAN = (0.5, 0.4, 0.3)
SWIN: dict[str, Any] = {
    "window_size": 4,
    "depths": (1, 1),
    "embed_dim": 12,
    "num_heads": (1, 2),
}
SHARED_TABLE: dict[str, Any] = {
    "use_shared_rel_pos_bias": True,
    "use_rel_pos_bias": False,
    "use_fc_norm": False,
}
PLAIN: dict[str, Any] = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "random_erasing": 0.0,
}


@pytest.fixture(scope="module")
def encoder() -> MaskedEncoder:
    torch.manual_seed(0)
    return masked_encoder("vit_tiny_patch16_224", img_size=16, **OPTIONS)


# The loss.


def recipe_with(**changes: Any) -> recipes.FineTuneRecipe:
    return dataclasses.replace(RECIPES["mae_vit_base"], **(PLAIN | changes))


def batch() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 8, 12, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 12, 4))
    return model, images, torch.tensor([0, 3, 1, 1, 2, 0])


def smoothed(labels: Tensor, smoothing: float) -> Tensor:
    targets = torch.full((len(labels), 4), smoothing / 4)
    targets[torch.arange(len(labels)), labels] += 1 - smoothing
    return targets


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def test_mixed_loss__label_smoothing() -> None:
    model, images, labels = batch()
    loss = mixed_loss(recipe_with(label_smoothing=0.1), 4, CPU)
    expected = soft_cross_entropy(model(images), smoothed(labels, 0.1))
    torch.testing.assert_close(loss(model, images, labels), expected)


def test_mixed_loss__mixup() -> None:
    model, images, labels = batch()
    np.random.seed(5)  # noqa: NPY002
    np.random.rand()  # noqa: NPY002, whether to mix at all
    lam = np.random.beta(0.8, 0.8)  # noqa: NPY002
    assert 0.01 < lam < 0.99
    mixed = lam * images + (1 - lam) * images.flip(0)
    targets = smoothed(labels, 0.1)
    targets = lam * targets + (1 - lam) * targets.flip(0)
    expected = soft_cross_entropy(model(mixed), targets)

    np.random.seed(5)  # noqa: NPY002
    loss = mixed_loss(recipe_with(mixup=0.8, label_smoothing=0.1), 4, CPU)
    torch.testing.assert_close(loss(model, images.clone(), labels), expected)


def test_mixed_loss__cutmix() -> None:
    """The share of each label is the share of pixels that are its image's."""
    model, images, labels = batch()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    loss = mixed_loss(recipe_with(cutmix=1.0), 4, CPU)
    for seed in range(4):
        np.random.seed(seed)  # noqa: NPY002
        found = loss(model, images.clone(), labels)
        other = (seen[-1] == images.flip(0)).all(dim=1) & (seen[-1] != images).all(1)
        shares = other.float().mean(dim=(1, 2))
        assert float(shares.std()) == 0  # the same rectangle in all of them
        targets = smoothed(labels, 0)
        targets = (1 - shares[0]) * targets + shares[0] * targets.flip(0)
        expected = soft_cross_entropy(model(seen[-1]), targets)
        torch.testing.assert_close(found, expected)
    assert any(not image.equal(images) for image in seen)


def test_mixed_loss__random_erasing() -> None:
    model, images, labels = batch()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    loss = mixed_loss(recipe_with(random_erasing=1.0), 4, CPU)
    with keyed_random_state(0):
        loss(model, images.clone(), labels)
    changed = (seen[0] != images).all(dim=1)  # (B, H, W)
    for mask in changed:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert mask.equal(rows[:, None] & columns)  # one rectangle
        assert 0.01 < float(mask.float().mean()) < 0.5
    noise = seen[0][changed[:, None].expand_as(images)]
    assert abs(float(noise.mean())) < 0.3
    assert 0.7 < float(noise.std()) < 1.3


# The transform.


def picture(in_chans: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if in_chans == 1 else pixels)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_transform__every_operation_works(in_chans: int) -> None:
    transform = FineTuneTransform(
        (24, 32), in_chans, MEAN[:in_chans], 0.08, "rand-m9-mstd0.5-inc1"
    )
    names = {op.name for op in transform.augment.ops}
    assert len(names) == (15 if in_chans == 3 else 14)
    assert ("ColorIncreasing" in names) == (in_chans == 3)
    operations = transform.augment.ops
    for operation in operations:
        operation.prob = 1.0
        for magnitude in (0, 9, 10):  # 10 posterises to black
            operation.magnitude, operation.magnitude_std = magnitude, 0
            transform.augment.ops = [operation]
            with keyed_random_state(1):
                (view,) = transform(picture(in_chans))
            assert (view.shape, view.dtype) == ((in_chans, 24, 32), torch.uint8)
            if operation.name == "PosterizeIncreasing" and magnitude == 10:
                assert not view.any()


def test_transform__is_timms_rand_augment() -> None:
    transform = FineTuneTransform((24, 24), 3, MEAN, 1.0, "rand-m9-mstd0.5-inc1")
    colour = tuple(round(255 * value) for value in MEAN)
    theirs = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": colour, "interpolation": 3}
    )
    image = picture(3)
    for seed in range(20):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        expected = theirs(image)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        assert transform.augment(image).tobytes() == expected.tobytes()


def test_transform__takes_tensors_and_many_channels() -> None:
    pixels = torch.randint(256, (5, 20, 20), dtype=torch.uint8)
    with pytest.raises(ValueError, match='5 channels: use rand_augment=""'):
        FineTuneTransform((16, 16), 5, (0.5,) * 5, 0.08, "rand-m9")
    (view,) = FineTuneTransform((16, 16), 5, (0.5,) * 5, 0.08, "")(pixels)
    assert view.shape == (5, 16, 16)
    (view,) = FineTuneTransform((16, 16), 1, (0.5,), 0.08, "rand-m9")(pixels[:1])
    assert view.shape == (1, 16, 16)


def test_transform__leaves_out_colour_of_weighted_choices() -> None:
    transform = FineTuneTransform((16, 16), 1, (0.5,), 0.08, "rand-m9-tweights")
    assert len(transform.augment.choice_weights) == len(transform.augment.ops) == 14
    assert transform.augment.choice_weights.sum() == pytest.approx(1)


# The model.


def test_fine_tuned__equals_timm_with_mean_pooling(encoder: MaskedEncoder) -> None:
    model = FineTuned(encoder, 3, "mean", head_std=0.5).eval()
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=3,
        img_size=16,
        global_pool="avg",
        **OPTIONS,
    ).eval()
    weights = dict(encoder.vit.state_dict())
    weights = {k: v for k, v in weights.items() if not k.startswith("norm.")}
    missing = theirs.load_state_dict(
        weights | {f"head.{k}": v for k, v in model.head.state_dict().items()},
        strict=False,
    )
    # New, as in MAE's and SimMIM's code, also where the encoder's norm was trained.
    assert missing.missing_keys == ["fc_norm.weight", "fc_norm.bias"]
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), theirs(images))


def test_fine_tuned__the_norm_is_new(encoder: MaskedEncoder) -> None:
    with torch.no_grad():
        encoder.vit.norm.weight[0] = 3.0
    model = FineTuned(encoder, 3, "mean", head_std=0.5)
    assert (model.encoder.vit.fc_norm.weight == 1).all()
    assert model.encoder.vit.fc_norm.eps == 1e-6
    kept = FineTuned(encoder, 3, "cls", head_std=0.5)
    assert kept.encoder.vit.norm.weight[0].item() == 3.0


def test_fine_tuned__equals_timms_swin() -> None:
    encoder = masked_encoder("swin_tiny_patch4_window7_224", img_size=32, **SWIN)
    model = FineTuned(encoder, 3, "mean", head_std=0.5).eval()
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=3, img_size=32, **SWIN
    ).eval()
    head = {f"head.fc.{k}": v for k, v in model.head.state_dict().items()}
    theirs.load_state_dict(encoder.vit.state_dict() | head)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), theirs(images))


@pytest.mark.parametrize("own", [False, True])
def test_fine_tuned__each_block_gets_the_shared_positions(own: bool) -> None:
    torch.manual_seed(0)
    encoder = masked_encoder(
        "beit_base_patch16_224",
        img_size=16,
        **(OPTIONS | SHARED_TABLE | {"use_rel_pos_bias": own}),
    )
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_()
    model = FineTuned(encoder, 3, "cls", head_std=0.5).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model.head(encoder.eval().embed(images, "cls"))
    torch.testing.assert_close(model(images), expected)
    tables = [n for n, _ in model.named_parameters() if n.endswith("bias_table")]
    assert tables == [
        f"encoder.vit.blocks.{block}.attn.relative_position_bias_table"
        for block in (0, 1)
    ]


def test_fine_tuned__trains_everything(encoder: MaskedEncoder) -> None:
    fixed = masked_encoder(
        "vit_tiny_patch16_224", img_size=16, pos_embed="sincos", **OPTIONS
    )
    fixed.add_mask_token()
    model = FineTuned(fixed, 3, "mean", head_std=2e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.3)
    assert not model.head.bias.any()


# The recipes.


def test_recipes__published_values() -> None:
    """The reference page: MAE's FINETUNE.md and SimMIM's configuration files."""
    found = {
        name: (
            recipe.lr,
            recipe.batch_size,
            recipe.lr * recipe.batch_size / recipe.lr_batch_size,
            recipe.epochs,
            recipe.warmup_epochs,
            recipe.layer_decay,
            recipe.drop_path,
            recipe.clip_grad,
        )
        for name, recipe in RECIPES.items()
    }
    assert found == {
        "mae_vit_base": (5e-4, 1024, 2e-3, 100, 5, 0.65, 0.1, None),
        "mae_vit_large": (1e-3, 1024, 4e-3, 50, 5, 0.75, 0.2, None),
        "mae_vit_huge": (1e-3, 1024, 4e-3, 50, 5, 0.75, 0.3, None),
        "simmim_vit_base": (1.25e-3, 2048, 5e-3, 100, 20, 0.65, 0.1, 5.0),
        "simmim_swin_base_100ep": (1.25e-3, 2048, 5e-3, 100, 20, 0.9, 0.1, 5.0),
        "simmim_swin_base_800ep": (1.25e-3, 2048, 5e-3, 100, 20, 0.8, 0.1, 5.0),
        "simmim_swin_large": (1.25e-3, 2048, 5e-3, 100, 20, 0.7, 0.2, 5.0),
        "simmim_swinv2_base": (1.25e-3, 2048, 5e-3, 100, 20, 0.75, 0.1, 5.0),
    }
    for recipe in RECIPES.values():
        assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.8, 1.0, 0.1)
        assert (recipe.random_erasing, recipe.weight_decay) == (0.25, 0.05)
        assert recipe.rand_augment == "rand-m9-mstd0.5-inc1"
    assert tuple(RECIPES) == recipes.RecipeName.__args__  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_tiny_patch16_224", OPTIONS, "mae_vit_base"),
        ("vit_tiny_patch16_224", OPTIONS | {"depth": 24}, "mae_vit_large"),
        ("vit_tiny_patch16_224", OPTIONS | {"depth": 32}, "mae_vit_huge"),
        ("beit_base_patch16_224", OPTIONS, "simmim_vit_base"),
        ("swin_tiny_patch4_window7_224", SWIN, "simmim_swin_base_100ep"),
        ("swinv2_tiny_window8_256", SWIN, "simmim_swinv2_base"),
    ],
)
def test_default_recipe(name: str, options: dict[str, Any], expected: str) -> None:
    assert default_recipe(masked_encoder(name, img_size=32, **options)) == expected


def test_settings__override_the_recipe() -> None:
    recipe = FineTune(
        epochs=20, lr=1e-3, layer_decay=0.9, rand_augment="", clip_grad=1.0
    ).settings("mae_vit_base", 1_281_167)
    assert (recipe.epochs, recipe.warmup_epochs) == (20, 1)
    assert (recipe.lr, recipe.layer_decay, recipe.clip_grad) == (1e-3, 0.9, 1.0)
    assert (recipe.rand_augment, recipe.batch_size) == ("", 1024)


def test_recipes__where_the_cosine_begins_and_ends() -> None:
    for name, recipe in RECIPES.items():
        # MAE's code, and WARMUP_PREFIX of the code of SwinV2.
        from_warmup = name.startswith("mae_") or name == "simmim_swinv2_base"
        assert recipe.cosine_from_warmup == from_warmup, name
        # 1e-6 of MAE's code is the rate itself; SimMIM's is per 512 images.
        absolute = name.startswith("mae_")
        assert recipe.min_lr_is_absolute == absolute, name
        assert recipe.min_lr == (1e-6 if absolute else 2.5e-7)


def test_recipes__rates_of_swinv2() -> None:
    """At 100 epochs of 2048 images: 20 of warm-up, and the cosine over the other 80."""
    recipe = RECIPES["simmim_swinv2_base"]
    end = recipe.min_lr / recipe.lr
    for epoch in (20, 40, 60, 99):
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 20) / 80))
        expected = end + (1 - end) * cosine
        found = learning_rate_factor(epoch * 5, 5, 500, recipe)
        assert found == pytest.approx(expected)
    assert learning_rate_factor(100, 5, 500, recipe) == 1
    swin = RECIPES["simmim_swin_base_100ep"]
    assert learning_rate_factor(100, 5, 500, swin) == pytest.approx(0.9045, abs=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_finetune__tables_decay_in_simmims_vit_alone(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def catch(model: Any, recipe: Any, *arguments: Any, **_: Any) -> None:
        left_out.extend(arguments[-1])
        raise Stop

    left_out: list[str] = []
    monkeypatch.setattr(finetune, "build_optimizer", catch)
    vit = masked_encoder("beit_base_patch16_224", img_size=16, **OPTIONS)
    with pytest.raises(Stop):
        FineTune(recipe=name)(vit, stripes(10, 2), 2, TrainingRun(tmp_path))
    assert "encoder.vit.cls_token" in left_out
    table = "encoder.vit.blocks.0.attn.relative_position_bias_table"
    assert (table in left_out) == (name != "simmim_vit_base")


def test_recipes__only_maes_code_scales_the_ends_with_the_layers() -> None:
    scaled = {name for name, recipe in RECIPES.items() if recipe.decay_ends}
    assert scaled == {"mae_vit_base", "mae_vit_large", "mae_vit_huge"}


def test_settings__small_data_has_small_batches() -> None:
    sizes = {
        num_train: FineTune().settings("mae_vit_base", num_train).batch_size
        for num_train in (11, 20, 100, 1968, 9469, 25_599, 25_600, 1_281_167)
    }
    assert sizes == {
        11: 10,
        20: 20,
        100: 32,
        1968: 64,
        9469: 256,
        25_599: 512,
        25_600: 1024,
        1_281_167: 1024,
    }
    smaller, short = FineTune().check(1968)
    assert "batches have 64 images instead of the published 1024" in smaller
    assert "3000 steps" in short
    assert FineTune().check(1_281_167) == []
    assert FineTune(batch_size=64).check(1968) == [short]
    assert FineTune(batch_size=64, lr=4e-3).check(1968) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "mae"}, "recipe of FineTune is None or one of 'mae_vit_base'"),
        ({"pool": "max"}, "pool of FineTune is one of"),
        ({"epochs": 0}, "at least 1, got epochs=0"),
        ({"lr": -1.0}, "above 0, got lr=-1.0"),
        ({"lr": math.nan}, "lr of FineTune is None or a number above 0"),
        ({"layer_decay": 0.0}, "layer_decay of FineTune"),
        ({"layer_decay": 1.1}, "layer_decay of FineTune"),
        ({"drop_path": 1.0}, "drop_path of FineTune"),
        ({"label_smoothing": 1.0}, "label_smoothing of FineTune"),
        ({"random_erasing": 1.5}, "random_erasing of FineTune"),
        ({"min_scale": 0.0}, "min_scale of FineTune"),
        ({"mixup": -0.1}, "mixup of FineTune"),
        ({"clip_grad": math.inf}, "clip_grad of FineTune"),
        ({"weight_decay": -1.0}, "weight_decay of FineTune"),
        ({"rand_augment": "rand-m9-mstd"}, "rand_augment is timm's text"),
        ({"rand_augment": "auto"}, "rand_augment is timm's text"),
        ({"batch_size": 0}, "batch_size of FineTune"),
        ({"batch_size": 33}, "multiple of 2"),
        ({"batch_size": 1001}, "larger than the training set"),
        ({"micro_batch_size": 1}, "at least 2 image"),
    ],
)
def test_finetune__refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTune(**settings).check(1000)


def test_finetune__refuses_what_does_not_fit_the_encoder() -> None:
    options: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24}
    five = masked_encoder("vit_tiny_patch16_224", in_chans=5, num_heads=2, **options)
    with pytest.raises(ValueError, match="have 5 channels: use rand_augment"):
        FineTune().check_encoder(five)
    FineTune(rand_augment="", pool="cls").check_encoder(five)


def test_finetune__odd_batches_without_mixing() -> None:
    FineTune(batch_size=33, mixup=0.0, cutmix=0.0).check(1000)


# All of it.


def test_finetune__learns(encoder: MaskedEncoder, tmp_path: Path) -> None:
    settings = FineTune(
        epochs=12, batch_size=10, lr=0.2, layer_decay=0.9, min_scale=0.5,
        rand_augment="", drop_path=0.0, **PLAIN,
    )  # fmt: skip
    outcome = settings(
        encoder, stripes(40, 20), 2, TrainingRun(tmp_path, num_workers=0)
    )[0]
    labels = torch.arange(20) % 2
    assert float((outcome.ranked[:, 0] == labels).float().mean()) >= 0.9
    assert outcome.key == (1, "mean")
    assert outcome.hyperparameters == {
        "epochs": 12,
        "batch_size": 10,
        "learning_rate": pytest.approx(0.2 * 10 / 256),
        "layer_decay": 0.9,
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", OPTIONS | {"in_chans": 1}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("beit_base_patch16_224", OPTIONS | SHARED_TABLE),
    ],
)
def test_finetune__published_augmentations(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Grey, not square, and all of the augmentations."""
    encoder = masked_encoder(name, img_size=(16, 32), **options)
    images = stripes(12, 7, size=(20, 30), in_chans=encoder.in_chans, num_classes=6)
    images = images._replace(
        test=stripes(12, 7, size=(16, 32), in_chans=encoder.in_chans).test
    )
    outcome = FineTune(epochs=1, batch_size=6, clip_grad=0.0)(
        encoder, images, 6, TrainingRun(tmp_path, num_workers=0)
    )[0]
    assert outcome.ranked.shape == (7, 5)
    changed = [
        key
        for key, value in encoder.vit.state_dict().items()
        if f"encoder.vit.{key}" in trained(tmp_path)
        and not value.equal(trained(tmp_path)[f"encoder.vit.{key}"])
    ]
    assert "patch_embed.proj.weight" in changed


def test_finetune__sets_drop_path(
    encoder: MaskedEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(
        MaskedEncoder, "set_drop_path", lambda self, rate: rates.append(rate)
    )
    for settings in (FineTune(), FineTune(drop_path=0.3)):
        settings = dataclasses.replace(settings, epochs=1, batch_size=10)
        out = tmp_path / str(len(rates))
        settings(encoder, stripes(10, 2), 2, TrainingRun(out, num_workers=0))
    assert rates == [0.1, 0.3]
