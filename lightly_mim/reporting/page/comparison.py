"""Several runs beside each other: what differs between them, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from lightly_mim.reporting.page.facts import arguments_of, class_name, state, words_of
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
_MAX_MULTIPLES = 24
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
        `varied` and `scores`, the names of columns; `lines`, one for each run;
        `baselines`, lines of what the runs were compared with; `says`, what the
        intervals allow to say; `paper`, whether a paper's number is there; and
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
        "baselines": list(_baselines(runs, columns)),
        "says": _sentences(runs, scores, columns),
        "paper": any(papers),
        "multiples": _multiples(runs, settings, varied, scores, columns),
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
        for name, value in arguments_of(method).items():
            flat |= _flat(str(name), value)
    recipe = as_mapping(config.pop("recipe", None))
    flat |= {f"recipe.{name}": value for name, value in recipe.items()}
    flat |= config
    if not run.config and run.results:
        flat["encoder"] = dig(run.results, "encoder", "name")
    return {str(k): v for k, v in flat.items() if k not in _NOT_SETTINGS}


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Returns a setting, and those of the object that it is: masking, masking.ratio."""
    if not (isinstance(value, dict) and "class_path" in value):
        return {name: value}
    inner = arguments_of(value).items()
    parts = [_flat(f"{name}.{key}", each) for key, each in inner]
    return {name: class_name(value)} | {k: v for p in parts for k, v in p.items()}


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the settings that differ between runs.

    Left out is what one method alone has, and one of two that are the same.
    """
    names = dict.fromkeys(name for each in settings for name in each)
    methods = _parts([each.get("method") for each in settings])
    found: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name in names:
        values = [each.get(name) for each in settings]
        told = tuple(map(repr, values))
        alone = None in values and _parts(values) == methods
        if len(set(told)) > 1 and told not in seen and not alone:
            seen.add(told)
            found.append(name)
    return found[:_MAX_VARIED]


def _parts(values: Sequence[Any]) -> list[int]:
    """Returns for each run the first one with the same value."""
    told = [repr(value) for value in values]
    return [told.index(each) for each in told]


def _short(name: str) -> str:
    shown = as_text(name, 60).removeprefix("recipe.")
    return shown.replace("_", " ").replace(".", " ")


def _scores(run: RunFiles) -> dict[str, dict[str, float]]:
    """Returns the numbers of a run: accuracies in per cent, and the last losses."""
    rows = run.results["rows"] if run.results else []
    found = {
        _column(row): _accuracy(row) for row in rows if row["model"] not in BASELINES
    }
    for column, name in (
        ("val_loss", "validation loss"),
        ("train_loss", "training loss"),
    ):
        series = run.metrics.get(column)
        if series and series.values and math.isfinite(series.values[-1]):
            found[name] = {"value": series.values[-1]}
    return found


def _column(row: Mapping[str, Any]) -> str:
    return f"{protocol_name(row)} %"


def _accuracy(row: Mapping[str, Any]) -> dict[str, float]:
    keys = {"value": "top1", "low": "top1_low", "high": "top1_high"}
    return {name: 100 * row[key] for name, key in keys.items()}


def _baselines(
    runs: Sequence[RunFiles], columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yields a line for each baseline, put together from all runs that have it."""
    rows = [row for run in runs if run.results for row in run.results["rows"]]
    for name in BASELINES:
        cells = []
        for column in columns:
            own = [r for r in rows if r["model"] == name and _column(r) == column]
            values = [_accuracy(row)["value"] for row in own]
            cell = _cell(_accuracy(own[0]) if own else None)
            if len(set(values)) > 1:
                ends = " to ".join(percent(v / 100) for v in (min(values), max(values)))
                mean = fmean(values)
                cell = {
                    "value": mean,
                    "text": percent(mean / 100),
                    "beside": f"mean of {len(values)}, {ends}",
                }
            cells.append(cell)
        if any(cell["text"] for cell in cells):
            yield {"name": name, "scores": cells}


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


class _Over(NamedTuple):
    """What scores are drawn over: a setting that differs, or an axis of a study."""

    name: str
    places: list[float | None]  # of each run, None where it is not part of it
    words: list[str]
    categories: list[str] | None  # by place; None for numbers
    papers: list[str]


