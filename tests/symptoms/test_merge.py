"""Merging of symptom sets: by vote, by worth on training images, and what is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import CLASSES
from vipbench.harness.commands.symptoms import app
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.symptoms.merge import by_vote, by_worth, check_mergeable, unite
from vipbench.harness.symptoms.score import score_set
from vipbench.harness.symptoms.sets import ClassSymptoms, SetProvenance, Symptom, SymptomSet


def made_set(author: str, texts: dict[str, list[str]], agreement: int | None = 2) -> SymptomSet:
    classes = [
        ClassSymptoms(name=name, symptoms=[Symptom(text=text, agreement=agreement) for text in own])
        for name, own in texts.items()
    ]
    provenance = SetProvenance(kind="generated", author=author, created=f"2026-01-0{len(author)}", how="made up")
    return SymptomSet(task="skin", classes=classes, provenance=provenance)


A = made_set("a", {"nevus": ["one even brown colour", "round shape"], "basal_cell": ["shiny bump"]})
B = made_set("bb", {"basal cell": ["pearly edge"], "Nevus": ["tiny spot", "an even brown colour", "round shape"]})
C = made_set("ccc", {"nevus": ["shape is round", "hairy"], "basal cell": ["red lines"]}, agreement=None)


def test_by_vote_near_same_wordings_count_together() -> None:
    merged = by_vote([A, B, C])
    # three votes and two, in the first set's words; then the first of each set, since none is in several
    assert merged.texts(["nevus", "basal cell"]) == [["round shape", "one even brown colour"], ["shiny bump"]]
    assert by_vote([A, B, C], count=3).texts(["basal cell"]) == [["shiny bump", "pearly edge", "red lines"]]
    assert [symptom.agreement for symptom in merged.classes[0].symptoms] == [None, 4]
    details = merged.provenance.model_dump()
    assert [parent["digest"] for parent in details["parents"]] == [symptoms.digest() for symptoms in (A, B, C)]
    assert details["author"] == "a, bb, ccc" and details["created"] == "2026-01-03"
    assert details["merged"]["without_a_vote"] == ["basal_cell"]
    assert by_vote([A, B, C], count=1).texts(["nevus"]) == [["round shape"]]


def test_a_merged_set_is_held_to_what_its_parts_were() -> None:
    def generated(author: str, texts: dict[str, list[str]], agreement: int) -> SymptomSet:
        own = made_set(author, texts, agreement)
        stated = SetProvenance.model_validate({**own.provenance.model_dump(), "samples": 4, "count": 2})
        return own.model_copy(update={"provenance": stated})

    lone = by_vote([generated("a", {"nevus": ["round brown"]}, 1), generated("bb", {"nevus": ["wide red"]}, 1)])
    details = lone.provenance.model_dump()
    assert (details["samples"], details["count"]) == (8, 2)
    assert not details["verdict"]["usable"] and "0% of the symptoms are in a third" in details["verdict"]["reasons"][0]
    texts = {"nevus": ["round brown spot", "smooth pale border"]}
    shared = by_vote([generated("a", texts, 2), generated("bb", {**texts, "nevus": texts["nevus"][::-1]}, 2)])
    assert shared.provenance.model_dump()["verdict"]["usable"]
    assert (
        "samples"
        not in by_vote([generated("a", texts, 2), made_set("x", {"nevus": ["hairy"]})]).provenance.model_dump()
    )


def test_what_cannot_be_merged() -> None:
    with pytest.raises(UserError, match="two symptom sets or more"):
        check_mergeable([A], ["a.json"])
    with pytest.raises(UserError, match=r"b.json: no class 'basal_cell', which a.json has"):
        check_mergeable([A, made_set("x", {"nevus": ["round"]})], ["a.json", "b.json"])
    with pytest.raises(UserError, match=r"a.json: no class 'veil', which b.json has"):
        check_mergeable([A, made_set("x", {"nevus": [], "basal cell": [], "veil": []})], ["a.json", "b.json"])
    with pytest.raises(UserError, match=r"b.json holds the same symptoms as a.json"):
        check_mergeable([A, B, A.model_copy(deep=True)], ["a.json", "c.json", "b.json"])
    check_mergeable([A, B, C], ["a", "b", "c"])


def test_by_worth_keeps_what_separates_training_images(dataset: Path, symptoms: Path, vit_backbone: Backbone) -> None:
    own = SymptomSet.load(symptoms)
    texts = {"melanoma": ["a red wall"], "nevus": ["wide lake", "small"], "basal cell carcinoma": ["shiny thing"]}
    sets = [own, made_set("x", texts)]
    scores = score_set(unite(sets), Dataset(dataset), vit_backbone)
    merged = by_worth(sets, scores, count=2)
    for name, kept in zip(CLASSES, merged.texts(CLASSES), strict=True):
        ranked = sorted((-(score.auroc or 0), score.text) for score in scores.scores if score.name == name)
        good = [text for auroc, text in ranked if -auroc >= 0.5] or [ranked[0][1]]
        assert kept == good[:2]
    assert merged.provenance.model_dump()["merged"]["data"] == Dataset(dataset).info.digest
    assert unite(sets).texts(["nevus"]) == [["round", "one even brown colour", "small", "wide lake"]]  # "small" once


def test_the_verb(tmp_path: Path, dataset: Path, symptoms: Path, model_folder: Path) -> None:
    run, other, out = CliRunner(), tmp_path / "other.json", tmp_path / "out.json"
    texts = {"melanoma": ["a border, jagged and uneven"], "nevus": ["small"], "basal cell carcinoma": ["flat"]}
    made_set("x", texts).save(other)
    merged = run.invoke(app, ["merge", str(symptoms), str(other), "--out", str(out)])
    assert merged.exit_code == 0 and "each set's first is kept: basal cell carcinoma" in merged.output, merged.output
    assert SymptomSet.load(out).texts(CLASSES) == [["jagged uneven border"], ["shiny bump"], ["small"]]
    by = ["merge", str(symptoms), str(other), "--by", "worth", "--out", str(out), "--overwrite"]
    assert "--data" in str(run.invoke(app, by).exception)
    where = ["--data", str(dataset), "--backbone", str(model_folder / "vit.json"), "--device", "cpu"]
    assert run.invoke(app, [*by, *where]).exit_code == 0
    assert SymptomSet.load(out).provenance.model_dump()["merged"]["by"] == "worth"
    assert "for --by worth" in str(
        run.invoke(app, ["merge", str(symptoms), str(other), *where, "--out", str(tmp_path / "x")]).exception
    )
