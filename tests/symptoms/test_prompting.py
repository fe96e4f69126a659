"""Templates: version 1 asks what it always asked; version 2 shows worked examples from other fields, and counts their copies."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.symptoms.test_generate import SAMPLING, SEEN, WHO, Model, plan_for
from vipbench.harness.commands.symptoms import app
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.generate import Group, Plan, generate
from vipbench.harness.symptoms.llm.record import Request
from vipbench.harness.symptoms.prompting import PRESETS_FILE, Answer, Templates, find_preset
from vipbench.harness.symptoms.sets import fold

# Of the questions that were asked before there was a version 2: answers on record stand under these.
KEYS_OF_VERSION_1 = {
    "elicit": "62b9de3a903cc6f2242c3e0b4702897afb7594e35b8d346889da0b11646476bc",
    "refine": "62edc55a28e284ba7ed2e49aff83d339b92159b82f17cb83d751aaea7b5929ee",
    "describe": "85e5e7df006ee9371c0d5e2d9e5fe8e8281e857e8435d939c536227b7c860e8a",
    "define": "a89e7fc93ed5467493b6bd544359db13d4bf35d5b5000a30767058c4bca1df58",
}


def questions(plan: Plan) -> dict[str, Request]:
    """One question of each step."""
    group = Group(["melanoma", "nevus"])
    return {
        step.template: plan.question(group, "nevus", step, 1, ["Smooth edge.", "One colour"], "m")
        for step in plan.knowledge.steps
    }


def test_version_1_asks_what_it_always_asked() -> None:
    sampling = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512, "seed": 0}
    keys: dict[str, str] = {}
    for kind in ("symptoms", "description", "definition"):
        plan = plan_for(kind=kind, version=1, sampling=sampling, count=4)
        keys |= {name: question.key("r", "1") for name, question in questions(plan).items()}
        assert not plan.rules.copied and "examples" not in plan.templates.digest_of_examples()
    assert keys == KEYS_OF_VERSION_1


@pytest.mark.parametrize(("template", "key"), [("elicit", "features"), ("refine", "symptoms"), ("observe", "symptoms")])
def test_worked_examples_are_turns_of_the_chat(template: str, key: str) -> None:
    plan = plan_for(one_step=template == "observe")
    question = questions(plan)[template]
    system, *turns, last = question.messages
    assert system["role"] == "system" and last["role"] == "user" and last["content"].endswith("Class: nevus")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 5
    accepts = next(step for step in plan.knowledge.steps if step.template == template).accepts
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        (found, items), *others = json.loads(answered["content"]).items()
        assert found == key and not others and len(items) >= 3 and all(map(accepts, items))
        pattern = question.schema["properties"][key]["items"]["pattern"] if question.schema else ""
        assert all(re.match(pattern, item) for item in items), "an example is what the schema demands"
        name = asked["content"].rsplit("Class: ", 1)[1]
        assert name not in " ".join(items) and "skin" not in asked["content"]
        reasons = {plan.rules.rejection_reason(name, item) for item in items}
        assert key == "features" or reasons == {"copied from an example"}
    other = plan.question(Group(["melanoma", "nevus"]), "melanoma", plan.knowledge.steps[0], 0, [], "m")
    assert template == "refine" or other.messages[:-1] == question.messages[:-1]  # one prefix for all classes


def test_examples_show_every_kind_of_feature_and_none_of_the_asked_field() -> None:
    kinds = set(get_args(get_args(get_args(Answer)[0])[0]))
    assert len(kinds) == 6
    templates = Templates()
    for name in yaml.safe_load(PRESETS_FILE.read_text(encoding="utf-8")):
        modality, preset = find_preset(name)
        phrases = templates.example_phrases(modality, preset.picture)
        shown = [example for example in templates.examples if fold(next(iter(example.symptoms.values()))) in phrases]
        assert set().union(*(example.symptoms for example in shown)) == kinds, name
        assert all(example.symptoms.keys() == example.features.keys() for example in shown)
        assert len({example.field[0] for example in shown}) >= 3
    left = templates.example_phrases("dental photography", "a photo of a mouth")
    assert "deep round hole in the crown" in phrases and "deep round hole in the crown" not in left < phrases
    assert "rough hairy shell" not in templates.example_phrases("photo", "a picture of one fruit, cut in half")


def test_copies_of_an_example_are_removed_and_counted(tmp_path: Path) -> None:
    copies = {"melanoma": [json.dumps({"symptoms": ["Rough  hairy shell.", *SEEN["melanoma"]]})]}
    copies["nevus"] = [json.dumps({"symptoms": SEEN["nevus"]})]
    symptoms = generate(plan_for(), WHO, Model(copies).ask)
    assert symptoms.texts(["melanoma"]) == [SEEN["melanoma"][:2]]
    details = symptoms.provenance.model_dump()
    assert details["removed"]["copied from an example"] == 1 and len(details["examples"]) == 64
    assert generate(plan_for(version=1), WHO, Model(copies).ask).texts(["melanoma"])[0][0] == "Rough hairy shell"


def test_a_feature_copied_from_an_example_is_not_asked_about_again() -> None:
    plan, group = plan_for(), Group(["melanoma"])
    step = plan.knowledge.steps[0]
    for texts, kept in (
        (["The peel is bright yellow.", "Dark spots."], ["Dark spots"]),
        (["It is as large as a head"], []),
    ):
        response = Model().answer(questions(plan)["elicit"])
        group.take("melanoma", 0, step, type(response)(json.dumps({"features": texts}), "stop", {}, ""), plan)
        assert group.features("melanoma", 0, step, 4) == kept
    assert group.lost == {"answer without a usable item": 1}


def test_repetitions_in_an_answer_count_once() -> None:
    """Count "Round shape" and "round shape" as one item, so that a loop leaves room for what follows it."""
    texts = {
        name: [json.dumps({"symptoms": [*(["Round shape", "round shape."] * 20), *seen]})]
        for name, seen in SEEN.items()
    }
    del texts["nevus"]
    symptoms = generate(plan_for(["melanoma"], count=4), WHO, Model(texts).ask)
    assert symptoms.texts(["melanoma"]) == [["Round shape", *SEEN["melanoma"][:3]]]
    assert symptoms.classes[0].symptoms[0].agreement == 3  # samples
    first = generate(plan_for(["melanoma"], count=4, version=1), WHO, Model(texts).ask)
    assert first.texts(["melanoma"]) == [["Round shape"]]  # as it was rebuilt from old records


def test_one_step_asks_once_and_names_no_other_class() -> None:
    model = Model()
    symptoms = generate(plan_for(one_step=True), WHO, model.ask)
    assert symptoms.texts(["melanoma"]) == [SEEN["melanoma"][:2]] and len(model.asked) == 2 * 3
    for request in model.asked:
        text = " ".join(message["content"] for message in request.messages)
        assert ("melanoma" in text) != ("nevus" in text) and "colours and how many" in request.messages[-1]["content"]
    assert set(symptoms.provenance.model_dump()["templates"]) == {"observe"}


def dry_run(tmp_path: Path, *options: str) -> Result:
    words = ["generate", "--task", "skin", "--classes", "melanoma,nevus", "--modality", "dermoscopy", "--dry-run"]
    return CliRunner().invoke(app, [*words, *options])


def test_own_examples_take_the_place_of_ours(tmp_path: Path) -> None:
    kite: dict[str, Any] = {"field": ["toy"], "picture": "a photo of a toy", "look_at": ["sail"], "classes": ["kite"]}
    kite |= {"features": {"shape": "The sail has four corners."}, "symptoms": {"shape": "sail with four corners"}}
    file = tmp_path / "examples.yaml"
    file.write_text(yaml.safe_dump({"kite": kite}))
    shown = dry_run(tmp_path, "--templates", str(tmp_path)).output
    assert "Class: kite" in shown and '{"features": ["The sail has four corners."]}' in shown and "banana" not in shown
    assert "Class: kite" not in dry_run(tmp_path, "--templates", str(tmp_path), "--templates-version", "1").output
    for content, words in (
        ({"kite": {**kite, "symptoms": {"smell": "sweet"}}}, "examples.yaml: kite: symptoms"),
        ({"kite": {**kite, "features": {}}}, "examples.yaml: kite: features"),
        ({"kite": 3}, "examples.yaml: kite"),
        ([kite], "examples.yaml: should be a mapping"),
    ):
        file.write_text(yaml.safe_dump(content))
        failed = dry_run(tmp_path, "--templates", str(tmp_path))
        assert isinstance(failed.exception, UserError) and words in str(failed.exception), failed.exception
        assert "\n" not in str(failed.exception)
    file.write_text("{}")  # none at all
    assert dry_run(tmp_path, "--templates", str(tmp_path)).exit_code == 0


def test_what_does_not_go_together_is_one_line(tmp_path: Path) -> None:
    for options, words in (
        (["--steps", "1", "--templates-version", "1"], "--steps 1 needs templates of version 2"),
        (["--steps", "1", "--knowledge", "description"], "--steps 1 is for symptoms, not for description"),
    ):
        failed = dry_run(tmp_path, *options)
        assert isinstance(failed.exception, UserError) and words in str(failed.exception)


def test_penalties_go_with_the_templates_unless_they_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vipbench.harness.commands import generate as command

    plans: list[Plan] = []
    monkeypatch.setattr(command, "print_estimate", lambda plan, _: plans.append(plan))
    usual = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512, "seed": 0}
    guards = {"presence_penalty": 0.3, "frequency_penalty": 0.3}
    given = ["--presence-penalty", "0", "--repetition-penalty", "1.1"]
    for options, more in (
        ([], guards),
        (given, {**guards, "presence_penalty": 0, "repetition_penalty": 1.1}),
        (["--templates-version", "1"], {}),
        (["--templates-version", "1", "--frequency-penalty", "1"], {"frequency_penalty": 1}),
    ):
        assert dry_run(tmp_path, *options).exit_code == 0
        assert plans[-1].sampling == usual | more
        body = questions(plans[-1])["refine"].body()
        assert all(body[name] == value for name, value in more.items()) and usual != SAMPLING
