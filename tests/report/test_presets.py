"""Presets: references, averages, ablations, base to new, costs; by figures made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from tests.report.test_tables import RUNS, run
from tests.report.written_runs import share, write_results, write_run
from vipbench.harness.cli import app
from vipbench.harness.commands.report import Preset
from vipbench.harness.errors import UserError
from vipbench.harness.report.tables import load_runs, make_table, to_markdown
from vipbench.harness.report.tables.derive import add_average, spread_references
from vipbench.harness.report.tables.layout import Layout
from vipbench.harness.report.tables.presets import PRESETS, Query, query_table


def shown(directory: Path, *arguments: str) -> list[str]:
    """The lines that `vipbench table` prints."""
    result = CliRunner().invoke(app, ["table", str(directory), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout.splitlines()


def test_zero_shot_is_a_reference_in_every_column() -> None:
    made = spread_references(make_table(RUNS, ["method"], ["shots"], ["accuracy", "ece"]))
    assert made.columns == [("accuracy", 16), ("accuracy", "all"), ("ece", 16), ("ece", "all")]
    lines = to_markdown(made).splitlines()
    assert lines[2].startswith("| zero_shot (text=symptoms) | 50.00 (1) | 50.00 (1) |")
    assert lines[4].startswith("| coop | **65.00** ± 5.00 (3) | – |")
    assert "stand in every column" in lines[-1]
    alone = make_table(RUNS.iloc[:2], ["method"], ["shots"], ["accuracy"])
    assert spread_references(alone) == alone, "there is no other column to stand in"


def test_runs_without_a_setting_stand_in_its_columns_and_in_no_others() -> None:
    runs = pd.DataFrame(
        [
            run("tip", 4, 1, 0.4, train__lr=None),
            run("tip", 16, 1, 0.5, train__lr=None),
            *(run("coop", shots, 1, 0.6, train__lr=lr) for shots in (4, 16) for lr in (0.1, 0.2)),
            run("zero_shot", 0, 0, 0.3, train__lr=None),
        ]
    )
    made = spread_references(make_table(runs, ["method"], ["shots", "lr"], ["accuracy"]))
    assert made.columns == [("accuracy", shots, lr) for shots in (4, 16) for lr in (0.1, 0.2)]
    means = [[made.cells[row, column].mean for column in made.columns] for row in [("tip",), ("zero_shot",)]]
    assert means == [[0.4, 0.4, 0.5, 0.5], [0.3] * 4]


def write_datasets(folder: Path, datasets: Sequence[str] = ("derm", "chest")) -> Path:
    for place, data in enumerate(datasets):
        write_run(folder / "runs", "zero_shot", 0, 0, share(50), data=data)
        for shots in (4, 16):
            for seed in (1, 2):
                write_run(folder / "runs", "coop", shots, seed, share(50 + shots + seed + 20 * place), data=data)
    return folder


def test_few_shot_averages_over_datasets_unless_one_is_missing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "vip", 4, 1, share(90), data="derm")
    lines = shown(write_datasets(tmp_path), "--preset", "few_shot")
    columns = [f"accuracy, dataset={data}, shots={n}" for data in ("chest", "derm", "average") for n in (4, 16)]
    assert lines[0] == f"| method | {' | '.join(columns)} |"
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines[2:5]}
    assert rows["coop"][4:] == ["**65.50** (4)", "**77.50** (4) |"]
    assert rows["zero_shot"] == ["50.00 (1)"] * 4 + ["50.00 (2)"] + ["50.00 (2) |"]
    assert rows["vip"] == ["–", "–", "**90.00** (1)", "–", "–", "– |"], "the average of one dataset is none"
    assert "average: the mean over 2 values of dataset" in lines[-1]


def test_zoo_groups_methods_by_family(tmp_path: Path) -> None:
    for method, right in (("vip", 90), ("a_plugin", 40), ("clip_lora", 80), ("taskres", 70), ("coop", 60), ("gda", 50)):
        write_run(tmp_path / "runs", method, 16, 1, share(right))
    failed = tmp_path / "runs" / "kgcoop_16shot_seed1.partial"
    failed.mkdir()
    config = yaml.safe_load(next(tmp_path.glob("runs/coop*/config.yaml")).read_text())
    (failed / "config.yaml").write_text(yaml.safe_dump(config | {"method": {"name": "kgcoop"}}))
    lines = shown(tmp_path, "--preset", "zoo")
    assert lines[0].startswith("| family | method | accuracy, shots=16 |")
    families = {"untrained": ["gda"], "adapters": ["taskres"], "prompts": ["coop", "vip", "kgcoop"]}
    families |= {"image tower": ["clip_lora"], "unknown": ["a_plugin"]}
    expected = [[family, method] for family, methods in families.items() for method in methods]
    assert [line.removeprefix("| ").split(" | ")[:2] for line in lines[2:9]] == expected
    assert "– (0 of 1)" in lines[6], "a run that is not finished has its family"


def test_symptom_sets_of_a_kind_stand_in_one_row_for_all_datasets() -> None:
    kinds = ["clinical", "description"]
    sets = [(data, kind, f"symptoms_cache/{data}/{kind}.json") for data in ("derm", "chest") for kind in kinds]
    runs = pd.DataFrame(
        [
            run("vip", 16, 1, 0.5, dataset=data, symptoms=place, **{"digests.symptoms": place, "digests.dataset": data})
            for data, _, place in sets
        ]
    )
    made = query_table(runs, Query(rows=("method", "symptom_set"), columns=("dataset",)))
    assert made.rows == [("vip", kind) for kind in kinds] and len(made.cells) == 4
    named = replace(made, layout=Layout(names={"symptom_set": "knowledge", "description": "descriptions"}))
    lines = to_markdown(named).splitlines()
    assert lines[0].startswith("| method | knowledge |") and lines[3].startswith("| vip | descriptions | ")


def test_an_average_of_what_is_no_column_is_one_line() -> None:
    table = make_table(RUNS, ["method"], ["shots"], ["accuracy"])
    with pytest.raises(UserError, match="--average: 'dataset' is not among the columns: shots"):
        add_average(table, "dataset")


def test_main_has_intervals_and_options_change_it(tmp_path: Path) -> None:
    lines = shown(write_datasets(tmp_path, ["derm"]), "--preset", "main")
    assert lines[0] == "| method | accuracy, shots=4 | accuracy, shots=16 | macro_f1, shots=4 | macro_f1, shots=16 |"
    assert "50.00 [40.38, 59.62] (1)" in lines[3], "Wilson's interval of 50 of 100"
    assert "Thin evidence: " in lines[-1]
    changed = shown(tmp_path, "--preset", "main", "--no-intervals", "--no-references", "--metric", "ece")
    assert changed[0] == "| method | ece, shots=0 | ece, shots=4 | ece, shots=16 |"
    assert "[" not in changed[2]


def test_ablation_has_a_column_per_option(tmp_path: Path) -> None:
    for merge in ("mean", "attention"):
        for context in ("fixed", "learned"):
            write_run(tmp_path, "vip", "all", 1, share(60), method__merge=merge, method__context=context)
    write_run(tmp_path, "zero_shot", 0, 0, share(50), method__text="symptoms")
    lines = shown(tmp_path, "--preset", "ablation")
    assert lines[0] == "| method | context | merge | accuracy, shots=all | macro_f1, shots=all |"
    assert {"| zero_shot | – | – | 50.00 (1)", "| vip | fixed | mean | **60.00** (1)"} <= {
        " | ".join(line.split(" | ")[:4]) for line in lines
    }


def write_base_to_new(folder: Path) -> None:
    """Two datasets; accuracies (base, new) of coop's two seeds."""
    figures = {"derm": [(90, 30), (80, 60)], "chest": [(50, 50), (50, 50)]}
    for data, pairs in figures.items():
        for seed, (base, new) in enumerate(pairs, start=1):
            path = write_run(folder / "runs", "coop", 16, seed, share(base), data=data)
            evaluation = path / "evaluations" / "new_test_01234567"
            digests, provenance = {"dataset": "digest of new"}, {"split": "test"}
            write_results(evaluation, share(new), f"{data} new", ("keratosis", "wart"), digests, provenance)


