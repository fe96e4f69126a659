"""`vipbench runs`: states, filters, settings in which runs differ, paths."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.report.test_missing_runs import sweep as sweep  # a fixture
from tests.report.written_runs import share, write_run
from vipbench.harness.cli import app
from vipbench.harness.errors import UserError


def listed(directory: Path, *arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["runs", str(directory), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.splitlines()


def test_a_sweep_in_the_order_of_its_plan(sweep: Path) -> None:
    lines = [line.split() for line in listed(sweep)]
    assert lines[0] == ["state", "method", "shots", "seed", "accuracy", "macro_f1", "path"]
    assert [line[:5] for line in lines[1:6]] == [
        ["done", "coop", "16", "1", "60.00"],
        ["done", "coop", "16", "2", "60.00"],
        ["failed", "coop", "16", "3", "–"],
        ["failed", "vip", "16", "1", "–"],
        ["pending", "vip", "16", "2", "–"],
    ]
    assert lines[1][-1] == str(sweep / "runs" / "coop_16shot_seed1_data")
    tail = listed(sweep)[7:]
    assert tail[0] == "5 runs: 2 done, 2 failed, 1 pending"
    assert tail[1:] == ["failed: coop_16shot_seed3_data: the loss is nan", "failed: vip_16shot_seed1_data: killed"]


def test_filters_and_paths(sweep: Path) -> None:
    write_run(sweep / "runs", "coop", 4, 1, share(70))
    paths = listed(sweep, "method=coop", "shots=16", "state=done", "--paths")
    assert paths == [str(sweep / "runs" / f"coop_16shot_seed{seed}_data") for seed in (1, 2)]
    assert listed(sweep, "seed=9") == listed(sweep, "seed=9", "shots=16", "method=vip") == ["no run"]
    assert listed(sweep, "seed=9", "shots=16", "--paths") == []
    for words, message in (
        ("metod=vip", "the runs have no 'metod'"),
        ("vip", "'vip': a filter is NAME=VALUE, such as method=vip or shots=16"),
    ):
        with pytest.raises(UserError, match=message):
            listed(sweep, words)


def test_settings_in_which_runs_of_a_method_differ(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        write_run(tmp_path, "coop", 16, 1, share(60), lr=lr)
    write_run(tmp_path, "vip", 16, 1, share(60), data="other", epochs=3)
    header = listed(tmp_path)[0].split()
    assert header == ["state", "dataset", "method", "lr", "shots", "seed", "accuracy", "macro_f1", "path"]


def test_metrics_of_choice(tmp_path: Path) -> None:
    write_run(tmp_path, "coop", 16, 1, share(61))
    lines = listed(tmp_path, "--metric", "ece,sensitivity.nevus")
    assert lines[0].split()[4:] == ["ece", "sensitivity.nevus", "path"] and lines[1].split()[5] == "62.00"
    with pytest.raises(UserError, match="there is no metric 'eec'; did you mean 'ece'"):
        listed(tmp_path, "--metric", "eec")


def test_a_damaged_run_is_listed_as_such(tmp_path: Path) -> None:
    write_run(tmp_path, "coop", 16, 1, share(60))
    damaged = write_run(tmp_path, "coop", 16, 2, share(60))
    (damaged / "metrics.json").write_text("{}")
    lines = listed(tmp_path)
    assert "2 runs: 1 done, 1 damaged" in lines
    assert lines[-1].startswith("damaged: coop_16shot_seed2_data: ") and "metrics.json: damaged" in lines[-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run here, finished or not"):
        listed(tmp_path / "empty")
    with pytest.raises(UserError, match="no such directory of runs"):
        listed(tmp_path / "nothing")


def test_only_unfinished_runs(sweep: Path) -> None:
    lines = listed(sweep, "state=failed")
    assert lines[0].split() == ["state", "method", "shots", "seed", "accuracy", "macro_f1", "path"]
    assert "2 runs: 2 failed" in lines
