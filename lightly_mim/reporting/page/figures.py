"""The figures of a page as PNG and JSON files, for papers and slides."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightly_mim.files import atomic_write
from lightly_mim.reporting.page import findings
from lightly_mim.reporting.page.comparison import compare_runs
from lightly_mim.reporting.page.curves import curves
from lightly_mim.reporting.page.reading import RunFiles

FIGURES = "figures"
CURVES = "curves.png"

# Those of the page on white.
_COLOURS = (
    *("#2a64ad", "#c8561b", "#1f8a6b", "#a2408a"),
    *("#8a6d00", "#0f8aa8", "#5d6673", "#7a52c7"),
)
_LOOKS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8},
    "faint": {"linewidth": 0.9, "alpha": 0.4},
    "dashed": {"linewidth": 1.8, "linestyle": (0, (5, 3))},
}
_DPI = 160
_LONGEST = 40  # of a label


def write_figures(runs: Sequence[RunFiles], out: Path | str) -> list[Path]:
    """Writes each figure of the page as figures/NAME.png and figures/NAME.json.

    All curves together are in `curves.png` besides. The JSON files hold every value
    that was logged.

    Args:
        runs:
            What was read of the runs.
        out:
            The directory of the page.

    Returns:
        The paths of the files.

    Raises:
        OSError: If they cannot be written.
    """
    folder = Path(out) / FIGURES
    written = []
    lines = curves(runs)
    multiples = compare_runs(runs)["multiples"] if len(runs) > 1 else []
    for figure in [*lines, *multiples]:
        drawing, axes = _new(1)
        (_dots if "points" in figure else _lines)(axes[0], figure)
        written += _write(drawing, figure, folder / figure["key"])
    if len(runs) == 1:
        heat = findings.heat_map(runs[0])
        if heat is not None:
            rows = heat["rows"]
            written += _write(
                _heat(heat), {"layers": heat["layers"], "rows": rows}, folder / "layers"
            )
        for group in findings.classes(runs[0]):
            if group["matrix"] is not None:
                drawing = _confusion(group)
                written += _write(drawing, group, folder / f"confusion_{group['key']}")
    if lines:
        drawing, axes = _new(len(lines))
        for each, figure in zip(axes, lines, strict=False):
            _lines(each, figure)
        written.append(_save(drawing, Path(out) / CURVES))
    return written


def _new(count: int) -> tuple[Figure, list[Axes]]:
    columns = 1 if count == 1 else 2
    rows = math.ceil(count / columns)
    drawing = Figure(figsize=(6.4 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.7)
    return drawing, axes


def _lines(axes: Axes, figure: dict[str, Any]) -> None:
    for line in figure["series"]:
        steps = [point[0] for point in line["points"]]
        values = [math.nan if p[1] is None else p[1] for p in line["points"]]
        few = len(steps) <= 40 and line["look"] != "faint"
        axes.plot(
            steps,
            values,
            color=_COLOURS[line["colour"] % len(_COLOURS)],
            label=_plain(line["label"]),
            marker="o" if few else None,
            markersize=3.5,
            **_LOOKS[line["look"]],
        )
    for mark in figure["marks"]:
        axes.axvline(mark["x"], color="#9a6700", linewidth=0.9, linestyle=":")
    axes.set_title(_plain(figure["title"]), fontsize=10, loc="left")
    axes.set_xlabel(figure["x"], fontsize=9)
    axes.set_ylabel(_plain(figure["y"]), fontsize=9)
    if 1 < len(figure["series"]) <= 12:
        axes.legend(fontsize=8, frameon=False)


def _dots(axes: Axes, figure: dict[str, Any]) -> None:
    names = figure["categories"]
    for point in figure["points"]:
        colour = _COLOURS[point["colour"] % len(_COLOURS)]
        place = point["x"]
        if names:  # down the side, those of one beside each other
            same = [each for each in figure["points"] if each["x"] == place]
            place += 0.7 * ((same.index(point) + 0.5) / len(same) - 0.5)
        if "low" in point:
            ends, both = (point["low"], point["high"]), (place, place)
            line = (ends, both) if names else (both, ends)
            axes.plot(*line, color=colour, linewidth=3, alpha=0.3)
        fill = "none" if point.get("paper") else "full"
        spot = (point["y"], place) if names else (place, point["y"])
        axes.plot(*spot, "o", color=colour, fillstyle=fill)
    labels = (figure["x"], figure["y"])
    if names:
        labels = (figure["y"], "")
        axes.set_yticks(range(len(names)))
        axes.set_yticklabels([_plain(name) for name in names], fontsize=8)
        axes.invert_yaxis()
    elif figure["log"]:
        axes.set_xscale("log")
    axes.set_title(_plain(figure["title"]), fontsize=10, loc="left")
    axes.set_xlabel(_plain(labels[0]), fontsize=9)
    axes.set_ylabel(_plain(labels[1]), fontsize=9)


def _heat(heat: dict[str, Any]) -> Figure:
    rows, layers = heat["rows"], heat["layers"]
    shares = [
        [row["cells"].get(n, {}).get("share", math.nan) for n in layers] for row in rows
    ]
    texts = [[row["cells"].get(n, {}).get("text", "") for n in layers] for row in rows]
    names = [_plain(f"{row['title']}, {row['pool']}") for row in rows]
    return _table(shares, texts, list(map(str, layers)), names, "layer")


def _confusion(group: dict[str, Any]) -> Figure:
    shares = [[share for _, share in line] for line in group["matrix"]]
    texts = [[str(count) for count, _ in line] for line in group["matrix"]]
    names = [_plain(label) for label in group["labels"]]
    return _table(shares, texts, names, names, f"{_plain(group['title'])}: said")


def _table(
    shares: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    columns: Sequence[str],
    rows: Sequence[str],
    label: str,
) -> Figure:
    size = (2.5 + 0.65 * len(columns), 1.2 + 0.42 * len(rows))
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            light = shares[row][column] > 0.7
            colour = "white" if light else "#1c2024"
            axes.text(
                column, row, text, ha="center", va="center", color=colour, fontsize=8
            )
    axes.set_xticks(range(len(columns)))
    turned = max(map(len, columns)) > 6
    axes.set_xticklabels(
        columns,
        fontsize=8,
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
    )
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels(rows, fontsize=8)
    axes.set_xlabel(label, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return drawing


def _plain(text: str) -> str:
    """Returns a text that matplotlib has room for, and takes for no formula."""
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return short.replace("$", r"\$")


def _write(drawing: Figure, figure: dict[str, Any], stem: Path) -> list[Path]:
    json_file = stem.with_name(f"{stem.name}.json")
    with atomic_write(json_file) as temporary:
        temporary.write_text(json.dumps(figure, allow_nan=False, indent=1))
    return [_save(drawing, stem.with_name(f"{stem.name}.png")), json_file]


def _save(drawing: Figure, path: Path) -> Path:
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # Names in letters that matplotlib's font has not become boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        drawing.savefig(temporary, dpi=_DPI, format="png")
    return path
