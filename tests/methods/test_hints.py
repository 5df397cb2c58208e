"""What the methods say of encoders, decoders and sizes that do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightly.models.modules import (
    MaskedVisionTransformerTIMM,
    MaskedVisionTransformerTorchvision,
)
from lightly.models.modules.masked_vision_transformer_decoder_timm import (
    MaskedVisionTransformerDecoderTIMM,
)
from torch import nn
from torch.nn import functional

from lightly_mim import MAE, SimMIM
from lightly_mim.decoders import MAEDecoder
from lightly_mim.heads import InverseSwinHead, LinearHead
from lightly_mim.losses import L1, SmoothL1
from lightly_mim.masking import BlockMasking, MixtureMasking, RandomMasking
from lightly_mim.methods import CrossMAE, MaskTokenMAE
from lightly_mim.targets import HOG, Pixels

VIT = "vit_tiny_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}
UNIT: dict[str, Any] = {"mask_patch_size": 32}  # the paper's
DECODER: dict[str, Any] = {
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


@pytest.mark.parametrize(
    ("method", "name", "options", "img_size", "unit"),
    [
        # 512, 504, 480, ... were proposed in turn.
        (SimMIM, "vit_small_patch14_dinov2", UNIT, 504, 28),
        (SimMIM, "vit_small_patch14_dinov2", UNIT | {"img_size": 504}, 504, 28),
        (
            *(SimMIM, "vit_small_patch14_dinov2"),
            UNIT | {"img_size": (224, 518)},
            *((224, 504), 28),
        ),
        (SimMIM, "eva02_tiny_patch14_224", UNIT, 224, 28),
        (SimMIM, VIT, {"mask_patch_size": (32, 24)}, 224, (32, 16)),
        (SimMIM, VIT, {"mask_patch_size": 90}, 224, 112),
        (SimMIM, SWIN, {"mask_patch_size": 30}, 224, 28),
        (SimMIM, SWIN, {"mask_patch_size": 2}, 224, 4),
        (MAE, VIT, {"mask_patch_size": 24}, 224, 16),
        (MAE, "vit_small_patch14_dinov2", {"mask_patch_size": 16}, 518, 14),
        (CrossMAE, VIT, {"mask_patch_size": 8}, 224, 16),
    ],
)
def test_unit__names_a_pair_that_fits(
    method: type[Any],
    name: str,
    options: dict[str, Any],
    img_size: Any,
    unit: Any,
) -> None:
    small = {"depths": (1, 1, 1, 1)} if name == SWIN else {"depth": 1}
    hint = f"img_size={img_size} with mask_patch_size={unit}."
    with pytest.raises(ValueError, match=re.escape(hint)) as error:
        method(name, **small, **options)
    assert str(error.value).startswith(f"{method.__name__} masks whole patches")
    # Who follows the advice is not sent on.
    options = {**options, "img_size": img_size, "mask_patch_size": unit}
    method(name, **small, **options).check_masking()


@pytest.mark.parametrize(
    "masking",
    [
        BlockMasking(12, 0.5),
        MixtureMasking([RandomMasking(16, 0.5), RandomMasking(12, 0.5)]),
    ],
)
@pytest.mark.parametrize("method", [SimMIM, MAE])
def test_unit__of_other_maskings(method: type[Any], masking: Any) -> None:
    with pytest.raises(ValueError, match=r"multiple of 8 x 8, got 12 x 12.*=8\."):
        method(VIT, masking=masking, **SMALL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (SWIN, {"img_size": 128}),
        (SWIN, {"img_size": 100}),
        (SWIN, {"depth": 2}),  # which a Swin does not take either
        ("swin_base_patch4_window12_384.ms_in22k", {"img_size": 100}),
        ("swinv2_tiny_window8_256", {"img_size": 100, "in_chans": 1}),
    ],
)
@pytest.mark.parametrize("method", [MAE, MaskTokenMAE])
def test_mae__on_a_swin_is_impossible_first_of_all(
    method: type[MAE], name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(name)} needs all of.*SimMIM"):
        method(name, **options)


def test_mae__on_a_swin_by_hand() -> None:
    vit = timm.create_model(SWIN, img_size=100, always_partition=True)
    with pytest.raises(ValueError, match=r"SwinTransformer needs all of them"):
        MAE(vit)
    with pytest.raises(ValueError, match=r"no model 'swim_tiny.*Did you mean"):
        MAE("swim_tiny_patch4_window7_224")


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("method", [SimMIM, MAE])
def test_lightlys_encoder_is_taken(method: type[Any], pool: str) -> None:
    torch.manual_seed(0)
    vit: Any = timm.create_model(VIT, global_pool=pool, **SMALL)
    wrapper = MaskedVisionTransformerTIMM(vit)
    weights = {name: value.clone() for name, value in vit.state_dict().items()}
    options = DECODER if method is MAE else {}
    model = method(wrapper, mask_patch_size=8, **options)
    assert model.encoder.vit is vit
    for name, value in model.encoder.vit.state_dict().items():
        assert torch.equal(value, weights[name]), name
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    assert not [
        n for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    ]


@pytest.mark.parametrize("method", [SimMIM, MAE])
def test_torchvisions_encoder_is_refused(method: type[Any]) -> None:
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64)
    for module, name in (
        (vit, "torchvision's VisionTransformer"),
        (
            MaskedVisionTransformerTorchvision(vit),
            "lightly's MaskedVisionTransformerTorchvision",
        ),
    ):
        with pytest.raises(ValueError, match=f"{name} is.*Take timm's, such as 'vit_b"):
            method(module)


@pytest.mark.parametrize("method", [MAE, CrossMAE, MaskTokenMAE])
def test_decoder__that_cannot_decode_masked_tokens(method: type[MAE]) -> None:
    model = method(VIT, **SMALL, **DECODER)
    before = model.decoder
    for decoder in (
        MaskedVisionTransformerDecoderTIMM(16, 32, 1, 2),
        nn.Linear(32, 32),
        None,
    ):
        with pytest.raises(ValueError, match=r"decoder_depth.*decoders\.MAEDecoder"):
            model.decoder = decoder  # type: ignore[assignment]
    assert model.decoder is before


def test_decoder__of_ones_own() -> None:
    model = MAE(VIT, **SMALL, **DECODER)
    model.decoder = MAEDecoder((4, 4), 32, depth=3, num_heads=4)
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    block: Any = model.decoder.blocks[2]
    assert block.mlp.fc1.weight.grad is not None


BY_HAND = timm.create_model(VIT, img_size=32, depth=1, embed_dim=32, num_heads=2)


@pytest.mark.parametrize(
    ("method", "options", "meant"),
    [
        (SimMIM, {"maskin": RandomMasking(8, 0.5)}, "masking"),
        (SimMIM, {"mask": BlockMasking(8, 0.5)}, "masking"),
        (SimMIM, {"targt": Pixels()}, "target"),
        (SimMIM, {"loos": L1()}, "loss"),
        (SimMIM, {"haed": lambda *arguments: nn.Linear(1, 1)}, "head"),
        (SimMIM, {"mask_ration": 0.5}, "mask_ratio"),
        (SimMIM, {"regions": "all"}, "region"),
        (MAE, {"decoder_dept": 1}, "decoder_depth"),
        (MAE, {"masking_": RandomMasking}, "masking"),
        (CrossMAE, {"predict_ration": 0.25}, "predict_ratio"),
        (MaskTokenMAE, {"losses": "l1", "depth": 2}, "loss"),
    ],
)
def test_misspelled_argument(
    method: type[Any], options: dict[str, Any], meant: str
) -> None:
    (name, *_) = options
    message = (
        rf"Neither {method.__name__} nor timm takes '{name}'\. Did you mean {meant}"
    )
    with pytest.raises(ValueError, match=message):
        method(VIT, **(SMALL | options))
    if "depth" not in options:
        with pytest.raises(ValueError, match=message):
            method(BY_HAND, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # What is none of the method's words is left to timm and to what it says.
        ({"depht": 2}, "timm cannot build .*'depht'"),
        ({"norm_layer": nn.LayerNorm}, "cannot be recorded.*timm.create_model"),
        ({"num_heads": 5}, "divisible"),
        ({"drop_rte": 0.1}, "timm cannot build .*'drop_rte'"),
        # A part under no name that is near is no option of timm's.
        (
            {"where": RandomMasking(8, 0.5)},
            r"takes 'where'\. \w+ takes encoder, img_si",
        ),
    ],
)
@pytest.mark.parametrize("method", [SimMIM, MAE])
def test_misspelled_option_of_the_encoder(
    method: type[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        method(VIT, **(SMALL | options))
    # Python 3.13 asks so itself, in quotes, and means timm's words.
    assert not re.search(r"Did you mean \w", str(error.value))


def test_misspelled_argument__of_ones_own_method() -> None:
    class Mine(SimMIM):
        def __init__(self, encoder: str, strength: int = 1, **options: Any) -> None:
            super().__init__(encoder, **options)

    with pytest.raises(ValueError, match=r"Neither Mine nor .*Did you mean strength\?"):
        Mine(VIT, strenght=2, **SMALL)


@pytest.mark.parametrize(
    ("argument", "part", "instance"),
    [
        ("masking", RandomMasking, "RandomMasking(...)"),
        ("masking", MixtureMasking, "MixtureMasking(...)"),
        ("masking", BlockMasking, "BlockMasking(...)"),
        ("target", Pixels, "Pixels(...)"),
        ("target", HOG, "HOG(...)"),
        ("loss", L1, "L1(...)"),
        ("loss", SmoothL1, "SmoothL1(...)"),
        ("head", LinearHead, "LinearHead(...)"),
        ("head", InverseSwinHead, "InverseSwinHead(...)"),
    ],
)
def test_class_where_an_object_is_wanted(
    argument: str, part: type, instance: str
) -> None:
    message = re.escape(f"Make an object of it: {instance}")
    with pytest.raises(ValueError, match=f"^{argument} of SimMIM is .*{message}"):
        SimMIM(VIT, **(SMALL | {argument: part}))
    if argument != "head":
        with pytest.raises(ValueError, match=message):
            MAE(VIT, **(SMALL | {argument: part}))


def test_class_in_a_mixture() -> None:
    mistaken: Any = ([RandomMasking], [BlockMasking(8, 0.5), BlockMasking])
    for maskings in mistaken:
        with pytest.raises(ValueError, match=r"each a Masking, .* Make an object of"):
            MixtureMasking(maskings)


def plain(prediction: Any, target: Any) -> Any:
    return (prediction - target).abs().mean()


class Keyword:
    def __call__(self, prediction: Any, target: Any, *, reduce: str) -> Any: ...


@pytest.mark.parametrize(
    "loss", [plain, Keyword(), nn.L1Loss(), nn.MSELoss(reduction="none"), min]
)
def test_loss_without_reduction__fails_when_it_is_made(loss: Any) -> None:
    methods: list[type[Any]] = [SimMIM, MAE]
    for method in methods:
        if loss is min:  # does not tell what it takes
            method(VIT, **SMALL, loss=loss)
            continue
        with pytest.raises(
            ValueError, match=r"reduction=\.\.\..*Derive from lightly_m"
        ):
            method(VIT, **SMALL, loss=loss)


@pytest.mark.parametrize(
    "loss",
    [
        functional.l1_loss,
        functional.huber_loss,
        lambda a, b, reduction: functional.mse_loss(a, b, reduction=reduction),
        lambda *both, **options: functional.mse_loss(*both, **options),
    ],
)
def test_loss_of_ones_own(loss: Any) -> None:
    SimMIM(VIT, **SMALL, loss=loss)(torch.randn(2, 3, 32, 32)).loss.backward()
