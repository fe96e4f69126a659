"""Paired tests of a table against the best of each column, adjusted by Holm."""

from pathlib import Path

import pytest
from scipy.stats import binomtest

from tests.report.test_presets import shown
from tests.report.written_runs import share, write_run
from vipbench.harness.evaluation.statistics.comparisons import compare_over_seeds
from vipbench.harness.report.tables import Table, load_runs, make_table, to_csv, to_latex, to_markdown
from vipbench.harness.report.tables.derive import add_average, spread_references
from vipbench.harness.report.tables.paired import add_tests
from vipbench.harness.runs.predictions import read_predicted


def with_p(folder: Path, *metrics: str) -> Table:
    table = make_table(load_runs(folder), ["method"], ["shots"], metrics or ["accuracy"])
    return add_tests(spread_references(table))


def test_p_values_are_adjusted_for_all_tests_of_the_table(tmp_path: Path) -> None:
    for method, right in (("vip", 80), ("near", 76), ("far", 40)):
        write_run(tmp_path, method, 16, 1, share(right))
    table = with_p(tmp_path)
    alone = [binomtest(0, 80 - right).pvalue for right in (76, 40)]  # the better one is right wherever the other is
    cells = [table.cells[(method,), ("accuracy", 16)] for method in ("near", "far", "vip")]
    assert [cell.p for cell in cells] == [pytest.approx(alone[0]), pytest.approx(2 * alone[1]), None]
    lines = to_markdown(table).splitlines()
    assert {"| near | 76.00 (1)≈ |", "| far | 40.00 (1) |", "| vip | **80.00** (1) |"} <= set(lines)
    assert "p ≥ 0.05 after Holm over 2 paired tests (McNemar (exact))" in lines[-1]
    assert r"near & \underline{76.00} (1)$^\approx$ \\" in to_latex(table)
    assert "p_holm" in to_csv(table).splitlines()[0]


def test_runs_are_paired_by_seed_and_zero_shot_with_each(tmp_path: Path) -> None:
    best = [write_run(tmp_path, "vip", 16, seed, share(70 + seed)) for seed in (1, 2)]
    others = [write_run(tmp_path, "coop", 16, seed, share(60 + seed)) for seed in (2, 1)]
    zero = write_run(tmp_path, "zero_shot", 0, 0, share(50))
    table = with_p(tmp_path)
    first, second, third = ([read_predicted(run)[0] for run in runs] for runs in (best, others[::-1], [zero, zero]))
    raw = [compare_over_seeds("accuracy", first, other) for other in (second, third)]
    smaller, larger = sorted(test.p for test in raw if test is not None and test.p is not None)
    found = sorted(cell.p for cell in table.cells.values() if cell.p is not None)
    assert found == [pytest.approx(2 * smaller), pytest.approx(max(2 * smaller, larger))]


def test_other_seeds_or_samples_are_not_tested(tmp_path: Path) -> None:
    write_run(tmp_path, "vip", 16, 1, share(80))
    write_run(tmp_path, "coop", 16, 2, share(70))
    write_run(tmp_path, "cocoop", 16, 1, share(70, 110))
    table = with_p(tmp_path)
    assert not [cell for cell in table.cells.values() if cell.p is not None]
    assert "≈" not in to_markdown(table)
    assert "2 cells have no test: other seeds or samples than the best" in to_markdown(table)


def test_averages_are_not_tested(tmp_path: Path) -> None:
    for data in ("derm", "chest"):
        for method, right in (("vip", 80), ("coop", 40)):
            write_run(tmp_path, method, 16, 1, share(right), data=data)
    table = add_average(make_table(load_runs(tmp_path), ["method"], ["dataset"], ["accuracy"]), "dataset")
    found = {
        column[1]: cell.p is not None for (row, column), cell in add_tests(table).cells.items() if row == ("coop",)
    }
    assert found == {"chest": True, "derm": True, "average": False}


def test_the_option(tmp_path: Path) -> None:
    for method, right in (("vip", 80), ("coop", 79)):
        write_run(tmp_path, method, 16, 1, share(right))
    assert "| coop | 79.00 (1)≈ |" in shown(tmp_path, "--tests")
    assert "≈" not in "".join(shown(tmp_path))
