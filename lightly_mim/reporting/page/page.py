"""Writes the page: one HTML file that holds all it shows and asks no network.

Curves are drawn by a small script of our own: plotly's alone has 4.5 MB, and Vega's
0.8 MB, for what are lines, dots and a pointer here. The page allows no other script
than that one, by its hash, and no address but those that hold their content.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from lightly_mim.files import atomic_write, printable
from lightly_mim.reporting.figures import COLUMNS
from lightly_mim.reporting.page import findings
from lightly_mim.reporting.page.comparison import compare_runs
from lightly_mim.reporting.page.curves import curves, thinned
from lightly_mim.reporting.page.facts import commands, facts, state, summary
from lightly_mim.reporting.page.pictures import MAX_FRAMES, frames, gallery
from lightly_mim.reporting.page.reading import (
    RunFiles,
    as_text,
    find_runs,
    names_of,
    read_run,
)

REPORT = "report.html"
MAX_BYTES = 10_000_000
# Of a comparison: runs whose curves and pictures are shown.
MAX_CURVES = 24
MAX_PICTURES = 8


def write_page(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    title: str | None = None,
    figures: bool = False,
) -> Path:
    """Writes `report.html` for a run, or for several beside each other.

    Args:
        runs:
            The directories, see `read_run`. Nothing else is read.
        out:
            The directory of the page.
        title:
            What it is called. By default the name of the run.
        figures:
            Whether to write the figures as PNG and JSON files as well, see
            `write_figures`.

    Returns:
        The page's path.

    Raises:
        ValueError: If there is nothing to show.
        OSError: If it cannot be written.
    """
    read = read_runs(runs)
    for count in (MAX_FRAMES, 8, 4, 2):
        text = render(read, title, count)
        if len(text.encode()) <= MAX_BYTES:
            break
    path = Path(out) / REPORT
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if figures:
        # matplotlib takes a second to import, which is for those who ask for it.
        from lightly_mim.reporting.page.figures import write_figures

        write_figures(read, out)
    return path


def write_page_or_warn(*folders: Path | str) -> Path | None:
    """Writes the page of what has just finished, with figures, or warns if it cannot.

    Args:
        folders:
            The directory of a run, or those of the runs of a study. The page goes into
            the first one; all other files in them stay as they are.

    Returns:
        The page's path, or None.
    """
    try:
        runs = [run for folder in folders for run in find_runs(folder)]
        return write_page(runs, folders[0], figures=True)
    except Exception as error:
        words = ["lightly-mim", "report", *map(str, folders)]
        words += ["--out", str(folders[0])] if len(folders) > 1 else []
        warnings.warn(
            f"The report could not be written: {error} All else is complete; try "
            f"`{shlex.join(words)}`.",
            stacklevel=2,
        )
        return None


def read_runs(runs: Sequence[Path | str]) -> list[RunFiles]:
    """Reads run directories, and gives them names that tell them apart.

    Args:
        runs:
            The directories.

    Raises:
        ValueError: If there is nothing in one of them.
    """
    paths = [Path(run) for run in runs]
    read = [read_run(p, name) for p, name in zip(paths, names_of(paths), strict=True)]
    for run in read:
        if run.empty:
            why = f": {' '.join(run.problems)}" if run.problems else ""
            raise ValueError(
                f"There is nothing to report in {run.path}{why.rstrip('.')}. A run "
                "has a config.yaml, a metrics.csv or a results.json."
            )
    return read


def render(
    runs: Sequence[RunFiles], title: str | None = None, max_frames: int = MAX_FRAMES
) -> str:
    """Returns the page's text.

    Args:
        runs:
            What was read of the runs.
        title:
            See `write_page`.
        max_frames:
            How many epochs of pictures there are at most.
    """
    template, style, script = _parts()
    digest = hashlib.sha256(script.encode()).digest()
    text = template.render(
        _context(runs, title, max_frames),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
        version=metadata.version("lightly-mim"),
        percent=findings.percent,
        interval_axis=findings.interval_axis,
        columns=COLUMNS,
    )
    # A path need not be UTF-8: what is none becomes, as in Python, \\udce4.
    return text.encode("utf-8", "backslashreplace").decode()


@cache
def _parts() -> tuple[Template, str, str]:
    """Returns the template, the style and the script of every page."""
    text, style, script = (
        files("lightly_mim.reporting.page").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html.j2", "page.css", "page.js")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text), style, script


def _context(
    runs: Sequence[RunFiles], title: str | None, max_frames: int
) -> dict[str, Any]:
    several = len(runs) > 1
    only = runs[0]
    problems = [problem for run in runs for problem in run.problems]
    if several and len(runs) > MAX_CURVES:
        problems.append(f"Curves are those of the first {MAX_CURVES} runs.")
    figures = curves(runs[:MAX_CURVES])
    study = compare_runs(runs) if several else None
    shown, sprites = _pictures(runs[:MAX_PICTURES], max_frames, problems)
    look = None if several else gallery(only, problems)
    if look is not None:
        sprites += _look_sprites(look)
    found: dict[str, Any] = {"lines": [], "dense": []}
    if not several:
        found = {
            "lines": findings.result_lines(only),
            "dense": findings.dense_lines(only),
            "sentences": findings.sentences(only),
            "map": findings.heat_map(only),
            "classes": findings.classes(only),
        }
    context = {
        "title": printable(title or (f"{len(runs)} runs" if several else only.name)),
        "badge": None if several else state(only),
        "summary": _together(runs) if several else summary(only),
        "headline": [] if several else findings.headline(only),
        "problems": problems,
        "study": study,
        "found": found,
        "shown": shown,
        "look": look,
        "figures": figures,
        "groups": [] if several else facts(only),
        "commands": [] if several else commands(only),
        "notes": [] if several else _notes(only),
        "from": ", ".join(as_text(run.path) for run in runs[:3])
        + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        "sprites": sprites,
        "data": _data(figures, study, shown, look),
    }
    names = {
        "runs": ("Runs", study),
        "results": ("Results", found["lines"] or found["dense"]),
        "pictures": ("Pictures", shown),
        "features": ("Features", look),
        "curves": ("Curves", figures),
        "run": ("What was run", context["groups"]),
    }
    if several:
        names["pictures"] = names.pop("pictures")  # behind the curves
    context["sections"] = [(key, name) for key, (name, there) in names.items() if there]
    return context


def _together(runs: Sequence[RunFiles]) -> list[str]:
    """Returns what is the same in all runs."""
    parts = [summary(run) for run in runs]
    return [part for part in parts[0] if all(part in other for other in parts)]


def _notes(run: RunFiles) -> list[str]:
    """Returns what the run and its evaluation say besides."""
    notes = []
    for change in run.changes:
        told = json.dumps(change.get("changes"), default=str)
        notes.append(f"Went on with changes, {as_text(change.get('time', ''))}: {told}")
    unreadable = (run.finished or {}).get("unreadable")
    if isinstance(unreadable, dict) and unreadable:
        notes.append(f"{len(unreadable)} files could not be read, see finished.json.")
    for found in (run.results, run.dense):
        said = (found or {}).get("notes")
        notes += said if isinstance(said, list) else []
    return [as_text(note, 600) for note in notes]


def _pictures(
    runs: Sequence[RunFiles], max_frames: int, problems: list[str]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Returns the reconstructions of each run, and the style rules that hold them."""
    shown: list[dict[str, Any]] = []
    sprites: list[tuple[str, str]] = []
    for run in runs:
        each = max_frames if len(runs) == 1 else max(max_frames // 4, 1)
        part = frames(run, problems, each)
        if not part["frames"]:
            continue
        key = f"frames-{len(shown)}"
        for number, frame in enumerate(part["frames"]):
            place = f'#{key}[data-frame="{number}"] .frame'
            sprites.append((Markup(place), frame["uri"]))
        shown.append({**part, "key": key, "name": run.name})
    return shown, sprites


def _look_sprites(look: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the style rules of the gallery, and names them in it."""
    look["sprite"] = "thumbnail"
    numbers = look["classes"] or []
    named = {
        n: t for n, t in zip(numbers, look["labels"], strict=False) if n is not None
    }
    look["legend"] = sorted(named.items())[:30]
    sprites = [(".thumbnail", look["thumbnails"]["uri"])]
    for name, key in ((".patches", "patches"), (".best", "reconstructed")):
        if look[key]:
            sprites.append((name, look[key]["uri"]))
    return sprites


def _data(
    figures: Sequence[dict[str, Any]],
    study: dict[str, Any] | None,
    shown: Sequence[dict[str, Any]],
    look: dict[str, Any] | None,
) -> dict[str, Any]:
    """Returns what the script draws."""
    slim = [
        {
            **figure,
            "series": [
                {**line, "points": thinned(line["points"])} for line in figure["series"]
            ],
        }
        for figure in figures
    ]
    data: dict[str, Any] = {
        "figures": [*slim, *(study["multiples"] if study else [])],
        "frames": {
            part["key"]: [
                {"epoch": frame["epoch"], "title": frame["title"]}
                for frame in part["frames"]
            ]
            for part in shown
        },
        "patches": {},
        "maps": {},
    }
    if look and look["patches"]:
        names = ("grid", "similarity")
        data["patches"]["look"] = {name: look["patches"][name] for name in names}
    if look and look["map"]:
        data["maps"]["look"] = {
            "x": look["map"]["x"],
            "y": look["map"]["y"],
            **{name: look[name] for name in ("labels", "classes", "files", "sprite")},
            "columns": look["thumbnails"]["columns"],
            "rows": look["thumbnails"]["rows"],
        }
    return data
