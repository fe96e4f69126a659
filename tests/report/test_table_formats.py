"""Formats of tables: marks, layout, runs behind cells, what signs in names do."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.report.test_tables import RUNS, run
from tests.report.written_runs import share, write_run
from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.report.tables import FORMATS, make_table, to_csv, to_html, to_latex, to_markdown
from vipbench.harness.report.tables.cells import Table
from vipbench.harness.report.tables.layout import Layout, read_layout
from vipbench.harness.report.tables.text import arranged

THREE = pd.DataFrame(
    [
        run("coop", 16, 1, 0.5),
        run("coop", 16, 2, 0.6),
        run("vip", 16, 1, 0.7),
        run("vip", 16, 2, 0.7),
        run("tip <b>&", 16, 1, 0.65),
    ]
)


def three(metric: str = "accuracy") -> Table:
    return make_table(THREE, ["method"], ["shots"], [metric])


def test_second_is_underlined_where_there_are_three() -> None:
    lines = to_latex(three()).splitlines()
    assert r"vip & \textbf{70.00} $\pm$ 0.00 (2) \\" in lines
    assert r"tip \textless{}b\textgreater{}\& & \underline{65.00} (1) \\" in lines
    assert r"coop & 55.00 $\pm$ 7.07 (2) \\" in lines
    assert "Underlined: second best" in lines[-1]
    assert r"\underline{35.00} (1)" in to_latex(three("ece"))
    two = make_table(THREE.iloc[:4], ["method"], ["shots"], ["accuracy"])
    assert r"\underline" not in to_latex(two)


def test_html_opens_cells_and_escapes_names() -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.texts: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}, "the file needs nothing else"

        def handle_data(self, data: str) -> None:
            self.texts.append(data)

    reader = Reader()
    reader.feed(text := to_html(three()))
    assert "b" not in reader.tags and "tip <b>&" in reader.texts
    assert "seed 2: 60.00  coop162" in reader.texts, "the directory's name"
    assert reader.tags.count("details") == 3 and 'class="best"><summary>70.00' in text
    assert 'class="second"><summary>65.00' in text
    assert "seed 2: 60.00  runs/coop162" in to_html(three(), show_runs=True)


def test_runs_behind_cells() -> None:
    table = three()
    lines = to_markdown(table, show_runs=True).splitlines()
    place = lines.index("coop, accuracy, shots=16")
    assert lines[place + 1 : place + 3] == ["- seed 1: 50.00  runs/coop161", "- seed 2: 60.00  runs/coop162"]
    assert "runs/coop161" not in to_markdown(table)
    assert "%   seed 2: 60.00  runs/coop162" in to_latex(table, show_runs=True).splitlines()
    opened = to_csv(table, show_runs=True).splitlines()
    assert opened[0] == "method,shots,metric,seed,split_seed,augmentation_seed,value,run"
    assert opened[2] == "coop,16,accuracy,2,2,2,0.6,runs/coop162"
    assert len(opened) == 1 + len(THREE)


def test_seeds_that_differ_are_named() -> None:
    runs = pd.DataFrame([run("vip", 16, 1, 0.7, data__split_seed=7)])
    assert "- seed 1, split_seed 7: 70.00  " in to_markdown(make_table(runs, ["method"], [], ["accuracy"]), True)


def test_parquet_holds_the_rows_of_csv(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "coop", 4, 1, share(60))
    with pytest.raises(UserError, match="--format parquet: give a file in --out"):
        CliRunner().invoke(app, ["table", str(tmp_path), "--format", "parquet"], catch_exceptions=False)
    out = tmp_path / "table.parquet"
    arguments = ["table", str(tmp_path), "--format", "parquet", "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    row = {"method": "coop", "shots": "4", "metric": "accuracy", "mean": 0.6, "std": None, "n": 1, "doubtful": 0}
    assert pd.read_parquet(out).to_dict("records") == [row]


def test_names_order_and_caption(tmp_path: Path) -> None:
    path = tmp_path / "layout.yaml"
    path.write_text(
        "names: {vip: ViP, accuracy: Acc., shots: images, 'shots=all': all images, nevus: mole}\n"
        "order: [vip, zero_shot]\ncaption: 100% drawn & small.\nlabel: tab:a_1\n"
    )
    table = arranged(replace(make_table(RUNS, ["method"], ["shots"], ["accuracy"]), layout=read_layout(path)))
    lines = to_markdown(table).splitlines()
    assert lines[0] == "100% drawn & small."
    assert lines[2] == "| method | Acc., images=0 | Acc., images=16 | Acc., all images |"
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines[4:8]]
    assert rows == ["ViP", "zero_shot (text=symptoms)", "zero_shot (text=class_names)", "coop"]
    latex = to_latex(table).splitlines()
    assert latex[:4] == [r"\begin{table}", r"\centering", r"\caption{100\% drawn \& small.}", r"\label{tab:a_1}"]
    assert latex[-1] == r"\end{table}" and "Mean $\\pm$ sample standard deviation" in latex[-2]
    merged = make_table(
        pd.DataFrame([run("vip", 1, 1, 0.5, method__merge=one) for one in "ab"]), ["method"], [], ["ece"]
    )
    assert "| ViP (merge=a) |" in to_markdown(replace(merged, layout=read_layout(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("order: [vipp]", r"order: the table has no row 'vipp'; did you mean 'vip'\?"),
        ("captoin: x", r"layout\.yaml: captoin: unknown key; did you mean 'caption'\?"),
        ("label: 'a b'", r"layout\.yaml: label: "),
    ],
)
def test_a_layout_that_does_not_fit_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "layout.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        arranged(replace(make_table(RUNS, ["method"], ["shots"], ["accuracy"]), layout=read_layout(path)))


def test_caption_and_label_of_the_command_line_win(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "coop", 4, 1, share(60))
    (tmp_path / "layout.yaml").write_text("caption: first\n")
    arguments = ["table", str(tmp_path), "--layout", str(tmp_path / "layout.yaml"), "--format", "latex"]
    shown = CliRunner().invoke(app, [*arguments, "--caption", "second", "--label", "tab:x"]).stdout
    assert r"\caption{second}" in shown and r"\label{tab:x}" in shown
    with pytest.raises(UserError, match="--caption, --label: label: "):
        CliRunner().invoke(app, [*arguments, "--label", "a}b"], catch_exceptions=False)


def test_every_format_of_the_command_is_there(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "coop", 4, 1, share(60))
    for name in FORMATS:
        out = tmp_path / f"table.{name}"
        result = CliRunner().invoke(app, ["table", str(tmp_path), "--format", name, "--out", str(out)])
        assert result.exit_code == 0 and out.stat().st_size, result.output


def test_sensitivity_of_a_class_whose_name_has_a_comma(tmp_path: Path) -> None:
    for seed, right in ((1, 60), (2, 80)):
        write_run(tmp_path / "runs", "coop", 4, seed, share(right), classes=("nevus", "cancer, basal cell"))
    metric = 'accuracy,"sensitivity.cancer, basal cell",specificity.nevus'
    result = CliRunner().invoke(app, ["table", str(tmp_path), "--metric", metric])
    assert "| method | accuracy, shots=4 | sensitivity.cancer, basal cell, shots=4 | spec" in result.stdout, (
        result.output
    )
    assert "| coop | **70.00** ± 14.14 (2) | **70.00** ± 14.14 (2) | **70.00** ± 14.14 (2) |" in result.stdout
    for metric, message in (
        ("sensitivity.nevvus", "did you mean 'sensitivity.nevus'"),
        ("ece.nevus", "metrics by class are sensitivity, specificity"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["table", str(tmp_path), "--metric", metric], catch_exceptions=False)


def test_default_layout_changes_nothing() -> None:
    table = make_table(RUNS, ["method"], ["shots"], ["accuracy"])
    assert to_markdown(arranged(table)) == to_markdown(replace(table, layout=Layout()))
