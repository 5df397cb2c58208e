from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightly.models.modules import (
    MaskedVisionTransformerTIMM,
)
from lightly.transforms.utils import IMAGENET_NORMALIZE
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import (
    build_2d_sinusoidal_position_embedding,
)

from lightly_mim.checkpoints import read_encoder
from lightly_mim.encoders import masked_encoder
from lightly_mim.masking import BlockMasking, GridMasking, Mask, RandomMasking
from lightly_mim.methods import MAE, CrossMAE, MaskTokenMAE
from lightly_mim.optim import build_optimizer
from lightly_mim.patches import sincos_positions
from lightly_mim.pretraining import pretrain
from lightly_mim.targets import PatchNormalizedPixels, Pixels, Target

from .mae_models import (
    BEIT,
    DECODER,
    LAYOUTS,
    VIT,
    assert_gradients_equal,
    build,
    gradients,
    images,
)

# Parity with Hugging Face.

RENAMED = [
    (r"vit\.embeddings\.cls_token", "encoder.vit.cls_token"),
    (r"vit\.embeddings\.position_embeddings", "encoder.vit.pos_embed"),
    (r"vit\.embeddings\.patch_embeddings\.projection", "encoder.vit.patch_embed.proj"),
    (r"vit\.layers", "encoder.vit.blocks"),
    (r"vit\.layernorm", "encoder.vit.norm"),
    (r"decoder\.decoder_embed", "decoder_embed"),
    (r"decoder\.decoder_pos_embed", "decoder.pos_embed"),
    (r"decoder\.decoder_layers", "decoder.blocks"),
    (r"decoder\.decoder_norm", "decoder.norm"),
    (r"decoder\.decoder_pred", "head"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.[qkv]_proj", "attn.qkv"),
]


def in_hf_layout(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns one of our tensors as Hugging Face's parameter of this name."""
    ours = name
    for pattern, replacement in RENAMED:
        ours = re.sub(rf"^{pattern}|(?<=\.){pattern}", replacement, ours)
    tensor = tensors[ours]
    if match := re.search(r"\.([qkv])_proj", name):
        return tensor.chunk(3)["qkv".index(match[1])]
    return tensor


@pytest.mark.parametrize("target", [PatchNormalizedPixels(), Pixels()])
def test_loss_and_gradients__equal_hugging_face(target: Target) -> None:
    model = build(VIT, target=target)
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=96,
        image_size=64,
        patch_size=16,
        layer_norm_eps=1e-6,
        norm_pix_loss=isinstance(target, PatchNormalizedPixels),
    )
    hf = ViTMAEForPreTraining(config).eval()
    # Without a checkpoint its positions are 0; those of its published weights are
    # these, columns first.
    for width, positions in (
        (32, model.encoder.vit.pos_embed),
        (24, model.decoder.pos_embed),
    ):
        rows_first = build_2d_sinusoidal_position_embedding(4, 4, width, cls_token=True)
        torch.testing.assert_close(positions[0], rows_first.roll(width // 2, dims=1))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(in_hf_layout(name, weights))

    pixels = images(model)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    expected = hf(pixels, noise=noise)
    mask = expected.mask.bool().view(2, 4, 4)
    assert model.draw_mask(pixels).count == mask[0].sum() == 12
    output = model(pixels, mask)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    logits = expected.logits[expected.mask.bool()].view(2, 12, -1)
    torch.testing.assert_close(output.prediction, logits, rtol=1e-4, atol=1e-5)

    output.loss.backward()
    expected.loss.backward()
    ours = gradients(model)
    trained = {name for name, p in weights.items() if p.requires_grad}
    assert ours.keys() == trained
    theirs = gradients(hf)
    assert_gradients_equal({name: in_hf_layout(name, ours) for name in theirs}, theirs)
    # Nothing of ours was left out: all parts of all our gradients were compared.
    numbers = [sum(g.numel() for g in each.values()) for each in (ours, theirs)]
    assert numbers[0] == numbers[1]


# The method once more, slowly and over the whole sequence.


def plain_loss(model: MAE, pixels: Tensor, mask: Mask) -> Tensor:
    """Embeds all, drops, encodes image by image, fills in and decodes in raster order.

    The target and the loss are loops over patches.
    """
    encoder: Any = model.encoder
    decoder = model.decoder
    (h, w), (p, q) = encoder.grid, encoder.patch_size
    prefix = encoder.num_prefix_tokens
    cells = mask.on((h, w)).cells.flatten(1).tolist()
    losses = []
    for image, is_masked in zip(pixels, cells, strict=True):
        masked = [i for i in range(h * w) if is_masked[i]]
        visible = [i for i in range(h * w) if not is_masked[i]]
        keep = [*range(prefix), *(prefix + i for i in visible)]
        latent = encoder.encode(image[None], idx_keep=torch.tensor([keep]))[0]

        sequence = [decoder.mask_token[0, 0]] * (prefix + h * w)
        for place, token in zip(keep, latent, strict=True):
            sequence[place] = model.decoder_embed(token)
        positions = sincos_positions((h, w), decoder.pos_embed.shape[-1], prefix)
        x = torch.stack(sequence)[None] + positions
        for block in decoder.blocks:
            x = block(x)
        prediction = model.head(decoder.norm(x))[0]

        for i in masked:
            y, x0 = i // w * p, i % w * q
            patch = image[:, y : y + p, x0 : x0 + q].permute(1, 2, 0).flatten()
            if type(model.target).__name__ == "PatchNormalizedPixels":
                variance = (patch - patch.mean()).square().sum() / (len(patch) - 1)
                patch = (patch - patch.mean()) / (variance + 1e-6).sqrt()
            losses.append((prediction[prefix + i] - patch).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("target", [PatchNormalizedPixels(), Pixels()])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients__equal_plain_loops(layout: str, target: Target) -> None:
    model = build(LAYOUTS[layout], target=target)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    expected = plain_loss(model, pixels, mask)
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    output = model(pixels, mask)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    output.loss.backward()
    assert_gradients_equal(gradients(model), expected_gradients)


# What comes out.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output(layout: str) -> None:
    options = LAYOUTS[layout]
    model = MAE(**options)
    pixels = images(model)
    output = model(pixels)
    h, w = model.encoder.grid
    num_cells = math.ceil(h * w * options.get("mask_ratio", 0.75))
    values = math.prod(model.encoder.patch_size) * model.encoder.in_chans
    assert output.prediction.shape == output.target.shape == (2, num_cells, values)
    assert output.weight is None
    grid = output.mask.on((h, w)).cells.flatten(1)
    picked = torch.zeros_like(grid).scatter(1, output.index, True)
    assert torch.equal(picked, grid)
    assert (output.index.diff() > 0).all()

    output.loss.backward()
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert unused == []


def test_forward__does_not_see_the_masked_pixels() -> None:
    model = build(VIT)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    changed = torch.where(mask.pixels((64, 64)), 100.0, pixels)
    prediction = model(pixels, mask).prediction
    assert torch.equal(model(changed, mask).prediction, prediction)
    other = model(torch.where(changed == 100, pixels, -pixels), mask).prediction
    assert (other - prediction).abs().max() > 1e-3


def test_forward__takes_bool_tensors_and_other_ratios() -> None:
    model = build(VIT)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    expected = model(pixels, mask)
    output = model(pixels, mask.cells)
    assert torch.equal(output.loss, expected.loss)
    assert output.mask.count == expected.mask.count == 12
    picture = model.reconstruct(pixels, mask.cells)
    assert torch.equal(picture, model.reconstruct(pixels, mask))
    single = torch.zeros(2, 4, 4, dtype=torch.bool)
    single[:, 1, 2] = True
    assert model(pixels, single).index.tolist() == [[6], [6]]


def test_forward__takes_other_sizes_if_the_encoder_does() -> None:
    model = build(VIT, dynamic_img_size=True)
    pixels = torch.randn(2, 3, 96, 64)
    output = model(pixels)
    assert output.prediction.shape == (2, 18, 768)
    assert output.loss.isfinite()
    assert model.reconstruct(pixels).shape == pixels.shape


def test_reconstruct__undoes_the_normalisation_and_pastes() -> None:
    model = build(VIT)
    pixels = images(model)
    mask = model.draw_mask(pixels)
    output = model(pixels, mask)
    picture = model.reconstruct(pixels, mask)
    for b in range(2):
        for y in range(4):
            for x in range(4):
                rows, columns = slice(16 * y, 16 * y + 16), slice(16 * x, 16 * x + 16)
                place = (b, slice(None), rows, columns)
                patch = pixels[place]
                if mask.cells[b, y, x]:
                    row = output.index[b].tolist().index(4 * y + x)
                    values = output.prediction[b, row].view(16, 16, 3).permute(2, 0, 1)
                    patch = values * (patch.var() + 1e-6).sqrt() + patch.mean()
                torch.testing.assert_close(picture[place], patch)


def test_reconstruct__raw_pixels_are_the_prediction() -> None:
    model = build(VIT, target=Pixels())
    pixels = images(model)
    mask = model.draw_mask(pixels)
    picture = model.reconstruct(pixels, mask)
    inside = mask.pixels((64, 64)).expand_as(pixels)
    # What lies under the mask has no influence.
    other = model.reconstruct(torch.where(inside, 7.0, pixels), mask)
    assert torch.equal(other, picture)
    assert torch.equal(picture[~inside], pixels[~inside])


# Cost.


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75])
def test_encoder_flops__are_those_of_the_visible_tokens(mask_ratio: float) -> None:
    model = build(VIT, patch_size=8, mask_ratio=mask_ratio)
    pixels = images(model)
    # The counter knows plain matrix products on every device.
    model.encoder.choose_attention(pixels.device, bf16=True)
    mask = model.draw_mask(pixels)
    with FlopCounterMode(display=False) as counter:
        model.encoder.encode_visible(pixels, mask)
    dim, depth, visible = 32, 2, int(64 * (1 - mask_ratio))
    tokens = 1 + visible
    embed = 2 * visible * 8 * 8 * 3 * dim
    linear = 2 * tokens * 12 * dim**2  # qkv 3, projection 1, MLP 8
    attention = 2 * 2 * tokens**2 * dim
    expected = len(pixels) * (embed + depth * (linear + attention))
    assert counter.get_total_flops() == expected


# Training.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast__stays_finite_at_the_recipes_rate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MAE(**VIT).train()
    recipe = MAE.recipe().for_epochs(100)
    pixels = images(model, batch_size=16)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    optimizer, schedule = build_optimizer(
        model, recipe, 4096, 1, 100, model.no_weight_decay(), fused=False
    )
    assert recipe.lr * 4096 / recipe.lr_batch_size == pytest.approx(2.4e-3)
    losses, rates, skipped = [], [], 0
    for _ in range(100):
        with torch.autocast("cpu", dtype):
            loss = model(pixels).loss
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert max(rates) == pytest.approx(2.4e-3, rel=0.01)
    assert skipped <= 2  # while the scale settles
    assert all(map(math.isfinite, losses))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_grad_checkpointing__gives_the_same_gradients() -> None:
    model = build(VIT).train()
    pixels = images(model)
    mask = model.draw_mask(pixels)
    model(pixels, mask).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_grad_checkpointing()
    calls = {"encoder": 0, "decoder": 0}

    def count(part: str) -> Any:
        return lambda *_: calls.update({part: calls[part] + 1})

    model.encoder.vit.blocks[0].register_forward_pre_hook(count("encoder"))
    model.decoder.blocks[0].register_forward_pre_hook(count("decoder"))
    model(pixels, mask).loss.backward()
    assert calls == {"encoder": 2, "decoder": 2}
    assert_gradients_equal(gradients(model), expected)
    model.set_grad_checkpointing(False)
    model(pixels, mask).loss.backward()
    assert calls == {"encoder": 3, "decoder": 3}


def test_choose_attention__reaches_the_decoder() -> None:
    model = MAE(**VIT)
    for bf16 in (True, False):
        model.choose_attention(torch.device("cpu"), bf16)
        for block in (*model.encoder.vit.blocks, *model.decoder.blocks):
            assert block.attn.fused_attn is not bf16


def test_compile__gives_the_same_loss() -> None:
    model = build({**VIT, "depth": 1, "decoder_depth": 1})
    pixels = images(model)
    mask = model.draw_mask(pixels)
    expected = model(pixels, mask).loss
    keys = list(model.state_dict())
    model.compile(backend="aot_eager", fullgraph=True)
    loss = model(pixels, mask).loss
    torch.testing.assert_close(loss, expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("method", "options"),
    [(MAE, {}), (CrossMAE, {"predict_ratio": 0.5}), (MaskTokenMAE, {})],
)
def test_pretrain__one_epoch(
    method: type[MAE], options: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    options = {**VIT, "img_size": 32, "patch_size": 8, "reg_tokens": 1, **options}
    trained = pretrain(
        tmp_path / "run",
        photos,
        lambda: method(**options),
        epochs=1,
        batch_size=8,
        precision="32-true",
        accelerator="cpu",
        devices=1,
        num_workers=0,
        tensorboard=False,
        grad_checkpointing=True,
        reconstruct_every=1,
    )
    assert (tmp_path / "run" / "finished.json").exists()
    assert (tmp_path / "run" / "reconstructions" / "epoch_0001.png").exists()
    encoder = read_encoder(tmp_path / "run")
    assert encoder.spec["pos_embed"] == "sincos"
    weight = encoder.state_dict["blocks.0.attn.qkv.weight"]
    assert torch.equal(weight, trained.encoder.vit.blocks[0].attn.qkv.weight)


# Initialisation.


def test_initialisation__is_the_references() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 192, "num_heads": 3, "decoder_dim": 96, "reg_tokens": 2}
    model = MAE(**{**VIT, **sizes})
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 4 * 4 + 2
    weights = {name: linear.weight for name, linear in linears.items()}
    # The patch embedding counts as a linear layer from 768 pixels.
    weights["patch_embed"] = model.encoder.vit.patch_embed.proj.weight.flatten(1)
    for name, weight in weights.items():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for name, linear in linears.items():
        assert not linear.bias.any(), name
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 4 * 2 + 2
    for norm in norms:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    vit = model.encoder.vit
    for token in (vit.cls_token, vit.reg_token, model.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.25)
    for positions in (vit.pos_embed, model.decoder.pos_embed):
        assert not positions.requires_grad
        expected = sincos_positions((4, 4), positions.shape[-1], 3)
        torch.testing.assert_close(positions[0], expected)


def test_initialisation__equals_lightlys_positions() -> None:
    vit: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    lightlys = MaskedVisionTransformerTIMM(vit)
    ours = MAE("vit_tiny_patch16_224", img_size=64, depth=1, **DECODER)
    positions = ours.encoder.vit.pos_embed
    torch.testing.assert_close(positions, lightlys.vit.pos_embed)


def test_initialisation__leaves_what_comes_from_elsewhere() -> None:
    options: dict[str, Any] = {"img_size": 64, "depth": 1}
    vit = timm.create_model("vit_tiny_patch16_224", **options)
    expected = copy.deepcopy(vit.state_dict())
    for encoder in (vit, masked_encoder(vit)):
        model = MAE(encoder, **DECODER)
        for name, tensor in model.encoder.vit.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    learned = MAE("vit_tiny_patch16_224", pos_embed="learned", **options, **DECODER)
    assert learned.encoder.vit.pos_embed.requires_grad
    assert learned.encoder.vit.pos_embed.std() < 0.1


def test_no_weight_decay__decays_the_tokens() -> None:
    for options in (VIT, BEIT, {**VIT, "reg_tokens": 2}):
        model = MAE(**options)
        exempt = model.no_weight_decay()
        assert exempt <= {name for name, _ in model.named_parameters()}
        assert not any(name.endswith("token") for name in exempt)
    optimizer, _ = build_optimizer(model, MAE.recipe(), 4096, 1, 1, exempt)
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        expected = parameter.requires_grad and parameter.ndim > 1
        assert (id(parameter) in decayed) == expected, name


def test_masking__covers_what_random_blocks_are_short_for() -> None:
    plain = MAE(**VIT).masking
    assert type(plain) is RandomMasking
    assert (plain.mask_patch_size, plain.ratio) == ((16, 16), 0.75)
    short = MAE(**VIT, mask_ratio=0.5).masking
    assert isinstance(short, RandomMasking)
    assert (short.mask_patch_size, short.ratio) == ((16, 16), 0.5)
    for part in (BlockMasking(32, 0.5), GridMasking(16)):
        assert MAE(**VIT, masking=part).masking is part


def test_init_args__rebuild_the_method() -> None:
    model = MAE(**VIT, mask_ratio=0.5, mask_patch_size=32)
    again = MAE(**model.init_args)
    assert again.init_args == model.init_args
    again.load_state_dict(model.state_dict())


def test_transform__is_the_papers() -> None:
    model = MAE(**{**VIT, "img_size": (32, 64)})
    transform = model.transform(IMAGENET_NORMALIZE)
    (view,) = transform(torch.zeros(3, 80, 90, dtype=torch.uint8))
    assert view.shape == (3, 32, 64)
    assert transform.min_scale == 0.2
    assert transform.crop.interpolation.value == "bicubic"


# Recipes.


def test_recipes__are_the_published_ones() -> None:
    assert next(iter(MAE.recipes)) == "vit_base_1600ep"
    assert set(MAE.recipes) == {
        f"vit_{size}_{epochs}ep"
        for size in ("base", "large", "huge")
        for epochs in (400, 800, 1600)
    }
    for name, recipe in MAE.recipes.items():
        assert name.endswith(f"_{recipe.epochs}ep")
        assert recipe.lr * recipe.batch_size / recipe.lr_batch_size == 2.4e-3
        assert (recipe.min_lr, recipe.warmup_lr, recipe.warmup_epochs) == (0, 0, 40)
        assert recipe.schedule == "cosine"
        assert recipe.cosine_from_warmup
        assert recipe.betas == (0.9, 0.95)
        assert recipe.weight_decay == 0.05
        assert recipe.clip_grad is None
        assert recipe.drop_path == 0.0
        assert recipe.min_scale == 0.2


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("vit_base_1600ep", "vit_base_patch16_224"),
        ("vit_large_800ep", "vit_large_patch16_224"),
        ("vit_huge_400ep", "vit_huge_patch14_224"),
    ],
)
def test_from_recipe__builds_the_encoder(name: str, encoder: str) -> None:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 1, "decoder_depth": 1}
    model = MAE.from_recipe(name, **small)
    assert model.encoder.name == encoder
    assert model.encoder.img_size == (224, 224)


