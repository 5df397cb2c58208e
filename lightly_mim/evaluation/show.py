"""`show(...)`: results that were written, to look at again."""

from __future__ import annotations

from pathlib import Path

from lightly_mim.arguments import checked
from lightly_mim.evaluation.dense.results import DENSE_FILE, DenseResults
from lightly_mim.evaluation.results import RESULTS_FILE, Results
from lightly_mim.files import read_sealed


@checked
def show(results: Path | str) -> Results | DenseResults:
    """Reads the results of an evaluation, which `rich.print` shows as a table.

    Args:
        results:
            A `results.json` or `dense.json`, or the directory that holds it; of both,
            `results.json`.

    Raises:
        ValueError: If there are no such results, or if they are damaged.
        OSError: If the file cannot be read.
    """
    path = Path(results)
    if path.is_dir():
        there = [each for each in (RESULTS_FILE, DENSE_FILE) if (path / each).exists()]
        if not there:
            raise ValueError(
                f"{path} holds neither {RESULTS_FILE} nor {DENSE_FILE}. Evaluate with "
                f"out={path} first."
            )
        path /= there[0]
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    written = read_sealed(path, "Evaluate once more.")
    try:
        if "miou" in written["rows"][0]:
            return DenseResults.from_dict(written)
        return Results.from_dict(written)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of an evaluation.") from error
