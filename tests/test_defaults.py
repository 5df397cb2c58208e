"""What is chosen where nobody chose, against the papers' own sizes and its promises."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightly_mim.methods
from lightly_mim import MAE, SimMIM, defaults
from lightly_mim.encoders import masked_encoder
from lightly_mim.methods import CrossMAE, MaskTokenMAE

from .conftest import TINY_VIT

SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1)}
SWIN["num_heads"] = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "options", "law"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, "mae"),
        ("beit_base_patch16_224", {"depth": 1}, "mae"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "mae"),
        ("swin_tiny_patch4_window7_224", SWIN, "timm"),
        ("swinv2_tiny_window8_256", SWIN, "timm"),
    ],
)
def test_initialization(name: str, options: dict[str, Any], law: str) -> None:
    assert defaults.initialization(name) == law
    module = timm.create_model(name, **options)
    for encoder in (module, masked_encoder(module)):
        assert defaults.initialization(encoder) == law


# The mask unit.


@pytest.mark.parametrize(
    ("img_size", "patch_size", "unit"),
    [
        # SimMIM, section 3.2: 32 pixels, whatever the patch.
        ((192, 192), (4, 4), (32, 32)),
        ((192, 192), (16, 16), (32, 32)),
        ((192, 192), (32, 32), (32, 32)),
        ((224, 224), (4, 4), (32, 32)),
        ((224, 224), (16, 16), (32, 32)),
        # Three blocks or more, where 32 pixels leave 2 x 2 and 1 x 1.
        ((64, 64), (16, 16), (16, 16)),
        ((32, 32), (8, 8), (8, 8)),
        # By the shorter side, and each side for itself.
        ((192, 384), (16, 16), (32, 32)),
        ((224, 518), (14, 14), (28, 14)),
        # Fewer than three patches: all that there are.
        ((32, 32), (16, 16), (16, 16)),
        # Patches that do not divide the image are left for others to refuse.
        ((100, 64), (16, 16), (16, 16)),
    ],
)
def test_mask_unit(img_size: Any, patch_size: Any, unit: Any) -> None:
    assert defaults.mask_unit(img_size, patch_size) == unit


pairs = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(pairs, pairs)
def test_mask_unit__tiles_the_image(patches: Any, patch_size: Any) -> None:
    img_size = tuple(n * p for n, p in zip(patches, patch_size, strict=True))
    units = defaults.mask_unit(img_size, patch_size)
    for side, patch, count, unit in zip(
        img_size, patch_size, patches, units, strict=True
    ):
        assert side % unit == 0 and unit % patch == 0
        assert count < 3 or side // unit >= 3


@pytest.mark.parametrize(
    ("name", "img_size"),
    [
        ("vit_small_patch14_dinov2", None),
        ("vit_small_patch14_dinov2", (224, 518)),
        ("eva02_tiny_patch14_224", None),
        ("vit_tiny_patch16_224", 48),
        ("vit_tiny_patch16_224", (32, 160)),
    ],
)
def test_mask_unit__serves_every_encoder(name: str, img_size: Any) -> None:
    model = SimMIM(name, img_size=img_size, depth=1, embed_dim=32, num_heads=2)
    model.check_masking()
    assert model(torch.randn(1, 3, *model.encoder.img_size)).loss.isfinite()


# The target's window.


def test_target_window__is_swinv2s_at_its_size() -> None:
    assert defaults.target_window((192, 192)) == 47
    assert defaults.target_window((192, 500)) == 47
    assert SimMIM.recipe("swinv2_base_800ep").img_size == 192


@given(st.integers(1, 2000))
def test_target_window__is_odd_and_in_proportion(side: int) -> None:
    window = defaults.target_window((side, 2 * side))
    assert window % 2 == 1
    assert window >= 3
    assert window == 3 or abs(window - side * 47 / 192) <= 1


# MAE's decoder.


@pytest.mark.parametrize("name", ["base_patch16", "large_patch16", "huge_patch14"])
@pytest.mark.parametrize("method", [MAE, CrossMAE, MaskTokenMAE])
def test_decoder__is_the_papers_from_vit_b_on(method: type[MAE], name: str) -> None:
    with torch.device("meta"):
        model = method(f"vit_{name}_224")
    assert len(model.decoder.blocks) == 8
    assert model.head.in_features == 512
    names = ("decoder_dim", "decoder_depth", "decoder_num_heads")
    assert [model.init_args[key] for key in names] == [512, 8, 16]


def test_decoder__is_in_proportion() -> None:
    assert defaults.decoder_size(192, 12) == (128, 8)
    assert defaults.decoder_size(384, 12) == (256, 8)
    assert defaults.decoder_size(192, 6) == (128, 4)
    with torch.device("meta"):
        model = MAE("vit_tiny_patch16_224", depth=6)
    assert model.init_args["decoder_dim"] == 128
    assert model.init_args["decoder_depth"] == 4
    assert model.init_args["decoder_num_heads"] == 4


def test_decoder__what_was_said_wins() -> None:
    said = {"decoder_dim": 96, "decoder_depth": 1}
    model = MAE("vit_tiny_patch16_224", depth=1, **said)  # type: ignore[arg-type]
    assert {name: model.init_args[name] for name in said} == said
    assert model.init_args["decoder_num_heads"] == 3
    model = MAE("vit_tiny_patch16_224", depth=1, decoder_num_heads=2)
    assert model.init_args["decoder_num_heads"] == 2


@given(st.integers(1, 4096), st.integers(1, 64))
def test_decoder_size__is_never_larger_than_the_papers(width: int, depth: int) -> None:
    decoder_width, decoder_depth = defaults.decoder_size(width, depth)
    assert 32 <= decoder_width <= 512 and decoder_width % 32 == 0
    assert 1 <= decoder_depth <= min(depth, 8)


@given(st.integers(1, 4096))
def test_num_heads__divides_the_width(width: int) -> None:
    heads = defaults.num_heads(width)
    assert width % heads == 0
    assert heads == 1 or width // heads >= 32


# The method.


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("num_images", [300, 2_000_000])
@pytest.mark.parametrize("side", [8, 11, 28, 31, 32, 50, 64, 96, 159, 160, 300, 2000])
def test_method__can_be_built_for_the_images(
    side: int, num_images: int, grey: bool, gpu: bool
) -> None:
    name, options = defaults.method(num_images, side, grey, gpu)
    with torch.device("meta"):
        model = getattr(lightly_mim.methods, name)(**options)
    model.check_masking()
    encoder = model.encoder
    assert encoder.in_chans == (1 if grey else 3)
    # Patches enough to mask, and not more than the machine can afford.
    assert all(4 <= along <= 14 for along in encoder.grid)
    if side < 160:  # no pixel is made up
        assert max(encoder.img_size) <= side


def test_method__grows_with_the_images_and_the_machine() -> None:
    assert defaults.method(2000, 64, False, gpu=False)[0] == "MAE"
    assert defaults.method(2000, 8, True, gpu=False)[0] == "SimMIM"
    assert defaults.method(2000, 300, False, gpu=True)[1]["encoder"].startswith(
        "vit_small"
    )
    assert defaults.method(2_000_000, 300, False, gpu=True)[1]["encoder"].startswith(
        "vit_base"
    )


# The optimiser.

counts = st.integers(1, 10**8)


@given(counts)
def test_images_per_step(num_images: int) -> None:
    batch_size = defaults.images_per_step(num_images)
    assert 1 <= batch_size <= min(num_images, 256)
    if num_images >= 8:
        assert batch_size in (8, 16, 32, 64, 128, 256)


@given(counts, counts)
def test_passes__are_fewer_of_more_images(few: int, many: int) -> None:
    few, many = sorted((few, many))
    assert 20 <= defaults.passes(many) <= defaults.passes(few) <= 400


@given(
    st.none() | counts,
    st.none() | st.integers(1, 4096),
    st.none() | st.integers(1, 2000),
)
def test_recipe(
    num_images: int | None, batch_size: int | None, epochs: int | None
) -> None:
    recipe = defaults.recipe(ENCODER, num_images, batch_size, epochs)
    assert recipe.source == defaults.SOURCE
    assert recipe.encoder == "vit_tiny_patch16_224"
    assert recipe.img_size == 32
    number = 10_000 if num_images is None else num_images
    assert recipe.batch_size == (batch_size or defaults.images_per_step(number))
    assert recipe.epochs == (epochs or defaults.passes(number))
    # The rate is the rate itself.
    assert recipe.lr_batch_size == recipe.batch_size
    assert recipe.lr == defaults.learning_rate(ENCODER.embed_dim)
    assert recipe.warmup_epochs <= recipe.epochs


ENCODER = SimMIM(**TINY_VIT).encoder
