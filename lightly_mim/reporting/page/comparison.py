"""Several runs beside each other: what differs between them, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightly_mim.reporting.page.facts import class_name, state, words_of
from lightly_mim.reporting.page.findings import (
    BASELINES,
    as_beginning,
    percent,
    protocol_name,
)
from lightly_mim.reporting.page.reading import (
    RunFiles,
    as_mapping,
    as_number,
    as_text,
    dig,
)

_MAX_VARIED = 8
_MAX_MULTIPLES = 12
_MAX_CATEGORIES = 30
# Settings that do not tell runs apart: where they lie, and what follows from others.
_NOT_SETTINGS = {
    *("out", "data", "val", "normalize", "num_workers", "progress", "loggers"),
    *("callbacks", "tensorboard", "save_every_minutes", "log_every", "devices"),
    *("recipe.source", "recipe.encoder", "recipe.img_size"),
}
# A number that is given is the recipe's, too.
_GIVEN = ("epochs", "batch_size", "lr", "warmup_epochs", "weight_decay", "min_scale")


def compare_runs(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Returns the table of a study, and its small multiples.

    Args:
        runs:
            The runs.

    Returns:
        `varied` and `scores`, the names of columns; `lines`, one for each run; `says`,
        what the intervals allow to say; `paper`, whether a paper's number is there; and
        `multiples`, figures of a score over a setting.
    """
    settings = [_settings(run) for run in runs]
    varied = _varied(settings)
    scores = [_scores(run) for run in runs]
    columns = list(dict.fromkeys(name for found in scores for name in found))
    papers = [_paper(run) for run in runs]
    lines = [
        {
            "name": run.name,
            "varied": [words_of(each.get(name, "")) for name in varied],
            "scores": [_cell(found.get(name)) for name in columns],
            "paper": paper,
            "state": state(run)[1],
        }
        for run, each, found, paper in zip(runs, settings, scores, papers, strict=True)
    ]
    return {
        "varied": [_short(name) for name in varied],
        "scores": columns,
        "lines": lines,
        "says": _sentences(runs, scores, columns),
        "paper": any(papers),
        "multiples": _multiples(runs, settings, varied, scores, columns, papers),
    }


