"""The curves of runs as data: which lines stand in which figure, and their points.

A figure is a dictionary that JSON can hold, so that the page, the PNG file and the JSON
file beside the page show the same. Points are [step, value, epoch], as `metrics.csv`
has them; a value that is not finite is null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lightly_mim.reporting.page.reading import RunFiles, Series, as_number, as_text

# Of a line on the page. A screen has no more columns, and PNG and JSON have all.
MAX_POINTS = 600


class _Line(NamedTuple):
    column: str  # a regular expression
    label: str
    look: str  # "line", "faint" or "dashed"


class _Plan(NamedTuple):
    key: str
    title: str
    y: str
    lines: tuple[_Line, ...]
    says: str = ""  # what to look at
    factor: float = 1.0


_PLANS = (
    _Plan(
        "loss",
        "Loss",
        "loss",
        (
            _Line("train_loss_step", "training, one batch", "faint"),
            _Line("train_loss", "training, epoch", "line"),
            _Line("val_loss", "validation", "dashed"),
        ),
        "Of masked pixels alone. Losses of different targets, masks or methods "
        "cannot be compared.",
    ),
    _Plan(
        "probe",
        "What the features tell while they are learned",
        "top-1 accuracy, %",
        (
            _Line("probe_top1", "probe", "line"),
            _Line("knn_top1", "kNN, leave one out", "line"),
        ),
        "On whole images, without training the encoder for it. It shows where a run is "
        "heading; results to report come from an evaluation.",
        100.0,
    ),
    _Plan(
        "alignment",
        "Two crops of an image find each other",
        "share of other images that are farther",
        (_Line("alignment", "alignment", "line"),),
        "1 if each crop is nearest to the other crop of its image, 0.5 by chance.",
    ),
    _Plan(
        "rank",
        "How many directions the features fill",
        "RankMe",
        (_Line(r"rankme(?:.*)", "rank", "line"),),
        "Near 1 all images get the same feature: a collapse. Of two healthy encoders, "
        "the one with the higher rank need not be the better one.",
    ),
    _Plan(
        "uniformity",
        "How evenly the features spread",
        "uniformity",
        (_Line("uniformity", "uniformity", "line"),),
        "0 if all images get the same feature, lower the more evenly they cover all "
        "directions.",
    ),
    _Plan(
        "lr",
        "Learning rate",
        "learning rate",
        (_Line("lr(?:[-/].*)?", "learning rate", "line"),),
    ),
    _Plan(
        "grad_norm",
        "Gradient norm",
        "norm, before clipping",
        (_Line("grad_norm", "gradient norm", "line"),),
    ),
    _Plan(
        "avg_dist",
        "AvgDist of the masks",
        "pixels",
        (_Line("avg_dist(?:_step|_epoch)?", "AvgDist", "line"),),
        "The mean distance from a masked pixel to the nearest visible one. SimMIM's "
        "paper finds 10 to 20 pixels good for images of 192 pixels.",
    ),
    _Plan(
        "speed",
        "Speed",
        "images per second",
        (_Line("images_per_second", "speed", "line"),),
    ),
)
_MAX_OTHERS = 12


def curves(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Returns the figures of what runs have logged.

    Args:
        runs:
            The runs, drawn over each other.

    Returns:
        For each figure with anything in it a dictionary of `key`, `title`, `x`, `y`,
        `says` (a sentence), `series` (each with `label`, `run`, `colour`, `look` and
        `points`), `marks` (each with `x`, `label`, `text` and `run`) and `lost` (what
        was not finite, a sentence).
    """
    figures = [_figure(plan, runs) for plan in (*_PLANS, *_others(runs))]
    return [figure for figure in figures if figure["series"]]


