"""Finished runs as tables: read from run directories, compared by model and seed.

What several runs have found is put side by side here, for the scripts of `benchmarks/`
and `slurm/`; `lightly_mim.reporting.tables` shows what one evaluation has found.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student_t

from lightly_mim.files import atomic_write, printable, read_sealed
from lightly_mim.runs import RunDirectory

RESULTS_FILE = "results.json"

# Models of a study: what a run has trained, and `Result.model` for the baselines.
PRETRAINED = "pretrained"
RANDOM = "random initialisation"
PIXELS = "raw pixels"

# The protocols that the table of a study has, and their names in it.
PROTOCOLS = {"knn": "kNN", "linear": "linear"}

LOG_WIDTH = 120  # columns of a table where there is no terminal

# Columns that are aligned to the right.
_NUMBERS = ("training", "images/s", "masked %", "AvgDist px", "M params", "GFLOPs")

Row = Mapping[str, Any]  # a row of results.json


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        method:
            Name of the method.
        seed:
            Its seed.
        path:
            Its directory.
        seconds:
            Time that it trained, validation and pictures excluded.
        images_per_second:
            Training images per second, over all devices.
        results:
            What results.json holds.
    """

    method: str
    seed: int
    path: Path
    seconds: float
    images_per_second: float
    results: dict[str, Any]

    @classmethod
    def read(cls, path: Path, method: str, seed: int) -> Run:
        """Reads a run that is finished and evaluated.

        Args:
            path:
                Its directory.
            method:
                The name that tables give it.
            seed:
                Its seed.

        Raises:
            ValueError: If it is not finished or not evaluated, or if a file of it is
                damaged.
        """
        directory = RunDirectory(path)
        batch_size = directory.stored_arguments()["recipe"]["batch_size"]
        speed = training_speed(directory, batch_size)
        results = read_sealed(path / RESULTS_FILE, "Evaluate the run again.")
        return cls(method, seed, path, *speed, results)

    def scores(self, model: str) -> dict[str, Row]:
        """Returns the rows of `PRETRAINED`, `RANDOM` or `PIXELS` by protocol."""
        return {
            row["protocol"]: row
            for row in self.results["rows"]
            if model == model_of(row)
        }


def training_speed(directory: RunDirectory, batch_size: int) -> tuple[float, float]:
    """Reads how fast a run trained, also one that was cut and went on.

    Args:
        directory:
            A finished run.
        batch_size:
            Images per optimiser step.

    Returns:
        (seconds, images per second), validation and pictures excluded.
    """
    finished = read_sealed(directory.marker, "Train the run again.")
    images = finished["steps"] * batch_size / finished["epochs"]
    with (directory.path / "metrics.csv").open(newline="") as file:
        speeds = [row["images_per_second"] for row in csv.DictReader(file)]
    epochs = [images / float(speed) for speed in speeds if speed]
    return sum(epochs), images * len(epochs) / sum(epochs)


def write_summary(
    runs: Sequence[Run],
    command: str,
    path: Path,
    about: Callable[[Run], Mapping[str, Any]] = lambda run: {"method": run.method},
) -> None:
    """Writes one line per run, model and protocol.

    Args:
        runs:
            The runs.
        command:
            The command that made them.
        path:
            The CSV file.
        about:
            Returns the first columns of a run.
    """
    lines = [
        {
            **about(run),
            "encoder": run.results["encoder"]["name"],
            "encoder_options": json.dumps(run.results["encoder"]["options"]),
            "img_size": "x".join(map(str, run.results["encoder"]["img_size"])),
            "seed": run.seed,
            "model": model_of(row),
            "protocol": row["protocol"],
            "layer": row["layer"],
            "pooling": row["pooling"],
            "hyperparameters": json.dumps(row["hyperparameters"]),
            "top1": row["top1"],
            "top1_low": row["top1_low"],
            "top1_high": row["top1_high"],
            "num_train": row["num_train"],
            "num_test": row["num_test"],
            "pretraining_seconds": round(run.seconds, 1),
            "images_per_second": round(run.images_per_second, 1),
            "evaluation_seconds": round(row["feature_seconds"] + row["seconds"], 1),
            "versions": json.dumps(run.results["versions"]),
            "run": str(run.path),
            "command": command,
        }
        for run in runs
        for row in run.results["rows"]
    ]
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