def _multiples(
    runs: Sequence[RunFiles],
    settings: Sequence[Mapping[str, Any]],
    varied: Sequence[str],
    scores: Sequence[Mapping[str, Mapping[str, float]]],
    columns: Sequence[str],
) -> list[dict[str, Any]]:
    """Returns figures of each accuracy, or else each loss, over each setting."""
    exact = [c for c in columns if any("low" in found.get(c, {}) for found in scores)]
    swept = list(_axes(runs)) or list(_settings_as_axes(settings, varied))
    figures: list[dict[str, Any]] = []
    for over in swept:
        for column in exact or columns:
            points = list(_dots(runs, scores, over, column))
            if sum(not point.get("paper") for point in points) < 2:
                continue
            numbers = [place for place in over.places if place is not None]
            positive = over.categories is None and min(numbers) > 0
            paper = any(point.get("paper") for point in points)
            figures.append(
                {
                    "key": f"multiple_{len(figures)}",
                    "title": f"{column.removesuffix(' %')} over {over.name}",
                    "x": over.name,
                    "y": column,
                    "says": f"{column}, each dot a run"
                    + (", bars 95 % intervals" if exact else "")
                    + (", rings the paper's, of its own data" if paper else ""),
                    "categories": over.categories,
                    "log": positive and max(numbers) / min(numbers) >= 20,
                    "points": points,
                }
            )
    return figures[:_MAX_MULTIPLES]


def _axes(runs: Sequence[RunFiles]) -> Iterator[_Over]:
    """Yields the axes that a study says its runs lie on, see `row.json`."""
    axes = [as_mapping(dig(run.row, "axes")) for run in runs]
    for name in dict.fromkeys(name for each in axes for name in each):
        found = [as_mapping(each.get(name)) for each in axes]
        words = [as_text(entry.get("shown", ""), 60) for entry in found]
        order = {
            word: as_number(entry.get("place")) or 0.0
            for word, entry in zip(words, found, strict=True)
            if entry
        }
        categories = sorted(order, key=lambda word: order[word])
        if not 1 < len(categories) <= _MAX_CATEGORIES:
            continue
        places = [
            float(categories.index(word)) if entry else None
            for word, entry in zip(words, found, strict=True)
        ]
        papers = [as_text(entry.get("paper") or "", 60) for entry in found]
        yield _Over(_short(name), places, words, categories, papers)


def _settings_as_axes(
    settings: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> Iterator[_Over]:
    """Yields the settings that differ; seeds only where nothing else does.

    Of those that always change together one is enough: nothing tells them apart.
    """
    seen: list[list[int]] = []
    for name in [name for name in varied if name != "seed"] or varied:
        values = [each.get(name) for each in settings]
        if _parts(values) in seen:
            continue
        seen.append(_parts(values))
        words = [words_of(value) for value in values]
        numbers = [as_number(value) for value in values]
        categories = list(dict.fromkeys(words))
        papers = [""] * len(values)
        if None not in numbers and len(set(numbers)) > 1:
            yield _Over(_short(name), numbers, words, None, papers)
        elif len(categories) <= _MAX_CATEGORIES:
            places: list[float | None] = [float(categories.index(w)) for w in words]
            yield _Over(_short(name), places, words, categories, papers)


def _dots(
    runs: Sequence[RunFiles],
    scores: Sequence[Mapping[str, Mapping[str, float]]],
    over: _Over,
    column: str,
) -> Iterator[dict[str, Any]]:
    """Yields a dot for each run, and a ring where a paper has the same number."""
    ringed = set()
    for number, (run, found) in enumerate(zip(runs, scores, strict=True)):
        place = over.places[number]
        if column not in found or place is None:
            continue
        score = found[column]
        shown = _cell(score)
        beside = f" ({shown['beside']})" if shown["beside"] else ""
        own = over.papers[number]
        yield {
            "x": place,
            "y": score["value"],
            "colour": number,
            "label": run.name,
            "text": f"{over.name} {over.words[number]}: {shown['text']}{beside}"
            + (f"; paper: {own}" if own else ""),
            **{key: score[key] for key in ("low", "high") if key in score},
        }
        paper = _paper_number(own, column)
        if paper is not None and place not in ringed:
            ringed.add(place)
            said = {"label": "paper", "text": own, "paper": True}
            yield {"x": place, "y": paper, "colour": number, **said}


def _paper_number(text: str, column: str) -> float | None:
    """Returns a paper's accuracy, where a study says "fine-tuning / linear probe"."""
    parts = text.split(" / ")
    part = 0 if "fine-tun" in column else 1 if column.startswith("linear") else None
    if part is None or part >= len(parts):
        return None
    try:
        number = float(parts[part])
    except ValueError:
        return None
    return number if math.isfinite(number) else None