def harmonic(first: float, second: float) -> float:
    return 2 * first * second / (first + second)


def test_base_to_new_has_both_harmonic_means(tmp_path: Path) -> None:
    write_base_to_new(tmp_path)
    made = query_table(load_runs(tmp_path), PRESETS["base_to_new"](load_runs(tmp_path)))
    means = {column: cell.mean for (_, column), cell in made.cells.items()}
    derm, chest = (harmonic(0.9, 0.3) + harmonic(0.8, 0.6)) / 2, 0.5
    assert means == {
        ("base", "derm"): pytest.approx(0.85),
        ("new", "derm"): pytest.approx(0.45),
        ("H of means", "derm"): pytest.approx(harmonic(0.85, 0.45)),
        ("mean of H", "derm"): pytest.approx(derm),
        ("base", "chest"): 0.5,
        ("new", "chest"): 0.5,
        ("H of means", "chest"): 0.5,
        ("mean of H", "chest"): 0.5,
        ("base", "average"): pytest.approx(0.675),
        ("new", "average"): pytest.approx(0.475),
        ("H of means", "average"): pytest.approx(harmonic(0.675, 0.475)),
        ("mean of H", "average"): pytest.approx((derm + chest) / 2),
    }
    assert dict.fromkeys(column[0] for column in made.columns) == dict.fromkeys(
        ["base", "new", "H of means", "mean of H"]
    )
    assert "H of means: the harmonic mean of the two means" in shown(tmp_path, "--preset", "base_to_new")[-1]


