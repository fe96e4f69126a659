"""`vipbench compare`: what differs, and the samples on which two runs disagree; by figures made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from tests.report.written_runs import CLASSES, share, write_results, write_run
from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.report.compare import compare_runs, to_lines


def compared(*paths: Path, **options: Any) -> Any:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["compare", *map(str, paths), *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Of 100 samples the first is right on 80 (the first ones), the second on 60 (the last ones)."""
    first = write_run(tmp_path, "vip", 16, 1, share(80), lr=0.5)
    second = write_run(tmp_path, "coop", 16, 1, [not right for right in share(40)], digests={"symptoms": "s" * 64})
    return first, second


def test_what_differs(runs: tuple[Path, Path]) -> None:
    found = compare_runs(*runs)
    assert found.settings == [("method.name", "vip", "coop"), ("train.lr", 0.5, 0.1)]
    assert found.data == [("symptoms (digest)", None, "s" * 64)]
    metrics = {name: (first, second) for name, first, second in found.metrics}
    assert metrics["accuracy"] == (0.8, 0.6) and metrics["sensitivity.melanoma"] == (0.8, 0.6)
    lines = to_lines(found)
    assert "accuracy" in lines[[line[:6] for line in lines].index("metric") + 1]
    assert any(line.split() == ["symptoms", "(digest)", "–", "s" * 12] for line in lines), "the beginning of a digest"


def test_samples_on_which_they_disagree(runs: tuple[Path, Path]) -> None:
    found = compare_runs(*runs)
    assert found.samples
    counts = (found.samples.both_right, found.samples.only_first, found.samples.only_second, found.samples.both_wrong)
    assert counts == (40, 40, 20, 0)
    assert len(found.samples.disagreements) == 60
    first = found.samples.disagreements.iloc[0]
    assert (first["id"], first["class"], first["first"], first["second"], first["right"]) == (
        "data 0000",
        CLASSES[0],
        CLASSES[0],
        CLASSES[1],
        "first",
    )
    assert first["first_probability"] == pytest.approx(0.7311, abs=1e-4), "e / (e + 1)"
    text = compared(*runs, most=3)
    assert "both right 40, only A 40, only B 20, both wrong 0" in text
    assert text.count("\ndata 0") == 3 and "... 57 more (--most 60, or --json)" in text


def test_paired_tests(runs: tuple[Path, Path]) -> None:
    found = compare_runs(*runs)
    accuracy = found.tests[0]
    assert accuracy.difference == pytest.approx(0.2) and accuracy.p == pytest.approx(binomtest(40, 60).pvalue)
    assert [test.metric for test in found.tests] == ["accuracy", "balanced_accuracy", "macro_f1", "auroc"]
    assert found.adjusted[0] is not None and accuracy.p is not None and found.adjusted[0] >= accuracy.p
    assert found.false_claim == pytest.approx(0.005, abs=0.005)


def test_json_holds_all_disagreements(runs: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--json"])
    found = json.loads(result.stdout)
    assert found["settings"]["train.lr"] == {"first": 0.5, "second": 0.1}
    assert found["samples"]["only_first"] == 40 and len(found["disagreements"]) == 60
    assert found["tests"][0]["metric"] == "accuracy" and "p_holm" in found["tests"][0]


def test_the_same_run_twice(runs: tuple[Path, Path]) -> None:
    text = compared(runs[0], runs[0])
    assert "config: no difference" in text and "data: no difference" in text
    assert "A and B predict the same of every sample" in text


def test_other_data_is_not_paired(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    other = write_run(tmp_path, "vip", 16, 1, share(80), data="other")
    text = compared(runs[0], other)
    assert "samples: tested on other data, so that samples cannot be paired" in text
    assert "paired test" not in text and "accuracy" in text


def test_evaluations_are_paired_whatever_the_order_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (write_run(tmp_path, "vip", 16, seed, share(80)) for seed in (1, 2))
    ours, theirs = first / "evaluations" / "x", second / "evaluations" / "x"
    write_results(ours, share(7, 12), "x", ("a", "b", "c"), {"dataset": "x"}, {})
    write_results(theirs, share(9, 12), "x", ("a", "b", "c"), {"dataset": "x"}, {})
    straight = compare_runs(ours, theirs)
    reorder(theirs, ("c", "a", "b"))
    turned = compare_runs(ours, theirs)
    assert straight.samples and turned.samples
    assert turned.samples.disagreements.equals(straight.samples.disagreements)
    assert turned.tests[0] == straight.tests[0] and turned.samples.only_second == 2
    monkeypatch.chdir(ours.parent)
    assert compare_runs(Path("x"), theirs).tests == turned.tests


def reorder(path: Path, order: tuple[str, ...]) -> None:
    """Write predictions with their classes in another order."""
    import pandas as pd

    provenance = json.loads((path / "provenance.json").read_text())
    places = [provenance["classes"].index(name) for name in order]
    frame = pd.read_parquet(path / "predictions.parquet")
    frame["logits"] = [logits[places] for logits in frame["logits"]]
    frame["label"] = [places.index(label) for label in frame["label"]]
    frame.to_parquet(path / "predictions.parquet", index=False)
    (path / "provenance.json").write_text(json.dumps(provenance | {"classes": list(order)}))


def test_samples_that_one_run_left_out_are_counted(tmp_path: Path) -> None:
    first = write_run(tmp_path, "vip", 16, 1, share(80))
    second = write_run(tmp_path, "vip", 16, 2, share(80, 90))
    assert "samples: paired on the 90 samples that both predicted" in compared(first, second)


def test_what_is_no_run_is_one_line(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="no finished run"):
        compare_runs(runs[0], tmp_path)
    with pytest.raises(UserError, match=r"provenance\.json"):
        compare_runs(runs[0], runs[0] / "evaluations" / "nothing")