def _settings(run: RunFiles) -> dict[str, Any]:
    """Returns the settings of a run by their names, what is nested as recipe.lr."""
    config = dict(run.config or {})
    for name in _GIVEN:
        config.pop(name, None)
    method = as_mapping(config.pop("method", None))
    flat: dict[str, Any] = {}
    if method:
        flat["method"] = class_name(method)
        flat |= as_mapping(method.get("init_args"))
        flat |= as_mapping(method.get("dict_kwargs"))
    recipe = as_mapping(config.pop("recipe", None))
    flat |= {f"recipe.{name}": value for name, value in recipe.items()}
    flat |= config
    if not run.config and run.results:
        flat["encoder"] = dig(run.results, "encoder", "name")
    return {str(k): v for k, v in flat.items() if k not in _NOT_SETTINGS}


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the settings that differ between runs."""
    names = dict.fromkeys(name for each in settings for name in each)
    found: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name in names:
        values = tuple(repr(each.get(name)) for each in settings)
        # Two settings that always change together are shown once.
        if len(set(values)) > 1 and values not in seen:
            seen.add(values)
            found.append(name)
    return found[:_MAX_VARIED]


def _short(name: str) -> str:
    return as_text(name, 60).removeprefix("recipe.").replace("_", " ")


def _scores(run: RunFiles) -> dict[str, dict[str, float]]:
    """Returns the numbers of a run: accuracies in per cent, and the last losses."""
    found: dict[str, dict[str, float]] = {}
    for row in run.results["rows"] if run.results else []:
        if row["model"] not in BASELINES:
            found[f"{protocol_name(row)} %"] = {
                name: 100 * row[key]
                for name, key in (
                    ("value", "top1"),
                    ("low", "top1_low"),
                    ("high", "top1_high"),
                )
            }
    for column, name in (
        ("val_loss", "validation loss"),
        ("train_loss", "training loss"),
    ):
        series = run.metrics.get(column)
        if series and series.values and math.isfinite(series.values[-1]):
            found[name] = {"value": series.values[-1]}
    return found


def _cell(score: Mapping[str, float] | None) -> dict[str, Any]:
    if score is None:
        return {"value": None, "text": "", "beside": ""}
    if "low" in score:
        low, high = (percent(score[name] / 100) for name in ("low", "high"))
        text, beside = percent(score["value"] / 100), f"{low} to {high}"
    else:
        text, beside = f"{score['value']:.4g}", ""
    return {"value": score["value"], "text": text, "beside": beside}


def _paper(run: RunFiles) -> str:
    """Returns what a paper has for a run, as its study says."""
    axes = as_mapping(dig(run.row, "axes"))
    said = [as_text(as_mapping(axis).get("paper") or "", 60) for axis in axes.values()]
    return ", ".join(dict.fromkeys(text for text in said if text))


def _sentences(
    runs: Sequence[RunFiles],
    scores: Sequence[Mapping[str, Mapping[str, float]]],
    columns: Sequence[str],
) -> list[str]:
    """Returns which runs are the best ones, as far as the intervals tell."""
    said = []
    for name in columns:
        rows = [
            (run.name, found[name])
            for run, found in zip(runs, scores, strict=True)
            if "low" in found.get(name, {})
        ]
        if len(rows) < 2:
            continue
        best, top = max(rows, key=lambda row: row[1]["value"])
        near = [n for n, score in rows if n != best and score["high"] >= top["low"]]
        label = name.removesuffix(" %")
        begin = f"{as_beginning(label)}: {best} is highest ({top['value']:.1f} %)"
        if not near:
            said.append(f"{begin}, beyond the draw of the test images.")
        elif len(near) == len(rows) - 1:
            said.append(
                f"{begin}, but the intervals of all runs overlap with its own: they do "
                "not say which one is best."
            )
        else:
            shown = ", ".join(near[:5]) + (", ..." if len(near) > 5 else "")
            said.append(
                f"{begin}. The intervals do not tell it from {len(near)} of the "
                f"{len(rows) - 1} others: {shown}."
            )
    return said


def _multiples(
    runs: Sequence[RunFiles],
    settings: Sequence[Mapping[str, Any]],
    varied: Sequence[str],
    scores: Sequence[Mapping[str, Mapping[str, float]]],
    columns: Sequence[str],
    papers: Sequence[str],
) -> list[dict[str, Any]]:
    """Returns figures of each accuracy, or else each loss, over each setting."""
    exact = [c for c in columns if any("low" in found.get(c, {}) for found in scores)]
    figures: list[dict[str, Any]] = []
    for setting in varied:
        values = [each.get(setting) for each in settings]
        numbers = [as_number(value) for value in values]
        words = [words_of(value) for value in values]
        plain = None not in numbers and len(set(numbers)) > 1
        categories = list(dict.fromkeys(words))
        if not plain and len(categories) > _MAX_CATEGORIES:
            continue
        for column in exact or columns:
            points: list[dict[str, Any]] = []
            for number, (run, found) in enumerate(zip(runs, scores, strict=True)):
                if column not in found:
                    continue
                score = found[column]
                x = numbers[number] if plain else categories.index(words[number])
                beside = _cell(score)
                point = {
                    "x": x,
                    "y": score["value"],
                    "colour": number,
                    "label": run.name,
                    "text": f"{_short(setting)} {words[number]}: {beside['text']}"
                    + (f" ({beside['beside']})" if beside["beside"] else ""),
                }
                point |= {key: score[key] for key in ("low", "high") if key in score}
                points.append(point)
                paper = _as_percent(papers[number])
                if paper is not None and "fine-tuning" in column:
                    said: dict[str, Any] = {
                        "label": "paper",
                        "text": papers[number],
                        "paper": True,
                    }
                    points.append({"x": x, "y": paper, "colour": number, **said})
            if len(points) > 1 and len(figures) < _MAX_MULTIPLES:
                positive = [n for n in numbers if n is not None and n > 0]
                many = plain and len(positive) == len(numbers)
                figures.append(
                    {
                        "key": f"multiple_{len(figures)}",
                        "title": f"{column.removesuffix(' %')} over {_short(setting)}",
                        "x": _short(setting),
                        "y": column,
                        "says": f"{column}, each dot a run"
                        + (", bars 95 % intervals" if exact else "")
                        + (
                            ", rings the paper's" if any(map(_is_paper, points)) else ""
                        ),
                        "categories": None if plain else categories,
                        "log": bool(many and max(positive) / min(positive) >= 20),
                        "points": points,
                    }
                )
    return figures


def _is_paper(point: Mapping[str, Any]) -> bool:
    return bool(point.get("paper"))


def _as_percent(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
