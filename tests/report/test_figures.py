"""Figures of small real runs: what they show is what the metrics and predictions say, and nothing is drawn without its n."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.metrics import auc
from typer.testing import CliRunner

from tests.conftest import CLASSES, COUNTS
from tests.report.written_runs import share, write_run
from vipbench.harness.cli import app
from vipbench.harness.commands.figures import Kind
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import CALIBRATION_BINS
from vipbench.harness.evaluation.statistics.intervals import interval_over_seeds
from vipbench.harness.evaluation.statistics.selective import risk_coverage
from vipbench.harness.report.figures.critical_difference import complete
from vipbench.harness.report.figures.data import load, read_tested
from vipbench.harness.report.figures.registry import FORMATS, Chart, Query, draw, finished, kinds, render, rendered
from vipbench.harness.report.figures.style import VERMILLION, look
from vipbench.harness.report.figures.training import read_curve
from vipbench.harness.runs.directory import write_digests

TESTED = COUNTS["test"] * len(CLASSES)
FILTERS: dict[str, list[str]] = {
    "ablation": ["method=vip", "shots=4"],
    "confusion": ["method=vip", "shots=4", "merge=attention"],
    "attention": ["method=vip", "shots=4", "merge=attention"],
    "card": ["method=vip", "shots=4", "merge=attention"],
    "gallery": ["method=coop", "shots=4"],
}
Paths = dict[str, Path]


@pytest.fixture(scope="module")
def directory(run_paths: Paths) -> Path:
    return next(iter(run_paths.values())).parent


def query(directory: Path, kind: str, *filters: str, **options: Any) -> Query:
    return Query(load(directory, filters or FILTERS.get(kind, [])), **options)


def chart_of(directory: Path, kind: str, *filters: str, **options: Any) -> Chart:
    return draw(kind, query(directory, kind, *filters, **options))


def texts(svg: bytes) -> list[str]:
    """All texts of an SVG file."""
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")]


def axes_of(figure: Figure) -> list[Any]:
    return list(figure.axes)


def metric(run: Path, name: str) -> Any:
    return json.loads((run / "metrics.json").read_text())[name]


def line(ax: Any, label: str) -> Any:
    return next(own for own in ax.lines if own.get_label() == label)


def test_the_verb_offers_the_kinds_there_are() -> None:
    assert {kind.value for kind in Kind} == set(kinds())


@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_every_kind_has_its_n(directory: Path, kind: str) -> None:
    svg = render(kind, query(directory, kind))
    written = " ".join(texts(svg))
    assert "n = " in written and b"<dc:date>" not in svg
    assert not re.search(r"\bnan\b|\binf\b", written)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_the_same_runs_give_the_same_bytes(directory: Path, kind: str) -> None:
    for format in FORMATS:
        assert render(kind, query(directory, kind), format) == render(kind, query(directory, kind), format)


def test_a_chart_without_its_n_is_refused() -> None:
    with pytest.raises(AssertionError, match="without its n"):
        finished(lambda: Chart(Figure(), "three runs"))


def test_the_verb_writes_svg_and_png(directory: Path, tmp_path: Path) -> None:
    command = ["plot", "bars", str(directory), "method=coop", "--metric", "balanced_accuracy"]
    for name, start in (("a.svg", b"<?xml"), ("b.PNG", b"\x89PNG")):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / name)])
        assert result.exit_code == 0 and str(tmp_path / name) in result.output
        assert (tmp_path / name).read_bytes().startswith(start)
    assert "balanced accuracy (%)" in texts((tmp_path / "a.svg").read_bytes())


def test_few_shot_curves_are_means_with_intervals_as_bands(directory: Path, run_paths: Paths) -> None:
    chart = chart_of(directory, "few_shot", "method=vip", "merge=attention")
    (ax,) = axes_of(chart.figure)
    drawn = line(ax, "vip")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "4"]
    runs = [[run_paths[f"vip {shots} {seed}"] for seed in (1, 2)] for shots in (1, 4)]
    means = [100 * np.mean([metric(run, "accuracy") for run in own]) for own in runs]
    np.testing.assert_allclose(drawn.get_ydata(), means)
    interval = interval_over_seeds("accuracy", [read_tested(run).of for run in runs[1]])
    (band,) = ax.collections
    edges = [y for x, y in band.get_paths()[0].vertices if x == 1]
    assert interval and 0 < interval.low < interval.high < 1 and min(edges) == pytest.approx(100 * interval.low)
    assert max(edges) == pytest.approx(100 * interval.high)
    assert interval.method in chart.note and f"n = {TESTED} test images, 2 runs (seeds) each" in chart.note


def test_methods_without_training_are_level_lines_and_look_the_same_everywhere(directory: Path) -> None:
    ax = axes_of(chart_of(directory, "few_shot").figure)[0]
    level = line(ax, "zero_shot")
    assert len(set(level.get_ydata())) == 1 and level.get_color() == look("zero_shot").color
    bars = axes_of(chart_of(directory, "bars").figure)
    places = [
        (own, place) for own in bars for place, row in enumerate(own.get_yticklabels()) if row.get_text() == "coop"
    ]
    assert {to_hex(own.patches[place].get_facecolor()) for own, place in places} == {
        line(ax, "coop").get_color().lower()
    }
    assert {line(ax, name).get_color() for name in ("vip (merge=attention)", "vip (merge=mean)")} == {VERMILLION}


def test_bars_have_the_values_and_whiskers_of_the_runs(directory: Path, run_paths: Paths) -> None:
    chart = chart_of(directory, "bars", "shots=4", "merge=attention", metric="macro_f1")
    (ax,) = axes_of(chart.figure)
    runs = [run_paths[f"vip 4 {seed}"] for seed in (1, 2)]
    mean = 100 * np.mean([metric(run, "macro_f1") for run in runs])
    assert ax.patches[0].get_width() == pytest.approx(mean)
    assert f"{mean:.1f}" in " ".join(texts(rendered(chart, "svg")))
    interval = interval_over_seeds("macro_f1", [read_tested(run).of for run in runs])
    assert interval
    np.testing.assert_allclose(ax.lines[-1].get_xdata(), [100 * interval.low, 100 * interval.high])


def test_a_metric_of_one_class(directory: Path, run_paths: Paths) -> None:
    chart = chart_of(directory, "bars", "shots=4", "method=coop", metric="sensitivity.nevus")
    rates = [metric(run_paths[f"coop 4 {seed}"], "sensitivity")["nevus"] for seed in (1, 2)]
    assert axes_of(chart.figure)[0].patches[0].get_width() == pytest.approx(100 * np.mean(rates))
    assert "sensitivity of nevus (%)" in texts(rendered(chart, "svg"))


def test_ablation_shows_differences_from_the_first_variant(directory: Path, run_paths: Paths) -> None:
    chart = chart_of(directory, "ablation", metric="auroc")
    written = texts(rendered(chart, "svg"))
    of = {
        name: np.mean([metric(run_paths[f"{name} 4 {seed}"], "auroc") for seed in (1, 2)])
        for name in ("vip", "vip_mean")
    }
    first, other = [name for name in written if name.startswith("vip (")]
    sign = 1 if "attention" in first else -1
    assert {first, other} == {"vip (merge=attention)", "vip (merge=mean)"}
    assert f"{sign * 100 * (of['vip_mean'] - of['vip']):+.1f}" in " ".join(written)
    with pytest.raises(UserError, match="narrow it down: method="):
        chart_of(directory, "ablation", "shots=4")
    with pytest.raises(UserError, match="the runs of coop do not differ in any option"):
        chart_of(directory, "ablation", "method=coop", "shots=4")


def test_confusion_counts_are_sums_over_runs(directory: Path, run_paths: Paths) -> None:
    chart = chart_of(directory, "confusion")
    counts = sum(read_tested(run_paths[f"vip 4 {seed}"]).of.confusion for seed in (1, 2))
    cells = {text.get_gid(): text.get_text() for text in axes_of(chart.figure)[0].texts}
    for (label, predicted), count in np.ndenumerate(counts):
        share = 100 * count / (2 * COUNTS["test"])
        assert cells[f"{label}-{predicted}"] == f"{share:.0f}%\n{count}"
    assert set(CLASSES) <= set(texts(rendered(chart, "svg")))
    with pytest.raises(UserError, match=r"confusion shows one method on one dataset, and here are .*narrow it down"):
        chart_of(directory, "confusion", "shots=4")


def test_roc_curves_have_the_area_that_the_metrics_have(directory: Path, run_paths: Paths) -> None:
    (ax,) = axes_of(chart_of(directory, "roc", "method=coop", "shots=4").figure)
    area = np.mean([metric(run_paths[f"coop 4 {seed}"], "auroc") for seed in (1, 2)])
    mean = next(own for own in ax.lines if str(own.get_label()).startswith("coop: AUROC"))
    assert f"AUROC {area:.3f} [" in str(mean.get_label())
    assert auc(mean.get_xdata() / 100, mean.get_ydata() / 100) == pytest.approx(area, abs=0.02)
    assert len(ax.lines) == 2 + len(CLASSES), "the diagonal, the classes and their mean"


def test_reliability_gaps_add_up_to_the_calibration_error(run_paths: Paths) -> None:
    run = run_paths["coop 4 1"]
    chart = draw("reliability", Query(load(run)))
    (ax,) = axes_of(chart.figure)
    accuracy = line(ax, "accuracy")
    share = np.array([bar.get_height() for bar in ax.patches])
    assert len(share) == CALIBRATION_BINS and share.sum() == pytest.approx(100)
    gaps = np.abs(np.asarray(accuracy.get_ydata()) - np.asarray(accuracy.get_xdata()))
    error = np.nansum(gaps * share / 100) / 100
    assert error == pytest.approx(metric(run, "ece"))
    assert f"ECE {100 * error:.1f}%" in texts(rendered(chart, "svg"))


def test_risk_at_full_coverage_is_the_error(directory: Path, run_paths: Paths) -> None:
    (ax,) = axes_of(chart_of(directory, "risk_coverage", "method=coop", "shots=4").figure)
    runs = [run_paths[f"coop 4 {seed}"] for seed in (1, 2)]
    (curve,) = ax.lines
    assert curve.get_ydata()[-1] == pytest.approx(100 * (1 - np.mean([metric(run, "accuracy") for run in runs])))
    area = np.mean([risk_coverage(read_tested(run).of).aurc for run in runs])
    found = re.fullmatch(r"coop: AURC (\S+) \[(\S+), (\S+)\]", str(curve.get_label()))
    assert found and found[1] == f"{area:.3f}" and float(found[2]) < area < float(found[3])


def test_training_curves_are_those_of_the_log(directory: Path, run_paths: Paths) -> None:
    chart = chart_of(directory, "training", "shots=4", "merge=attention")
    loss, validated = axes_of(chart.figure)
    curves = [read_curve(run_paths[f"vip 4 {seed}"]) for seed in (1, 2)]
    mean = line(loss, "vip")
    assert list(mean.get_xdata()) == [1, 2, 3]
    np.testing.assert_allclose(mean.get_ydata(), np.mean([curve["loss"] for curve in curves], axis=0))
    accuracy = line(validated, "vip").get_ydata()
    np.testing.assert_allclose(accuracy, 100 * np.mean([curve["validation_accuracy"] for curve in curves], axis=0))
    kept = [json.loads((run_paths[f"vip 4 {seed}"] / "provenance.json").read_text())["kept_epoch"] for seed in (1, 2)]
    assert sorted(own.get_xdata()[0] for own in loss.lines if own.get_marker() == "o") == sorted(kept)
    with pytest.raises(UserError, match="no run here has a log of steps"):
        chart_of(directory, "training", "method=zero_shot")


def test_cost_is_the_seconds_on_record(directory: Path, run_paths: Paths) -> None:
    (ax,) = axes_of(chart_of(directory, "cost", "method=coop", "shots=4").figure)
    runs = [run_paths[f"coop 4 {seed}"] for seed in (1, 2)]
    seconds = [json.loads((run / "provenance.json").read_text())["cost"]["train_seconds"] for run in runs]
    point = line(ax, "coop")
    assert point.get_xdata()[0] == pytest.approx(np.mean(seconds)) and ax.get_xscale() == "log"
    assert point.get_ydata()[0] == pytest.approx(100 * np.mean([metric(run, "accuracy") for run in runs]))
    chart = chart_of(directory, "cost", "shots=0")
    assert "0 at the left edge" in chart.note and line(axes_of(chart.figure)[0], "zero_shot").get_xdata()[0] > 0


def test_ranks_of_a_critical_difference_diagram(directory: Path) -> None:
    chart = chart_of(directory, "critical_difference")
    assert (
        "n = 2 combinations of dataset, backbone, shots" in chart.note
        and "zero_shot" in chart.note.partition("Left out")[2]
    )
    written = " ".join(texts(rendered(chart, "svg")))
    assert "CD = " in written and "coop" in written
    with pytest.raises(UserError, match="needs two methods or more on two or more"):
        chart_of(directory, "critical_difference", "shots=4", "method=coop")


def test_the_largest_share_of_gaps_goes_first() -> None:
    present = [((shots,), name) for shots in (1, 4) for name in ("coop", "vip")] + [((0,), "zero"), ((1,), "lonely")]
    blocks, methods, left_out = complete(present)
    assert (blocks, methods) == ([(1,), (4,)], ["coop", "vip"])
    assert set(left_out) == {"zero", "lonely", "0"}
    assert complete(present[:4]) == ([(1,), (4,)], ["coop", "vip"], [])


def test_subgroups_by_class_are_sensitivities(directory: Path, run_paths: Paths) -> None:
    (ax,) = axes_of(chart_of(directory, "subgroups", "method=coop", "shots=4").figure)
    rows = [tick.get_text() for tick in ax.get_yticklabels()]
    assert rows == [f"{name} (n = {COUNTS['test']})" for name in sorted(CLASSES)]
    rates = [metric(run_paths[f"coop 4 {seed}"], "sensitivity") for seed in (1, 2)]
    expected = [100 * np.mean([rate[name] for rate in rates]) for name in sorted(CLASSES)]
    np.testing.assert_allclose(line(ax, "coop").get_xdata(), expected)


def test_subgroups_by_a_column_of_the_predictions(run_paths: Paths, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_paths["coop 4 1"], run)
    frame = pd.read_parquet(run / "predictions.parquet")
    frame["scanner"] = ["A"] * 9 + ["B"] * 10 + [None] * 2
    frame.to_parquet(run / "predictions.parquet", index=False)
    write_digests(run)
    chart = draw("subgroups", Query(load(run), by="scanner"))
    assert {"A (n = 9)", "B (n = 10)", "unknown (n = 2)"} <= set(texts(rendered(chart, "svg")))
    right = (frame["predicted"] == frame["class"]).to_numpy()
    expected = [100 * right[:9].mean(), 100 * right[9:19].mean(), 100 * right[19:].mean()]
    np.testing.assert_allclose(line(axes_of(chart.figure)[0], "coop").get_xdata(), expected)
    with pytest.raises(UserError, match=r"no column 'scaner'; they have class, scanner"):
        draw("subgroups", Query(load(run), by="scaner"))


def test_attention_of_a_class_sums_to_one(directory: Path) -> None:
    chart = chart_of(directory, "attention")
    (ax,) = axes_of(chart.figure)
    widths = [bar.get_width() for bar in ax.patches]
    assert sum(widths) == pytest.approx(len(CLASSES), abs=1e-5)
    written = texts(rendered(chart, "svg"))
    assert {*CLASSES, "jagged uneven border", "1.000"} <= {text.strip() for text in written}, "a lone symptom has 1"
    with pytest.raises(UserError, match="coop has no merge prompt"):
        chart_of(directory, "attention", "method=coop", "shots=4")


def test_a_card_of_an_image(directory: Path, run_paths: Paths) -> None:
    frame = pd.read_parquet(run_paths["vip 4 1"] / "predictions.parquet")
    own = frame.iloc[5]
    chart = chart_of(directory, "card", image=own["id"])
    written = texts(rendered(chart, "svg"))
    assert own["id"] in written and f"predicted: {own['predicted']}" in written
    verdict = "right" if own["predicted"] == own["class"] else "wrong"
    assert f"truth: {own['class']} ({verdict})" in written
    for name, probability in zip(CLASSES, own["probabilities"], strict=True):
        assert any(text.startswith(f"{name}: {100 * probability:.1f}%") for text in written)
    assert b"<image " in rendered(chart, "svg") and "each of n = 6 symptoms" in chart.note
    with pytest.raises(UserError, match="no sample 'nothing' in this split"):
        chart_of(directory, "card", image="nothing")


def test_the_gallery_shows_the_surest_mistakes(directory: Path, run_paths: Paths) -> None:
    frame = pd.read_parquet(run_paths["coop 4 1"] / "predictions.parquet")
    wrong = frame[frame["predicted"] != frame["class"]].copy()
    wrong["confidence"] = [max(own) for own in wrong["probabilities"]]
    first = wrong.sort_values("confidence", ascending=False, kind="stable").iloc[0]
    chart = chart_of(directory, "gallery", images=2)
    written = texts(rendered(chart, "svg"))
    assert f"{first['id']}: {first['predicted']} instead of {first['class']}" in written
    assert f"n = {len(wrong)} mistakes among {TESTED} test images" in chart.note
    assert sum("instead of" in text for text in written) == min(2, len(wrong))


def test_a_run_without_a_mistake_has_no_gallery(run_paths: Paths, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_paths["coop 4 1"], run)
    frame = pd.read_parquet(run / "predictions.parquet")
    frame["logits"] = list(np.eye(len(CLASSES), dtype=np.float32)[frame["label"]])
    frame.to_parquet(run / "predictions.parquet", index=False)
    write_digests(run)
    with pytest.raises(UserError, match=r"gallery: run makes no mistake on its 21 test images"):
        draw("gallery", Query(load(run)))


def test_signs_of_mathematics_and_markup_are_text(run_paths: Paths, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_paths["coop 4 1"], run)
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["classes"] = ["cost $5 < $6_a", "a & b", "nevus"]
    (run / "provenance.json").write_text(json.dumps(provenance))
    write_digests(run)
    written = texts(rendered(draw("confusion", Query(load(run))), "svg"))
    assert {"cost $5 < $6_a", "a & b"} <= set(written)


def test_mistakes_are_one_line(directory: Path, run_paths: Paths, tmp_path: Path) -> None:
    def refused(*command: str, out: str = "x.svg") -> str:
        result = CliRunner().invoke(app, ["plot", *command, "--out", str(tmp_path / out)])
        assert isinstance(result.exception, UserError), result.output
        assert not (tmp_path / out).exists()
        return str(result.exception)

    runs = str(directory)
    assert "x.pdf is neither .svg nor .png" in refused("roc", runs, out="x.pdf")
    assert refused("roc", runs, "--image", "a") == "--image has no effect on roc; leave it out"
    assert refused("roc", runs, "shots=3") == "shots=3: no run has it; the runs have 1, 4, 0"
    assert "the runs have no 'shot'" in refused("roc", runs, "shot=3")
    assert "a filter is NAME=VALUE" in refused("roc", runs, "vip")
    assert "there is no metric 'acuracy'" in refused("bars", runs, "--metric", "acuracy")
    assert "no finished run here" in refused("bars", str(tmp_path))
    mixed = refused("few_shot", runs, "--rows", "backbone")
    assert "/ data / 1 would mix method.name=coop, vip; add method.name to --rows or --columns" in mixed
    assert "dataset names a panel or point already" in refused("roc", runs, "--rows", "dataset", "--columns", "dataset")


def test_a_damaged_run_is_counted_in_the_note(directory: Path, run_paths: Paths, tmp_path: Path) -> None:
    for name in ("coop 4 1", "coop 4 2"):
        shutil.copytree(run_paths[name], tmp_path / run_paths[name].name)
    (tmp_path / run_paths["coop 4 2"].name / "metrics.json").write_text("{}")
    chart = draw("bars", Query(load(tmp_path)))
    assert "Left out: 1 damaged runs." in chart.note and "1 run each" in chart.note


def drawn_twice(folder: Path) -> pd.DataFrame:
    """Runs on datasets "a" and "b": a lone variant of vip on the one, two on the other."""
    for data, merge in (("a", "mean"), ("b", "attention"), ("b", "mean")):
        cost = {"cost": {"train_seconds": 12.5, "trained": 8}, "kept_epoch": 1}
        run = write_run(folder, "vip", 4, 1, share(70), data=data, method__merge=merge, provenance=cost)
        (run / "steps.jsonl").write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "loss": 1.0}\n')
        write_digests(run)
    return load(folder)


@pytest.mark.parametrize("kind", ["few_shot", "roc", "risk_coverage", "cost", "subgroups"])
def test_a_variant_looks_the_same_in_every_panel(kind: str, tmp_path: Path) -> None:
    axes = axes_of(draw(kind, Query(drawn_twice(tmp_path))).figure)
    assert len(axes) == 2
    for variant, count in (("mean", 2), ("attention", 1)):
        lines = [own for ax in axes for own in ax.lines if f"merge={variant}" in str(own.get_label())]
        assert (
            len(lines) == count
            and len({(own.get_color(), own.get_linestyle(), own.get_marker()) for own in lines}) == 1
        )


def test_training_curves_of_several_datasets_have_names_and_colours_of_their_own(tmp_path: Path) -> None:
    (ax,) = axes_of(draw("training", Query(drawn_twice(tmp_path))).figure)
    means = [own for own in ax.lines if "vip" in str(own.get_label())]
    assert {own.get_label() for own in means} == {
        f"vip (merge={m}) / {d}" for m, d in (("mean", "a"), ("attention", "b"), ("mean", "b"))
    }
    assert {own.get_color() for own in means} == {VERMILLION} and len({own.get_linestyle() for own in means}) == 3


def test_costs_and_coefficients_are_no_shares(tmp_path: Path) -> None:
    runs = drawn_twice(tmp_path)
    for name, text in (("cost.train_seconds", "12.5"), ("cost.trained", "8"), ("mcc", "0.400")):
        chart = draw("bars", Query(runs, metric=name))
        assert all(f"  {text}" in {own.get_text() for own in ax.texts} for ax in axes_of(chart.figure))
        assert "%" not in "".join(ax.get_xlabel() for ax in axes_of(chart.figure))
        assert ("no Whiskers" in chart.note) == name.startswith("cost")
    differences = draw("ablation", Query(runs, metric="mcc"))
    assert any("+0.000" in own.get_text() for ax in axes_of(differences.figure) for own in ax.texts)


def test_subgroups_need_the_column_in_every_run(run_paths: Paths, tmp_path: Path) -> None:
    for seed in (1, 2):
        run = tmp_path / run_paths[f"coop 4 {seed}"].name
        shutil.copytree(run_paths[f"coop 4 {seed}"], run)
        if seed == 1:
            frame = pd.read_parquet(run / "predictions.parquet")
            frame.assign(scanner="A").to_parquet(run / "predictions.parquet", index=False)
            write_digests(run)
    with pytest.raises(UserError, match=r"no column 'scanner'; they have class"):
        draw("subgroups", Query(load(tmp_path), by="scanner"))