class Difference(NamedTuple):
    """The mean of paired differences and its interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> Difference:
    """Returns the mean of a - b and the interval that Student's t gives.

    The interval covers what changes with the seed; not the draw of the test images,
    which all seeds share.

    Args:
        a:
            One value per seed, two seeds or more.
        b:
            The same of the other model.
        confidence:
            Share of such intervals that hold the true mean.

    Raises:
        ValueError: If there are fewer than two pairs.
    """
    if len(a) < 2:
        raise ValueError(f"An interval needs two seeds or more, got {len(a)}.")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = fmean(differences)
    quantile = float(student_t.ppf((1 + confidence) / 2, len(differences) - 1))
    half = quantile * stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


def table_lines(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the lines of the table.

    Args:
        runs:
            The runs, with the same seeds for each method.

    Returns:
        The names of the columns, and a line per method and baseline. With several
        seeds, lines with paired differences follow.
    """
    columns = [
        name for title in PROTOCOLS.values() for name in (f"{title} top-1 %", "layer")
    ]
    lines = [
        [
            f"{name}, pretrained",
            *_score_cells([run.scores(PRETRAINED) for run in own]),
            duration(fmean(run.seconds for run in own)),
            f"{fmean(run.images_per_second for run in own):.0f}",
        ]
        for name, own in by_method(runs).items()
    ]
    lines += [
        [label, *_score_cells(scores), "", ""] for label, scores in _baselines(runs)
    ]
    if len({run.seed for run in runs}) > 1:
        for name, own in by_method(runs).items():
            for baseline in (RANDOM, PIXELS):
                cells = [
                    cell
                    for protocol in PROTOCOLS
                    for cell in (_difference_cell(own, baseline, protocol), "")
                ]
                lines.append([f"{name} - {baseline}", *cells, "", ""])
    return ["", *columns, "training", "images/s"], lines


