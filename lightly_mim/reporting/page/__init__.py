"""One HTML page of a run or of several, made from their directories alone."""

from lightly_mim.reporting.page.page import REPORT, write_page, write_page_or_warn
from lightly_mim.reporting.page.reading import find_runs

__all__ = ["REPORT", "find_runs", "write_page", "write_page_or_warn"]
