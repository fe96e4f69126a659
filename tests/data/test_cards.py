"""Dataset cards: each is whole, and `prepare --recipe` compares a source with one."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.data.drawn_images import drawn, save
from vipbench.harness.cli import app
from vipbench.harness.data import cards
from vipbench.harness.data.cards import Card, card_names, load_card
from vipbench.harness.data.importers import formats
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError

FIELD = ("btmri", "busi", "chmnist", "covid_qu", "ctkidney", "kneexray", "kvasir", "lungcolon", "retina")
MEDMNIST = (
    "path",
    "chest",
    "derma",
    "oct",
    "pneumonia",
    "retina",
    "breast",
    "blood",
    "tissue",
    "organa",
    "organc",
    "organs",
)

SMALL = {
    "title": "Small",
    "modality": "dermoscopy",
    "source": "https://example.org",
    "citation": "nobody",
    "format": "coop-split",
    "file": "split.json",
    "image_root": "images",
    "layout": "split.json beside images/",
    "classes": ["nevus", "melanoma"],
    "counts": {"train": {"nevus": 3, "melanoma": 2}, "test": 2},
    "leaks": ["lesions are in both splits"],
    "checked": "made up",
}


def test_every_card_is_whole() -> None:
    expected = {"derm7pt", "pneumonia", *FIELD, *(f"{name}mnist" for name in MEDMNIST)}
    assert expected <= set(card_names())
    for name in card_names():
        card = load_card(name)
        assert card.format in formats(), name
        assert all(card.total(split) > 0 for split in card.counts), name
        assert card.source.startswith("https://"), name
        assert name in card.text(name) and card.citation in card.text(name)


@pytest.mark.parametrize(
    "change",
    [
        {"licence": ""},
        {"classes": ["nevus"]},
        {"classes": ["nevus", "nevus"]},
        {"counts": {"train": {"nevus": 3}}},
        {"counts": {"holdout": 3}},
        {"colour": "red"},
        {"task": "segmentation"},
        {"citation": None},
    ],
)
def test_a_card_that_is_not_whole_is_refused(change: dict[str, object]) -> None:
    Card.model_validate(SMALL)
    with pytest.raises(ValueError, match="validation error"):
        Card.model_validate(SMALL | change)


def test_the_verb_lists_and_shows_them() -> None:
    listed = CliRunner().invoke(app, ["datasets"]).output
    assert all(name in listed for name in card_names())
    shown = CliRunner().invoke(app, ["datasets", "derm7pt"]).output
    assert "train: 346 images (melanoma 90, nevus 256)" in shown
    wrong = CliRunner().invoke(app, ["datasets", "derm7"])
    assert "no card of a dataset 'derm7'; did you mean 'derm7pt'" in str(wrong.exception)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A downloaded folder of five training and two test images, which the card `small` describes."""
    split: dict[str, list[list[object]]] = {"train": [], "test": []}
    for name, labels in {"train": [0, 0, 0, 1, 1], "test": [0, 1]}.items():
        for number, label in enumerate(labels):
            save(tmp_path / "in" / "images" / f"{name}{number}.png", drawn(f"{name}{number}"))
            split[name].append([f"{name}{number}.png", label, ["nevus", "melanoma"][label]])
    (tmp_path / "in" / "split.json").write_text(json.dumps(split))
    monkeypatch.setattr(cards, "load_card", lambda name: Card.model_validate(SMALL))
    return tmp_path / "in"


def prepare(source: Path, out: Path, *options: str) -> str:
    """Run `vipbench prepare --recipe`; returns its output or error."""
    command = ["prepare", str(source), "--recipe", "small", "--out", str(out), "--workers", "1", *options]
    result = CliRunner().invoke(app, command)
    return str(result.exception) if result.exception else result.output


def test_a_recipe_reads_and_checks_a_downloaded_folder(small: Path, tmp_path: Path) -> None:
    output = prepare(small, tmp_path / "data", "--val-fraction", "0", "--rename", "nevus=mole")
    dataset = Dataset(tmp_path / "data")
    assert dataset.classes == ["mole", "melanoma"] and dataset.info.modality == "dermoscopy"
    assert "classes and counts are those of the card 'small'" in output
    assert "known of Small: lesions are in both splits" in " ".join(dataset.info.notes)


def test_a_source_that_is_not_what_the_card_describes(small: Path, tmp_path: Path) -> None:
    split = json.loads((small / "split.json").read_text())
    split["train"].pop()
    (small / "split.json").write_text(json.dumps(split))
    assert "train has 1 images of 'melanoma', not 2" in prepare(small, tmp_path / "data")
    del split["test"]
    (small / "split.json").write_text(json.dumps(split))
    assert "the splits are train, not train, test" in prepare(small, tmp_path / "data")
    for entry in split["train"]:
        entry[2] = entry[2].replace("nevus", "mole")
    (small / "split.json").write_text(json.dumps(split))
    assert "the classes are ['mole', 'melanoma'], not" in prepare(small, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_recipe_finds_the_published_file(tmp_path: Path) -> None:
    images = np.zeros((1, 28, 28), np.uint8)
    np.savez(tmp_path / "pneumoniamnist.npz", train_images=images, train_labels=np.zeros((1, 1), np.uint8))
    result = CliRunner().invoke(
        app, ["prepare", str(tmp_path), "--recipe", "pneumoniamnist", "--out", str(tmp_path / "x")]
    )
    assert "the splits are train, not train, val, test" in str(result.exception)
    with pytest.raises(UserError, match="no card"):
        load_card("../derm7pt")