def mean_table(
    lines: Sequence[Row], keys: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of a table of accuracies: models down, protocols across.

    Args:
        lines:
            What `write_summary` writes, or rows of results.json, with `keys` beside.
        keys:
            What tells lines of the table apart beside the model. Lines that differ in
            nothing of that are put together: mean ± standard deviation (how many).
    """
    protocols = list(dict.fromkeys(str(line["protocol"]) for line in lines))
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for line in lines:
        group = (*(str(line.get(key, "")) for key in keys), str(line["model"]))
        values = cells.setdefault(group, {}).setdefault(str(line["protocol"]), [])
        values.append(100 * float(line["top1"]))
    header = [*keys, "model", *(f"{name} top-1 %" for name in protocols)]
    return header, [
        [*group, *(_mean_cell(values.get(name, [])) for name in protocols)]
        for group, values in cells.items()
    ]


def _mean_cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f} (1)"
    return f"{fmean(values):.1f} ± {stdev(values):.1f} ({len(values)})"


def captions(runs: Sequence[Run]) -> list[str]:
    """Returns how to read the table, one sentence each.

    Args:
        runs:
            The runs.
    """
    row = runs[0].results["rows"][0]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    if len(seeds) == 1:
        first = (
            f"Accuracy on {row['num_test']} test images with its 95 % interval over "
            f"the draw of those images (bootstrap), seed {seeds[0]}."
        )
    else:
        first = (
            f"Accuracy on {row['num_test']} test images: mean ± standard deviation "
            f"over the seeds {', '.join(map(str, seeds))}. Differences are paired by "
            "seed, in points, with the 95 % interval of their mean over seeds "
            "(Student's t)."
        )
    return [
        first,
        "Layers count from 0; features are means of patch tokens unless a pooling is "
        "named. Layer, pooling and hyper-parameters were chosen on the "
        f"{row['num_train']} training images.",
        "Time and images/s are those of pretraining, evaluation excluded.",
    ]


def verdict(runs: Sequence[Run], baseline: str) -> str:
    """Says in a sentence whether a method beats a baseline wherever they met.

    Args:
        runs:
            The runs of one method.
        baseline:
            `RANDOM` or `PIXELS`.
    """
    method = runs[0].method
    failed = [
        f"{title} with seed {run.seed} ({100 * margin:+.1f} points)"
        for run in runs
        for protocol, title in PROTOCOLS.items()
        if (margin := _margin(run, baseline, protocol)) <= 0
    ]
    seeds = ", ".join(str(run.seed) for run in runs)
    if failed:
        return f"{method} does not beat {baseline} everywhere: {'; '.join(failed)}."
    which = f"with seed {seeds}" if len(runs) == 1 else f"on every seed ({seeds})"
    return f"{method} beats {baseline} on both protocols {which}."


def rich_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Returns the table for a terminal.

    Args:
        header:
            Names of the columns.
        lines:
            Text of the cells.
    """
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for number, name in enumerate(header):
        right = name in _NUMBERS
        table.add_column(
            Text(name),
            justify="right" if right else "left",
            no_wrap=number > 0,
            overflow="fold",
        )
    for line in lines:  # Text, since rich takes brackets in a string for markup
        table.add_row(*(Text(printable(cell)) for cell in line))
    return table


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns the table in Markdown.

    Args:
        header:
            Names of the columns.
        lines:
            Text of the cells.
    """
    rule = ["---"] * len(header)
    cells = [
        [printable(cell).replace("|", "\\|") for cell in line]
        for line in [header, rule, *lines]
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def print_table(
    title: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    width: int = LOG_WIDTH,
) -> None:
    """Prints the table, as wide as the terminal is.

    Args:
        title:
            What stands above it.
        header:
            Names of the columns.
        lines:
            Text of the cells.
        width:
            Its width where there is no terminal.
    """
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), width=None if terminal else width)
    with console.capture() as capture:
        console.print(rich_table(header, lines))
    print(f"\n{title}\n{capture.get().rstrip()}\n")


def model_of(row: Row) -> str:
    """Returns `PRETRAINED`, `RANDOM` or `PIXELS`, whichever a row is of."""
    model = str(row.get("model"))
    return model if model in (RANDOM, PIXELS) else PRETRAINED


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns the runs by method, in their order."""
    names = dict.fromkeys(run.method for run in runs)
    return {name: [run for run in runs if run.method == name] for name in names}


def _baselines(runs: Sequence[Run]) -> Iterator[tuple[str, list[dict[str, Row]]]]:
    """Yields the baselines: one for all methods, if they have the same numbers."""
    for baseline in (RANDOM, PIXELS):
        found: dict[str, list[dict[str, Row]]] = {}
        for name, own in by_method(runs).items():
            scores = [run.scores(baseline) for run in own]
            if all(_numbers(scores) != _numbers(other) for other in found.values()):
                found[name] = scores
        for name, scores in found.items():
            yield baseline if len(found) == 1 else f"{baseline} ({name})", scores


def _numbers(scores: Sequence[Mapping[str, Row]]) -> list[Any]:
    keys = ("layer", "pooling", "hyperparameters", "top1")
    return [[row[key] for key in keys] for by in scores for row in by.values()]


def _score_cells(scores: Sequence[Mapping[str, Row]]) -> list[str]:
    """Returns the cells of accuracy and layer for each protocol, from all seeds."""
    cells = []
    for protocol in PROTOCOLS:
        rows = [by_protocol[protocol] for by_protocol in scores]
        cells += [accuracy_cell(rows), _layers(rows)]
    return cells


def accuracy_cell(rows: Sequence[Row]) -> str:
    """Returns the accuracy with its interval or, of several seeds, its deviation.

    Args:
        rows:
            A row of results.json for each seed.
    """
    top1 = [100 * row["top1"] for row in rows]
    if len(rows) == 1:
        low, high = 100 * rows[0]["top1_low"], 100 * rows[0]["top1_high"]
        return f"{top1[0]:.1f} [{low:.1f}, {high:.1f}]"
    return f"{fmean(top1):.1f} ± {stdev(top1):.1f}"


def _layers(rows: Sequence[Row]) -> str:
    """Returns the chosen layers, those of one pooling together: `1, 3; 4 cls`."""
    layers: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["layer"] is not None:
            layers.setdefault(row["pooling"], {})[str(row["layer"])] = None
    return "; ".join(
        ", ".join(chosen) + ("" if pooling == "mean" else f" {pooling}")
        for pooling, chosen in layers.items()
    )


def _margin(run: Run, baseline: str, protocol: str) -> float:
    pretrained, other = run.scores(PRETRAINED), run.scores(baseline)
    return float(pretrained[protocol]["top1"] - other[protocol]["top1"])


def _difference_cell(runs: Sequence[Run], baseline: str, protocol: str) -> str:
    values = paired_difference(
        [100 * run.scores(PRETRAINED)[protocol]["top1"] for run in runs],
        [100 * run.scores(baseline)[protocol]["top1"] for run in runs],
    )
    return f"{values.mean:+.1f} [{values.low:+.1f}, {values.high:+.1f}]"


def duration(seconds: float) -> str:
    """Returns a time in words: 12.3 s, 4 min 5 s, 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
