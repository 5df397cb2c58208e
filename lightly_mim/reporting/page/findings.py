"""What runs found: tables, and what the intervals allow to say, for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scipy.stats import binomtest

from lightly_mim.reporting.page.facts import duration, training_seconds, words_of
from lightly_mim.reporting.page.reading import (
    RunFiles,
    as_mapping,
    as_mappings,
    as_number,
    as_text,
    dig,
)
from lightly_mim.reporting.study import PIXELS, RANDOM

Row = Mapping[str, Any]

BASELINES = RANDOM, PIXELS
_PROTOCOLS = {
    "knn": "kNN",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "attentive": "attentive probe",
    "low_label": "few labels",
    "linear_mae": "MAE's linear probe",
    "finetune": "fine-tuning",
}
_MAX_MATRIX = 30  # classes of a confusion matrix
_MAX_CLASSES = 60  # of a list
_SHORT = {
    "batch_size": "batch",
    "layer_decay": "layer decay",
    "learning_rate": "lr",
    "temperature": "T",
    "weight_decay": "wd",
}


def percent(value: Any) -> str:
    """Returns a share in per cent with one decimal, or nothing."""
    number = as_number(value)
    return "" if number is None else f"{100 * number:.1f}"


def protocol_name(row: Row) -> str:
    """Returns what the page calls a protocol and its variant."""
    name = _PROTOCOLS.get(str(row["protocol"]), as_text(row["protocol"], 60))
    variant = as_text(row.get("variant") or "", 60)
    return f"{name}, {variant}" if variant else name


def model_name(row: Row, run: RunFiles) -> str:
    """Returns what the page calls the model of a row: the run, or a baseline."""
    name = str(row["model"])
    return as_text(name, 80) if name in BASELINES else run.name


def result_lines(run: RunFiles) -> list[dict[str, Any]]:
    """Returns the rows of the table of results.

    Each has `model`, `baseline` (whether it is one), `protocol`, `layer`, `pooling`,
    `chosen`, the accuracies `top1`, `low`, `high`, `top5` and `mean_class` in [0, 1] or
    None, `num_test` and `seconds`.
    """
    rows = run.results["rows"] if run.results else []
    return [_line(row, run, "top1") for row in rows]


def dense_lines(run: RunFiles) -> list[dict[str, Any]]:
    """Returns the rows of the table of a dense evaluation, as `result_lines`.

    What is `top1` there is the mean intersection over union.
    """
    names = "miou", "miou_low", "miou_high"
    return [
        _line(row, run, "miou")
        for row in (run.dense["rows"] if run.dense else [])
        if {"model", "protocol"} <= row.keys()
        and None not in [as_number(row.get(name)) for name in names]
    ]


def _line(row: Mapping[str, Any], run: RunFiles, score: str) -> dict[str, Any]:
    chosen = as_mapping(row.get("hyperparameters"))
    spent = [as_number(row.get(n)) for n in ("feature_seconds", "seconds")]
    return {
        "model": model_name(row, run),
        "baseline": row["model"] in BASELINES,
        "protocol": protocol_name(row),
        "layer": words_of(row["layer"]) if row.get("layer") is not None else "",
        "pooling": as_text(row.get("pooling", ""), 40),
        "chosen": ", ".join(
            f"{_SHORT.get(str(k), as_text(k, 40))} {words_of(v)}"
            for k, v in chosen.items()
        ),
        "top1": as_number(row[score]),
        "low": as_number(row[f"{score}_low"]),
        "high": as_number(row[f"{score}_high"]),
        "top5": as_number(row.get("top5")),
        "mean_class": as_number(row.get("mean_class")),
        "num_test": row.get("num_test"),
        "seconds": sum(s for s in spent if s is not None) if any(spent) else None,
    }


def sentences(run: RunFiles) -> list[str]:
    """Returns what the intervals allow to say of the encoder and its baselines."""
    rows = run.results["rows"] if run.results else []
    own = [row for row in rows if row["model"] not in BASELINES]
    said = []
    for row in own:
        others = [
            other
            for other in rows
            if other["model"] in BASELINES
            and (other["protocol"], other.get("variant"))
            == (row["protocol"], row.get("variant"))
        ]
        name = protocol_name(row)
        for other in others:
            said.append(f"{as_beginning(name)}: {compare(row, other, other['model'])}")
    if said:
        tested = {as_number(row.get("num_test")) for row in own}
        one = tested.pop() if len(tested) == 1 else None
        count = f"the {one:g} test images" if one is not None else "test images"
        seed = words_of(dig(run.results, "arguments", "seed"))
        said.append(
            f"The intervals (95 %) cover the draw of {count}, not another seed of "
            f"pretraining or of the probes (this is seed {seed}): run more seeds "
            "before you report a small difference."
        )
    return said


def as_beginning(name: str) -> str:
    """Returns a name as a sentence begins; kNN begins small."""
    return name if name.startswith("kNN") else f"{name[:1].upper()}{name[1:]}"


def compare(row: Row, other: Row, name: str) -> str:
    """Returns what two intervals allow to say, in a sentence.

    Args:
        row:
            A row of results.
        other:
            The row that it is compared with.
        name:
            What that is called.
    """
    points = 100 * (row["top1"] - other["top1"])
    said = (
        f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} {name} "
        f"({percent(row['top1'])} and {percent(other['top1'])} %)"
    )
    apart = (
        f"{said}. The intervals do not overlap: beyond the draw of test images, it is"
    )
    if row["top1_low"] > other["top1_high"]:
        return f"{apart} better."
    if row["top1_high"] < other["top1_low"]:
        return f"{apart} worse."
    return (
        f"{said}. The intervals overlap: they do not say which one is better. "
        "More test images would."
    )


def headline(run: RunFiles) -> list[tuple[str, str, str]]:
    """Returns the numbers at the top: value, name, and what belongs to it."""
    shown: list[tuple[str, str, str]] = []
    lines = result_lines(run)
    for line in [line for line in lines if not line["baseline"]][:3]:
        rivals = [
            other
            for other in lines
            if other["baseline"] and other["protocol"] == line["protocol"]
        ]
        beside = f"{percent(line['low'])} to {percent(line['high'])}"
        if rivals:
            best = max(rivals, key=lambda other: other["top1"])
            beside += f" · {best['model']} {percent(best['top1'])}"
        shown.append((f"{percent(line['top1'])} %", line["protocol"], beside))
    for column, name in (
        ("train_loss", "training loss"),
        ("val_loss", "validation loss"),
    ):
        series = run.metrics.get(column)
        if series and series.values:
            first, last = series.values[0], series.values[-1]
            shown.append((f"{last:.4g}", name, f"{first:.4g} in the first epoch"))
    seconds = training_seconds(run)
    if seconds:
        speed = run.metrics["images_per_second"].values[-1]
        shown.append(
            (duration(seconds), "in training steps", f"{speed:.4g} images per second")
        )
    return shown


def interval_axis(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """Returns the ends of the axis that intervals are drawn on, in steps of 5 %.

    Args:
        lines:
            Lines of a table of results.
    """
    low = min(line["low"] for line in lines)
    high = max(line["high"] for line in lines)
    ends = math.floor(20 * low) / 20, math.ceil(20 * high) / 20
    return ends if ends[1] > ends[0] else (ends[0], ends[0] + 0.05)


def heat_map(run: RunFiles) -> dict[str, Any] | None:
    """Returns layer x pooling of each row whose protocol chose among several.

    Returns:
        `layers` and `rows`, each with `title`, `pool` and a cell for each layer:
        `text`, `share` (from 0 for the lowest of the row's protocol to 1 for the
        highest) and `chosen`. None if there is no such row.
    """
    rows: list[dict[str, Any]] = []
    all_layers: set[int] = set()
    for row in run.results["rows"] if run.results else []:
        cells: dict[tuple[int, str], float] = {}
        for entry in as_mappings(row.get("selection")):
            layer = as_number(entry.get("layer"))
            value = as_number(entry.get("accuracy"))
            if layer is not None and value is not None:
                key = (int(layer), as_text(entry.get("pooling", ""), 40))
                cells[key] = max(value, cells.get(key, value))
        layers = {layer for layer, _ in cells}
        pools = list(dict.fromkeys(pool for _, pool in cells))
        if len(cells) < 2 or len(layers | all_layers) > 100 or len(pools) > 20:
            continue
        all_layers |= layers
        low, high = min(cells.values()), max(cells.values())
        span = (high - low) or 1.0
        chosen = (row.get("layer"), as_text(row.get("pooling", ""), 40))
        for pool in pools:
            entries = {
                layer: {
                    "text": percent(value),
                    "share": (value - low) / span,
                    "chosen": (layer, pool) == chosen,
                }
                for (layer, other), value in cells.items()
                if other == pool
            }
            title = f"{model_name(row, run)}, {protocol_name(row)}"
            rows.append({"title": title, "pool": pool, "cells": entries})
    return {"layers": sorted(all_layers), "rows": rows} if rows else None


def classes(run: RunFiles) -> list[dict[str, Any]]:
    """Returns the confusion matrix and the accuracy per class, for each own row."""
    names = dig(run.results, "data", "classes")
    found: list[dict[str, Any]] = []
    for row in run.results["rows"] if run.results else []:
        matrix = _matrix(row.get("confusion"))
        if matrix is None or row["model"] in BASELINES:
            continue
        count = len(matrix)
        named = isinstance(names, list) and len(names) == count
        labels = (
            [as_text(n, 60) for n in names] if named else list(map(str, range(count)))
        )
        draws = len(row["draws"]) if isinstance(row.get("draws"), list) else 0
        draws = max(draws, 1)
        found.append(
            {
                "key": f"classes_{len(found)}",
                "title": protocol_name(row),
                "labels": labels,
                "matrix": _shares(matrix) if count <= _MAX_MATRIX else None,
                "confused": _confused(matrix, labels),
                "bars": _bars(matrix, labels, draws),
                "draws": draws,
            }
        )
    return found


def _matrix(value: Any) -> list[list[int]] | None:
    """Returns a square matrix of counts, None if it is none."""
    if not isinstance(value, list) or not value:
        return None
    for line in value:
        if not isinstance(line, list) or len(line) != len(value):
            return None
        if any(type(entry) is not int or entry < 0 for entry in line):
            return None
    return value


def _shares(matrix: list[list[int]]) -> list[list[tuple[int, float]]]:
    return [[(n, n / max(sum(line), 1)) for n in line] for line in matrix]


def _confused(matrix: list[list[int]], labels: list[str]) -> list[tuple[str, str, str]]:
    """Returns the pairs of classes that are confused most: true, said, how often."""
    pairs = [
        (count, sum(line), row, column)
        for row, line in enumerate(matrix)
        for column, count in enumerate(line)
        if row != column and count
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[2], pair[3]))
    return [
        (labels[row], labels[column], f"{count} of {total}")
        for count, total, row, column in pairs[:8]
    ]


def _bars(matrix: list[list[int]], labels: list[str], draws: int) -> dict[str, Any]:
    """Returns the accuracy of each class, the worst first, with Wilson's interval."""
    bars: list[dict[str, Any]] = []
    for number, line in enumerate(matrix):
        total = sum(line)
        if not total:
            continue
        bar: dict[str, Any] = {
            "label": labels[number],
            "value": line[number] / total,
            "count": total // draws,
        }
        if draws == 1:
            interval = binomtest(line[number], total).proportion_ci(method="wilson")
            bar |= {"low": float(interval.low), "high": float(interval.high)}
        bars.append(bar)
    bars.sort(key=lambda bar: bar["value"])
    left_out = max(len(bars) - _MAX_CLASSES, 0)
    if left_out:
        half = _MAX_CLASSES // 2
        bars = bars[:half] + bars[-half:]
    return {"bars": bars, "left_out": left_out}
