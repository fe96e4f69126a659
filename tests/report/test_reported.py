"""Reported rows: set apart, with their source, and never the best."""

from pathlib import Path

import pytest

from tests.report.test_tables import RUNS
from vipbench.harness.errors import UserError
from vipbench.harness.report.tables import Table, make_table, to_csv, to_html, to_latex, to_markdown
from vipbench.harness.report.tables.reported import add_reported, read_reported

ROWS = """
- row: {method: ViP}
  source: "paper, table 1"
  cells:
    - {metric: accuracy, at: {shots: 16}, mean: 99.5, deviation: 0.25, runs: 3}
    - {metric: accuracy, at: {shots: all}, mean: 12}
- {row: {method: CLIP}, source: other, cells: [{metric: accuracy, at: {shots: 0}, mean: 50}]}
"""


def with_rows(folder: Path, text: str) -> Table:
    path = folder / "reported.yaml"
    path.write_text(text)
    table = make_table(RUNS, ["method"], ["shots"], ["accuracy"])
    return add_reported(table, read_reported(path), str(path))


def test_reported_rows_are_set_apart(tmp_path: Path) -> None:
    table = with_rows(tmp_path, ROWS)
    lines = to_markdown(table).splitlines()
    assert lines[5] == "| vip | – | 61.00 ± 1.00 (3) | **85.00** ± 7.07 (2) |"
    assert lines[4] == "| coop | – | **65.00** ± 5.00 (3) | – |", "99.5 is not the best, for no run here made it"
    assert lines[6] == "| *Reported, not run here* |  |  |  |"
    assert lines[7:9] == ["| ViP [a] | – | 99.50 ± 0.25 (3) | 12.00 |", "| CLIP [b] | 50.00 | – | – |"]
    assert "a: reported in paper, table 1. b: reported in other." in lines[-1]
    latex = to_latex(table)
    assert r"\midrule" + "\n" + r"\multicolumn{4}{l}{\emph{Reported, not run here}} \\" in latex
    assert r"ViP$^\mathrm{a}$ & -- & 99.50 $\pm$ 0.25 (3) & 12.00 \\" in latex
    assert "<sup>b</sup>" in to_html(table) and "Reported, not run here" in to_html(table)
    csv = to_csv(table).splitlines()
    assert csv[0] == "method,shots,metric,mean,std,n,doubtful,source"
    assert csv[-1] == "CLIP,0,accuracy,0.5,,0,0,other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row: 1", "should be a list of rows"),
        ("[{row: {method: a}, cells: []}]", r"reported\.yaml: row 1: "),
        ("[{row: {method: a}, source: '', cells: [{metric: accuracy, mean: 1}]}]", "row 1: source: "),
        (
            "[{row: {methd: a}, source: b, cells: [{metric: accuracy, at: {shots: 0}, mean: 1}]}]",
            "did you mean 'method'",
        ),
        (
            "[{row: {method: a}, source: b, cells: [{metric: accuracy, at: {shots: 2}, mean: 1}]}]",
            "no column 'accuracy, shots=2'; a column is a metric and shots",
        ),
        ("[{row: {method: a}, source: b, cells: [{metric: accuracy, mean: 1}]}]", "no column 'accuracy'"),
        ("[{row: {method: a}, source: b, cells: [{metric: accuracy, at: {x: 2, shots: 0}, mean: 1}]}]", "no column"),
        (
            "[{row: {method: a}, source: b, cells: [{metric: accuracy, at: {shots: 0}, mean: 101}]}]",
            "accuracy 101.0 is no percentage",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_rows(tmp_path, text)


def test_a_figure_that_does_not_name_its_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reported.yaml"
    path.write_text("[{row: {method: a}, source: b, cells: [{metric: accuracy, at: {dataset: demo}, mean: 1}]}]")
    table = make_table(RUNS, ["method"], ["dataset", "shots"], ["accuracy"])
    with pytest.raises(UserError, match="no column 'accuracy, dataset=demo'; a column is a metric and shots"):
        add_reported(table, read_reported(path))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "reported.yaml"
    with pytest.raises(UserError, match=r"reported\.yaml: cannot be read"):
        read_reported(path)
    path.write_bytes("- source: Müller".encode("latin-1"))
    with pytest.raises(UserError, match=r"reported\.yaml: not YAML"):
        read_reported(path)