# Bad input.


@pytest.mark.parametrize("method", [MAE, MaskTokenMAE])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm_pix", False, r"target=Pixels\(\) for False"),
        ("sampling", "block", r"masking=BlockMasking\(\.\.\.\) or masking=GridMask"),
        ("decoder", "cross", "CrossMAE of lightly_mim.methods has the cross-att"),
        ("predict_ratio", 0.5, "argument of lightly_mim.methods.CrossMAE"),
        ("weighted_feature_maps", True, "argument of lightly_mim.methods.CrossMAE"),
        ("encoder_mask_tokens", True, "lightly_mim.methods.MaskTokenMAE is that"),
    ],
)
def test_constructor__says_what_replaced_an_argument(
    method: type[MAE], name: str, value: Any, message: str
) -> None:
    message = f"{method.__name__} does not take {name}: .*{message}"
    with pytest.raises(ValueError, match=message):
        method(**VIT, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.5}, "between 0 and 1"),
        ({"mask_patch_size": 0}, "mask_patch_size"),
        ({"mask_patch_size": 24}, "multiple of 16 x 16, got 24 x 24"),
        ({"mask_patch_size": 8}, "multiple of 16 x 16, got 8 x 8"),
        ({"decoder_depth": 0}, "at least 1, got decoder_depth=0"),
        ({"decoder_num_heads": 5}, "multiple of its number of heads, got 24 and 5"),
        ({"decoder_num_heads": 0}, "at least 1, got decoder_num_heads=0"),
        ({"decoder_dim": 18}, "multiple of 4, got 18"),
        ({"embed_dim": 30}, "multiple of 4, got 30"),
        ({"encoder": "vit_tinny_patch16_224"}, "vit_tinny_patch16_224"),
    ],
)
def test_constructor__refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAE(**{**VIT, **options})


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]
)
def test_constructor__refuses_swin(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs all of them.*or SimMIM"):
        MAE(name, depths=(1, 1), num_heads=(1, 1), embed_dim=16)


def test_constructor__refuses_a_mask_token() -> None:
    encoder = masked_encoder("vit_tiny_patch16_224", depth=1)
    encoder.add_mask_token()
    with pytest.raises(ValueError, match="encoder.mask_token = None"):
        MAE(encoder)
    encoder.mask_token = None
    assert MAE(encoder, **DECODER).encoder is encoder


def test_forward__refuses() -> None:
    model = MAE(**VIT)
    pixels = images(model)
    with pytest.raises(ValueError, match="channel"):
        model(pixels[:, :1])
    with pytest.raises(ValueError, match="96"):
        model(torch.randn(2, 3, 96, 96))
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        model(pixels, torch.eye(4, dtype=torch.bool)[None])
    with pytest.raises(ValueError, match="8 x 8 cells cannot be laid over"):
        model(pixels, torch.eye(8, dtype=torch.bool).expand(2, -1, -1))
    uneven = torch.eye(4, dtype=torch.bool).repeat(2, 1, 1)
    uneven[0, 0, 1] = True
    with pytest.raises(ValueError, match="same number of masked cells"):
        model(pixels, uneven)


def test_masked_loss__is_the_references() -> None:
    # Mean in each patch, then over the masked patches of the batch.
    model = build(VIT)
    output = model(images(model))
    per_patch = functional.mse_loss(
        output.prediction, output.target, reduction="none"
    ).mean(dim=-1)
    torch.testing.assert_close(output.loss, per_patch.sum() / per_patch.numel())
