"""A set against its controls, from made predictions: what is paired, adjusted and decided."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.report.written_runs import CLASSES, share, write_run
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.statistics.comparisons import compare, compare_over_seeds
from vipbench.harness.report.controls import (
    CONTROL,
    KNOWLEDGE,
    THE_SET,
    Line,
    Result,
    compare_lines,
    decisions,
    thin_evidence,
    to_csv,
    to_markdown,
)
from vipbench.harness.report.figures.controls import draw_controls
from vipbench.harness.report.figures.data import Group, read_tested
from vipbench.harness.report.figures.registry import Query, finished
from vipbench.harness.report.rows import load_runs

N = 200


def rights(count: int, seed: int) -> list[bool]:
    """A random choice of so many of the samples."""
    chosen = np.random.default_rng(seed).permutation(N) < count
    return [bool(one) for one in chosen]


def make_line(
    folder: Path, kind: str, reader: str, texts: str, runs: Sequence[Sequence[bool]], keys: Sequence[int | None]
) -> Line:
    shots, place = 0 if reader == "zero_shot" else 16, folder / f"{reader} {texts}"
    for seed, right in enumerate(runs):
        write_run(place, reader, shots, seed, right)
    rows = load_runs(place).to_dict("records") if runs else []
    found = [{str(name): value for name, value in row.items()} for row in rows]
    return Line(kind, Group((reader, texts), ("data", "b"), found), keys)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """Zero-shot: the set is clearly better than all; ViP: it is no better than random words."""
    folder = tmp_path_factory.mktemp("controls")
    return [
        make_line(folder, THE_SET, "zero_shot", "the set (good)", [share(150, N)], [None]),
        make_line(folder, CONTROL, "zero_shot", "class names", [rights(100, 1)], [None]),
        make_line(folder, CONTROL, "zero_shot", "random words", [rights(90 + n, n) for n in range(4)], [1, 2, 3, 4]),
        make_line(folder, KNOWLEDGE, "zero_shot", "description", [rights(148, 8)], [None]),
        make_line(folder, THE_SET, "vip", "the set (good)", [rights(150 + n, n) for n in range(3)], [1, 2, 3]),
        make_line(folder, CONTROL, "vip", "random words", [rights(150 - n, 9 + n) for n in range(3)], [1, 2, 3]),
        make_line(folder, CONTROL, "vip", "class names", [rights(40 + 4 * n, 20 + n) for n in range(3)], [1, 2, 3]),
    ]


@pytest.fixture(scope="module")
def results(lines: list[Line]) -> list[Result]:
    return compare_lines(lines, "accuracy")


def predictions(line: Line) -> list[Predicted]:
    return [read_tested(Path(run["run"])).of for run in line.group.runs]


def test_the_set_is_paired_with_every_draw_and_with_its_own_seed(lines: list[Line], results: list[Result]) -> None:
    (own,), (names,), words = map(predictions, lines[:3])
    assert results[0].comparison is None and results[4].comparison is None
    assert results[1].comparison == compare("accuracy", own, names)
    assert results[2].comparison == compare_over_seeds("accuracy", [own] * 4, words)
    assert results[5].comparison == compare_over_seeds("accuracy", predictions(lines[4]), predictions(lines[5]))
    shorter = Line(CONTROL, lines[5].group, [3, 2, 7])
    (_, other) = compare_lines([lines[4], shorter], "accuracy")
    first, second = predictions(lines[4]), predictions(lines[5])
    assert other.comparison == compare_over_seeds("accuracy", [first[1], first[2]], [second[1], second[0]])


def test_p_values_are_adjusted_over_the_whole_table(results: list[Result]) -> None:
    tested = sorted((one.comparison.p or 0, one.p or 0) for one in results if one.comparison)
    assert len(tested) == 5
    highest = 0.0
    for place, (p, adjusted) in enumerate(tested):
        highest = min(1.0, max(highest, p * (5 - place)))
        assert adjusted == pytest.approx(highest)


def test_the_decision_is_plain(results: list[Result]) -> None:
    yes, no = decisions(results, "accuracy")
    assert yes.startswith(
        "Zero-shot: yes, the set (good) beats all 2 controls, the nearest (class names) by 25.0 points ["
    )
    assert "p < 0.001 after Holm over 5 tests." in yes and "Against other knowledge: description (+1.0 points" in yes
    assert no.startswith("ViP: no, the set (good) is not shown to beat random words (+1.0 points [")
    assert no.endswith("; it beats class names.")


def test_lower_is_better_where_it_is(lines: list[Line]) -> None:
    results = compare_lines(lines[:2], "brier")
    assert results[1].comparison and results[1].comparison.difference < 0
    assert decisions(results, "brier")[0].startswith("Zero-shot: yes, ")
    swapped = [Line(THE_SET, lines[1].group, [None]), Line(CONTROL, lines[0].group, [None])]
    assert "is not shown to beat" in decisions(compare_lines(swapped, "brier"), "brier")[0]


def test_runs_that_are_missing_leave_the_decision_open(lines: list[Line], tmp_path: Path) -> None:
    empty = make_line(tmp_path, CONTROL, "zero_shot", "WaffleCLIP", [], [])
    results = compare_lines([*lines[:2], empty], "accuracy")
    (sentence,) = decisions(results, "accuracy")
    assert sentence.startswith("Zero-shot: not decided: the set (good) is not compared with WaffleCLIP")
    assert "| zero-shot | WaffleCLIP | – | 0 | – | – |" in to_markdown(results, "accuracy")
    no_set = [make_line(tmp_path, THE_SET, "zero_shot", "the set (good)", [], []), *lines[1:2]]
    assert "not decided" in decisions(compare_lines(no_set, "accuracy"), "accuracy")[0]
    assert "WaffleCLIP" not in str(drawn_texts(results))


def drawn_texts(results: Sequence[Result]) -> list[str]:
    """The texts of the chart."""
    runs = load_runs(Path(results[0].line.group.runs[0]["run"]).parent)
    chart = finished(lambda: draw_controls(Query(runs), results))
    assert f"n = {N} test images" in chart.note and "Whiskers: 95% intervals" in chart.note
    (ax,) = chart.figure.axes
    return [text.get_text() for text in [*ax.get_yticklabels(), *ax.texts]]


def test_table_data_and_figure_hold_the_same(lines: list[Line], results: list[Result]) -> None:
    table, frame = to_markdown(results, "accuracy"), to_csv(results, "accuracy").splitlines()
    assert len(frame) == 1 + len(lines)
    assert "| zero-shot | **the set (good)** | 75.0 [" in table and f"n = {N} test images" in table
    assert "adjusted by Holm over all 5" in table
    shown = drawn_texts(results)
    assert "zero_shot / random words" in shown and "vip / the set (good)" in shown
    assert any("+25.0 (p < 0.001)" in text for text in shown)


def test_thin_evidence_is_named(results: list[Result], tmp_path: Path) -> None:
    found = thin_evidence(results)
    assert any("patients are unknown" in one for one in found)
    assert "3 seeds only: a test over so few finds large differences alone" in found
    few = [
        make_line(tmp_path, THE_SET, "vip", "the set (few)", [share(15, 20)], [None]),
        make_line(tmp_path, CONTROL, "vip", "class names", [share(10, 20)], [None]),
    ]
    found = thin_evidence(compare_lines(few, "accuracy"))
    assert any(f"fewer than 50 test samples of {CLASSES[0]} (10)" in one for one in found)
    assert any("one seed only" in one for one in found)
