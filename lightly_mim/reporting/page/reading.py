"""What a run directory says, read as data that anybody may have written.

Nothing is built, imported or called because a file names it. What is missing is None or
empty; what is damaged is left out and said in `RunFiles.problems`.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightly_mim.config import read_yaml
from lightly_mim.files import check_regular, check_text, printable, read_sealed
from lightly_mim.runs import RunDirectory

RESULTS, DENSE, ROW, METRICS = "results.json", "dense.json", "row.json", "metrics.csv"
GALLERY = "gallery"
GALLERY_FILE = "gallery.json"

# Of a study, how far below its folder runs are looked for: tasks/NAME/run/METHOD-seed0.
_DEPTH = 4
_MAX_JSON = 200_000_000  # bytes; results of 1,000 classes have 30 million
_MAX_CSV = 500_000_000
_EPOCH = re.compile(r"epoch_(\d{1,9})\.png")
# What a row of results must have to be shown.
_NUMBERS = ("top1", "top1_low", "top1_high")


@dataclass(frozen=True)
class Series:
    """The values of one column of `metrics.csv`.

    Attributes:
        steps:
            The optimiser step of each value.
        epochs:
            The epoch of each, from 0.
        values:
            The values. Those that are not finite are NaN.
    """

    steps: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunFiles:
    """What a directory holds: of a pretraining run, of an evaluation, or of both.

    Attributes:
        path:
            The directory.
        name:
            What the page calls it.
        config:
            The arguments of `pretrain`, or None.
        facts:
            What the run noted of its images and devices.
        sessions:
            One mapping for each time that the run began or went on.
        changes:
            What was changed when it went on.
        finished:
            What the marker of the end says, or None.
        metrics:
            The columns of `metrics.csv` by name.
        results:
            `results.json`, or None. Each of its rows has a model, a protocol and an
            accuracy with its interval.
        dense:
            `dense.json`, or None.
        row:
            What a study says of the run, or None.
        pictures:
            Epoch and file of the reconstructions, in their order.
        gallery:
            `gallery/gallery.json`, or None.
        problems:
            What could not be read, in sentences.
    """

    path: Path
    name: str
    config: dict[str, Any] | None
    facts: dict[str, Any]
    sessions: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    finished: dict[str, Any] | None
    metrics: dict[str, Series]
    results: dict[str, Any] | None
    dense: dict[str, Any] | None
    row: dict[str, Any] | None
    pictures: list[tuple[int, Path]]
    gallery: dict[str, Any] | None
    problems: list[str]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.config or self.metrics or self.results or self.dense)


def find_runs(folder: Path | str) -> list[Path]:
    """Returns the directory itself if it is a run's, else the runs of a study in it.

    Args:
        folder:
            The directory.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory: pass the directory of a run.")
    if _is_run(folder):
        return [folder]
    found = [path for path in _below(folder, _DEPTH) if _is_run(path)]
    if not found:
        raise ValueError(
            f"There is no run in {folder}: it has neither a config.yaml nor a "
            "results.json, nor have the folders below it."
        )
    return found


