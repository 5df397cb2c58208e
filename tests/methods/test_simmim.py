from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from lightly_mim.config import to_config
from lightly_mim.encoders import masked_encoder
from lightly_mim.losses import L1, L2, Loss, SmoothL1
from lightly_mim.masking import Mask, RandomMasking
from lightly_mim.methods import SimMIM
from lightly_mim.methods.base import MaskedImageModel
from lightly_mim.optim import Recipe, build_optimizer
from lightly_mim.patches import gather_patches
from lightly_mim.targets import LocallyNormalizedPixels, Pixels, Target

Size = tuple[int, int]

VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 64,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
SWIN: dict[str, Any] = {
    "encoder": "swin_tiny_patch4_window7_224",
    "img_size": 128,
    "window_size": 2,
    "embed_dim": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 2, 2),
}
BEIT: dict[str, Any] = {
    **VIT,
    "encoder": "beit_base_patch16_224",
    "use_shared_rel_pos_bias": True,
    "use_rel_pos_bias": False,
    "use_abs_pos_emb": False,
    "use_fc_norm": False,
    "init_values": 0.1,
}
PAPER: dict[str, Any] = {"target": Pixels(), "masking": RandomMasking(32, 0.6)}


def images(size: tuple[int, int] = (64, 64), channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, *size, generator=generator)


# Parity with Hugging Face.


def hf_vit(model: SimMIM) -> nn.Module:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        patch_size=16,
        encoder_stride=16,
        layer_norm_eps=1e-6,
    )
    return ViTForMaskedImageModeling(config)


def hf_swin(model: SimMIM) -> nn.Module:
    config = SwinConfig(
        image_size=128,
        embed_dim=16,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 2, 2],
        window_size=2,
        encoder_stride=32,
        drop_path_rate=0.0,
    )
    return SwinForMaskedImageModeling(config)


RENAMED = [
    (r"decoder\.0", "head"),
    (r"(vit|swin)\.embeddings\.mask_token", "encoder.mask_token"),
    (r"(vit|swin)\.", "encoder.vit."),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.norm", "patch_embed.norm"),
    (r"vit\.encoder\.layers", "vit.layers"),
    (r"vit\.layernorm", "vit.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.relative_position_bias\.", "attn."),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.[qkv]_proj", "attn.qkv"),
]


def in_hf_layout(name: str, tensors: Mapping[str, Tensor], stride: int) -> Tensor:
    """Returns one of our tensors as Hugging Face's parameter of this name."""
    ours = name
    for pattern, replacement in RENAMED:
        ours = re.sub(pattern, replacement, ours)
    if name.startswith("vit."):
        ours = ours.replace("vit.layers", "vit.blocks")
    # timm merges patches before a stage, Hugging Face after one.
    ours = re.sub(
        r"layers\.(\d)\.downsample",
        lambda match: f"layers.{int(match[1]) + 1}.downsample",
        ours,
    )
    tensor = tensors[ours]
    if match := re.search(r"\.([qkv])_proj", name):
        return tensor.chunk(3)["qkv".index(match[1])]
    if ours.startswith("head"):
        # (height, width, channels) to (channels, height, width) of a cell.
        cell = tensor.view(stride, stride, 3, -1).permute(2, 0, 1, 3)
        cell = cell.reshape(len(tensor), -1)
        return cell[:, :, None, None] if name.endswith("weight") else cell[:, 0]
    return tensor


@pytest.mark.parametrize(("options", "build"), [(VIT, hf_vit), (SWIN, hf_swin)])
def test_loss_and_gradients__equal_hugging_face(
    options: dict[str, Any], build: Any
) -> None:
    torch.manual_seed(0)
    model = SimMIM(**options, **PAPER, init="timm").eval()
    # Biases and scales begin at 0 and 1, tables and tokens near 0: move all of them,
    # so that none can be mapped wrongly without being seen.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    hf = build(model).eval()
    stride = model.encoder.stride[0]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(in_hf_layout(name, weights, stride))

    pixels = images(model.encoder.img_size)
    mask = model.draw_mask(pixels)
    size = model.encoder.img_size[0] // model.encoder.patch_size[0]
    bool_masked_pos = mask.on((size, size)).cells.flatten(1)

    output = model(pixels, mask)
    hf_output = hf(pixel_values=pixels, bool_masked_pos=bool_masked_pos)
    assert output.loss.item() == pytest.approx(hf_output.loss.item(), rel=1e-5)

    output.loss.backward()
    hf_output.loss.backward()
    gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
    assert gradients.keys() == weights.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in hf.named_parameters():
        ours = in_hf_layout(name, gradients, stride)
        assert parameter.grad is not None
        assert (ours - parameter.grad).abs().max() <= 1e-5 * largest, name

    # And the picture: Hugging Face paints every cell, ours the masked ones.
    pixel_mask = mask.pixels(model.encoder.img_size)
    expected = torch.where(pixel_mask, hf_output.reconstruction, pixels)
    torch.testing.assert_close(
        model.reconstruct(pixels, mask), expected, rtol=1e-4, atol=1e-5
    )


