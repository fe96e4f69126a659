"""Intervals of cells, and remarks where evidence is thin."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.report.written_runs import share, write_run
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.statistics.intervals import OVER_SEEDS, interval_over_seeds
from vipbench.harness.report.tables import Table, load_runs, make_table, to_latex, to_markdown
from vipbench.harness.report.tables.derive import add_average
from vipbench.harness.report.tables.evidence import add_evidence
from vipbench.harness.runs.predictions import read_predicted


def evident(folder: Path, *metrics: str) -> Table:
    return add_evidence(make_table(load_runs(folder), ["method"], ["shots"], metrics or ["accuracy"]))


def test_intervals_over_seeds_and_samples_together(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "coop", 16, seed, share(right, 200)) for seed, right in ((1, 120), (2, 160))]
    found = evident(tmp_path, "accuracy", "sensitivity.melanoma")
    samples = [read_predicted(run)[0] for run in runs]
    for metric, name in (("accuracy", "accuracy"), ("sensitivity.melanoma", "sensitivity[melanoma]")):
        interval = found.cells[("coop",), (metric, 16)].interval
        assert interval == interval_over_seeds(name, samples) and interval and interval.method == OVER_SEEDS
        low, high = 100 * interval.low, 100 * interval.high
        assert f"± 14.14 [{low:.2f}, {high:.2f}] (2)" in to_markdown(found)
        assert f"14.14 [{low:.2f}, {high:.2f}] (2)" in to_latex(found)
    assert f"[low, high]: 95% interval ({OVER_SEEDS})." in to_markdown(found)


def test_the_interval_that_a_run_recorded_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path, "coop", 16, 1, share(60))
    recorded = {"low": 0.125, "high": 0.25, "method": "mine"}
    (run / "intervals.json").write_text(json.dumps({"accuracy": recorded, "specificity": {"nevus": recorded}}))
    table = evident(tmp_path, "accuracy", "specificity.nevus", "ece", "specificity.melanoma")
    shown = to_markdown(table)
    assert shown.count("[12.50, 25.00] (1)") == 2 and "95% interval (mine)" in shown
    (run / "intervals.json").write_text("[]")
    with pytest.raises(UserError, match=r"intervals\.json: damaged: it holds no intervals"):
        evident(tmp_path)


def test_runs_of_other_samples_share_no_interval(tmp_path: Path) -> None:
    for seed, size in ((1, 100), (2, 120)):
        write_run(tmp_path, "coop", 16, seed, share(60, size))
    assert evident(tmp_path).cells[("coop",), ("accuracy", 16)].interval is None


def test_patients_are_clusters(tmp_path: Path) -> None:
    right = [place // 10 % 2 == 0 for place in range(200)]  # ten samples of a patient are right together
    run = write_run(tmp_path, "coop", 16, 1, right)
    alone = evident(tmp_path)
    frame = pd.read_parquet(run / "predictions.parquet")
    frame.assign(patient=[f"p{place // 10}" for place in range(200)]).to_parquet(run / "predictions.parquet")
    (run / "files.json").unlink()
    together = evident(tmp_path)
    place = ("coop",), ("accuracy", 16)
    narrow, wide = alone.cells[place].interval, together.cells[place].interval
    assert narrow and wide and wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert "20 patients only" in to_markdown(together) and "patients are unknown" in to_markdown(alone)


def test_thin_evidence_is_remarked(tmp_path: Path) -> None:
    write_run(tmp_path, "zero_shot", 0, 0, share(10, 60))
    write_run(tmp_path, "coop", 16, 1, share(55, 60))
    write_run(tmp_path, "vip", 16, 1, share(56, 60))
    write_run(tmp_path, "vip", 16, 2, share(58, 60))
    write_run(tmp_path, "kgcoop", 16, 1, share(20, 60))
    write_run(tmp_path, "kgcoop", 16, 2, share(21, 60))
    note = to_markdown(evident(tmp_path)).splitlines()[-1]
    assert "fewer than 50 test samples of nevus (30), melanoma (30)" in note
    assert "one seed only: how much the result varies with the seed is unknown (coop)" in note
    assert "accuracy, shots=16: the interval of vip overlaps with coop: compare them in pairs." in note
    assert "shots=0: the interval" not in note, "there is nothing to overlap with"


def test_derived_cells_have_no_interval(tmp_path: Path) -> None:
    for data in ("derm", "chest"):
        write_run(tmp_path, "coop", 16, 1, share(60), data=data)
    table = add_evidence(add_average(make_table(load_runs(tmp_path), ["method"], ["dataset"], ["accuracy"]), "dataset"))
    found = [table.cells[("coop",), ("accuracy", name)].interval is None for name in ("chest", "derm", "average")]
    assert found == [False, False, True]


def test_damaged_predictions_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path, "coop", 16, 1, share(60))
    table = make_table(load_runs(tmp_path), ["method"], ["shots"], ["accuracy"])
    (run / "predictions.parquet").write_text("PAR1")
    with pytest.raises(UserError, match=r"predictions\.parquet: damaged"):
        add_evidence(table)
