from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Generator, Tensor

from lightly_mim.config import to_config
from lightly_mim.masking import (
    BlockMasking,
    GridMasking,
    InverseBlockMasking,
    Mask,
    Masking,
    MixtureMasking,
    RandomMasking,
    SquareMasking,
)

SIZE = (96, 64)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def members(maskings: list[Masking], batch_size: int) -> list[Mask]:
    """The masks that a mixture draws before it chooses."""
    generator = seeded()
    return [masking(batch_size, SIZE, generator=generator) for masking in maskings]


def which(mask: Mask, drawn: list[Mask]) -> Tensor:
    """Bool (members, images): whose masked cells all of an image's are."""
    laid = torch.stack([one.on(mask.grid).cells for one in drawn])
    return (mask.cells <= laid).all(dim=(2, 3))


def test_same_counts__every_image_is_a_members_own() -> None:
    maskings: list[Masking] = [
        RandomMasking(16, 0.5),
        BlockMasking(16, 0.5),
        InverseBlockMasking(16, 0.5),
    ]
    mask = MixtureMasking(maskings)(6000, SIZE, generator=seeded())
    drawn = members(maskings, 6000)
    same = torch.stack([(mask.cells == one.cells).all(dim=(1, 2)) for one in drawn])
    assert same.any(dim=0).all()
    assert mask.count == Mask.of(mask.cells).count == 12
    # A third each, now and then equal by chance; the standard error is 0.006.
    assert (same.float().mean(dim=1) - 1 / 3).abs().max() < 5 * 0.006


def test_weights__decide() -> None:
    maskings: list[Masking] = [
        BlockMasking(16, 0.5),
        RandomMasking(16, 0.5),
        InverseBlockMasking(16, 0.5),
        SquareMasking(16, 0.5),
    ]
    mask = MixtureMasking(maskings, [0, 3, 1, 0])(6000, SIZE, generator=seeded())
    drawn = members(maskings[1:3], 6000)  # those without weight are not drawn
    same = torch.stack([(mask.cells == one.cells).all(dim=(1, 2)) for one in drawn])
    share = same.float().mean(dim=1)
    assert same.any(dim=0).all()
    assert share[0].item() == pytest.approx(0.75, abs=5 * 0.006)
    assert share[1].item() == pytest.approx(0.25, abs=5 * 0.006)


def test_other_grids__meet_on_the_coarsest_common_one() -> None:
    # 6 x 4 cells and 4 x 4: 12 x 4.
    maskings: list[Masking] = [RandomMasking(16, 0.5), RandomMasking((24, 16), 0.5)]
    mask = MixtureMasking(maskings)(40, SIZE, generator=seeded())
    assert mask.grid == (12, 4)
    assert mask.count == Mask.of(mask.cells).count == 24
    own = which(mask, members(maskings, 40))
    assert own.any(dim=0).all()
    assert own.any(dim=1).all()  # both are drawn


def test_other_counts__masks_beside_one_side_become_visible() -> None:
    maskings: list[Masking] = [RandomMasking(16, 0.5), RandomMasking(32, 0.6)]
    mask = MixtureMasking(maskings)(400, SIZE, generator=seeded())
    drawn = members(maskings, 400)
    # 12 of 6 x 4 cells, and 4 of 3 x 2, which are 16.
    assert mask.grid == (6, 4)
    assert mask.count == Mask.of(mask.cells).count == 12
    fine, coarse = which(mask, drawn)
    assert (fine | coarse).all()
    assert torch.equal(mask.cells[fine], drawn[0].cells[fine])
    sides = [0, 0, 0, 0]
    for own, whole in zip(
        mask.cells[~fine], drawn[1].on((6, 4)).cells[~fine], strict=True
    ):
        # What is lost are the last four in one of four orders.
        lost = (whole & ~own).nonzero().tolist()
        masked = whole.nonzero().tolist()
        by_column = sorted(masked, key=lambda place: (place[1], place[0]))
        ends = [masked[-4:], masked[:4], by_column[-4:], by_column[:4]]
        assert lost in [sorted(end) for end in ends]
        for number, end in enumerate(ends):
            sides[number] += lost == sorted(end)
    assert min(sides) > 20


def test_generator_decides() -> None:
    masking = MixtureMasking([RandomMasking(16, 0.5), BlockMasking(32, 0.4)])
    masks = [masking(20, SIZE, generator=seeded(s)).cells for s in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_nothing_waits_for_the_device() -> None:
    # A tensor on this device has no values that the host could ask for.
    masking = MixtureMasking([RandomMasking(16, 0.5), SquareMasking(32, 0.6)], [1, 2])
    mask = masking(4, SIZE, device="meta")
    assert mask.cells.shape == (4, 6, 4)
    assert mask.count == 12


def test_mixes_mixtures_and_functions() -> None:
    def left(
        batch_size: int,
        image_size: tuple[int, int],
        device: torch.device | str | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        return torch.tensor([[[True, False]]]).expand(batch_size, 1, 2)

    inner = MixtureMasking([RandomMasking(16, 0.5), BlockMasking(16, 0.5)])
    mask = MixtureMasking([inner, cast(Any, left)])(50, SIZE, generator=seeded())
    assert mask.count == Mask.of(mask.cells).count == 12
    halves = mask.cells[:, :, :2].all(dim=(1, 2))
    assert 10 < halves.sum() < 40


def test_refuses() -> None:
    two: list[Masking] = [RandomMasking(16), RandomMasking(32)]
    with pytest.raises(ValueError, match="a list of one or more, each a Masking"):
        MixtureMasking([])
    with pytest.raises(ValueError, match=r"weights .*got 1 for 2 masking\(s\)"):
        MixtureMasking(two, [1.0])
    for weights in ([1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="weights"):
            MixtureMasking(two, weights)
    with pytest.raises(ValueError, match="48 x 64 pixels.*mask_patch_size 32 x 32"):
        MixtureMasking(two)(1, (48, 64))
    with pytest.raises(ValueError, match="even number of patches"):
        MixtureMasking([RandomMasking(16), GridMasking(16)])(1, (48, 64))


def test_command_line__builds_what_a_config_says() -> None:
    mixture = MixtureMasking([RandomMasking(16, 0.5), BlockMasking((8, 4))], [1.0, 2.5])
    parser = ArgumentParser()
    parser.add_argument("--masking", type=Masking)
    words = ["--masking=MixtureMasking", "--masking.weights=[1, 2.5]"]
    words += ["--masking.maskings+=RandomMasking"]
    words += ["--masking.maskings.mask_patch_size=16", "--masking.maskings.ratio=0.5"]
    words += ["--masking.maskings+=BlockMasking"]
    words += ["--masking.maskings.mask_patch_size=[8, 4]"]
    typed = parser.instantiate(parser.parse_args(words)).masking
    assert repr(typed) == repr(mixture)
    config = parser.parse_object({"masking": to_config(mixture)})
    assert repr(parser.instantiate(config).masking) == repr(mixture)


def test_mixture__ways_without_weight_are_not_counted() -> None:
    ways = [RandomMasking(16, 0.75), RandomMasking(16, 0.25)]
    mask = MixtureMasking(ways, [1.0, 0.0])(2, (64, 64))
    assert mask.count == 12
