"""Paired tests of a table: each cell against the best of its column, on the same samples and seeds, adjusted by Holm."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vipbench.harness.evaluation.statistics.comparisons import Comparison, compare_over_seeds, holm
from vipbench.harness.report.tables.cells import Cell, Key, Table
from vipbench.harness.report.tables.evidence import Samples, is_measured, same_samples, statistic
from vipbench.harness.report.tables.text import ALIKE
from vipbench.harness.report.tables.values import LEVEL
from vipbench.harness.runs.predictions import read_predicted


def add_tests(table: Table) -> Table:
    """Give cells the p-value of their difference from the best mean of their column, adjusted for all tests of the table.

    Runs are paired by their seeds; those that depend on none, as of zero-shot, with each. Cells of other seeds or other test
    samples than the best have no p-value, nor have metrics without a test.

    Raises:
        UserError: the predictions of a run are damaged.
    """
    tests: dict[tuple[Key, Key], Comparison | None] = {}
    for key in dict.fromkeys(column[1:] for column in table.columns):
        read: dict[str, Samples] = {}  # of all metrics in these columns
        for column in (one for one in table.columns if one[1:] == key):
            for contest in table.contests(column):
                rows = [row for row in contest if is_measured(column, table.cells[row, column])]
                best = [row for row in rows if table.is_best(row, column)][:1]
                for row in rows if best else ():
                    if row not in best:
                        cells = table.cells[best[0], column], table.cells[row, column]
                        tests[row, column] = _compare(column[0], *cells, read)
    done = {place: test.p for place, test in tests.items() if test is not None and test.p is not None}
    adjusted = dict(zip(done, holm(list(done.values())), strict=True))
    tested = table.cells | {place: replace(table.cells[place], p=p) for place, p in adjusted.items()}
    methods = "; ".join(dict.fromkeys(test.test for place, test in tests.items() if test is not None and place in done))
    bound = f"p ≥ {LEVEL} after Holm over {len(done)} paired tests ({methods})"
    remarks = [f"{ALIKE}: not shown to differ from the best of its column: {bound}."] if done else []
    if untested := len(tests) - len(done):
        remarks.append(f"{untested} cells have no test: other seeds or samples than the best, or a metric without one.")
    return replace(table, cells=tested, remarks=[*table.remarks, *remarks])


def _compare(metric: str, best: Cell, other: Cell, read: dict[str, Samples]) -> Comparison | None:
    pairs = _pairs(best, other)
    for run in {run for pair in pairs for run in pair} - set(read):
        read[run] = read_predicted(Path(run))
    first, second = ([read[pair[place]] for pair in pairs] for place in (0, 1))
    if not pairs or not all(same_samples(first[0], samples) for samples in (*first, *second)):
        return None
    of_best, of_other = ([of for of, _ in samples] for samples in (first, second))
    return compare_over_seeds(statistic(metric), of_best, of_other, first[0][1].clusters)


def _pairs(first: Cell, second: Cell) -> Sequence[tuple[str, str]]:
    """Runs of two cells by their seeds; none where these are not the same."""
    one, other = ({tuple(value.seeds.items()): value.run for value in cell.values} for cell in (first, second))
    if first.seedless or second.seedless:
        return [(own, its) for own in one.values() for its in other.values()]
    return [(run, other[seeds]) for seeds, run in one.items()] if one.keys() == other.keys() else []