# The formula, once more and slowly.


LOSSES: dict[str, tuple[Loss, Callable[[float], float]]] = {
    "l1": (L1(), abs),
    "l2": (L2(), lambda d: d**2),
    "smooth_l1": (
        SmoothL1(),
        lambda d: d**2 / 2 if abs(d) < 1 else abs(d) - 0.5,
    ),
    "smooth_l1, beta": (
        SmoothL1(0.2),
        lambda d: d**2 / 0.4 if abs(d) < 0.2 else abs(d) - 0.1,
    ),
}


def counting_pixels(model: SimMIM, pixels: Tensor, mask: Tensor) -> list[Any]:
    """Says which pixels [b][y][x] the loss sees."""
    height, width = pixels.shape[-2:]
    mh, mw = height // mask.shape[1], width // mask.shape[2]
    return [
        [
            [
                {
                    "masked": rows[y // mh][x // mw],
                    "all": True,
                    "visible": not rows[y // mh][x // mw],
                }[model.region]
                for x in range(width)
            ]
            for y in range(height)
        ]
        for rows in mask.tolist()
    ]


@torch.no_grad()
def plain_loss(
    model: SimMIM, pixels: Tensor, mask: Tensor, measure: Callable[[float], float]
) -> float:
    """A head on every cell, and a mask of pixels that picks what counts."""
    encoder = model.encoder
    (p, q), channels = encoder.stride, encoder.in_chans
    h, w = pixels.shape[2] // p, pixels.shape[3] // q
    tokens = encoder.encode_masked(pixels, mask)[:, -h * w :]
    cells = model.head(tokens, (h, w)).view(len(pixels), h, w, p, q, channels)
    painted = cells.permute(0, 5, 1, 3, 2, 4).reshape(pixels.shape).tolist()
    counts = counting_pixels(model, pixels, mask)
    total, count = 0.0, 0
    for b, image in enumerate(pixels.tolist()):
        for c, channel in enumerate(image):
            for y, row in enumerate(channel):
                for x, pixel in enumerate(row):
                    if counts[b][y][x]:
                        total += measure(painted[b][c][y][x] - pixel)
                        count += 1
    return total / count


REGIONS = ["masked", "all", "visible"]
GEOMETRIES = [
    ({**VIT, "img_size": (32, 64)}, (32, 64), 3, 16),
    ({**VIT, "img_size": (64, 32)}, (64, 32), 1, 32),
    # Mask patches smaller than a cell, so that cells are masked in part.
    ({**SWIN, "img_size": 64, "depths": (1, 1, 1, 1)}, (64, 64), 2, 16),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(("options", "size", "channels", "mask_patch_size"), GEOMETRIES)
def test_loss__equals_plain_loops(
    options: dict[str, Any],
    size: tuple[int, int],
    channels: int,
    mask_patch_size: int,
    region: Any,
    loss: str,
) -> None:
    torch.manual_seed(0)
    part, formula = LOSSES[loss]
    model = SimMIM(
        **options,
        in_chans=channels,
        mask_patch_size=mask_patch_size,
        mask_ratio=0.4,
        target=Pixels(),
        region=region,
        loss=part,
    ).eval()
    pixels = images(size, channels)
    mask = model.draw_mask(pixels)
    expected = torch.tensor(plain_loss(model, pixels, mask.cells, formula))
    torch.testing.assert_close(model(pixels, mask).loss, expected)


class MeanColors(Target):
    """Four values for a cell, of which none is a pixel: its mean twice, and zeros."""

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        return 4

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        mean = gather_patches(images, index, cell_size).mean(dim=-1, keepdim=True)
        return torch.cat([mean, mean, 0 * mean, 0 * mean], dim=-1)


class Brightness(Target):
    """Two choices for a cell: dark, medium or bright, and the other way round."""

    num_classes = 3

    def width(self, cell_size: tuple[int, int], in_chans: int) -> int:
        return 2

    def __call__(
        self, images: Tensor, index: Tensor, cell_size: tuple[int, int]
    ) -> Tensor:
        mean = gather_patches(images, index, cell_size).mean(dim=-1, keepdim=True)
        levels = (mean > -0.01).long() + (mean > 0.01).long()
        return torch.cat([levels, 2 - levels], dim=-1)


def plain_cell_loss(model: SimMIM, pixels: Tensor, mask: Tensor) -> Tensor:
    """The loss of targets above, where a cell counts by the share of its pixels."""
    head: Any = model.head
    (p, q), prefix = model.encoder.stride, model.encoder.num_prefix_tokens
    h, w = pixels.shape[2] // p, pixels.shape[3] // q
    tokens = model.encoder.encode_masked(pixels, mask)
    counts = counting_pixels(model, pixels, mask)
    total, weights = torch.zeros(()), 0.0
    for b in range(len(pixels)):
        for i in range(h):
            for j in range(w):
                rows, columns = slice(p * i, p * i + p), slice(q * j, q * j + q)
                mean = pixels[b, :, rows, columns].mean()
                share = sum(sum(row[columns]) for row in counts[b][rows]) / (p * q)
                token = tokens[b, prefix + i * w + j]
                values = functional.linear(token, head.weight, head.bias)
                if isinstance(model.target, MeanColors):
                    wanted = torch.stack([mean, mean, 0 * mean, 0 * mean])
                    losses = (values - wanted).abs()
                else:
                    level = int(mean > -0.01) + int(mean > 0.01)
                    losses = torch.stack(
                        [
                            values[:3].logsumexp(0) - values[level],
                            values[3:].logsumexp(0) - values[3 + 2 - level],
                        ]
                    )
                total = total + share * losses.sum()
                weights += share * len(losses)
    return total / weights


@pytest.mark.parametrize("target", [MeanColors(), Brightness()])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize(("options", "size", "channels", "mask_patch_size"), GEOMETRIES)
def test_loss__of_cells_equals_plain_loops(
    options: dict[str, Any],
    size: tuple[int, int],
    channels: int,
    mask_patch_size: int,
    region: Any,
    target: Target,
) -> None:
    torch.manual_seed(0)
    model = SimMIM(
        **options,
        in_chans=channels,
        masking=RandomMasking(mask_patch_size, 0.4),
        region=region,
        target=target,
    ).eval()
    # Far from zero, so that the logits say something.
    assert isinstance(model.head, nn.Linear)
    model.head.weight.data *= 20
    pixels = images(size, channels)
    mask = model.draw_mask(pixels)
    expected = plain_cell_loss(model, pixels, mask.cells)
    torch.testing.assert_close(model(pixels, mask).loss, expected)


@pytest.mark.parametrize("options", [VIT, SWIN, BEIT])
def test_output(options: dict[str, Any]) -> None:
    model = SimMIM(**options, **PAPER)
    pixels = images(model.encoder.img_size)
    output = model(pixels)
    stride = model.encoder.stride[0]
    cells = pixels.shape[2] // stride
    num_masked = RandomMasking(32, 0.6).count(
        pixels.shape[2] // 32, cells * stride // 32
    )
    num_cells = num_masked * (32 // stride) ** 2
    assert output.prediction.shape == (2, num_cells, stride**2 * 3)
    assert output.target.shape == output.prediction.shape
    assert output.index.shape == (2, num_cells)
    assert output.weight is None
    grid = output.mask.on((cells, cells)).cells.flatten(1)
    picked = torch.zeros_like(grid).scatter(1, output.index, True)
    assert torch.equal(picked, grid)


@pytest.mark.parametrize("options", [VIT, SWIN, BEIT])
def test_forward__leaves_no_parameter_without_gradient(options: dict[str, Any]) -> None:
    model = SimMIM(**options)
    model(images(model.encoder.img_size)).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    # Positions that are fixed are not trained.
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == (["encoder.vit.pos_embed"] if options is VIT else [])
    assert unused == fixed
    model = SimMIM(**options, **PAPER, init="timm")
    model(images(model.encoder.img_size)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_forward__does_not_see_the_masked_pixels() -> None:
    model = SimMIM(**VIT).eval()
    pixels = images()
    mask = model.draw_mask(pixels)
    hidden = torch.where(mask.pixels((64, 64)), 100.0, pixels)
    prediction = model(pixels, mask).prediction
    assert torch.equal(model(hidden, mask).prediction, prediction)


def test_forward__a_bool_tensor_gives_the_same() -> None:
    model = SimMIM(**VIT).eval()
    pixels = images()
    mask = model.draw_mask(pixels)
    expected = model(pixels, mask)
    output = model(pixels, mask.cells)
    assert torch.equal(output.loss, expected.loss)
    assert isinstance(output.mask, Mask)
    assert output.mask.count == expected.mask.count == mask.count
    picture = model.reconstruct(pixels, mask.cells)
    assert torch.equal(picture, model.reconstruct(pixels, mask))


def test_forward__takes_a_mask_of_another_ratio() -> None:
    model = SimMIM(**VIT)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1, 2] = True
    output = model(images(), mask)
    assert output.index.tolist() == [[6], [6]]


def test_norm_target__is_what_the_loss_sees() -> None:
    model = SimMIM(**VIT, target=LocallyNormalizedPixels(47)).eval()
    pixels = images() * 3 + 1
    output = model(pixels)
    assert output.target.mean().abs() < 0.1
    assert output.target.std() == pytest.approx(1, abs=0.1)
    # Predicting the target exactly gives back the image.
    restored = model.target.to_pixels(output.target, pixels, output.index, (16, 16))
    expected = Pixels()(pixels, output.index, (16, 16))
    torch.testing.assert_close(restored, expected)


def test_encoder__may_be_a_module() -> None:
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    model = SimMIM(vit)
    assert model(images()).loss.isfinite()
    encoder = masked_encoder("vit_tiny_patch16_224", img_size=64, depth=1)
    assert SimMIM(encoder).encoder is encoder


def test_compile__gives_the_same_loss() -> None:
    torch.manual_seed(0)
    model = SimMIM(**{**VIT, "depth": 1}).eval()
    pixels = images()
    mask = model.draw_mask(pixels)
    expected = model(pixels, mask).loss
    keys = list(model.state_dict())
    model.compile(backend="aot_eager", fullgraph=True)
    loss = model(pixels, mask).loss
    torch.testing.assert_close(loss, expected)
    assert list(model.state_dict()) == keys


def test_init_args__rebuild_the_method() -> None:
    model = SimMIM(**SWIN, mask_ratio=0.5)
    assert model.init_args["window_size"] == 2
    again = SimMIM(**model.init_args)
    assert again.init_args == model.init_args
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_clones__are_equal(clone: Any) -> None:
    model = SimMIM(**VIT).eval()
    other = clone(model)
    mask = model.draw_mask(images())
    assert to_config(other) == to_config(model)
    assert torch.equal(other(images(), mask).loss, model(images(), mask).loss)


def test_transform__is_the_papers() -> None:
    transform = SimMIM(**{**VIT, "img_size": (32, 64)}).transform(IMAGENET_NORMALIZE)
    (view,) = transform(torch.zeros(3, 80, 90, dtype=torch.uint8))
    assert view.shape == (3, 32, 64)
    assert transform.min_scale == 0.67


@pytest.mark.parametrize(
    ("options", "unit", "window", "init"),
    [
        (VIT, 16, 15, "mae"),
        (BEIT, 16, 15, "mae"),
        (VIT | {"img_size": 192}, 32, 47, "mae"),
        (VIT | {"img_size": 224}, 32, 55, "mae"),
        (VIT | {"img_size": 32, "patch_size": 4}, 4, 7, "mae"),
        (SWIN, 32, 31, "timm"),  # a cell
        (SWIN | {"img_size": 192, "window_size": 6}, 32, 47, "timm"),
    ],
)
def test_defaults__are_in_proportion_to_the_images(
    options: dict[str, Any], unit: int, window: int, init: str
) -> None:
    model = SimMIM(**options)
    assert to_config(model.masking) == to_config(RandomMasking((unit, unit), 0.6))
    assert to_config(model.target) == to_config(LocallyNormalizedPixels(window))
    assert model.init_args["init"] == init
    again = SimMIM(**model.init_args)
    assert to_config(again) == to_config(model)


# Recipes.


def test_recipes__are_the_published_ones() -> None:
    assert {
        name: (
            recipe.epochs,
            recipe.lr * recipe.batch_size / recipe.lr_batch_size,
            recipe.drop_path,
            recipe.schedule,
        )
        for name, recipe in SimMIM.recipes.items()
    } == {
        "swin_base_100ep": (100, 8e-4, 0.0, "cosine"),
        "swin_base_800ep": (800, 4e-4, 0.0, "step"),
        "swin_large_800ep": (800, 4e-4, 0.0, "step"),
        "vit_base_800ep": (800, 4e-4, 0.1, "step"),
        "swinv2_base_800ep": (800, 4e-4, 0.1, "step"),
    }
    for recipe in SimMIM.recipes.values():
        assert recipe.clip_grad == 5.0
        assert recipe.betas == (0.9, 0.999)
        assert recipe.weight_decay == 0.05
        assert recipe.min_scale == 0.67


@pytest.mark.parametrize("name", SimMIM.recipes)
def test_from_recipe__builds_the_encoder(name: str) -> None:
    recipe = SimMIM.recipes[name]
    model = SimMIM.from_recipe(name, **SMALL[name.split("_")[0]])
    assert model.encoder.img_size == (recipe.img_size, recipe.img_size)
    assert model.encoder.name == recipe.encoder
    assert model.init_args["init"] == recipe.encoder_options["init"] == "simmim"
    assert to_config(model.target) == to_config(recipe.method_options["target"])
    assert to_config(model.masking) == to_config(RandomMasking(32, 0.6))
    for key, value in recipe.encoder_options.items():
        assert key == "init" or model.encoder.options[key] == value


SMALL: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "swinv2": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "vit": {"embed_dim": 16, "depth": 1, "num_heads": 1},
}


def test_from_recipe__refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="no recipe 'vit'.*swin_base_100ep"):
        SimMIM.from_recipe("vit")


def test_no_weight_decay__names_exist() -> None:
    for options in (VIT, SWIN, BEIT):
        model = SimMIM(**options)
        names = {name for name, _ in model.named_parameters()}
        assert model.no_weight_decay() <= names
        assert "encoder.mask_token" in model.no_weight_decay()


@pytest.mark.parametrize("name", SimMIM.recipes)
def test_recipes__decay_what_the_reference_decays(name: str) -> None:
    """What its code leaves out are vectors, biases, and these by their exact names."""
    left_out = {"encoder.mask_token"}
    if name.startswith("vit"):
        left_out = {"encoder.vit.pos_embed", "encoder.vit.cls_token"}
    recipe = SimMIM.recipe(name)
    model = SimMIM.from_recipe(name, **SMALL[name.split("_")[0]])
    for settings, published in ((recipe, True), (plain(recipe), False)):
        exempt = settings.exempt(model.no_weight_decay())
        optimizer, _ = build_optimizer(model, settings, 2048, 1, 100, exempt)
        decay = {
            id(parameter): group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        special = 0
        for key, parameter in model.named_parameters():
            expected = parameter.ndim > 1 and key not in left_out
            if any(word in key for word in ("bias_table", "cpb_mlp", "logit_scale")):
                expected &= published
                special += 1
            if key == "encoder.mask_token":
                expected = published and name.startswith("vit")
            assert decay[id(parameter)] == (0.05 if expected else 0), key
        assert special > 0


def plain(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, weight_decay_on=())


# Bad input.


def test_constructor__says_what_replaced_an_argument() -> None:
    for value in (47, None):
        with pytest.raises(ValueError, match=r"LocallyNormalizedPixels\(47\)"):
            SimMIM(**VIT, norm_target_window=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l3"}, r"^loss of SimMIM is .*a Loss, got loss='l3'"),
        ({"region": "half"}, "'masked', 'all', 'visible', got region='half'"),
        ({"mask_ratio": 1.5}, "between 0 and 1"),
        ({"mask_patch_size": 0}, "mask_patch_size"),
        ({"encoder": "vit_tinny_patch16_224"}, "vit_tinny_patch16_224"),
    ],
)
def test_constructor__refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimMIM(**(VIT | options))


def test_forward__refuses() -> None:
    model = SimMIM(**VIT)
    with pytest.raises(ValueError, match="channel"):
        model(images(channels=1))
    with pytest.raises(ValueError, match="96"):
        model(images((96, 96)))
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        model(images(), torch.eye(4, dtype=torch.bool)[None])
    with pytest.raises(ValueError, match="3 x 3 cells"):
        model(images(), torch.eye(3, dtype=torch.bool).expand(2, -1, -1))
    with pytest.raises(ValueError, match="8 x 8 cells cannot be laid over"):
        model(images(), torch.eye(8, dtype=torch.bool).expand(2, -1, -1))
    odd = SimMIM(**{**VIT, "img_size": 48}, mask_patch_size=32)
    with pytest.raises(ValueError, match="48 x 48 pixels.*mask_patch_size 32 x 32"):
        odd(images((48, 48)))


def test_base_class__records_arguments_of_any_method() -> None:
    class Other(MaskedImageModel):
        def __init__(self, a: int, b: int = 2, **more: int) -> None:
            super().__init__()

    assert Other(1, c=3).init_args == {"a": 1, "b": 2, "c": 3}
