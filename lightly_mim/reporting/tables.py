"""The rows of `results.json` as a table: for a terminal, a log and a README."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

# Name and alignment of each column.
_COLUMNS = {
    "Model": "left",
    "Protocol": "left",
    "Layer": "right",
    "Pooling": "left",
    "Chosen": "left",
    "Top-1 % [95 %]": "left",
    "Top-5 %": "right",
    "Seconds": "right",
}
_SHORT = {"temperature": "T", "learning_rate": "lr"}


def results_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Returns a table for `rich.print`.

    Args:
        rows:
            Rows of a `results.json`, as `lightly_mim.evaluation.Result` documents them.
        title:
            What stands above the table.

    Returns:
        A rich table with one line per row. Accuracies are in per cent with their 95 %
        interval; the seconds are those of features and protocol together. A column that
        is empty throughout is left out, and a line is drawn where the model changes.
    """
    # Text, since rich would take square brackets in a string for markup.
    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    names, lines = _lines(rows)
    for name in names:
        table.add_column(
            Text(name),
            justify="right" if _COLUMNS[name] == "right" else "left",
            no_wrap=name != "Model",  # what is to be wrapped in a narrow terminal
            overflow="fold",
        )
    for number, line in enumerate(lines):
        last = number + 1 == len(lines) or line[0] != lines[number + 1][0]
        table.add_row(*(Text(cell) for cell in line), end_section=last)
    return table


def results_text(
    rows: Sequence[Row], title: str | None = None, width: int = 120
) -> str:
    """Returns the table as plain text, for a log.

    Args:
        rows:
            See `results_table`.
        title:
            What stands above the table.
        width:
            Number of characters in a line.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(results_table(rows, title))
    return capture.get()


def results_markdown(rows: Sequence[Row]) -> str:
    """Returns the table in Markdown, for a README.

    Args:
        rows:
            See `results_table`.
    """
    names, lines = _lines(rows)
    rules = ["---:" if _COLUMNS[name] == "right" else "---" for name in names]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [names, rules, *escaped])


def _lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns' names and the text of each cell, without empty columns."""
    lines = [_line(row) for row in rows]
    names = [
        name for name in _COLUMNS if not lines or any(line[name] for line in lines)
    ]
    return names, [[line[name] for name in names] for line in lines]


def _line(row: Row) -> dict[str, str]:
    low, high = 100 * row["top1_low"], 100 * row["top1_high"]
    chosen = row["hyperparameters"].items()
    return {
        "Model": row["model"],
        "Protocol": row["protocol"],
        "Layer": "" if row["layer"] is None else str(row["layer"]),
        "Pooling": row["pooling"],
        "Chosen": ", ".join(f"{_SHORT.get(name, name)} {v:g}" for name, v in chosen),
        "Top-1 % [95 %]": f"{100 * row['top1']:.1f} [{low:.1f}, {high:.1f}]",
        "Top-5 %": "" if row["top5"] is None else f"{100 * row['top5']:.1f}",
        "Seconds": f"{row['feature_seconds'] + row['seconds']:.1f}",
    }
