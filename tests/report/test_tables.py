"""Tables: figures by hand, the best marked, nothing mixed silently."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.report.tables import load_runs, make_table, to_csv, to_latex, to_markdown
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.directory import write_digests


def run(method: str, shots: Any, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    row = {
        "method.name": method,
        "data.shots": shots,
        "data.split_seed": seed,
        "train.augmentation_seed": seed,
        "seed": seed,
        "train.lr": 0.002,
        "backbone.name": "ViT-B-16",
        "dataset": "demo",
        "data.path": "data",
        "metrics.accuracy": accuracy,
        "metrics.ece": 1 - accuracy,
        "run": f"runs/{method}{shots}{seed}",
    }
    return row | {key.replace("__", "."): value for key, value in more.items()}


RUNS = pd.DataFrame(
    [
        run("zero_shot", 0, 0, 0.5, method__text="symptoms"),
        run("zero_shot", 0, 0, 0.25, method__text="class_names"),
        *(run("coop", 16, seed, value, method__position="end") for seed, value in ((1, 0.6), (2, 0.7), (3, 0.65))),
        *(run("vip", "all", seed, value, method__merge="mean") for seed, value in ((1, 0.8), (2, 0.9))),
        *(run("vip", 16, seed, value, method__merge="mean") for seed, value in ((1, 0.6), (2, 0.61), (3, 0.62))),
    ]
)


def test_mean_and_sample_deviation_best_marked_n_shown() -> None:
    lines = to_markdown(make_table(RUNS, ["method"], ["shots"], ["accuracy"])).splitlines()
    assert lines[0] == "| method | accuracy, shots=0 | accuracy, shots=16 | accuracy, shots=all |"
    assert lines[2] == "| zero_shot (text=symptoms) | **50.00** (1) | – | – |"
    assert lines[3] == "| zero_shot (text=class_names) | 25.00 (1) | – | – |"
    assert lines[4] == "| coop | – | **65.00** ± 5.00 (3) | – |"
    assert lines[5] == "| vip | – | 61.00 ± 1.00 (3) | **85.00** ± 7.07 (2) |"
    assert "sample standard deviation" in lines[-1]


def test_a_cell_whose_selection_is_doubtful_is_marked() -> None:
    runs = RUNS.assign(
        doubtful=[name == "vip" and seed == 2 for name, seed in zip(RUNS["method.name"], RUNS["seed"], strict=True)]
    )
    table = make_table(runs, ["method"], ["shots"], ["accuracy"])
    lines = to_markdown(table).splitlines()
    assert lines[4] == "| coop | – | **65.00** ± 5.00 (3) | – |"
    assert lines[5] == "| vip | – | 61.00 ± 1.00 (3)† | **85.00** ± 7.07 (2)† |"
    assert "†: some run kept an epoch of the warm-up" in lines[-1]
    assert r"61.00 $\pm$ 1.00 (3)$^\dagger$" in to_latex(table) and "†" not in to_latex(table)
    assert "†" not in to_markdown(make_table(RUNS, ["method"], ["shots"], ["accuracy"]))


def test_lower_is_better_for_calibration_error() -> None:
    table = make_table(RUNS, ["method"], ["shots"], ["ece"])
    assert table.is_best(("coop",), ("ece", 16))
    assert not table.is_best(("vip",), ("ece", 16))


def test_csv_has_raw_numbers() -> None:
    lines = to_csv(make_table(RUNS, ["method"], ["shots"], ["accuracy"])).splitlines()
    assert lines[0] == "method,shots,metric,mean,std,n,doubtful"
    assert lines[1] == "zero_shot (text=symptoms),0,accuracy,0.5,,1,0"
    coop = lines[3].split(",")
    assert coop[:3] == ["coop", "16", "accuracy"]
    assert [float(value) for value in coop[3:]] == pytest.approx([0.65, 0.05, 3, 0])


def test_latex_escapes() -> None:
    text = to_latex(make_table(RUNS, ["method"], ["data.shots"], ["accuracy"]))
    assert r"zero\_shot (text=symptoms) & \textbf{50.00} (1) & -- & -- \\" in text
    assert r"coop & -- & \textbf{65.00} $\pm$ 5.00 (3) & -- \\" in text
    assert text.startswith(r"\begin{tabular}{lrrr}")


def test_runs_that_differ_in_more_than_the_seed_are_not_mixed() -> None:
    mixed = pd.concat([RUNS, pd.DataFrame([run("coop", 16, 4, 0.1, train__lr=0.1, method__position="end")])])
    with pytest.raises(
        UserError, match=r"cell coop / 16 would mix train\.lr=0\.002, 0\.1; add train\.lr to --rows or --columns"
    ):
        make_table(mixed.reset_index(drop=True), ["method"], ["shots"], ["accuracy"])
    table = make_table(mixed.reset_index(drop=True), ["method", "lr"], ["shots"], ["accuracy"])
    assert ("coop", 0.1) in table.rows
    twice = pd.concat([RUNS, pd.DataFrame([run("coop", 16, 1, 0.1, method__position="end")])])
    with pytest.raises(UserError, match="several runs of one seed"):
        make_table(twice.reset_index(drop=True), ["method"], ["shots"], ["accuracy"])


def test_methods_that_differ_in_options_are_rows_of_their_own() -> None:
    runs = pd.concat([RUNS, pd.DataFrame([run("vip", 16, 1, 0.3, method__merge="attention")])]).reset_index(drop=True)
    rows = make_table(runs, ["method"], ["shots"], ["accuracy"]).rows
    assert ("vip (merge=mean)",) in rows
    assert ("vip (merge=attention)",) in rows


def test_unknown_names_are_told() -> None:
    with pytest.raises(UserError, match="the runs have no 'shot'; did you mean 'shots'"):
        make_table(RUNS, ["method"], ["shot"], ["accuracy"])
    with pytest.raises(UserError, match="there is no metric 'acuracy'; did you mean 'accuracy'"):
        make_table(RUNS, ["method"], ["shots"], ["acuracy"])


def test_options_with_a_place_of_their_own_are_not_repeated_in_the_label() -> None:
    vip = RUNS[(RUNS["method.name"] == "vip") & (RUNS["data.shots"] == 16)]
    runs = pd.concat([vip, pd.DataFrame([run("vip", 16, 1, 0.3, method__merge="attention")])]).reset_index(drop=True)
    table = make_table(runs, ["method"], ["merge"], ["accuracy"])
    assert table.rows == [("vip",)]
    assert table.columns == [("accuracy", "attention"), ("accuracy", "mean")]


def test_a_section_stands_for_its_name() -> None:
    table = make_table(RUNS, ["backbone", "method"], ["shots"], ["accuracy"])
    assert table.row_names == ["backbone", "method"]
    assert ("ViT-B-16", "coop") in table.rows


def test_runs_without_a_setting_share_one_column() -> None:
    runs = RUNS.assign(**{"train.lr": RUNS["train.lr"].where(RUNS["method.name"] != "zero_shot")})
    table = make_table(runs, ["method"], ["shots", "lr"], ["accuracy"])
    assert table.columns == [("accuracy", 0, "–"), ("accuracy", 16, 0.002), ("accuracy", "all", 0.002)]


def test_undefined_metrics_are_neither_counted_nor_best() -> None:
    runs = RUNS.assign(**{"metrics.auroc": pd.Series([None, 0.7, None, 0.5, 0.6, *[0.5] * 5], dtype=float)})
    lines = to_markdown(make_table(runs, ["method"], ["shots"], ["auroc"])).splitlines()
    assert lines[2] == "| zero_shot (text=symptoms) | undefined | – | – |"
    assert lines[3] == "| zero_shot (text=class_names) | **70.00** (1) | – | – |"
    assert lines[4] == "| coop | – | **55.00** ± 7.07 (2) | – |"


def test_latex_and_markdown_signs_are_escaped() -> None:
    runs = RUNS[RUNS["method.name"] == "zero_shot"].assign(**{"method.text": ["a|b", r"c:\d_e~100%"]})
    table = make_table(runs, ["method"], ["shots"], ["accuracy"])
    assert r"| zero_shot (text=a\|b) |" in to_markdown(table)
    assert r"| backbone | accuracy, text=a\|b |" in to_markdown(make_table(runs, ["backbone"], ["text"], ["accuracy"]))
    assert r"zero\_shot (text=c:\textbackslash{}d\_e\textasciitilde{}100\%) &" in to_latex(table)


def write_run(
    folder: Path, name: str, seed: int, accuracy: float, symptoms: str = "set.json", digest: str = "1"
) -> Path:
    """A run directory of zero_shot, which has no `train`, of ten samples; as earlier versions wrote it, without digests."""
    path = folder / name
    path.mkdir(parents=True)
    method = {"name": "zero_shot", "text": "symptoms"}
    config = {"seed": seed, "data": {"path": "data", "shots": 0}, "symptoms": symptoms, "method": method, "train": None}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = {"accuracy": accuracy, "auroc": None, "sensitivity": {"nevus": 1.0}, "samples": 10}
    (path / "metrics.json").write_text(json.dumps(metrics))
    digests = {"dataset": "1", "backbone": "1", "symptoms": digest}
    (path / "provenance.json").write_text(json.dumps({"dataset": "demo", "digests": digests}))
    labels = [0] * round(10 * accuracy) + [1] * round(10 - 10 * accuracy)
    frame = pd.DataFrame({"id": [*"abcdefghij"], "label": labels, "logits": [[1.0, 0.0]] * 10})
    frame.to_parquet(path / "predictions.parquet", index=False)
    return path


DAMAGES = {
    "accuracy is 7": ("metrics.json", '{"accuracy": 7, "samples": 10}'),
    "it is not of the 10 samples": ("metrics.json", "{}"),
    "accuracy is 0.9, but 0.5000": ("metrics.json", '{"accuracy": 0.9, "samples": 10}'),
    "metrics.json: damaged: accuracy is None": ("metrics.json", '{"auroc": 0.9, "samples": 10}'),
    "metrics.json: not JSON": ("metrics.json", '{"accuracy": 0.5'),
    "provenance.json: damaged": ("provenance.json", "[]"),
    "provenance.json: missing": ("provenance.json", None),
    "config.yaml: damaged": ("config.yaml", "method: zero_shot"),
    "config.yaml: not YAML": ("config.yaml", "{"),
    "predictions.parquet: damaged": ("predictions.parquet", "PAR1"),
    "predictions.parquet: missing": ("predictions.parquet", None),
}


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, digests: bool
) -> None:
    for seed, name in enumerate(("whole", "damaged")):
        path = write_run(tmp_path, name, seed, 0.5)
        if digests:
            write_digests(path)
    file, content = DAMAGES[damage]
    (path / file).unlink() if content is None else (path / file).write_text(content)
    result = CliRunner().invoke(app, ["table", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "**50.00** (1)" in result.stdout
    assert result.stdout.rstrip().endswith("1 damaged run is left out.")
    told = (
        f"{file}: missing"
        if content is None
        else f"{file}: damaged: it is not what the run wrote"
        if digests
        else damage
    )
    assert told in caplog.text
    assert f"left out: {path / file}" in caplog.text
    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(UserError, match="no finished run here, but 1 damaged"):
        load_runs(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"metrics.json": 1}', '{"../x": ""}'])
def test_damaged_digests_are_damage_too(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    path = write_run(tmp_path, "run", 1, 0.5)
    (path / "files.json").write_text(content)
    assert read_runs(tmp_path).empty
    assert f"left out: {path / 'files.json'}: damaged" in caplog.text


def test_an_option_that_is_not_set_is_none(tmp_path: Path) -> None:
    coop = RUNS[RUNS["method.name"] == "coop"].assign(
        **{"method.init_words": np.array([None, float("nan"), "a photo of a"], object)}
    )
    rows = make_table(coop.reset_index(drop=True), ["method"], ["shots"], ["accuracy"]).rows
    assert rows == [("coop (init_words=none)",), ("coop (init_words=a photo of a)",)]
    lengths = coop.assign(**{"method.context_length": np.array([None, None, 4], object)}).reset_index(drop=True)
    lines = to_markdown(make_table(lengths, ["method"], ["shots"], ["accuracy"])).splitlines()
    assert lines[2].startswith("| coop (init_words=none, context_length=none) |")


def test_folders_and_files_of_the_wrong_kind_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "a", 1, 0.5)
    (tmp_path / "file").touch()
    for arguments in (["file"], ["runs", "--out", "file/table.md"], ["runs", "--out", "runs"]):
        paths = [str(tmp_path / word) if not word.startswith("--") else word for word in arguments]
        result = CliRunner().invoke(app, ["table", *paths])
        assert isinstance(result.exception, UserError), arguments


def test_the_order_of_a_sweep_is_its_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate(("b", "a", "c")):
        write_run(tmp_path / "runs", name, seed, 0.5)
    assert [Path(path).name for path in load_runs(tmp_path)["run"]] == ["a", "b", "c"]
    assert [Path(path).name for path in load_runs(tmp_path / "runs")["run"]] == ["a", "b", "c"]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": ["c", "b"]}))
    assert [Path(path).name for path in load_runs(tmp_path)["run"]] == ["c", "b", "a"]
    (tmp_path / "sweep.json").write_text(json.dumps({"plans": [{"runs": ["b"]}, {"runs": ["c", "a"]}]}))
    assert [Path(path).name for path in load_runs(tmp_path)["run"]] == ["b", "c", "a"]
    for damaged in ("", "[]", "{}", '{"runs": 1}', '{"plans": [1]}', '{"runs": [["a"]]}', '{"runs": [".."]}'):
        caplog.clear()
        (tmp_path / "sweep.json").write_text(damaged)
        assert [Path(path).name for path in load_runs(tmp_path)["run"]] == ["a", "b", "c"]
        assert f"{tmp_path / 'sweep.json'}: damaged" in caplog.text


@pytest.mark.parametrize(
    ("symptoms", "digest", "message"),
    [
        ("other.json", "2", "would mix symptoms=set.json, other.json; add symptoms to --rows or --columns"),
        ("set.json", "2", "would mix runs before and after symptoms=set.json changed in content"),
        ("copy.json", "1", None),
    ],
)
def test_runs_of_other_content_are_not_mixed(tmp_path: Path, symptoms: str, digest: str, message: str | None) -> None:
    write_run(tmp_path, "a", 1, 0.5)
    write_run(tmp_path, "b", 2, 0.7, symptoms, digest)
    if message is None:
        assert "60.00** ± 14.14 (2)" in to_markdown(make_table(load_runs(tmp_path), ["method"], [], ["accuracy"]))
    else:
        with pytest.raises(UserError, match=message):
            make_table(load_runs(tmp_path), ["method"], [], ["accuracy"])


def test_a_config_leads_to_no_folder_outside_its_run(tmp_path: Path) -> None:
    with (write_run(tmp_path, "a", 1, 0.5) / "config.yaml").open("a") as file:
        file.write("evaluation: ../../b\n")
    with pytest.raises(UserError, match=r"a: \.\./\.\./b cannot be the name of an evaluation"):
        make_table(load_runs(tmp_path), ["method"], [], ["accuracy"])


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 1, 0.5)
    out = tmp_path / "table.csv"
    arguments = ["table", str(tmp_path), "--metric", "accuracy", "--format", "csv", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert out.read_text() == "method,shots,metric,mean,std,n,doubtful\nzero_shot,0,accuracy,0.5,,1,0\n"
    with pytest.raises(UserError, match="no finished run here"):
        load_runs(tmp_path / "a")
