from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightly.models.utils import get_at_index
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from lightly_mim.config import to_config
from lightly_mim.heads import (
    Head,
    InverseSwinHead,
    LinearHead,
    MLPHead,
    TransformerHead,
)
from lightly_mim.patches import unpatchify

HEADS: list[Head] = [
    LinearHead(),
    MLPHead(),
    MLPHead(hidden_dim=10),
    TransformerHead(depth=2),
    TransformerHead(num_heads=3, embed_dim=24),
    InverseSwinHead(embed_dim=8, depths=(2, 2), num_heads=(2, 1)),
    InverseSwinHead(embed_dim=16, depths=(1, 2, 1), window_size=(2, 4)),
]
EMBED_DIM = 32
CELL_SIZE = (8, 4)
PIXELS = 3 * math.prod(CELL_SIZE)
each_head = pytest.mark.parametrize("head", HEADS, ids=repr)
# 20 values are no multiple of the number of pixels.
each_width = pytest.mark.parametrize("num_values", [PIXELS, 20])


def build(
    head: Head, num_values: int = PIXELS, grid: tuple[int, int] = (4, 6)
) -> nn.Module:
    torch.manual_seed(0)
    module = head(
        EMBED_DIM, num_values, CELL_SIZE, grid, num_values % math.prod(CELL_SIZE) == 0
    )
    # timm's initial values are small, so that what blocks do would hardly be seen.
    for parameter in module.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    return module