def test_base_to_new_has_no_harmonic_mean_of_other_runs(tmp_path: Path) -> None:
    write_base_to_new(tmp_path)
    write_run(tmp_path / "runs", "coop", 16, 3, share(90), data="derm")  # not evaluated on new classes
    row = shown(tmp_path, "--preset", "base_to_new", "--average", "")[2].split(" | ")
    assert row[2::2] == ["**86.67** ± 5.77 (3)", "**45.00** ± 21.21 (2)", "–", "**56.79** ± 16.67 (2) |"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("ece", "a fraction of which higher is better"),
        ("accuracy,macro_f1", "give one --metric"),
        ("acuracy", "there is no metric 'acuracy'"),
    ],
)
def test_base_to_new_of_other_metrics_is_one_line(tmp_path: Path, metric: str, message: str) -> None:
    write_base_to_new(tmp_path)
    with pytest.raises(UserError, match=message):
        shown(tmp_path, "--preset", "base_to_new", "--metric", metric)


def test_base_to_new_takes_no_rows_of_evaluations(tmp_path: Path) -> None:
    write_base_to_new(tmp_path)
    with pytest.raises(UserError, match="base_to_new has columns for evaluations"):
        shown(tmp_path, "--preset", "base_to_new", "--evaluations")


def test_base_to_new_needs_one_evaluation_on_other_classes(tmp_path: Path) -> None:
    evaluations = write_run(tmp_path, "coop", 16, 1, share(90)) / "evaluations"
    write_results(evaluations / "same", share(5), "same", ("melanoma", "nevus"), {"dataset": "s"}, {})
    with pytest.raises(UserError, match="no run was evaluated on classes other than it learned"):
        shown(tmp_path, "--preset", "base_to_new")
    write_results(evaluations / "a", share(5), "a", ("wart", "x"), {"dataset": "a"}, {})
    assert shown(tmp_path, "--preset", "base_to_new")
    write_results(evaluations / "b", share(5), "b", ("wart", "y"), {"dataset": "b"}, {})
    with pytest.raises(UserError, match="evaluated on new classes 2 times: a, b; keep one"):
        shown(tmp_path, "--preset", "base_to_new")


