"""The page of real runs: images, diagnosis cards, symptom sets, and commands that make a run again."""

import json
import shlex
import shutil
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.test_page import Document
from vipbench.harness.report.bundle import write_bundle
from vipbench.harness.report.page.build import Options, build_page
from vipbench.harness.report.page.cards import diagnosis_cards
from vipbench.harness.report.page.entries import Entry, read_entries
from vipbench.harness.report.page.evidence import symptom_sets
from vipbench.harness.report.page.samples import SIDE, read_samples, thumbnails
from vipbench.harness.report.sources import Source, open_sources
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import load_config
from vipbench.harness.runs.symptom_evidence import Explainer, find_samples, run_samples
from vipbench.harness.symptoms.sets import SymptomSet

Paths = dict[str, Path]


@pytest.fixture(scope="module")
def folder(run_paths: Paths) -> Path:
    return run_paths["vip 4 1"].parent


@pytest.fixture
def entries(folder: Path) -> list[Entry]:
    return read_entries([Source(folder, folder)])


def test_page_has_every_part(folder: Path) -> None:
    page = build_page([folder], Options(cards=3))
    sections = {attrs["id"] for attrs in Document(page).all("section")}
    assert sections == {"tables", "cards", "samples", "runs", "symptoms", "details"}
    assert page.count('src="data:image/webp') == 3 and 'id="packed-images"' in page
    assert "Training loss by step, from 0 up; n = 1 run, " in page and "test: accuracy" in page


def test_no_image_is_there_where_none_is_wanted(folder: Path) -> None:
    page = build_page([folder], Options(images=False, cards=3))
    assert "data:image" not in page and 'id="packed-images"' not in page and 'class="cards"' in page


def test_thumbnails_keep_to_their_budget(entries: list[Entry]) -> None:
    predicted = read_samples(entries)
    (everything,), notes = thumbnails(predicted, 10**9)
    assert set(everything) == set(predicted.sets[0].ids) and not notes
    with Image.open(BytesIO(b64decode(next(iter(everything.values())).partition(",")[2]))) as image:
        assert image.format == "WEBP" and max(image.size) <= SIDE and not image.getexif()
    budget = sum(map(len, everything.values())) // 2
    (some,), notes = thumbnails(predicted, budget)
    assert 0 < sum(map(len, some.values())) <= budget and len(some) < len(everything) and "--image-mb" in notes[0]
    mistakes = predicted.sets[0].mistakes
    assert min(mistakes[sample] for sample in some) >= max(mistakes[sample] for sample in set(everything) - set(some))


def test_cards_have_the_cosines_of_the_run(entries: list[Entry]) -> None:
    cards, notes = diagnosis_cards(entries, read_samples(entries), 4, images=True)
    assert len(cards) == 4 and not notes
    own = entries[cards[0].run]
    able = [entry for entry in entries if entry.row.get("symptoms")]
    assert own.metrics["accuracy"] == max(entry.metrics["accuracy"] for entry in able)
    run, names = Run(own.folder), [card.name for card in cards]
    explainer = Explainer(run)
    assert explainer.symptoms is not None
    cosines = explainer.look_at(find_samples(run_samples(run, "test"), names)).cosines
    stored = run.predictions().set_index("id")
    for card, row in zip(cards, cosines, strict=True):
        expected = dict(zip(explainer.symptoms.texts, row, strict=True))
        shown = {text: float(cosine) for _, _, symptoms in card.classes for text, cosine, _ in symptoms}
        assert shown == pytest.approx({text: expected[text] for text in shown}, abs=6e-4)
        assert (card.truth, card.predicted) == tuple(stored.loc[card.name, ["class", "predicted"]])
        assert card.right == (card.truth == card.predicted)


def test_images_that_went_away_leave_a_note(entries: list[Entry], tmp_path: Path) -> None:
    for entry in entries:
        entry.row["data.path"] = str(tmp_path / "nowhere")
    (none,), notes = thumbnails(read_samples(entries), 10**6)
    assert none == {} and "not where its runs read them" in notes[0]


def test_symptom_sets_with_scores_and_changes(entries: list[Entry], symptoms: Path, tmp_path: Path) -> None:
    loaded = SymptomSet.load(symptoms)
    scores = {"symptoms": loaded.digest(), "data": "d", "backbone": "b", "images": 12, "coverage": {}, "accuracy": 0.5}
    first = loaded.classes[0]
    scored = [{"name": first.name, "text": first.symptoms[0].text, "auroc": 0.875, "redundancy": None}]
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(scores | {"balanced_accuracy": 0.5, "scores": scored}))
    (view,) = symptom_sets(entries, [file])
    assert view.classes[0][1][0] == (first.symptoms[0].text, None, 0.875) and view.note == ""
    assert ("author", "tests") in view.provenance and "12 training images" in view.scored
    changed = tmp_path / "set.json"
    loaded.classes[0].symptoms[0].text = "another one"
    loaded.save(changed)
    for entry in entries:
        if entry.row.get("symptoms"):
            entry.row["symptoms"] = str(changed)
    (view,) = symptom_sets(entries)
    assert "other symptoms now" in view.note


def test_command_makes_the_run_again(entries: list[Entry], run_paths: Paths, tmp_path: Path) -> None:
    path = run_paths["vip 4 1"]
    command = next(entry.command for entry in entries if entry.folder == path)
    program, verb, config, out = shlex.split(command)
    assert (program, verb, out) == ("vipbench", "run", "run.out=reproduced")
    again = execute(load_config(Path(config), [f"run.out={tmp_path / 'reproduced'}"]))
    assert again.name == path.name
    assert json.loads((again / "metrics.json").read_text()) == json.loads((path / "metrics.json").read_text())


def test_command_of_a_bundle_makes_the_run_again(run_paths: Paths, tmp_path: Path) -> None:
    path = run_paths["vip 1 2"]
    shutil.copytree(path, tmp_path / "runs" / path.name)
    write_bundle(tmp_path / "runs", tmp_path / "results.zip")
    with open_sources([tmp_path / "results.zip"]) as sources:
        (entry,) = read_entries(sources)
        unzip, _, run = entry.command.partition(" && ")
        assert shlex.split(unzip) == ["unzip", "-o", str(tmp_path / "results.zip"), f"runs/{path.name}/config.yaml"]
        _, _, config, *given = shlex.split(run)
        original = load_config(path / "config.yaml")
        values = {
            "data.path": original.data.path,
            "symptoms": original.symptoms,
            "backbone.name": original.backbone.name,
        }
        assert set(given) == {*(f"{name}=PLACE" for name in values), "run.out=reproduced"}
        overrides = [f"{name}={json.dumps(str(value))}" for name, value in values.items()]
        again = execute(load_config(sources[0].folder / config, [*overrides, f"run.out={tmp_path / 'again'}"]))
    assert again.name == path.name
    assert np.array_equal(
        np.stack(Run(again).predictions()["logits"].to_list()), np.stack(Run(path).predictions()["logits"].to_list())
    )
