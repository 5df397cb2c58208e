from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from lightly_mim.masking import (
    BlockMasking,
    CentralMasking,
    GridMasking,
    InverseBlockMasking,
    Mask,
    RandomMasking,
    SquareMasking,
    UnitMasking,
)

ANY_RATIO: list[Callable[..., UnitMasking]] = [
    RandomMasking,
    BlockMasking,
    SquareMasking,
    CentralMasking,
    InverseBlockMasking,
]


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def is_nearly_a_rectangle(cells: Tensor) -> bool:
    """Whether all is a rectangle, but for an end of the row or column at one edge."""
    rows, columns = (cells.any(dim).nonzero().flatten() for dim in (1, 0))
    box = cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if box.all():
        return True
    return any(
        (~box).sum() == (~line).sum() and line.int().diff().abs().sum() == 1
        for line in (box[0], box[-1], box[:, 0], box[:, -1])
    )


def sides(cells: Tensor) -> tuple[int, int]:
    """The (height, width) of the rectangle around all."""
    rows, columns = (cells.any(dim).nonzero().flatten() for dim in (1, 0))
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


# All of them.


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(ANY_RATIO),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 99),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_counts_are_exact_on_any_grid(
    cls: Callable[..., UnitMasking],
    h: int,
    w: int,
    share: int,
    batch_size: int,
    seed: int,
) -> None:
    count = -(-h * w * share // 100)
    assume(0 < count < h * w)
    masking = cls((8, 4), share / 100)
    mask = masking(batch_size, (h * 8, w * 4), generator=seeded(seed))
    assert mask.cells.shape == (batch_size, h, w)
    assert mask.cells.dtype == torch.bool
    assert mask.count == count
    assert (mask.cells.sum(dim=(1, 2)) == count).all()


@pytest.mark.parametrize(
    "masking",
    [
        *(cls(8, 0.4) for cls in ANY_RATIO),
        InverseBlockMasking(8, 0.4, roll=False),
        GridMasking(8),
    ],
    ids=str,
)
def test_generator_decides(masking: UnitMasking) -> None:
    masks = [masking(8, (64, 48), generator=seeded(s)).cells for s in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    "masking",
    [
        RandomMasking(16, 0.3),
        BlockMasking(16, 0.1),
        BlockMasking(16, 0.75),
        SquareMasking(16, 0.1),
        SquareMasking(16, 0.2),
        InverseBlockMasking(16, 0.3),
        InverseBlockMasking(16, 0.75),
        InverseBlockMasking(16, 0.75, roll=False),
        GridMasking(16),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(224, 224), (96, 320)])
def test_every_cell_is_masked_and_visible_in_time(
    masking: UnitMasking, size: tuple[int, int]
) -> None:
    cells = masking(3000, size, generator=seeded()).cells
    assert cells.any(dim=0).all()
    assert (~cells).any(dim=0).all()


@pytest.mark.parametrize(
    "masking",
    [
        *(cls(16, ratio) for cls in ANY_RATIO for ratio in (0.4, 0.75)),
        InverseBlockMasking(16, 0.75, roll=False),
        GridMasking(16),
    ],
    ids=str,
)
def test_no_side_of_the_image_is_preferred(masking: UnitMasking) -> None:
    cells = masking(20_000, (128, 128), generator=seeded()).cells
    share = cells.float().mean(dim=0)
    # The standard error of a difference of two shares is below 0.005.
    for turned in (share.flip(0), share.flip(1), share.T):
        assert (share - turned).abs().max() < 5 * 0.005


@pytest.mark.parametrize(
    "masking", [*(cls(16) for cls in ANY_RATIO), GridMasking(16)], ids=str
)
def test_nothing_waits_for_the_device(masking: UnitMasking) -> None:
    # A tensor on this device has no values that the host could ask for.
    mask = masking(4, (96, 64), device="meta")
    assert mask.cells.shape == (4, 6, 4)
    assert mask.count == masking.count(6, 4)


@pytest.mark.parametrize("cls", [*ANY_RATIO, GridMasking])
def test_refuses_what_does_not_fit(cls: type[UnitMasking]) -> None:
    with pytest.raises(ValueError, match="72 x 64 pixels.*mask_patch_size 16 x 16"):
        cls(16)(1, (72, 64))
    if cls is not GridMasking:
        with pytest.raises(ValueError, match=r"0\.9 masks 4 of 4 block\(s\)"):
            cls(16, 0.9)(1, (32, 32))


# Eight pictures of each, looked at: what is to be seen in them.


def pictures(masking: UnitMasking) -> Tensor:
    """Eight masks of a 224-pixel image, bool (8, 224, 224), of the right count."""
    mask = masking(8, (224, 224), generator=seeded())
    pixels = mask.pixels((224, 224))[:, 0]
    p, q = masking.mask_patch_size
    assert (pixels.sum(dim=(1, 2)) == mask.count * p * q).all()
    assert (pixels != pixels[0]).any()
    return pixels


def num_borders(pixels: Tensor) -> Tensor:
    """How many pixels of each image have another kind on their right or below."""
    across = (pixels[:, :, 1:] != pixels[:, :, :-1]).sum(dim=(1, 2))
    return across + (pixels[:, 1:] != pixels[:, :-1]).sum(dim=(1, 2))


@pytest.mark.parametrize("unit", [4, 8, 16, 32])
def test_pictures__random(unit: int) -> None:
    pixels = pictures(RandomMasking(unit, 0.5))
    n = 224 // unit
    # Of 2 * n * (n - 1) pairs of neighbours about half differ, by `unit` pixels each.
    share = num_borders(pixels) / (2 * n * (n - 1) * unit)
    assert (share - 0.5).abs().max() < 0.15


def test_pictures__block() -> None:
    pixels = pictures(BlockMasking(16, 0.4))
    # Few rectangles, whose outlines are much shorter than those of random patches.
    assert (
        num_borders(pixels).max()
        < 0.5 * num_borders(pictures(RandomMasking(16, 0.4))).min()
    )
    assert num_borders(pixels).min() > 0


@pytest.mark.parametrize("unit", [(16, 16), (8, 32)])
def test_pictures__square(unit: tuple[int, int]) -> None:
    pixels = pictures(SquareMasking(unit, 0.3))
    places = set()
    for picture in pixels:
        height, width = sides(picture)
        # 224 * sqrt(0.3) = 123 pixels, as far as patches allow.
        assert abs(height - 123) <= 1.5 * unit[0]
        assert abs(width - 123) <= 1.5 * unit[1]
        assert is_nearly_a_rectangle(picture[:: unit[0], :: unit[1]])
        places.add(tuple(picture.nonzero()[0].tolist()))
    assert len(places) > 4


def test_pictures__central() -> None:
    pixels = pictures(CentralMasking(16, 0.4))
    # 79 patches: 8 x 8 in the middle, and parts of the ring around it.
    assert pixels[:, 48:176, 48:176].all()
    ring = pixels.clone()
    ring[:, 32:192, 32:192] = False
    assert not ring.any()
    assert all(is_nearly_a_rectangle(picture[::16, ::16]) for picture in pixels)


def test_pictures__inverse_block() -> None:
    pixels = pictures(InverseBlockMasking(16, 0.75, roll=False))
    for picture in ~pixels:
        assert is_nearly_a_rectangle(picture[::16, ::16])
        height, width = sides(picture)
        # Between 5 x 10 and 10 x 5 patches.
        assert 64 <= min(height, width)
        assert max(height, width) <= 176
    assert len({sides(picture) for picture in ~pixels}) > 2


def test_pictures__grid() -> None:
    for picture in pictures(GridMasking(16)):
        [[y, x], *_] = (~picture).nonzero().tolist()
        expected = torch.ones(14, 14, dtype=torch.bool)
        expected[y // 16 :: 2, x // 16 :: 2] = False
        assert torch.equal(picture[::16, ::16], expected)


# One by one.


def test_random__every_block_is_as_likely() -> None:
    mask = RandomMasking(32, 0.6)(20_000, (96, 96), generator=seeded())
    share = mask.cells.float().mean(dim=0)
    # 6 of 9; the standard error of a share is 0.0033.
    assert (share - 6 / 9).abs().max() < 5 * 0.0033


class TwoRectangles(BlockMasking):
    num_rectangles: ClassVar[int] = 2


@pytest.mark.parametrize(
    "masking", [BlockMasking(16, 0.5), BlockMasking(16, 0.75), TwoRectangles(16, 0.9)]
)
def test_block__equals_plain_loops(masking: BlockMasking) -> None:
    # The same random numbers, rectangle by rectangle.
    masks = masking(20, (224, 160), generator=seeded(3)).cells
    h, w, count, n = 14, 10, masking.count(14, 10), masking.num_rectangles
    generator = seeded(3)
    uniform = torch.rand(4, 20, n, 1, generator=generator)
    numbers = torch.randint(4, (20,), generator=generator).tolist()
    down = [(y, x) for y in range(h) for x in range(w)]
    right = [(y, x) for x in range(w) for y in range(h)]
    scans = [down, down[::-1], right, right[::-1]]
    assert set(numbers) == {0, 1, 2, 3}
    for b, number in enumerate(numbers):
        rectangles = []
        for r in range(n):
            size, shape, top, left = uniform[:, b, r, 0].tolist()
            area = 16 + (count - 16) * size
            aspect = math.exp(math.log(0.3) * (1 - 2 * shape))
            assert 16 <= area <= count
            assert 0.3 <= aspect <= 1 / 0.3 + 1e-6
            height = min(max(round(math.sqrt(area * aspect)), 1), h)
            width = min(max(round(math.sqrt(area / aspect)), 1), w)
            y0, x0 = int(top * (h - height + 1)), int(left * (w - width + 1))
            rectangles.append((range(y0, y0 + height), range(x0, x0 + width)))
        rectangles.append((range(h), range(w)))
        chosen: list[tuple[int, int]] = []
        for rows, columns in rectangles:
            for y, x in scans[number]:
                inside = y in rows and x in columns
                if inside and (y, x) not in chosen and len(chosen) < count:
                    chosen.append((y, x))
        assert masks[b].nonzero().tolist() == [list(place) for place in sorted(chosen)]


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([SquareMasking, CentralMasking]),
    st.integers(2, 16),
    st.integers(2, 16),
    st.sampled_from([(8, 8), (4, 8), (8, 4)]),
    st.integers(1, 99),
    st.integers(0, 2**31),
)
def test_square__is_one_as_far_as_the_count_and_the_image_allow(
    cls: type[SquareMasking],
    h: int,
    w: int,
    unit: tuple[int, int],
    share: int,
    seed: int,
) -> None:
    p, q = unit
    masking = cls(unit, share / 100)
    count = -(-h * w * share // 100)
    assume(count < h * w)
    mask = masking(5, (h * p, w * q), generator=seeded(seed))
    side = math.sqrt(count * p * q)
    for cells in mask.cells:
        assert is_nearly_a_rectangle(cells)
        rows, columns = sides(cells)
        if side <= min((h - 1) * p, (w - 1) * q):
            assert abs(rows * p - side) < p + q
            assert abs(columns * q - side) < p + q


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [((224, 224), 64 / 196, (3, 11)), ((112, 112), 25 / 49, (1, 6))],
)
def test_central__is_the_central_square_where_there_is_one(
    size: tuple[int, int], ratio: float, expected: tuple[int, int]
) -> None:
    # 8 x 8 of 14 x 14 patches and 5 x 5 of 7 x 7.
    first, last = expected
    cells = CentralMasking(16, ratio - 1e-9)(20, size, generator=seeded()).cells
    square = torch.zeros_like(cells)
    square[:, first:last, first:last] = True
    assert torch.equal(cells, square)


def test_square__lies_anywhere_with_the_same_chance() -> None:
    # 2 x 2 of 4 x 5 patches: 3 x 4 places.
    cells = SquareMasking(16, 0.2)(24_000, (64, 80), generator=seeded()).cells
    places, counts = torch.unique(cells, dim=0, return_counts=True)
    assert len(places) == 12
    assert all(sides(place) == (2, 2) for place in places)
    # 2000 each; the standard error is 43.
    assert (counts - 2000).abs().max() < 5 * 43


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 16),
    st.integers(2, 16),
    st.integers(1, 99),
    st.integers(0, 2**31),
)
def test_inverse_block__leaves_one_rectangle_visible(
    h: int, w: int, share: int, seed: int
) -> None:
    count = -(-h * w * share // 100)
    assume(count < h * w)
    masking = InverseBlockMasking(8, share / 100, roll=False)
    mask = masking(5, (h * 8, w * 8), generator=seeded(seed))
    assert all(is_nearly_a_rectangle(~cells) for cells in mask.cells)

    # The same, rolled: some roll brings the rectangle back.
    rolled = InverseBlockMasking(8, share / 100)(
        2, (h * 8, w * 8), generator=seeded(seed)
    )
    for cells in ~rolled.cells:
        assert any(
            is_nearly_a_rectangle(cells.roll((y, x), (0, 1)))
            for y in range(h)
            for x in range(w)
        )


def test_inverse_block__has_wide_and_tall_ones() -> None:
    mask = InverseBlockMasking(16, 0.75, roll=False)(2000, (224, 224), None, seeded())
    shapes = [sides(cells) for cells in ~mask.cells]
    aspects = torch.tensor([math.log(height / width) for height, width in shapes])
    # Uniform in [-log 2, log 2], the sides rounded: mean 0, deviation log 2 / sqrt 3.
    assert abs(aspects.mean()) < 5 * 0.4 / math.sqrt(2000)
    assert aspects.std().item() == pytest.approx(math.log(2) / math.sqrt(3), rel=0.1)


def test_inverse_block__rolled_shows_every_cell_as_often() -> None:
    mask = InverseBlockMasking(16, 0.65)(20_000, (96, 64), generator=seeded())
    share = mask.cells.float().mean(dim=0)
    # 16 of 24; the standard error of a share is 0.0033.
    assert (share - 16 / 24).abs().max() < 5 * 0.0033


def test_grid__keeps_one_of_four() -> None:
    mask = GridMasking((8, 4))(4000, (32, 24), generator=seeded())
    assert mask.cells.shape == (4000, 4, 6)
    assert mask.count == Mask.of(mask.cells).count == 18
    cells = (~mask.cells).view(4000, 2, 2, 3, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert (cells.sum(dim=-1) == 1).all()
    assert (cells == cells[:, :1, :1]).all()  # the same place everywhere
    share = cells[:, 0, 0].float().mean(dim=0)
    # One of 4; the standard error of a share is 0.0068.
    assert (share - 0.25).abs().max() < 5 * 0.0068


def test_grid__refuses() -> None:
    with pytest.raises(ValueError, match=r"0\.75, got 0\.5"):
        GridMasking(16, 0.5)
    with pytest.raises(ValueError, match="even number of patches.*got 3 x 4"):
        GridMasking(16)(1, (48, 64))