def _is_run(folder: Path) -> bool:
    return any(
        (folder / name).is_file() for name in ("config.yaml", RESULTS, DENSE, METRICS)
    )


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: _natural(entry.name)):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            path = folder / entry.name
            yield path
            if depth > 1 and not _is_run(path):
                yield from _below(path, depth - 1)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a key that sorts a10 behind a9."""
    parts = re.split(r"(\d{1,18})", name)
    return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts]


def read_run(path: Path | str, name: str | None = None) -> RunFiles:
    """Reads a run directory.

    Args:
        path:
            The directory.
        name:
            What the page calls it. By default the name of the directory.
    """
    run = RunDirectory(path)
    problems: list[str] = []
    history = _read_json(run.history, problems) or {}
    results = _read_json(run.path / RESULTS, problems)
    dense = _read_json(run.path / DENSE, problems)
    return RunFiles(
        path=run.path,
        name=printable(name or run.path.resolve().name),
        config=_read_config(run.config, problems),
        facts=as_mapping(history.get("facts")),
        sessions=as_mappings(history.get("sessions")),
        changes=as_mappings(history.get("changes")),
        finished=_read_json(run.marker, problems),
        metrics=_read_metrics(run.path / METRICS, problems),
        results=results and _checked_rows(results, run.path / RESULTS, problems),
        dense=dense and {**dense, "rows": as_mappings(dense.get("rows"))},
        row=_read_json(run.path / ROW, problems),
        pictures=_find_pictures(run.reconstructions),
        gallery=_read_json(run.path / GALLERY / GALLERY_FILE, problems),
        problems=problems,
    )


def as_mapping(value: Any) -> dict[str, Any]:
    """Returns a mapping with names for keys, empty if the value is none."""
    return value if isinstance(value, dict) else {}


def as_mappings(value: Any) -> list[dict[str, Any]]:
    """Returns the mappings in a list."""
    entries = value if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, dict)]


def as_number(value: Any) -> float | None:
    """Returns a finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_text(value: Any, length: int = 300) -> str:
    """Returns what a page shows of any value: one printable line of limited length."""
    text = printable(value if isinstance(value, str) else str(value))
    return text if len(text) <= length else f"{text[: length - 1]}…"


def dig(value: Any, *names: str) -> Any:
    """Returns what lies at nested names, None if it does not."""
    for name in names:
        value = as_mapping(value).get(name)
    return value


def _read_config(path: Path, problems: list[str]) -> dict[str, Any] | None:
    def whole(text: str) -> Any:
        check_text(text)
        return yaml.safe_load(text)

    try:
        config = read_yaml(path, whole)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(as_text(error, 500))
        return None
    if not isinstance(config, dict):
        problems.append(as_text(f"{path} holds no settings."))
        return None
    return {str(name): value for name, value in config.items()}


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"{path} has more than {_MAX_JSON:,} bytes.")
        return read_sealed(path, "It is left out.")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        problems.append(as_text(error, 500))
        return None


def _checked_rows(
    results: dict[str, Any], path: Path, problems: list[str]
) -> dict[str, Any]:
    """Returns results with the rows that can be shown."""
    given = results.get("rows")
    rows = [
        row
        for row in as_mappings(given)
        if all(as_number(row.get(name)) is not None for name in _NUMBERS)
        and all(isinstance(row.get(name), str) for name in ("model", "protocol"))
    ]
    lost = len(given) - len(rows) if isinstance(given, list) else 0
    if lost or not isinstance(given, list):
        what = f"{lost} rows" if lost else "the table"
        problems.append(as_text(f"{path} is damaged: {what} cannot be shown."))
    return {**results, "rows": rows}


def _read_metrics(path: Path, problems: list[str]) -> dict[str, Series]:
    """Returns the columns of a `metrics.csv`; a row that was cut off is left out."""
    columns: dict[str, Series] = {}
    try:
        check_regular(path)
        if path.stat().st_size > _MAX_CSV:
            raise ValueError(f"it has more than {_MAX_CSV:,} bytes")
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                _add_row(columns, row)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        problems.append(
            as_text(f"{path} is damaged, what follows is left out: {error}")
        )
    return columns


def _add_row(columns: dict[str, Series], row: Mapping[str | Any, Any]) -> None:
    step, epoch = (_whole(row.get(name)) for name in ("step", "epoch"))
    if step is None or None in row or None in row.values():
        return
    for name, text in row.items():
        if name in ("step", "epoch") or not text:
            continue
        try:
            value = float(text)
        except ValueError:
            continue
        series = columns.setdefault(name, Series())
        series.steps.append(step)
        series.epochs.append(epoch or 0)
        series.values.append(value if math.isfinite(value) else math.nan)


def _whole(text: Any) -> int | None:
    try:
        return int(text)
    except (TypeError, ValueError):
        return None


def _find_pictures(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(_EPOCH.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Returns what tells runs apart: the ends of their paths, as short as can be.

    Args:
        paths:
            The directories.
    """
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]
