"""The rows of `results.json` as a table: for a terminal, a log and a README."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightly_mim.files import printable

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
_MEASURES = {
    "Model": "left",
    "Layer": "right",
    "Pooling": "left",
    "RankMe": "right",
    "of": "right",
    "Alpha-ReQ": "right",
    "Uniformity": "right",
}
# In a narrow terminal these are wrapped, between words; the model's name anywhere.
_WRAPPED = ("Model", "Protocol", "Chosen")
_NARROW = {
    "Pooling": "Pool",
    "Top-1 % [95 %]": "Top-1 %",
    "Top-5 %": "Top-5",
    "Seconds": "s",
}
_MIN_MODEL = 8
_LIST = re.compile(r"(?<=,) ")  # between "k 20," and "T 0.07"
_SHORT = {
    "batch_size": "batch",
    "layer_decay": "decay",
    "learning_rate": "lr",
    "temperature": "T",
    "weight_decay": "wd",
}


def results_table(
    rows: Sequence[Row], title: str | None = None, width: int | None = None
) -> Table:
    """Returns a table for `rich.print`.

    Args:
        rows:
            Rows of a `results.json`, as `lightly_mim.evaluation.Result` documents them.
        title:
            What stands above the table.
        width:
            Number of characters that there is room for. If the table needs more, the
            headers are shortened, protocols and choices are wrapped between words, and
            the model's name wherever it must be. None for as many as it needs.

    Returns:
        A rich table with one row per result. Accuracies are in per cent with their 95 %
        interval, or with the standard deviation over draws of the training images; the
        seconds are those of features and protocol together. A column that is empty
        throughout is left out, and a line is drawn where the model changes.
    """
    names, lines = _lines(rows)
    return _table(names, lines, _COLUMNS, title, width)


def measures_table(
    rows: Sequence[Row], title: str | None = None, width: int | None = None
) -> Table:
    """Returns a table of label-free measures for `rich.print`.

    Args:
        rows:
            The `measures` of a `results.json`.
        title:
            What stands above the table.
        width:
            See `results_table`.
    """
    lines = [
        [
            printable(row["model"]),
            "" if row["layer"] is None else str(row["layer"]),
            row["pooling"],
            f"{row['rank_me']:.1f}",
            str(min(row["num_images"], row["dim"])),
            "" if row["alpha_req"] is None else f"{row['alpha_req']:.2f}",
            f"{row['uniformity']:.2f}",
        ]
        for row in rows
    ]
    return _table(list(_MEASURES), lines, _MEASURES, title, width)


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
        console.print(results_table(rows, title, width))
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


def _table(
    names: Sequence[str],
    lines: Sequence[Sequence[str]],
    aligned: Mapping[str, str],
    title: str | None,
    width: int | None,
) -> Table:
    widths = _widths(names, lines, width)
    # Text, since rich would take square brackets in a string for markup.
    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        padding=(0, 1) if widths is None else (0, 0),
    )
    for number, name in enumerate(names):
        table.add_column(
            Text(name if widths is None else _NARROW.get(name, name)),
            justify="right" if aligned[name] == "right" else "left",
            no_wrap=widths is None or name not in _WRAPPED,
            overflow="fold",
            width=None if widths is None else widths[number],
        )
    for number, line in enumerate(lines):
        last = number + 1 == len(lines) or line[0] != lines[number + 1][0]
        cells = [Text(cell) for cell in line]
        if widths is not None and "Chosen" in names:  # a number stays with its name
            place = names.index("Chosen")
            cells[place] = Text("\n".join(_LIST.split(line[place])))
        table.add_row(*cells, end_section=last)
    return table


def _widths(
    names: Sequence[str], lines: Sequence[Sequence[str]], width: int | None
) -> list[int] | None:
    """Returns the columns' widths of a narrow table, None if there is room enough."""
    columns = list(zip(names, zip(*lines, strict=True), strict=True)) if lines else []
    wide = [max(map(cell_len, [name, *cells])) for name, cells in columns]
    if width is None or sum(wide) + 3 * len(wide) - 1 <= width:  # padding and divider
        return None
    widths = []
    for name, cells in columns:
        parts = [_NARROW.get(name, name), *cells]
        if name == "Chosen":
            parts = [part for cell in parts for part in _LIST.split(cell)]
        elif name in _WRAPPED:
            parts = [word for cell in parts for word in cell.split()]
        widths.append(max(map(cell_len, parts)))
    # What is left goes to the model's name, then to the protocol.
    rest = width - sum(widths[1:]) - len(widths) - 1
    widths[0] = max(_MIN_MODEL, min(wide[0], rest))
    widths[1] = max(widths[1], min(wide[1], widths[1] + rest - widths[0]))
    return widths


def _lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns' names and the text of each cell, without empty columns."""
    lines = [_line(row) for row in rows]
    names = [
        name for name in _COLUMNS if not lines or any(line[name] for line in lines)
    ]
    return names, [[line[name] for name in names] for line in lines]


def _line(row: Row) -> dict[str, str]:
    low, high = 100 * row["top1_low"], 100 * row["top1_high"]
    spread = f"[{low:.1f}, {high:.1f}]"
    draws = row.get("draws")
    if draws and len(draws) > 1:
        spread = f"± {100 * stdev(draws):.1f}"
    chosen = row["hyperparameters"].items()
    return {
        "Model": printable(row["model"]),
        "Protocol": f"{row['protocol']} {row.get('variant', '')}".strip(),
        "Layer": "" if row["layer"] is None else str(row["layer"]),
        "Pooling": row["pooling"],
        "Chosen": ", ".join(
            f"{_SHORT.get(name, name)} {_number(value)}" for name, value in chosen
        ),
        "Top-1 % [95 %]": f"{100 * row['top1']:.1f} {spread}",
        "Top-5 %": "" if row["top5"] is None else f"{100 * row['top5']:.1f}",
        "Seconds": f"{row['feature_seconds'] + row['seconds']:.1f}",
    }


def _number(value: float) -> str:
    """Returns a number in full if it is short, else with three digits."""
    full = f"{value:g}"
    return full if len(full) <= 6 else f"{value:.3g}"
