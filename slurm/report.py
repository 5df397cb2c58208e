"""Collects what the tasks of a study found: study.csv, study.md and report.html.

python slurm/report.py STUDY        (a study's last job does so by itself)
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, Python looks in slurm/ and not in the clone
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lightly_mim import files
from slurm.status import ENDED, PROGRESS, UNFINISHED, Row, queue, rows
from slurm.study import Study, named_if_damaged

_CELL_KEYS = {"model", "protocol", "top1"}


def write_report(study: Study) -> str:
    """Writes study.csv, study.md and, if a run has begun, report.html.

    Returns:
        What to tell the user.
    """
    from lightly_mim.reporting.page import find_runs, write_page_or_warn

    found, lines = [], []
    for row in rows(study, queue()):
        try:
            lines += _lines(study, row)
        except ValueError as error:
            row = replace(row, state="damaged", detail=str(error), damaged=True)
            lines += _lines(study, row)
        found.append(row)
    with (
        files.atomic_write(study.path / "study.csv") as temporary,
        temporary.open("w", newline="") as file,
    ):
        names = dict.fromkeys(name for line in lines for name in line)
        writer = csv.DictWriter(file, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(lines)
    page = _page(study, found, lines)
    with files.atomic_write(study.path / "study.md") as temporary:
        temporary.write_text(page)
    said = f"{page}\nEvery number: {study.path / 'study.csv'}"
    with suppress(ValueError):  # no run has begun
        find_runs(study.path)
        if html := write_page_or_warn(study.path):
            said += f"; open {html} with a browser"
    return f"{said}."


def _lines(study: Study, row: Row) -> list[dict[str, Any]]:
    """Returns the lines of a task: one per number that it measured, or one without."""
    last = row.attempts[-1] if row.attempts else {"host": "", "gpus": []}
    own = {"task": row.task.name, "state": row.state, **row.task.sweep}
    about = {
        "requeues": row.requeues,
        "error": row.detail if row.damaged or row.state in UNFINISHED else "",
        "host": last["host"],
        "gpus": json.dumps(last["gpus"]),
        "commit": study.origin["commit"],
        "modified": study.origin["modified"],
    }
    numbers = list(_numbers(study.run(row.task))) if row.state == "done" else []
    return [own | line | about for line in numbers or [row.progress]]


def _numbers(run: Path) -> Iterator[dict[str, Any]]:
    """Yields what a task measured: a script's summary.csv or results.json."""
    summary, results = run / "summary.csv", run / "results.json"
    if summary.exists():
        yield from _summary(summary)
    elif results.exists():
        from lightly_mim.reporting.study import model_of

        remedy = "Evaluate the run again."
        for row in files.read_sealed(results, remedy).get("rows", []):
            plain = {
                key: value if isinstance(value, str | int | float | None) else
                json.dumps(value)
                for key, value in row.items()
            }  # fmt: skip
            yield plain | {"model": model_of(row)}


def _summary(path: Path) -> list[dict[str, Any]]:
    remedy = "Run the task's command again, with its --out and --resume."
    with named_if_damaged(path, remedy):
        files.check_regular(path)
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
        if reader.fieldnames is None:
            raise ValueError("it is empty")
        for line in lines:
            if None in line or None in line.values():
                raise ValueError("a line of it is cut")
            float(line.get("top1") or 0)
    return lines


def _page(study: Study, found: Sequence[Row], lines: Sequence[dict[str, Any]]) -> str:
    """Returns the page, in Markdown."""
    origin = study.origin
    modified = ", with changes that were not committed" if origin["modified"] else ""
    failed = [row for row in found if row.state != "done"]
    parts = [
        f"# {files.printable(study.path.name)}",
        f"`{files.printable(shlex.join(study.command))}`, {len(found)} task(s), "
        f"{len(found) - len(failed)} done; written {time.strftime('%Y-%m-%d %H:%M')}.",
    ]
    keys = [key for key in study.swept() if key not in ("seed", "seeds")]
    parts += _results(lines, keys)
    parts += ["## Tasks", _tasks(found)]
    if failed:
        reasons = [f"- `{r.task.name}`: {r.state}. {r.detail}".rstrip() for r in failed]
        parts += ["## Not finished", "\n".join(reasons)]
        if any(row.state in ENDED for row in failed):
            parts.append(
                "The traceback of a failed task is in its `state.json`, its output in "
                f"`jobs/`. Rerun only these:\n\n    {study.resume_command()}"
            )
    damaged = [row for row in found if row.damaged and row.state == "done"]
    if damaged:
        parts.append("## Damaged")
        parts.append("\n".join(f"- `{row.task.name}`: {row.detail}" for row in damaged))
    parts.append(
        f"Code: commit {origin['commit']}{modified}, in `code/` as it ran. Submitted "
        f"{origin['date']} on {origin['host']}. "
        + ", ".join(f"{name} {text}" for name, text in origin["versions"].items())
        + "."
    )
    return "\n\n".join(parts) + "\n"


def _results(lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """Returns the table of accuracies: swept values down, protocols across."""
    from lightly_mim.reporting.study import markdown_table, mean_table

    scored = [line for line in lines if line.keys() >= _CELL_KEYS]
    if not scored:
        return []
    # What a script's own rows differ in, if it was not swept: several methods at once.
    own = [key for key in ("method",) if key not in keys and key in scored[0]]
    table = markdown_table(*mean_table(scored, [*own, *keys])).rstrip()
    note = (
        "Mean ± standard deviation over the seeds (number of seeds). The differences "
        "between models and their intervals are in each task's own table."
    )
    return ["## Results", table, note]


def _tasks(found: Sequence[Row]) -> str:
    from lightly_mim.reporting.study import markdown_table

    body = []
    for row in found:
        spans = [(a["started"], a["ended"] or a["started"]) for a in row.attempts]
        body.append(
            [
                row.task.name,
                row.state,
                *(row.progress.get(name, "") for name in PROGRESS),
                str(row.requeues),
                f"{sum(ended - started for started, ended in spans) / 60:.1f}",
                ", ".join(dict.fromkeys(a["host"] for a in row.attempts)),
            ]
        )
    head = ["task", "state", *PROGRESS, "requeues", "minutes", "host"]
    return markdown_table(head, body).rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script. Exits with 2 if there is no study."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument("study", type=Path, metavar="STUDY")
    options = parser.parse_args(argv)
    try:
        print(write_report(Study.load(options.study)))
    except (ValueError, OSError) as error:
        parser.exit(2, f"report.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nreport.py: interrupted.\n")


if __name__ == "__main__":
    main()
