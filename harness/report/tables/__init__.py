"""Comparison tables of runs: mean and sample standard deviation over seeds, as Markdown, LaTeX, CSV, Parquet or HTML.

vipbench table DIR --rows method --columns shots --metric accuracy --format md

    rows of runs  ->  a query, or a preset  ->  cells  ->  references, averages, reported rows, intervals  ->  a format
"""

from collections.abc import Callable

from vipbench.harness.report.rows import load_runs
from vipbench.harness.report.tables.cells import Cell, Table
from vipbench.harness.report.tables.data import to_csv, to_parquet
from vipbench.harness.report.tables.html import to_html
from vipbench.harness.report.tables.latex import to_latex
from vipbench.harness.report.tables.make import make_table
from vipbench.harness.report.tables.markdown import to_markdown

FORMATS: dict[str, Callable[[Table, bool], str | bytes]] = {
    "md": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
    "parquet": to_parquet,
    "html": to_html,
}

__all__ = [
    "FORMATS",
    "Cell",
    "Table",
    "load_runs",
    "make_table",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
    "to_parquet",
]
