"""Pictures of the masks: how far masked pixels are from visible ones, and draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from torch import Generator

from lightly_mim.files import atomic_write
from lightly_mim.masking import (
    BlockMasking,
    CentralMasking,
    GridMasking,
    InverseBlockMasking,
    Mask,
    Masking,
    MixtureMasking,
    RandomMasking,
    SquareMasking,
    average_distance,
)
from simmim_paper.rows import RATIO, UNITS

NUM_DRAWN = 64  # masks behind each point of the picture


def distance_curves(side: int, fine: int) -> dict[str, list[tuple[float, float]]]:
    """Returns AvgDist in pixels by the share of masked pixels, for ways to mask.

    Args:
        side:
            Side of the images in pixels.
        fine:
            Side of the patches that rectangles are made of.

    Returns:
        Points (share, AvgDist) of each way, in order of the share.
    """
    ratios = [percent / 100 for percent in range(5, 100, 5)]
    rectangles: dict[str, Callable[..., Masking]] = {
        "block-wise": BlockMasking,
        "square": SquareMasking,
        "central square": CentralMasking,
        "inverse block": InverseBlockMasking,
    }
    ways: dict[str, list[Callable[[], Masking]]] = {
        f"random {unit} px": [partial(RandomMasking, unit, ratio) for ratio in ratios]
        for unit in UNITS
        if side % unit == 0 and side > 2 * unit
    }
    for name, masking in rectangles.items():
        ways[f"{name}, {fine} px"] = [partial(masking, fine, r) for r in ratios]
    if side // fine % 2 == 0:
        ways[f"grid, {fine} px"] = [partial(GridMasking, fine)]
    return {name: _distances(makers, side) for name, makers in ways.items()}


def _distances(
    makers: Sequence[Callable[[], Masking]], side: int
) -> list[tuple[float, float]]:
    points: dict[float, float] = {}
    for make in makers:
        try:
            drawn = make()(NUM_DRAWN, (side, side), None, Generator().manual_seed(0))
        except ValueError:  # so few units that all of them would be masked
            continue
        mask = Mask.of(drawn)
        share = mask.count / math.prod(mask.grid)
        points[share] = average_distance(mask, (side, side)).mean().item()
    return sorted(points.items())


def draw_distances(
    curves: dict[str, list[tuple[float, float]]], side: int, path: Path
) -> None:
    """Draws AvgDist by the share of masked pixels.

    Args:
        curves:
            See `distance_curves`.
        side:
            Side of the images in pixels.
        path:
            The PNG file.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    units = [name for name in curves if name.startswith("random")]
    blues = ["#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b"][-len(units) :]
    others = ["#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#333333"]
    colours = dict(zip(units, blues, strict=True))
    rest = [name for name in curves if name not in units]
    colours |= dict(zip(rest, others, strict=False))
    for name, points in curves.items():
        x = [100 * share for share, _ in points]
        y = [distance for _, distance in points]
        axes.plot(
            x,
            y,
            color=colours[name],
            linestyle="-" if name in units else "--" if len(points) > 1 else "",
            linewidth=1.8,
            marker="" if len(points) > 1 else "D",
            label=name,
        )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0, 100)
    axes.set_xlabel("masked pixels, %")
    axes.set_ylabel("AvgDist, pixels")
    axes.set_title(
        f"Mean distance to the nearest visible pixel, {side} x {side} pixels"
    )
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


def draw_masks(side: int, unit: int, path: Path) -> None:
    """Draws eight masks of each way to mask, in dark what is masked.

    Args:
        side:
            Side of the images in pixels.
        unit:
            Side in pixels of what random masking takes as a whole. Rectangles are made
            of patches of half that side.
        path:
            The PNG file.
    """
    fine = unit // 2
    ways: dict[str, Masking] = {
        f"random, {unit} px": RandomMasking(unit, RATIO),
        f"random, {fine} px": RandomMasking(fine, RATIO),
        "block-wise": BlockMasking(fine, RATIO),
        "square": SquareMasking(fine, RATIO),
        "central square": CentralMasking(fine, RATIO),
        "inverse block": InverseBlockMasking(fine, RATIO),
        "grid": GridMasking(fine),
    }
    mixed = [RandomMasking(unit, RATIO), *list(ways.values())[2:4]]
    ways["a third each"] = MixtureMasking(mixed)
    figure = Figure(figsize=(7.5, 0.85 * len(ways)), layout="constrained")
    grid = figure.subplots(len(ways), 8)
    for row, (name, masking) in zip(grid, ways.items(), strict=True):
        masks = Mask.of(masking(8, (side, side), None, Generator().manual_seed(0)))
        for axes, pixels in zip(row, masks.pixels((side, side)), strict=True):
            axes.imshow(pixels[0].numpy(), cmap="Greys", vmin=0, vmax=1.3)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