def test_evaluations_are_rows(tmp_path: Path) -> None:
    for seed, (own, other) in enumerate([(90, 61), (80, 50)], start=1):
        path = write_run(tmp_path, "coop", 16, seed, share(own), data="derm")
        folder = path / "evaluations" / "ham_test_01234567"
        write_results(folder, share(other), "ham", ("melanoma", "nevus"), {"dataset": "d"}, {"split": "test"})
    lines = shown(tmp_path, "--evaluations", "--show-runs")
    assert lines[0] == "| method | evaluated | accuracy, shots=16 |"
    assert lines[2:4] == ["| coop | derm | **85.00** ± 7.07 (2) |", "| coop | ham | **55.50** ± 7.78 (2) |"]
    assert lines[-1].startswith("- seed 2: 50.00  ") and lines[-1].endswith("evaluations/ham_test_01234567")
    assert "ham" not in "\n".join(shown(tmp_path))
    sensitivity = shown(tmp_path, "--evaluations", "--metric", "sensitivity.melanoma", "--intervals")
    assert "| coop | ham | **56.00**" in sensitivity[3], "read from the evaluation, whose classes come in another order"
    (folder / "predictions.parquet").unlink()
    lines = shown(tmp_path, "--evaluations")
    assert "| coop | ham | **61.00** (1) |" in lines and "1 damaged run is left out." in lines[-1]


def test_evaluations_with_other_symptoms_are_not_mixed(tmp_path: Path) -> None:
    path = write_run(tmp_path, "coop", 16, 1, share(90), data="derm")
    for name in ("ham_test_0_symptoms-1", "ham_test_0_symptoms-2"):
        digests = {"dataset": "d", "symptoms": name}
        write_results(path / "evaluations" / name, share(60), "ham", ("melanoma", "nevus"), digests, {})
    with pytest.raises(
        UserError, match="would mix evaluation=ham_test_0_symptoms-1, ham_test_0_symptoms-2; add evaluation"
    ):
        shown(tmp_path, "--evaluations")
    assert len(shown(tmp_path, "--evaluations", "--rows", "method,evaluation")) == 7


def test_rows_of_other_data_do_not_compete(tmp_path: Path) -> None:
    for data, right in (("derm", 90), ("chest", 60)):
        for method, less in (("vip", 0), ("coop", 10), ("cocoop", 20)):
            write_run(tmp_path, method, 16, 1, share(right - less), data=data)
    lines = shown(tmp_path, "--rows", "dataset,method", "--intervals", "--tests", "--format", "latex")
    assert sum(r"\textbf" in line for line in lines) == 2 and sum(r"\underline" in line for line in lines) == 2
    note = lines[-1]
    assert "Rows of other data are marked apart." in note and "Holm over 4 paired tests" in note
    assert (
        "the interval of derm / vip overlaps with derm / coop: " in note
        and "derm / vip overlaps with chest" not in note
    )


def test_costs_are_no_percentages_and_none_is_best() -> None:
    costs = {"metrics__cost__trained": 2048.0, "metrics__cost__train_seconds": 12.34, "metrics__cost__peak_gib": 1.5}
    runs = pd.DataFrame([run("coop", 16, seed, 0.5, shared=seed == 2, **costs) for seed in (1, 2)])
    table = query_table(runs, PRESETS["cost"](runs))
    line = to_markdown(table).splitlines()[2]
    assert line == "| coop | **50.00** ± 0.00 (2) | 2,048 ± 0 (2) | 12.3 ± 0.0 (2)‡ | 1.50 ± 0.00 (2)‡ |"
    assert "seconds of training" in to_markdown(table)
    with pytest.raises(UserError, match="these runs recorded no cost"):
        PRESETS["cost"](RUNS)


def test_coefficients_are_no_percentages() -> None:
    runs = pd.DataFrame([run("coop", 16, 1, 0.5, metrics__mae=1.25, metrics__quadratic_kappa=-0.1)])
    lines = to_markdown(make_table(runs, ["method"], [], ["mae", "quadratic_kappa"])).splitlines()
    assert lines[2] == "| coop | **1.250** (1) | **-0.100** (1) |"
    assert "No percentages: mae, quadratic_kappa." in lines[-1]


def test_the_command_offers_every_preset() -> None:
    assert [preset.value for preset in Preset] == list(PRESETS)


def test_every_preset_makes_a_table(tmp_path: Path) -> None:
    write_base_to_new(tmp_path)
    for name in PRESETS:
        if name != "cost":
            assert "coop" in "".join(shown(tmp_path, "--preset", name))


def test_the_default_query_is_the_plain_table() -> None:
    assert query_table(RUNS, Query()) == make_table(RUNS, ["method"], ["shots"], ["accuracy"])
