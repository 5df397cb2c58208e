"""What a dense evaluation found: its rows and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightly_mim.files import printable

DENSE_FILE = "dense.json"

_MAX_CLASSES_SHOWN = 40


@dataclass(frozen=True)
class DenseResult:
    """What one protocol says of one encoder: a row of the table and of `dense.json`.

    Attributes:
        model:
            The encoder, or "random initialisation".
        protocol:
            "knn" or "linear".
        layer:
            The chosen layer, from 0.
        hyperparameters:
            The chosen `k` and `temperature`, or `learning_rate`.
        miou:
            Mean over the classes of the intersection over union of all test pixels, in
            [0, 1]. Classes that neither occur in the test masks nor were predicted do
            not count. `miou_low` and `miou_high` are the ends of its 95 % interval: the
            percentile of 2,000 draws of the test images with replacement, which does
            not cover the draw of the training images.
        iou:
            Intersection over union of each class by its name, in [0, 1]. None if it
            neither occurs nor was predicted.
        pixel_accuracy:
            Share of test pixels whose class is right, in [0, 1].
        feature_seconds:
            Time spent on the tokens of training and test images, reading excluded.
        seconds:
            Time spent on the protocol, tokens excluded.
        num_train:
            Number of training images.
        num_test:
            Number of test images.
        num_patches:
            Number of training patches that were kept.
        selection:
            For each layer the best hyper-parameters and their `miou` on the held-out
            training images.
    """

    model: str
    protocol: str
    layer: int
    hyperparameters: dict[str, float]
    miou: float
    miou_low: float
    miou_high: float
    iou: dict[str, float | None]
    pixel_accuracy: float
    feature_seconds: float
    seconds: float
    num_train: int
    num_test: int
    num_patches: int
    selection: list[dict[str, Any]]


@dataclass(frozen=True)
class DenseResults:
    """All that a dense evaluation found. `rich.print` shows it as a table.

    Attributes:
        rows:
            One result per encoder and protocol.
        notes:
            What a reader of the table should know, one sentence each.
        record:
            What it takes to run it again, see `lightly_mim.evaluation.Results`.
    """

    rows: list[DenseResult]
    notes: list[str]
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns what `dense.json` holds: `rows`, `notes`, and the record's keys."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "notes": self.notes, **self.record}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> DenseResults:
        """Returns what `to_dict` has made."""
        rows = [DenseResult(**row) for row in written["rows"]]
        record = {k: v for k, v in written.items() if k not in ("rows", "notes")}
        return cls(rows, list(written.get("notes", [])), record)

    def __rich__(self) -> Group:
        return Group(_overview(self.rows), _by_class(self.rows), *map(Text, self.notes))


def _overview(rows: Sequence[DenseResult]) -> Table:
    columns = {"Model": False, "Protocol": False, "Layer": True, "Chosen": False}
    columns |= {"mIoU % [95 %]": False, "Pixels %": True, "Seconds": True}
    lines = []
    for row in rows:
        chosen = ", ".join(f"{name} {v:g}" for name, v in row.hyperparameters.items())
        interval = f"[{100 * row.miou_low:.1f}, {100 * row.miou_high:.1f}]"
        cells = [row.model, row.protocol, str(row.layer), chosen]
        cells.append(f"{100 * row.miou:.1f} {interval}")
        cells.append(f"{100 * row.pixel_accuracy:.1f}")
        cells.append(f"{row.feature_seconds + row.seconds:.1f}")
        lines.append(cells)
    return _table(columns, lines)


def _by_class(rows: Sequence[DenseResult]) -> Table:
    titles = [f"{row.model}, {row.protocol}" for row in rows]
    names = list(rows[0].iou)
    lines = []
    for name in names[:_MAX_CLASSES_SHOWN]:
        shown = [row.iou[name] for row in rows]
        lines.append([name, *("" if x is None else f"{100 * x:.1f}" for x in shown)])
    if len(names) > _MAX_CLASSES_SHOWN:
        lines.append([f"and {len(names) - _MAX_CLASSES_SHOWN} more in {DENSE_FILE}"])
    return _table({"IoU %": False} | dict.fromkeys(titles, True), lines)


def _table(columns: Mapping[str, bool], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, is_number in columns.items():
        table.add_column(
            Text(printable(name)), justify="right" if is_number else "left"
        )
    for cells in lines:  # Text, since rich takes brackets in a string for markup
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
