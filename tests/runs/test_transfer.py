"""Saved prompts on other data: class order, changed symptoms, damaged images, and where the result lies."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.conftest import CLASSES, write_images
from vipbench.harness.cli import app
from vipbench.harness.config.overrides import override
from vipbench.harness.errors import UserError
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.runs.transfer import evaluate_run


@pytest.fixture(scope="module")
def run_and_set(
    base_config: dict[str, Any], symptoms: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run of ViP, and the symptom set that it was trained with."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(symptoms, folder / "set.json")
    config = override(base_config, [f"symptoms={folder / 'set.json'}", f"run.out={folder / 'runs'}"])
    return execute(resolve_config(config)), folder / "set.json"


def predictions(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "predictions.parquet").set_index("id")


def test_predictions_are_in_the_order_of_the_recorded_classes(
    run_and_set: tuple[Path, Path], dataset: Path, tmp_path: Path
) -> None:
    run, _ = run_and_set
    write_images(tmp_path / "images")
    command = ["prepare", str(tmp_path / "images"), "--format", "folder", "--out", str(tmp_path / "data")]
    classes = [CLASSES[2], CLASSES[0], CLASSES[1]]
    assert CliRunner().invoke(app, [*command, "--classes", ",".join(classes)]).exit_code == 0
    first, other = (evaluate_run(run, data, "test", None, "cpu") for data in (dataset, tmp_path / "data"))
    assert json.loads((other / "provenance.json").read_text())["classes"] == classes
    expected, found = predictions(first), predictions(other).loc[predictions(first).index]
    order = [CLASSES.index(name) for name in classes]
    np.testing.assert_allclose(
        np.stack(found["logits"].to_list()), np.stack(expected["logits"].to_list())[:, order], atol=1e-4
    )
    assert [classes[label] for label in found["label"]] == [CLASSES[label] for label in expected["label"]]


def test_classes_of_other_names_are_mapped(run_and_set: tuple[Path, Path], dataset: Path, tmp_path: Path) -> None:
    run, _ = run_and_set
    write_images(tmp_path / "images")
    command = ["prepare", str(tmp_path / "images"), "--format", "folder", "--out", str(tmp_path / "data")]
    assert CliRunner().invoke(app, [*command, "--rename", f"{CLASSES[0]}=another"]).exit_code == 0
    scored = ["evaluate", str(run), "--data", str(tmp_path / "data"), "--device", "cpu"]
    assert CliRunner().invoke(app, [*scored, "--rename", f"another={CLASSES[0]}"]).exit_code == 0
    (found,) = (run / "evaluations").glob("*_renamed-*")
    record = json.loads((found / "provenance.json").read_text())
    assert set(record["classes"]) == set(CLASSES) and record["renamed"] == {"another": CLASSES[0]}
    own = predictions(evaluate_run(run, dataset, "test", None, "cpu"))
    assert predictions(found)["class"].to_dict() == own["class"].to_dict()
    with pytest.raises(UserError, match=r"the class .* is there twice"):
        evaluate_run(run, tmp_path / "data", "test", None, "cpu", changes={"another": CLASSES[1]})


def test_a_changed_symptom_set_is_refused_unless_it_is_named(
    run_and_set: tuple[Path, Path], dataset: Path, tmp_path: Path
) -> None:
    run, own = run_and_set
    before = own.read_text()
    same = evaluate_run(run, dataset, "test", own, "cpu")
    try:
        own.write_text(before.replace("jagged uneven border", "smooth border"))
        with pytest.raises(UserError, match="holds other symptoms now than when vip_all_seed1_"):
            evaluate_run(run, dataset, "test", None, "cpu")
        other = evaluate_run(run, dataset, "test", own, "cpu")
    finally:
        own.write_text(before)
    assert other != same and "symptoms-" in other.name, "each set has a result of its own"
    logits = [np.stack(predictions(path)["logits"].to_list()) for path in (other, same)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    digests = [json.loads((path / "provenance.json").read_text())["digests"]["symptoms"] for path in (same, other)]
    assert digests[0] != digests[1]
    assert evaluate_run(run, dataset, "test", None, "cpu") == same


def test_symptoms_for_a_method_without_are_refused(
    base_config: dict[str, Any], symptoms: Path, dataset: Path, tmp_path: Path
) -> None:
    run = execute(resolve_config(override(base_config, ["method=coop", "train.epochs=2", f"run.out={tmp_path}"])))
    with pytest.raises(UserError, match="coop reads no symptom set"):
        evaluate_run(run, dataset, "test", symptoms, "cpu")


def test_a_damaged_image_does_what_the_run_says(
    base_config: dict[str, Any], dataset: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = ["method=coop", "train.epochs=2", "data.on_error=skip", f"run.out={tmp_path}"]
    run = execute(resolve_config(override(base_config, settings)))
    request.getfixturevalue("one_damaged_image")  # after the run, which had whole images
    scored = evaluate_run(run, dataset, "test", None, "cpu")
    assert len(predictions(scored)) == 20
    assert len(json.loads((scored / "provenance.json").read_text())["skipped"]["test"]) == 1
    with pytest.raises(UserError, match="made up"):
        evaluate_run(run, dataset, "test", None, "cpu", on_error="raise")


def test_a_result_stays_in_its_run(run_and_set: tuple[Path, Path], dataset: Path, tmp_path: Path) -> None:
    """The dataset's name is a word of a file that somebody else may have written."""
    run, _ = run_and_set
    victim = run.parent / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "work.txt").write_text("mine")
    hostile = tmp_path / "hostile"
    shutil.copytree(dataset, hostile)
    info = json.loads((hostile / "dataset.json").read_text())
    for name in ("../../../victim", "..", "/etc", "a/b", "x\x00y"):
        (hostile / "dataset.json").write_text(json.dumps({**info, "name": name}))
        try:
            scored = evaluate_run(run, hostile, "test", None, "cpu")
        except UserError:
            continue  # the name is refused where it is read
        assert scored.resolve().parent == (run / "evaluations").resolve()
    assert (victim / "work.txt").read_text() == "mine"


def test_the_summary_names_what_accuracy_must_be_compared_with(
    run_and_set: tuple[Path, Path], dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run, _ = run_and_set
    evaluate_run(run, dataset, "test", None, "cpu")
    assert "balanced accuracy" in caplog.text and "(always guessing 'melanoma' gives 0.3333)" in caplog.text
