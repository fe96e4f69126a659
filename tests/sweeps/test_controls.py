"""`vipbench symptoms controls` on the embedded benchmark, in small: what it decides of a good set and of a bad one."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from vipbench.harness.cli import app
from vipbench.harness.data.info import DatasetInfo
from vipbench.harness.demo import benchmark
from vipbench.harness.errors import UserError
from vipbench.harness.report.rows import load_runs
from vipbench.harness.symptoms.sets import SymptomSet

ROOT = Path(__file__).parents[2]
SETS, MODEL = ROOT / "symptoms_cache" / "demo", ROOT / "harness" / "demo" / "model"
SMALL = {"train": 6, "val": 4, "test": 40}  # images per class
RECIPE = ["train.epochs=2", "train.lr=0.02", "run.workers=0"]
SIZE = ["--shots", "1", "--seeds", "1", "--draws", "2", "--device", "cpu", "--backbone", str(MODEL)]


def controls(file: Path, data: Path, out: Path, *options: str) -> Result:
    command = ["symptoms", "controls", str(file), "--data", str(data), "--out", str(out), *SIZE, *options, *RECIPE]
    return CliRunner().invoke(app, command)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lesions") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "IMAGES", SMALL)
        benchmark.make_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="module")
def good(data: Path, out: Path) -> Result:
    return controls(SETS / "lesions.json", data, out)


def runs_of(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*/metrics.json")}


@pytest.mark.slow
def test_the_hand_written_set_beats_its_controls(good: Result, out: Path) -> None:
    assert good.exit_code == 0, good.output
    table = pd.read_csv(out / "controls.csv")
    own = table[table["kind"] == "set"].set_index("read_by")
    assert len(table) == 14 and set(own["texts"]) == {"the set (lesions)"}
    for reader in ("zero-shot", "ViP"):
        for texts in ("random words", "symptoms of another class"):
            (row,) = table[(table["read_by"] == reader) & (table["texts"] == texts)].to_dict("records")
            assert row["p_holm"] < 0.05 and row["difference_low"] > 0
            assert row["difference"] == pytest.approx(own.loc[reader, "mean"] - row["mean"])
    decision = [line for line in good.output.splitlines() if line.startswith(("Zero-shot: ", "ViP: "))]
    assert decision[0].startswith("Zero-shot: yes, the set (lesions) beats all 5 controls, the nearest (")
    assert decision[1].startswith("ViP: yes, ") and "after Holm over 12 tests" in decision[1]
    assert "thin evidence: fewer than 50 test samples" in good.output and "one seed only" in good.output
    assert "left out" not in good.output


@pytest.mark.slow
def test_symptoms_are_looked_up_on_training_images(good: Result, data: Path, out: Path) -> None:
    found = json.loads((out / "symptoms.json").read_text())
    symptoms = SymptomSet.load(SETS / "lesions.json")
    assert found["split"] == "train" and found["images"] == 4 * SMALL["train"]
    assert found["symptoms"] == symptoms.digest() and found["data"] == DatasetInfo.load(data).digest
    assert [one["text"] for one in found["scores"]] == [text for entry in symptoms.classes for text in entry.texts]
    figures = [out / "controls.svg", out / "symptom_cosines" / "01.svg", *sorted((out / "symptom_images").iterdir())]
    assert len(figures) == 6 and all("n = " in path.read_text() for path in figures)


@pytest.mark.slow
def test_the_runs_are_ordinary_ones_which_are_not_run_again(good: Result, data: Path, out: Path) -> None:
    before = runs_of(out)
    runs = load_runs(out)
    assert len(runs) == len(before) > 15 and set(runs["method.name"]) == {"zero_shot", "waffle", "vip"}
    result = controls(SETS / "lesions.json", data, out, "--no-images")
    assert result.exit_code == 0 and runs_of(out) == before
    assert not list((out / "symptom_images").iterdir()), "of an earlier comparison"


@pytest.mark.slow
def test_random_words_do_not_beat_their_controls(good: Result, data: Path, out: Path, tmp_path: Path) -> None:
    """In the same folder, beside the runs of the other set; without the knowledge that lies beside that one."""
    file = tmp_path / "nonsense.json"
    shutil.copy(SETS / "random-words.json", file)
    result = controls(file, data, out, "--no-images")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out / "controls.csv")
    assert len(table) == 10 and "left out: definition: there is no" in result.output
    words = table[table["texts"] == "random words"].set_index("read_by")
    assert (words["p_holm"] >= 0.05).all()
    decision = [line for line in result.output.splitlines() if line.startswith(("Zero-shot: ", "ViP: "))]
    for line in decision:
        assert ": no, the set (nonsense) is not shown to beat " in line and "random words (" in line


def test_what_cannot_be_compared_is_one_line(data: Path, tmp_path: Path) -> None:
    for options, message in (
        (["seed=3"], "seed=3: seed is not overridden here"),
        (["--metric", "acuracy"], "--metric: 'acuracy' is no metric with a paired test; did you mean 'accuracy'?"),
        (["--shots", "none"], "--shots: 'none' is neither a number from 1 on nor all"),
        (["--split", "training"], "has no split 'training'; did you mean 'train'?"),
        (["--definition", str(tmp_path / "no.json")], "no.json: no such file"),
    ):
        result = controls(SETS / "lesions.json", data, tmp_path / "out", *options)
        assert isinstance(result.exception, UserError) and message in str(result.exception)
    result = controls(ROOT / "symptoms_cache" / "derm7pt" / "clinical.json", data, tmp_path / "out")
    assert isinstance(result.exception, UserError) and "no class 'basal cell carcinoma'" in str(result.exception)
