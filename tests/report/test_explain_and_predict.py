"""`vipbench explain` and `vipbench predict`: what they print is what the run computes, and mistakes are one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests.conftest import CLASSES, SYMPTOMS
from vipbench.harness.cli import app
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError
from vipbench.harness.report.explain import explain_run
from vipbench.harness.runs.api import Run

Paths = dict[str, Path]


def invoke(*command: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in command])


def refused(*command: Any) -> str:
    result = invoke(*command)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_explain_prints_weights_and_worth_and_what_they_mean(run_paths: Paths) -> None:
    run = run_paths["vip 4 1"]
    result = invoke("explain", run)
    assert result.exit_code == 0, result.output
    found = explain_run(Run(run), "test")
    assert found.worth and found.symptoms.weights is not None
    for text, weight in zip(found.symptoms.texts, found.symptoms.weights, strict=True):
        assert f"{weight:.3f}" in result.output and text.split()[0] in result.output
    said = " ".join(result.output.split())
    for column in (
        "weight: the part of the symptom",
        "AUROC: how well",
        "without it: change of the run's balanced accuracy",
    ):
        assert column in said
    assert "n = 21 test images" in said and "Choose symptoms by training images" in said


def test_explain_without_images_needs_no_dataset(run_paths: Paths) -> None:
    result = invoke("explain", run_paths["vip 4 1"], "--no-worth")
    assert result.exit_code == 0 and "AUROC" not in result.output and "weight" in result.output
    mean = " ".join(invoke("explain", run_paths["vip_mean 4 1"], "--no-worth").output.split())
    assert "this run takes their mean" in mean and "0.333" in mean


def test_explain_mistakes(run_paths: Paths, tmp_path: Path) -> None:
    assert "coop reads no symptoms" in refused("explain", run_paths["coop 4 1"])
    assert "no split 'tets'" in refused("explain", run_paths["vip 4 1"], "--split", "tets")
    assert "no finished run" in refused("explain", tmp_path)


@pytest.fixture
def images(dataset: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    samples = Dataset(dataset).split("test")
    for place in range(3):
        samples.image(place).save(folder / f"{samples.key(place).replace('/', '_')}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predict_gives_the_run_s_own_probabilities_with_evidence(
    run_paths: Paths, images: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    run = run_paths["vip 4 1"]
    assert invoke("predict", run, images, "--out", out).exit_code == 0
    found = json.loads(out.read_text())
    keys = [Dataset(dataset).split("test").key(place) for place in range(3)]
    frame = Run(run).predictions().set_index("id")
    assert (found["run"], found["classes"], len(found["images"])) == (run.name, CLASSES, 3)
    for own in found["images"]:
        (key,) = [key for key in keys if Path(own["file"]).stem == key.replace("/", "_")]
        stored = frame.loc[key]
        np.testing.assert_allclose(
            [own["probabilities"][name] for name in CLASSES], stored[CLASSES].astype(float), atol=1e-3
        )
        assert own["prediction"] == stored["predicted"]
        cosines = [row["cosine"] for row in own["symptoms"]]
        assert cosines == sorted(cosines, reverse=True) and len(cosines) == 6
        weights = [row["weight"] for row in own["symptoms"] if row["class"] == "nevus"]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
        assert {(row["class"], row["symptom"]) for row in own["symptoms"]} == {
            (name, text) for name, texts in SYMPTOMS.items() for text in texts
        }


def test_predict_prints_json_and_writes_cards(run_paths: Paths, images: Path, tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    one = sorted(images.glob("*.png"))[0]
    result = invoke("predict", run_paths["coop 4 1"], one, "--card", cards)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["images"]
    assert "symptoms" not in found and sum(found["probabilities"].values()) == pytest.approx(1)
    (card,) = cards.iterdir()
    assert card.name == f"{one.stem}.svg"
    text = card.read_text()
    assert f"predicted: {found['prediction']}" in text and "n = 1 image" in text and "truth" not in text


def test_cards_of_files_with_one_name_do_not_replace_each_other(run_paths: Paths, images: Path, tmp_path: Path) -> None:
    first, *_ = sorted(images.glob("*.png"))
    (tmp_path / "again").mkdir()
    shutil.copy(first, tmp_path / "again" / first.name)
    result = invoke("predict", run_paths["vip 4 1"], first, tmp_path / "again", "--card", tmp_path / "cards")
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "cards").iterdir()) == [f"{n}_{first.stem}.svg" for n in (1, 2)]


def test_predict_mistakes(run_paths: Paths, tmp_path: Path) -> None:
    run = run_paths["coop 4 1"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    (tmp_path / "text.png").write_text("no image")
    assert refused("predict", run, tmp_path / "nothing.png") == f"{tmp_path / 'nothing.png'}: no such file or folder"
    assert "no image in this folder" in refused("predict", run, tmp_path / "empty")
    assert "broken.png: " in refused("predict", run, tmp_path / "broken.png")
    assert "is not an image of a known format" in refused("predict", run, tmp_path / "text.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "is a file, not a folder" in refused("predict", run, tmp_path / "a.png", "--out", tmp_path / "a.png" / "b")
