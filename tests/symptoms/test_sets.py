"""Symptom sets: what is refused, in which order texts come, what `check` finds; and the sets in the repository."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vipbench.harness.commands.symptoms import app
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.symptoms.filters import Rules
from vipbench.harness.symptoms.prompting import KNOWLEDGE
from vipbench.harness.symptoms.sets import SymptomSet, check, difference, import_plain, most_tokens

COMMITTED = Path(__file__).parents[2] / "symptoms_cache"
TEXTS = {
    "melanoma": ["jagged border", "many colours"],
    "seborrheic_keratosis": ["stuck on, waxy surface"],
    "nevus": ["round"],
}


def make(texts: dict[str, list[str]], **others: Any) -> dict[str, Any]:
    return {
        "format": "vipbench-symptoms/1",
        "task": "skin",
        "modality": "dermoscopy",
        "classes": [{"name": name, "symptoms": [{"text": text} for text in own]} for name, own in texts.items()],
        "provenance": {"kind": "hand-written", "author": "a", "created": "2026-01-01", "how": "by hand", "more": [1]},
        **others,
    }


def made(texts: dict[str, list[str]]) -> SymptomSet:
    return SymptomSet.model_validate(make(texts))


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_saved_set_is_the_same_again(tmp_path: Path) -> None:
    made(TEXTS).save(tmp_path / "a.json")
    loaded = SymptomSet.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert loaded.provenance.model_dump()["more"] == [1]  # what the schema does not know is kept


def test_texts_come_in_the_datasets_order_whatever_the_spelling() -> None:
    assert made(TEXTS).texts(["NEVUS", "Seborrheic keratosis"]) == [["round"], ["stuck on, waxy surface"]]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["melanomas"], ["'melanomas'", "did you mean 'melanoma'"]),
        (["MELANOM"], ["'MELANOM'", "did you mean 'melanoma'"]),
        (["x"], ["it has 'melanoma'"]),
        (["empty"], ["no symptom for"]),
    ],
)
def test_a_missing_class_is_named_with_the_nearest(classes: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        made({**TEXTS, "empty": []}).texts(classes)
    assert all(word in str(error.value) for word in words)


def test_the_digest_is_of_names_and_ordered_texts_only() -> None:
    digest = made(TEXTS).digest()
    assert made(dict(reversed(TEXTS.items()))).digest() == digest
    assert SymptomSet.model_validate(make(TEXTS, task="other")).digest() == digest
    assert made({**TEXTS, "melanoma": TEXTS["melanoma"][::-1]}).digest() != digest
    assert made({**TEXTS, "nevus": ["rounder"]}).digest() != digest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ({"nevus": ["round"]}, "vipbench symptoms import"),
        ([], "top level"),
        (make({"a": ["x"]}, format="vipbench-symptoms/9"), "format"),
        (make({"a": ["x"]}, taks="t"), "taks: unknown key; did you mean 'task'?"),
        (
            make({}, classes=[{"name": "a", "symptoms": [{"text": "x", "agrement": 1}]}]),
            "classes[0].symptoms[0].agrement: unknown key; did you mean 'agreement'?",
        ),
        (make({}, classes=[{"name": "a", "symptoms": [{"text": 3}]}]), "classes[0].symptoms[0].text: input should be"),
        (make({}), "classes"),
        (make({"a": ["round", " "]}), "classes[0].symptoms[1].text: is empty"),
        (make({"a": ["dark\u0007"]}), "control characters"),
        (make({"a": ["two\nlines"]}), "one line"),
        (make({"a b": ["x"], "A_b": ["y"]}), "occurs twice"),
        (make({"a": ["x"]}, provenance={"kind": "found"}), "provenance.kind"),
    ],
)
def test_a_file_that_is_no_set_is_refused_in_one_line(tmp_path: Path, content: Any, words: str) -> None:
    path = write(tmp_path / "set.json", content)
    with pytest.raises(UserError) as error:
        SymptomSet.load(path)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_import_reads_the_plain_form(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.json", {"nevus": [" round ", "small"], "melanoma": ["jagged"]})
    imported = import_plain(path, task="skin", modality=None, author="GPT-4")
    assert imported.texts(["melanoma", "nevus"]) == [["jagged"], ["round", "small"]]
    assert (imported.provenance.kind, imported.provenance.author) == ("imported", "GPT-4")


def test_import_with_other_names_of_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.json", {"normal lung": ["clear"], "pneumonia": ["white patches"]})
    imported = import_plain(path, task="x", modality=None, author="a", changes={"normal lung": "normal"})
    assert imported.texts(["pneumonia", "normal"]) == [["white patches"], ["clear"]]
    assert "--rename 'normal lung=normal'" in imported.provenance.how
    for changes, message in (
        ({"normal lungs": "normal"}, "has no class 'normal lungs'; did you mean 'normal lung'"),
        ({"normal lung": "Pneumonia"}, "occurs twice"),
    ):
        with pytest.raises(UserError, match=message):
            import_plain(path, task="x", modality=None, author="a", changes=changes)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"a": "round"}', '{"a": [1]}', '{"a": ["x"], "a": ["y"]}', '{"a": [""]}', '{"a": {"b": ["x"]}}'],
)
def test_import_refuses_other_forms(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"plain\.json"):
        import_plain(write(tmp_path / "plain.json", content), task="t", modality=None, author="a")


def test_check_finds_each_mistake(vit_backbone: Backbone) -> None:
    tower = vit_backbone.text
    mistakes = made(
        {
            "melanoma": ["jagged borders", "a jagged border", "looks like a melanoma", "round"],
            "nevus": ["round", "word " * most_tokens(tower)],
            "gone": [],
        }
    )
    problems = "\n".join(check(mistakes, ["melanoma", "nevus", "keratosis"], tower))
    assert "class 'keratosis' of the dataset is not in the set" in problems
    assert "class 'gone' is no class of the dataset" in problems
    assert "class 'gone': no symptom" in problems
    assert "'a jagged border' says the same as 'jagged borders'" in problems
    assert "'looks like a melanoma' names the class" in problems
    assert "'round' is said of 'melanoma', 'nevus'" in problems
    assert f"has {most_tokens(tower) + 1} tokens" in problems  # the words and the full stop
    assert len(problems.splitlines()) == 7
    assert check(made(TEXTS), list(TEXTS), tower) == []


def test_difference_shows_both_ways_and_order() -> None:
    other = made(
        {
            "melanoma": ["many colours", "Jagged border."],
            "nevus": ["oval"],
            "new": ["x"],
            "seborrheic keratosis": TEXTS["seborrheic_keratosis"],
        }
    )
    lines = difference(made(TEXTS), other)
    assert lines == [
        "  melanoma",
        "the same in another order: many colours; Jagged border.",
        "  nevus",
        "- round",
        "+ oval",
        "  new",
        "+ x",
    ]
    assert difference(other, other) == []


@pytest.mark.parametrize(
    ("name", "classes"),
    [("derm7pt", ["melanoma", "nevus"]), ("pneumonia", ["normal lung", "pneumonia"])],
)
def test_the_committed_sets_are_sound(name: str, classes: list[str], vit_backbone: Backbone) -> None:
    symptoms = SymptomSet.load(COMMITTED / name / "clinical.json")
    assert symptoms.provenance.kind == "hand-written"
    assert check(symptoms, classes, vit_backbone.text) == []
    rules = Rules(KNOWLEDGE["symptoms"].steps[-1].accepts)
    for entry in symptoms.classes:  # what is asked of an LLM, we do ourselves
        assert [rules.rejection_reason(entry.name, text) for text in entry.texts] == [None] * len(entry.texts)


@pytest.mark.parametrize("name", ["derm7pt", "pneumonia", "demo"])
def test_the_committed_kinds_of_knowledge_are_of_the_task_and_fit_the_tower(name: str, vit_backbone: Backbone) -> None:
    task = SymptomSet.load(COMMITTED / name / ("lesions.json" if name == "demo" else "clinical.json"))
    classes = [entry.name for entry in task.classes]
    for kind in KNOWLEDGE.keys() - {"symptoms"}:
        found = SymptomSet.load(COMMITTED / name / f"{kind}.json")
        assert (found.task, found.modality) == (task.task, task.modality)
        assert found.texts(classes)
        names = {
            problem.rpartition(" ")[0].endswith("names the") for problem in check(found, classes, vit_backbone.text)
        }
        assert names == (set() if kind == "random-words" else {True}), (
            "texts name their class, and nothing else is wrong"
        )


def test_the_verbs(tmp_path: Path, dataset: Path, symptoms: Path) -> None:
    run = CliRunner()
    plain, out = (
        write(tmp_path / "plain.json", {"nevus": ["nevus like"], "melanoma": []}),
        tmp_path / "new" / "set.json",
    )
    command = ["import", str(plain), "--task", "skin", "--out", str(out)]
    assert run.invoke(app, command).exit_code == 0
    again = run.invoke(app, command)
    assert isinstance(again.exception, UserError) and "--overwrite" in str(again.exception)
    shown = run.invoke(app, ["show", str(out)]).output
    assert "nevus like" in shown and "(none)" in shown and "kind: imported" in shown
    found = run.invoke(app, ["check", str(out), "--classes", "nevus,melanoma"])
    assert found.exit_code == 1 and "names the class" in found.output and "not looked at: length" in found.output
    fine = run.invoke(app, ["check", str(symptoms), "--data", str(dataset)])
    assert fine.exit_code == 0 and "no problems" in fine.output
    assert "+ round" in run.invoke(app, ["diff", str(out), str(symptoms)]).output