def _others(runs: Sequence[RunFiles]) -> Iterator[_Plan]:
    """Yields a figure for each column that is not known here."""
    known = [line.column for plan in _PLANS for line in plan.lines]
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    other = [n for n in names if not any(re.fullmatch(k, n) for k in known)]
    for name in other[:_MAX_OTHERS]:
        shown = as_text(name, 60)
        key = re.sub(r"\W+", "_", shown, flags=re.ASCII)
        line = _Line(re.escape(name), shown, "line")
        yield _Plan(f"other_{key}", shown, shown, (line,))


def _figure(plan: _Plan, runs: Sequence[RunFiles]) -> dict[str, Any]:
    series = []
    lost = []
    for number, run in enumerate(runs):
        columns = [
            (line, name, number_of)
            for line in plan.lines
            for names in [[n for n in run.metrics if re.fullmatch(line.column, n)]]
            for number_of in [len(names)]
            for name in names
        ]
        for place, (line, name, number_of) in enumerate(columns):
            found = run.metrics[name]
            label = line.label if number_of == 1 else as_text(name, 60)
            many = len(runs) > 1
            # A faint line has the colour of the one after it.
            faint = sum(line.look == "faint" for line, _, _ in columns[:place])
            points = _points(found, plan.factor)
            bad = sum(value is None for _, value, _ in points)
            if bad:
                where = next(step for step, value, _ in points if value is None)
                lost.append(
                    f"{bad} of {len(points)} values of {as_text(name, 60)}"
                    + (f" of {run.name}" if many else "")
                    + f" are not finite, the first one at step {where}."
                )
            series.append(
                {
                    "label": f"{run.name}: {label}" if many else label,
                    "run": run.name,
                    "column": name,
                    "colour": number if many else place - faint,
                    "look": line.look,
                    "points": points,
                }
            )
    return {
        "key": plan.key,
        "title": plan.title,
        "x": "optimiser step",
        "y": plan.y,
        "says": plan.says,
        "log": plan.key in ("loss", "lr", "grad_norm"),  # whether that may be asked for
        "series": series,
        "marks": [mark for run in runs for mark in _marks(run)],
        "lost": " ".join(lost),
    }


def _points(series: Series, factor: float) -> list[tuple[int, float | None, int]]:
    rows = zip(series.steps, series.values, series.epochs, strict=True)
    points = [
        (step, None if math.isnan(value) else value * factor, epoch)
        for step, value, epoch in rows
    ]
    return sorted(points, key=lambda point: point[0])


def _marks(run: RunFiles) -> Iterator[dict[str, Any]]:
    """Yields where a run went on after it had been cut."""
    for session in run.sessions[1:]:
        step = as_number(session.get("step"))
        if step is None:
            continue
        queued = bool(session.get("restarts"))
        when = as_text(session.get("time", ""), 40)
        label = "queued again" if queued else "resumed"
        said = f"{label} at step {step:g}" + (f", {when}" if when else "")
        yield {"x": step, "label": label, "text": said, "run": run.name}


def thinned(
    points: Sequence[tuple[int, float | None, int]], count: int = MAX_POINTS
) -> list[tuple[int, float | None, int]]:
    """Returns some of the points of a line, whose picture stays the same.

    Of each of `count` / 2 parts of the line its lowest and its highest point stay, and
    the first one that is not finite. No value is changed.

    Args:
        points:
            The points, sorted by their steps.
        count:
            About how many to keep. Fewer stay as they are.
    """
    if len(points) <= count:
        return list(points)
    parts = count // 2
    kept: set[int] = {0, len(points) - 1}
    for part in range(parts):
        first, last = (len(points) * p // parts for p in (part, part + 1))
        places = range(first, last)
        finite = [p for p in places if points[p][1] is not None]
        if finite:
            kept |= {
                min(finite, key=lambda place: points[place][1] or 0.0),
                max(finite, key=lambda place: points[place][1] or 0.0),
            }
        kept |= set(_first(p for p in places if points[p][1] is None))
    return [points[place] for place in sorted(kept)]


def _first(places: Iterable[int]) -> list[int]:
    return [place for _, place in zip(range(1), places, strict=False)]