def draw(
    grid: tuple[int, int] = (4, 6), count: int = 5, batch_size: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_cells = math.prod(grid)
    tokens = torch.randn(batch_size, num_cells, EMBED_DIM, generator=generator)
    order = torch.rand(batch_size, num_cells, generator=generator).argsort(dim=1)
    return tokens, order[:, :count]


@each_head
@each_width
@pytest.mark.parametrize("grid", [(4, 4), (6, 4), (2, 8)])
def test_heads__predict_the_indexed_cells(
    head: Head, num_values: int, grid: tuple[int, int]
) -> None:
    module = build(head, num_values, grid)
    tokens, index = draw(grid)
    everything = module(tokens, grid)
    assert everything.shape == (2, math.prod(grid), num_values)
    some = module(tokens, grid, index)
    torch.testing.assert_close(some, get_at_index(everything, index))


@each_head
@each_width
def test_heads__use_every_parameter(head: Head, num_values: int) -> None:
    # One without a gradient stops plain DistributedDataParallel.
    grid = (4, 4)
    module = build(head, num_values, grid)
    tokens, index = draw(grid)
    module(tokens, grid, index).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@each_head
def test_heads__survive_files_and_bfloat16(head: Head) -> None:
    grid = (4, 4)
    tokens, index = draw(grid)
    module = build(head, grid=grid)
    expected = module(tokens, grid, index)

    other = head(EMBED_DIM, PIXELS, CELL_SIZE, grid, True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(tokens, grid, index), expected)
    assert torch.equal(copy.deepcopy(module)(tokens, grid, index), expected)

    with torch.autocast("cpu", torch.bfloat16):
        half = module(tokens, grid, index)
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().mean() < 0.02 * expected.abs().mean()


@each_head
def test_heads__are_recorded(head: Head) -> None:
    config = to_config(head)
    assert config["class_path"] == f"lightly_mim.heads.{type(head).__name__}"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--head", type=Head)
    parsed = parser.instantiate(parser.parse_object({"head": config})).head
    assert repr(parsed) == repr(head) == repr(pickle.loads(pickle.dumps(head)))


def test_heads__can_be_typed() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--head", type=Head)
    words = "--head InverseSwinHead --head.size base --head.depths [1,1]"
    words += " --head.window_size 4"
    head = parser.instantiate(parser.parse_args(words.split())).head
    assert head.init_args == {
        "size": "base",
        "embed_dim": None,
        "depths": (1, 1),
        "num_heads": None,
        "window_size": 4,
    }


def test_linear__is_pytorchs() -> None:
    torch.manual_seed(3)
    ours = LinearHead()(12, 20, (2, 2), (1, 3))
    torch.manual_seed(3)
    theirs = nn.Linear(12, 20)
    tokens = torch.randn(2, 3, 12)
    assert torch.equal(ours(tokens, (1, 3)), theirs(tokens))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(("hidden_dim", "width"), [(None, EMBED_DIM), (10, 10)])
def test_mlp__is_two_layers_with_a_gelu(hidden_dim: int | None, width: int) -> None:
    torch.manual_seed(0)
    module = MLPHead(hidden_dim)(EMBED_DIM, 20, CELL_SIZE, (4, 6))
    torch.manual_seed(0)
    first, second = nn.Linear(EMBED_DIM, width), nn.Linear(width, 20)
    tokens, index = draw()
    hidden = first(get_at_index(tokens, index))
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(module(tokens, (4, 6), index), second(hidden))


@pytest.mark.parametrize("embed_dim", [None, 48])
def test_transformer__equals_timms_blocks(embed_dim: int | None) -> None:
    head = TransformerHead(depth=3, num_heads=4, embed_dim=embed_dim)
    module = build(head)
    tokens, index = draw()
    weights = module.state_dict()
    x = tokens
    if embed_dim:
        x = functional.linear(x, weights["embed.weight"], weights["embed.bias"])
    for number in range(3):
        prefix = f"blocks.{number}."
        block = Block(x.shape[-1], 4, qkv_bias=True)
        block.load_state_dict(
            {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        )
        x = block(x)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    x = (x - mean) / (var + 1e-6).sqrt()
    x = x * weights["norm.weight"] + weights["norm.bias"]
    x = functional.linear(x, weights["output.weight"], weights["output.bias"])
    prediction = module(tokens, (4, 6), index)
    torch.testing.assert_close(prediction, get_at_index(x, index), atol=1e-5, rtol=1e-5)


def test_transformer__lets_cells_see_each_other() -> None:
    tokens, index = draw()
    unseen = next(n for n in range(24) if n not in index[0])
    changed = tokens.clone()
    changed[0, unseen] += 1
    for head, sees in [(MLPHead(), False), (TransformerHead(), True)]:
        module = build(head)
        before, after = (module(x, (4, 6), index) for x in (tokens, changed))
        assert torch.equal(before[0], after[0]) != sees
        torch.testing.assert_close(before[1], after[1])


@given(width=st.integers(1, 1300))
@settings(deadline=None, max_examples=30)
def test_default_num_heads__have_up_to_64_channels(width: int) -> None:
    with torch.device("meta"):
        module: Any = TransformerHead()(width, 1, (1, 1), (1, 1))
    num_heads = module.blocks[0].attn.num_heads
    channels = max(2**n for n in range(7) if width % 2**n == 0)
    assert num_heads * channels == width


def layer_norm(vector: list[float], weight: Tensor, bias: Tensor) -> list[float]:
    mean = sum(vector) / len(vector)
    variance = sum((value - mean) ** 2 for value in vector) / len(vector)
    scaled = [(value - mean) / math.sqrt(variance + 1e-5) for value in vector]
    triples = zip(scaled, weight.tolist(), bias.tolist(), strict=True)
    return [value * w + b for value, w, b in triples]


def multiply(matrix: Tensor, vector: list[float]) -> list[float]:
    return [
        sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix.tolist()
    ]


def without_blocks(num_values: int) -> Any:
    """Makes a head that splits 16 channels into 8 into 4, with nothing in between."""
    head = InverseSwinHead(embed_dim=4, depths=(1, 1, 1))
    torch.manual_seed(0)
    module = head(16, num_values, (8, 4), (2, 3), num_values % 32 == 0).double()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False).normal_()
        if "attn.proj." in name or "mlp.fc2." in name:
            parameter.zero_()
    return module


def fine_tokens(module: Any, token: Tensor) -> list[list[list[float]]]:
    """Splits a token twice, with loops; returns rows of 4 of columns of 4 of tokens."""
    cells = [[token.tolist()]]
    for split in module.splits:
        side = 2 * len(cells)
        finer: list[list[Any]] = [[None] * side for _ in range(side)]
        for y, row in enumerate(cells):
            for x, vector in enumerate(row):
                expanded = multiply(split.expansion.weight, vector)
                width = len(expanded) // 4
                for part in range(4):
                    piece = expanded[part * width : (part + 1) * width]
                    finer[2 * y + part // 2][2 * x + part % 2] = layer_norm(
                        piece, split.norm.weight, split.norm.bias
                    )
        cells = finer
    norm = module.norm
    return [[layer_norm(x, norm.weight, norm.bias) for x in row] for row in cells]


def test_inverse_swin__lays_fine_tokens_on_their_pixels() -> None:
    # Cells of 8 x 4 pixels, hence fine tokens of 2 x 1 pixels of 3 channels.
    module = without_blocks(num_values=8 * 4 * 3)
    tokens = torch.randn(1, 6, 16, dtype=torch.double)
    expected = torch.zeros(1, 3, 2 * 8, 3 * 4, dtype=torch.double)
    for cell in range(6):
        for y, row in enumerate(fine_tokens(module, tokens[0, cell])):
            for x, vector in enumerate(row):
                values = multiply(module.output.weight, vector)
                values = [
                    value + bias
                    for value, bias in zip(values, module.output.bias, strict=True)
                ]
                top, left = cell // 3 * 8 + y * 2, cell % 3 * 4 + x
                expected[0, :, top, left] = torch.tensor(values[:3])
                expected[0, :, top + 1, left] = torch.tensor(values[3:])
    prediction = module(tokens, (2, 3))
    torch.testing.assert_close(unpatchify(prediction, (8, 4), (2, 3)), expected)


def test_inverse_swin__predicts_other_targets_from_all_fine_tokens() -> None:
    module = without_blocks(num_values=5)
    tokens = torch.randn(1, 6, 16, dtype=torch.double)
    for cell in (0, 4):
        rows = fine_tokens(module, tokens[0, cell])
        vector = [value for row in rows for token in row for value in token]
        expected = torch.tensor(multiply(module.output.weight, vector)).double()
        prediction = module(tokens, (2, 3), torch.tensor([[cell]]))[0, 0]
        torch.testing.assert_close(prediction, expected + module.output.bias)


@pytest.mark.parametrize("fused", [False, True])
def test_inverse_swin__equals_timms_blocks(fused: bool) -> None:
    # Windows of 4 x 4 on 8 x 12 and 16 x 24 tokens; every other block is shifted.
    head = InverseSwinHead(embed_dim=16, depths=(2, 3), window_size=4)
    module: Any = build(head, grid=(8, 12))
    part: Any
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    tokens, _ = draw((8, 12))
    x = tokens.view(2, 8, 12, EMBED_DIM)
    for number, (stage, depth) in enumerate(zip(module.stages, (2, 3), strict=True)):
        if number:
            x = module.splits[0](x)
        for position in range(depth):
            block = SwinTransformerBlock(
                EMBED_DIM // 2**number,
                (8 * 2**number, 12 * 2**number),
                num_heads=1,
                window_size=4,
                shift_size=position % 2 * 2,
            )
            block.load_state_dict(stage.blocks[position].state_dict())
            x = block(x)
    fine = module.output(module.norm(x))  # (2, 16, 24, 4 * 2 * 3)
    images = fine.view(2, 16, 24, 4, 2, 3).permute(0, 5, 1, 3, 2, 4)
    images = images.reshape(2, 3, 64, 48)
    prediction = unpatchify(module(tokens, (8, 12)), CELL_SIZE, (8, 12))
    torch.testing.assert_close(prediction, images, atol=1e-4, rtol=1e-4)


def test_inverse_swin__takes_other_grids_that_its_windows_tile() -> None:
    head = InverseSwinHead(embed_dim=16, depths=(2, 2), window_size=4)
    module, other = build(head, grid=(8, 8)), build(head, grid=(12, 8))
    tokens, index = draw((12, 8))
    assert torch.equal(module(tokens, (12, 8), index), other(tokens, (12, 8), index))
    with pytest.raises(ValueError, match="4 x 4 tokens do not tile .* 6 x 8"):
        module(tokens[:, :48], (6, 8))


@pytest.mark.parametrize(
    ("side", "windows"),
    # SimMIM's Swin at 192 and 224 pixels, ViT-B/16 at 224, others.
    [
        (6, [6, 6, 6]),
        (7, [7, 7, 7]),
        (14, [7, 7, 7]),
        (3, [3, 6, 6]),
        (13, [13, 13, 4]),
    ],
)
def test_inverse_swin__chooses_windows(side: int, windows: list[int]) -> None:
    head = InverseSwinHead(embed_dim=8, depths=(1, 1, 1))
    module: Any = head(32, 48, (4, 4), (side, 6), True)
    shapes = [stage.blocks[0].window_size for stage in module.stages]
    assert shapes == [(n, 6) for n in windows]


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), num_stages=st.integers(1, 3)
)
@settings(deadline=None, max_examples=20)
def test_inverse_swin__never_pads(height: int, width: int, num_stages: int) -> None:
    head = InverseSwinHead(embed_dim=2, depths=(2,) * num_stages)
    # Those that no number from 4 to 14 divides.
    untiled = {17, 19, 23, 29, 31, 34, 37, 38}
    with torch.device("meta"):
        if {height, width} & untiled:
            with pytest.raises(ValueError, match="No window of 4 to 14"):
                head(8, 16, (4, 4), (height, width), True)
            return
        module: Any = head(8, 16, (4, 4), (height, width), True)
    for number, stage in enumerate(module.stages):
        for block in stage.blocks:
            assert height * 2**number % block.window_size[0] == 0
            assert width * 2**number % block.window_size[1] == 0


