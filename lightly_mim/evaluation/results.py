"""`results.json`: its schema, how it is written and how it is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from lightly_mim.files import sealed
from lightly_mim.reporting import measures_table, results_table, results_text
from lightly_mim.reporting.study import PIXELS, RANDOM, RESULTS_FILE

__all__ = ["PIXELS", "RANDOM", "RESULTS_FILE", "Result", "Results"]

# Counts up when a name or a meaning changes.
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Result:
    """What one protocol says of one model: a row of the table and of `results.json`.

    Accuracies are shares of the test images, in [0, 1]; `_low` and `_high` are the ends
    of their 95 % intervals over the draw of test images, see
    `lightly_mim.evaluation.scores`.

    Attributes:
        model:
            The encoder, or the baseline: `RANDOM` or `PIXELS`.
        protocol:
            Name of the protocol, such as "knn".
        variant:
            What tells this row from others of the same protocol, such as "5 per class".
            Empty if there are no others.
        layer:
            The chosen layer, from 0. None for raw pixels and feature functions.
        pooling:
            The chosen pooling.
        hyperparameters:
            The chosen hyper-parameters, such as `k` and `temperature`.
        top1:
            Share of test images whose class is the most probable one. The mean over
            `draws`, if there are any. `top1_low` and `top1_high`, as the others' `_low`
            and `_high`, are the ends of its 95 % interval, in [0, 1].
        top5:
            Share of test images whose class is among the five most probable. None with
            five classes or fewer, as its interval.
        mean_class:
            Mean over classes of the accuracy on their test images.
        per_class:
            Accuracy on the test images of each class, None for a class without any.
        confusion:
            Number of test images of each class (row) for which each class (column) was
            predicted; the sum over `draws`, if there are any.
        draws:
            Top-1 accuracy of each draw of training images, None if there was but one
            training set.
        feature_seconds:
            Time spent on the features of training and test images, reading the images
            excluded; of the pass that made them, if they were read from the disk.
        seconds:
            Time spent on the protocol, features excluded.
        num_train:
            Number of training images.
        num_test:
            Number of test images.
        selection:
            For each layer and pooling its best hyper-parameters and their `accuracy` on
            the training images (leave-one-out for kNN, cross-validation for linear).
    """

    model: str
    protocol: str
    variant: str
    layer: int | None
    pooling: str
    hyperparameters: dict[str, float]
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None
    top5_low: float | None
    top5_high: float | None
    mean_class: float
    mean_class_low: float
    mean_class_high: float
    per_class: list[float | None]
    confusion: list[list[int]]
    draws: list[float] | None
    feature_seconds: float
    seconds: float
    num_train: int
    num_test: int
    selection: list[dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """All that an evaluation found. `rich.print` shows it as a table.

    Attributes:
        rows:
            One result per model, protocol and variant.
        notes:
            What a reader of the table should know, one sentence each.
        record:
            What it takes to run it again: `command` (of the process), `arguments` (of
            `evaluate`), `encoder` (see `lightly_mim.evaluation.describe_encoder`),
            `data` (names of the classes, numbers of images) and `versions`. In
            `results.json` these stand beside `rows`.
        measures:
            Label-free measures of the training images' features, one dictionary per
            model, layer and pooling, see `lightly_mim.evaluation.label_free`.
            Empty if they were not asked for.
    """

    rows: list[Result]
    notes: list[str]
    record: dict[str, Any]
    measures: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Returns what `results.json` holds.

        `schema_version` (2), `rows`, `measures`, `notes`, and the record's keys.
        Version 1 had no `variant`, `mean_class`, `per_class`, `confusion`, `draws` and
        `measures`, no interval of `top5`, and Wilson's for `top1`.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "rows": [asdict(row) for row in self.rows],
            "measures": self.measures,
            "notes": self.notes,
            **self.record,
        }

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Results:
        """Returns what `to_dict` has made; what its version did not have is empty."""
        empty = {**dict.fromkeys(Result.__dataclass_fields__), "variant": ""}
        known = "schema_version", "rows", "measures", "notes"
        return cls(
            [Result(**{**empty, **row}) for row in written["rows"]],
            list(written.get("notes", [])),
            {name: value for name, value in written.items() if name not in known},
            list(written.get("measures", [])),
        )

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        width = options.max_width
        if self.rows:
            yield results_table([asdict(row) for row in self.rows], width=width)
        if self.measures:
            yield measures_table(self.measures, width=width)
        yield from map(Text, self.notes)  # no markup: names may have brackets

    def __str__(self) -> str:
        table = results_text([asdict(row) for row in self.rows])
        return "\n".join([table.rstrip(), *self.notes])


def results_file(out: Path, overwrite: bool, name: str) -> Path:
    """Returns where results are written; refuses a file that is there already."""
    file = out / name
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: pass a directory as out.")
    if file.exists() and not overwrite:
        raise ValueError(
            f"{file} is there already: pass overwrite, or another directory as out."
        )
    return file


def to_text(record: Any) -> str:
    """Returns sealed JSON of a record, with null for numbers that are not finite.

    Python would write NaN, which is not JSON and which other readers refuse. A probe
    whose learning rate was too high has such a loss.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(sealed(finite(record)), indent=2, allow_nan=False) + "\n"
