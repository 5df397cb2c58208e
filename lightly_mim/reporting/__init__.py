"""Tables and figures from what a run has left behind; knows no model."""

from lightly_mim.reporting.figures import reconstruction_grid
from lightly_mim.reporting.tables import (
    measures_table,
    results_markdown,
    results_table,
    results_text,
)

__all__ = [
    "measures_table",
    "reconstruction_grid",
    "results_markdown",
    "results_table",
    "results_text",
]