@pytest.mark.parametrize(
    ("cell_size", "widths"),
    [
        ((32, 32), [768, 384, 192, 96]),  # Swin
        ((16, 16), [384, 192, 96]),  # ViT/16
        ((64, 64), [768, 384, 192, 96]),
        ((14, 14), [192, 96]),  # 7 pixels
        ((8, 16), [192, 96]),
        ((7, 7), [96]),
        ((4, 4), [96]),
    ],
)
def test_inverse_swin__enters_at_the_encoders_stride(
    cell_size: tuple[int, int], widths: list[int]
) -> None:
    num_values = math.prod(cell_size)
    with torch.device("meta"):
        module: Any = InverseSwinHead()(
            8, num_values, cell_size, (2, 2), num_values % math.prod(cell_size) == 0
        )
        tokens = torch.randn(1, 4, 8)
    blocks = [stage.blocks[0] for stage in module.stages]
    assert [block.dim for block in blocks] == widths
    assert [block.attn.num_heads for block in blocks] == [n // 32 for n in widths]
    depths = [len(stage.blocks) for stage in module.stages]
    assert depths == [2, 6, 2, 2][-len(widths) :]
    assert module(tokens, (2, 2)).shape == (1, 4, num_values)


@pytest.mark.parametrize(
    ("head", "millions"),
    # Table 3 with Swin-B at 192 pixels; all but the first from memory.
    [
        (LinearHead(), 89.9),
        (MLPHead(), 90.9),
        (InverseSwinHead("tiny"), 115.2),
        (InverseSwinHead("base"), 174.8),
    ],
    ids=["linear", "mlp", "tiny", "base"],
)
def test_heads__have_the_papers_sizes(head: Head, millions: float) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(
            "swin_base_patch4_window7_224", num_classes=0, img_size=192, window_size=6
        )
        module = head(1024, 32 * 32 * 3, (32, 32), (6, 6), True)
    count = sum(p.numel() for each in (encoder, module) for p in each.parameters())
    # The paper does not say what stands between the stages of the last two.
    tolerance = 0.01 * millions if isinstance(head, InverseSwinHead) else 0.05
    assert count / 1e6 == pytest.approx(millions, abs=tolerance)


@pytest.mark.parametrize(
    "head",
    [TransformerHead(embed_dim=64), InverseSwinHead(embed_dim=32, depths=(1, 1))],
    ids=repr,
)
def test_initial_weights__are_timms(head: Head) -> None:
    torch.manual_seed(0)
    module = head(128, PIXELS, CELL_SIZE, (4, 4), True)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            assert 0.018 < layer.weight.std() < 0.022, name
            assert layer.bias is None or not layer.bias.any(), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPHead(0), "at least 1, got hidden_dim=0"),
        (lambda: TransformerHead(depth=0), "at least 1, got depth=0"),
        (lambda: TransformerHead(num_heads=0), "at least 1, got num_heads=0"),
        (lambda: TransformerHead(embed_dim=-8), "at least 1, got embed_dim=-8"),
        (
            lambda: TransformerHead(embed_dim=32, num_heads=5),
            "5 heads for a width of 32",
        ),
        (
            lambda: TransformerHead(num_heads=5)(32, 4, (2, 2), (2, 2)),
            "5 heads for a width of 32",
        ),
        (lambda: InverseSwinHead("large"), "one of 'tiny', 'base', got size='large'"),  # type: ignore[arg-type]
        (lambda: InverseSwinHead(embed_dim=0), "at least 1, got embed_dim=0"),
        (lambda: InverseSwinHead(depths=()), "each stage, got none"),
        (lambda: InverseSwinHead(depths=(2, 0)), "of at least 1, got depths=(2, 0)"),
        (
            lambda: InverseSwinHead(depths=(1, 1), num_heads=(1,)),
            "2 of depths (1, 1), got (1,)",
        ),
        (
            lambda: InverseSwinHead(num_heads=(24, 12, 6, 5)),
            "5 heads for a width of 96",
        ),
        (lambda: InverseSwinHead(window_size=0), "or one positive whole number"),
        (
            lambda: InverseSwinHead(depths=(1, 1, 1))(8, 4, (14, 16), (2, 2)),
            "3 stages halve the sides of a cell 2 times, which one of 14 x 16 pixels",
        ),
        (
            lambda: InverseSwinHead(window_size=7)(8, 4, (8, 8), (6, 7)),
            "Windows of 7 x 7 tokens do not tile a stage of the head that has 12 x 14",
        ),
        (
            lambda: InverseSwinHead()(8, 4, (8, 8), (37, 37)),
            "No window of 4 to 14 tokens tiles a grid of 37 x 37",
        ),
    ],
)
def test_heads__refuse_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
