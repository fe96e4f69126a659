"""Tables: figures by hand, the best marked, nothing mixed silently."""

from typing import Any

import pandas as pd
import pytest

from harness.errors import UserError
from harness.report.tables import make_table, to_csv, to_latex, to_markdown


def run(method: str, shots: Any, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    row = {
        "method.name": method,
        "data.shots": shots,
        "data.split_seed": seed,
        "train.augmentation_seed": seed,
        "seed": seed,
        "train.lr": 0.002,
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
    assert lines[0] == "| method | accuracy 0 | accuracy 16 | accuracy all |"
    assert lines[2] == "| zero_shot (text=symptoms) | **50.00** (1) | – | – |"
    assert lines[3] == "| zero_shot (text=class_names) | 25.00 (1) | – | – |"
    assert lines[4] == "| coop | – | **65.00** ± 5.00 (3) | – |"
    assert lines[5] == "| vip | – | 61.00 ± 1.00 (3) | **85.00** ± 7.07 (2) |"
    assert "sample standard deviation" in lines[-1]


def test_lower_is_better_for_calibration_error() -> None:
    table = make_table(RUNS, ["method"], ["shots"], ["ece"])
    assert table.is_best(("coop",), ("ece", 16))
    assert not table.is_best(("vip",), ("ece", 16))


def test_csv_has_raw_numbers() -> None:
    lines = to_csv(make_table(RUNS, ["method"], ["shots"], ["accuracy"])).splitlines()
    assert lines[0] == "method,column,metric,mean,std,n"
    assert lines[1] == "zero_shot (text=symptoms),0,accuracy,0.5,,1"
    coop = lines[3].split(",")
    assert coop[:3] == ["coop", "16", "accuracy"]
    assert [float(value) for value in coop[3:]] == pytest.approx([0.65, 0.05, 3])


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
