"""Runs that failed or are not finished: shown in their cells and below the table, never averaged away."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.report.test_presets import shown
from tests.report.written_runs import share, write_run
from vipbench.harness.report.rows import load_runs, unfinished
from vipbench.harness.report.tables import make_table


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Five planned runs: two finished, two failed (one without a directory), one not started."""
    runs, configs = tmp_path / "runs", tmp_path / "configs"
    configs.mkdir()
    names = {}
    for method, seed in (("coop", 1), ("coop", 2), ("coop", 3), ("vip", 1), ("vip", 2)):
        path = write_run(runs, method, 16, seed, share(60))
        names[method, seed] = path.name
        shutil.copy(path / "config.yaml", configs / f"{path.name}.yaml")
    failed = runs / names["coop", 3]
    shutil.rmtree(failed / "logs", ignore_errors=True)
    failed.rename(partial := failed.with_name(f"{failed.name}.partial"))
    (partial / "metrics.json").unlink()
    (partial / "failed.json").write_text(json.dumps({"error": "the loss is nan"}))
    shutil.rmtree(runs / names["vip", 1])
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / f"{names['vip', 1]}.json").write_text(json.dumps({"error": "killed"}))
    shutil.rmtree(runs / names["vip", 2])
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": list(names.values())}))
    return tmp_path


def test_missing_runs_are_counted_where_they_belong(sweep: Path) -> None:
    lines = shown(sweep)
    assert lines[2:4] == ["| coop | **60.00** ± 0.00 (2 of 3) |", "| vip | – (0 of 2) |"]
    assert "(n of m): runs that are planned and not finished are missing. 3 runs are not finished: " in lines[-1]
    assert "failed: coop_16shot_seed3_data: the loss is nan; " in lines[-1]
    assert "failed: vip_16shot_seed1_data: killed; pending: vip_16shot_seed2_data." in lines[-1]
    csv = shown(sweep, "--format", "csv")
    assert csv[0] == "method,shots,metric,mean,std,n,doubtful,missing"
    assert csv[1:] == ["coop,16,accuracy,0.6,0.0,2,0,1", "vip,16,accuracy,,,0,0,2"]


@pytest.mark.parametrize("format", ["md", "latex", "html", "csv", "parquet"])
def test_a_cell_leads_to_its_missing_runs_in_every_format(sweep: Path, tmp_path: Path, format: str) -> None:
    out = tmp_path / f"table.{format}"
    shown(sweep, "--show-runs", "--format", format, "--out", str(out))
    expected = [("coop", state) for state in ("done", "done", "failed")] + [("vip", "failed"), ("vip", "pending")]
    if format in ("csv", "parquet"):
        table = pd.read_csv(out) if format == "csv" else pd.read_parquet(out)
        assert [*zip(table["method"], table["state"], strict=True)] == expected
        assert table["value"].isna().tolist() == [state != "done" for _, state in expected]
        assert all(Path(run).parent == sweep / "runs" for run in table["run"])
        return
    text = out.read_text()
    for method, seed, state in (("coop", 3, "failed"), ("vip", 1, "failed"), ("vip", 2, "pending")):
        assert f"{state}  {sweep}/runs/{method}_16shot_seed{seed}_data" in text
    assert f"seed 1: 60.00  {sweep}/runs/coop_16shot_seed1_data" in text


def test_a_second_table_of_the_same_rows_is_the_same(sweep: Path) -> None:
    runs = load_runs(sweep)
    assert make_table(runs, ["method"], ["shots"], ["ece"]) == make_table(runs, ["method"], ["shots"], ["ece"])
    assert len(make_table(runs, ["method"], ["shots"], ["ece"]).unfinished) == 3


def test_missing_runs_count_by_dataset_too(sweep: Path) -> None:
    assert shown(sweep, "--columns", "dataset")[2:4] == [
        "| coop | **60.00** ± 0.00 (2 of 3) |",
        "| vip | – (0 of 2) |",
    ]


def test_an_unfinished_run_is_missing_without_a_plan_too(sweep: Path) -> None:
    (sweep / "sweep.json").unlink()
    lines = shown(sweep)
    assert lines[2] == "| coop | **60.00** ± 0.00 (2 of 3) |"
    assert "1 run is not finished: failed: coop_16shot_seed3_data: the loss is nan." in lines[-1]


def test_a_missing_run_whose_config_is_gone_is_named_all_the_same(sweep: Path) -> None:
    (sweep / "configs" / "vip_16shot_seed1_data.yaml").unlink()
    (sweep / "configs" / "vip_16shot_seed2_data.yaml").write_text("{")
    lines = shown(sweep)
    assert len(lines) == 5 and "3 runs are not finished" in lines[-1]


def test_states_of_unfinished_runs(sweep: Path) -> None:
    partial = sweep / "runs" / "coop_16shot_seed3_data.partial"
    runs = load_runs(sweep)
    assert [row["state"] for row in unfinished(sweep, runs)] == ["failed", "failed", "pending"]
    (partial / "failed.json").unlink()
    assert [row["state"] for row in unfinished(sweep, runs)] == ["interrupted", "failed", "pending"]
    assert len(load_runs(sweep)) == 2 and len(load_runs(sweep).attrs["missing"]) == 3


def test_unfinished_runs_are_described_as_finished_ones(sweep: Path) -> None:
    runs = load_runs(sweep).assign(recipe="published")
    assert [(row["dataset"], row["recipe"]) for row in unfinished(sweep, runs)] == [("data", "published")] * 3


def test_directories_side_by_side(sweep: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_run(other, "vip", 16, 7, share(80))
    lines = shown(sweep, str(other))
    assert "| vip | **80.00** (1 of 3) |" in lines
    apart = shown(sweep, str(other), "--rows", "directory,method")
    assert f"| {other} | vip | **80.00** (1) |" in apart and f"| {sweep} | vip | – (0 of 2) |" in apart
