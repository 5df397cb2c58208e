"""What holds for every target."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightly_mim.masking import Mask
from lightly_mim.methods import MAE, SimMIM
from lightly_mim.targets import (
    HOG,
    ColorBins,
    ColorClusters,
    LearnedTarget,
    LocallyNormalizedPixels,
    LowFrequencies,
    PatchNormalizedPixels,
    Pixels,
    Target,
)
from tests.conftest import TINY_VIT

IMAGES = torch.randn(3, 2, 32, 48, generator=torch.Generator().manual_seed(0))
CELL = (16, 8)
INDEX = torch.tensor([[0, 3, 11], [1, 2, 10], [11, 7, 5]])


def targets() -> list[Target]:
    """One of each, for 2 channels."""
    every: list[Target] = [
        Pixels(),
        Pixels(4),
        PatchNormalizedPixels(),
        LocallyNormalizedPixels(7),
        ColorBins(8),
        ColorBins(5, factor=2),
        ColorClusters(7),
        ColorClusters(9, factor=4),
        HOG(),
        HOG(6, pixels_per_cell=4),
        LowFrequencies(3),
    ]
    for target in every:
        if isinstance(target, LearnedTarget):
            target.fit(IMAGES)
    return every


@pytest.mark.parametrize("target", targets(), ids=repr)
def test_target__values_fit_what_it_says(target: Target) -> None:
    values = target(IMAGES, INDEX, CELL)
    assert values.shape == (3, 3, target.width(CELL, 2))
    if target.num_classes is None:
        assert values.dtype == torch.float32
    else:
        assert values.dtype == torch.int64
        low, high = values.aminmax()
        assert 0 <= low < high < target.num_classes


@pytest.mark.parametrize("target", targets(), ids=repr)
def test_target__values_of_a_cell_do_not_depend_on_the_others_asked_for(
    target: Target,
) -> None:
    every = target(IMAGES, torch.arange(12).expand(3, -1), CELL)
    rows = torch.arange(3)[:, None]
    assert torch.equal(target(IMAGES, INDEX, CELL), every[rows, INDEX])
    one = target(IMAGES[1:2], INDEX[1:2], CELL)
    torch.testing.assert_close(one[0], every[1, INDEX[1]])


@pytest.mark.parametrize("target", targets(), ids=repr)
def test_target__is_one_graph(target: Target) -> None:
    compiled = torch.compile(target.__call__, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IMAGES, INDEX, CELL), target(IMAGES, INDEX, CELL))


@pytest.mark.parametrize("target", targets(), ids=repr)
def test_target__is_the_same_under_autocast(target: Target) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        values = target(IMAGES, INDEX, CELL)
    assert torch.equal(values, target(IMAGES, INDEX, CELL))


@pytest.mark.parametrize("target", targets(), ids=repr)
def test_target__weight_is_the_share_of_the_pixels_behind_a_value(
    target: Target,
) -> None:
    masked = torch.rand(3, 1, 32, 48) < 0.5
    # How many pixels (rows, columns) a value is made of, and how many values share it.
    block = (getattr(target, "factor", 1),) * 2
    if isinstance(target, HOG):
        block = (target.pixels_per_cell,) * 2
    if isinstance(target, LowFrequencies):
        block = CELL
    weight = target.weight(masked, INDEX, CELL, 2)
    assert weight.shape == (3, 3, target.width(CELL, 2))
    rows, columns = CELL[0] // block[0], CELL[1] // block[1]
    weight = weight.reshape(3, 3, rows, columns, -1)
    for b, k, y, x in itertools.product(
        range(3), range(3), range(rows), range(columns)
    ):
        top = int(INDEX[b, k]) // 6 * CELL[0] + y * block[0]
        left = int(INDEX[b, k]) % 6 * CELL[1] + x * block[1]
        share = (
            masked[b, 0, top : top + block[0], left : left + block[1]].float().mean()
        )
        torch.testing.assert_close(
            weight[b, k, y, x], share.expand(weight.shape[-1]), rtol=1e-6, atol=1e-6
        )


TINY_DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.mark.parametrize(("method", "options"), [(SimMIM, {}), (MAE, TINY_DECODER)])
@pytest.mark.parametrize("target", targets(), ids=repr)
def test_target__serves_a_method(
    method: Any, options: dict[str, int], target: Target
) -> None:
    # A masked block of SimMIM's is larger than a cell, and of MAE's a cell.
    model = method(**TINY_VIT | options, in_chans=2, target=target)
    mask = Mask.of(torch.tensor([[[1, 0, 1, 0]] * 3 + [[0, 1, 0, 1]]] * 3).bool())
    output = model(IMAGES[..., :32], mask)
    output.loss.backward()
    assert output.loss.isfinite()
    values = output.target
    if target.num_classes is not None:
        values = F.one_hot(values, target.num_classes).flatten(-2)
    assert output.prediction.shape == values.shape
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    if target.drawable:
        picture = model.eval().reconstruct(IMAGES[..., :32], mask)
        assert picture.shape == (3, 2, 32, 32)
        assert picture.isfinite().all()
    else:
        with pytest.raises(ValueError, match="cannot be drawn"):
            model.eval().reconstruct(IMAGES[..., :32], mask)
