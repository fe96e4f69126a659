"""Verdicts: each figure, what makes a set unusable, who is exempt, and that `run`, `sweep` and `check` heed them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.symptoms.test_generate import SEEN, WHO, Model, plan_for
from vipbench.harness.cli import app
from vipbench.harness.config.overrides import override
from vipbench.harness.errors import UserError
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.symptoms.generate import generate
from vipbench.harness.symptoms.score import Scores, SymptomScore, prune_set
from vipbench.harness.symptoms.sets import SymptomSet
from vipbench.harness.symptoms.verdict import judge, refuse_unusable
from vipbench.sweeps.plan import write_plan

COMMITTED = Path(__file__).parents[2] / "symptoms_cache"
ROOT = Path(__file__).parents[2]
# Sets of SmolLM2-135M-Instruct, as templates of version 1 and the filters of their time let them through without a warning.
OF_VERSION_1 = {
    "derm7pt": {
        "melanoma": ["Sunscreen", "Malnutrition", "Socio-Economic Issues", "Fat Dealin"],
        "nevus": [
            "The sun shines bright",
            "The moon shines bright",
            "The sun is a star",
            "The sun is a bright smile",
        ],
    },
    "pneumonia": {
        "normal lung": ["Lung cancer", "air trapped in the air", "white patch in one part of a lung", "purple lung"],
        "pneumonia": ["The Dome Under the Lungs", "Malnutrition", "Sterile lung", "COPD"],
    },
    "demo": {
        "melanoma": ["mopped up", "White", "blushing", "Light"],
        "nevus": ["Blond hair", "mild, fair skin", "absence of any distinguishing features"],
        "basal cell carcinoma": ["basal cell cancer"],
        "seborrheic keratosis": ["mole", "tooth"],
    },
}
NONSENSE = {
    "melanoma": ["Sunscreen", "Malnutrition", "Socio-Economic Issues", "Fat Dealin"],
    "nevus": ["The sun shines bright", "Blond hair", "mopped up", "tooth"],
}
GENERATED = {
    "kind": "generated",
    "author": "m",
    "created": "2026-01-01",
    "how": "vipbench symptoms generate --knowledge symptoms",
    "samples": 4,
    "count": 4,
}


def written(texts: dict[str, list[str]], agreement: int | None = 4, **provenance: Any) -> SymptomSet:
    classes = [
        {"name": name, "symptoms": [{"text": text, "agreement": agreement} for text in own]}
        for name, own in texts.items()
    ]
    return SymptomSet.model_validate(
        {"task": "skin", "modality": "dermoscopy", "classes": classes, "provenance": {**GENERATED, **provenance}}
    )


def test_a_good_set_is_usable_and_says_so() -> None:
    symptoms = generate(plan_for(), WHO, Model().ask)
    verdict = judge(symptoms)
    assert verdict.usable and verdict.reasons == [] and verdict.missing == 0
    assert (verdict.consensus, verdict.verified, verdict.visual, verdict.coverage) == (1.0, None, 1.0, 1.0)
    assert symptoms.provenance.model_dump()["verdict"] == verdict.model_dump()
    shown = "verdict: usable (consensus 100%, verified -, visual 100%, coverage 100%, missing 0)"
    assert str(verdict) == shown


def test_nonsense_is_not_usable() -> None:
    verdict = judge(written(NONSENSE, agreement=1))
    assert not verdict.usable and (verdict.consensus, verdict.visual) == (0.0, 0.125)
    assert len(verdict.reasons) == 2 and "NOT usable: 0% of the symptoms are in a third" in str(verdict)
    assert "12% of the phrases have a word for a colour" in str(verdict)


@pytest.mark.parametrize("task", OF_VERSION_1)
def test_what_version_1_made_a_real_llm_write_is_not_usable(task: str) -> None:
    """Judge it by its words alone, whatever the samples agree on; the filters of today stop a third of its phrases and more."""
    verdict = judge(written(OF_VERSION_1[task], agreement=4))
    assert not verdict.usable and "have a word for a colour" in verdict.reasons[0]
    rules = plan_for(OF_VERSION_1[task]).rules
    phrases = [(name, text) for name, texts in OF_VERSION_1[task].items() for text in texts]
    passed = [text for name, text in phrases if rules.rejection_reason(name, text) is None]
    assert len(passed) * 3 < len(phrases) * 2, passed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"agreement": 1}, "0% of the symptoms are in a third of the samples"),
        ({"agreement": 2, "samples": 12}, "0% of the symptoms are in a third of the samples"),
        ({"agreement": 1, "samples": 1}, None),  # nothing to agree with
        ({"removed": {"not verified": 12}}, None),  # nothing passed the verification: it removed, as it should
        ({"count": 11}, "0% of the classes have"),
        ({"count": "many", "samples": [], "removed": 3}, None),  # not ours, and no hindrance
    ],
)
def test_each_figure_can_make_a_set_unusable(changed: dict[str, Any], reason: str | None) -> None:
    seen = {name: texts[:4] for name, texts in SEEN.items()}
    assert judge(written(seen)).usable
    verdict = judge(written(seen, **changed))
    if changed.get("removed") == {"not verified": 12}:
        assert verdict.verified == 0.0 and "0% of the phrases that an LLM was asked to verify" in verdict.reasons[0]
    elif reason is None:
        assert verdict.usable
    else:
        assert len(verdict.reasons) == 1 and reason in verdict.reasons[0]


def test_sets_that_a_person_wrote_and_controls_are_not_refused() -> None:
    for path in sorted(COMMITTED.glob("*/*.json")):
        verdict = judge(SymptomSet.load(path))
        assert verdict.usable and verdict.consensus is None, path
        if path.stem in ("clinical", "lesions"):
            assert verdict.visual is not None and verdict.visual > 0.9 and verdict.coverage == 1.0, path
        if path.stem in ("class-name", "random-words"):
            assert verdict.visual is not None and verdict.visual < 0.4, path
    by_hand = written(NONSENSE, agreement=None, kind="hand-written")
    assert judge(by_hand).usable and judge(by_hand).visual == 0.125
    assert judge(written(NONSENSE, how="vipbench symptoms generate --knowledge description")).usable


def test_pruning_judges_again() -> None:
    symptoms = generate(plan_for(), WHO, Model().ask)
    scores = [
        SymptomScore(name=name, text=text, auroc=0.1, redundancy=None) for name in SEEN for text in SEEN[name][:2]
    ]
    found = Scores(
        symptoms=symptoms.digest(),
        data="d",
        backbone="b",
        images=1,
        scores=scores,
        coverage={},
        accuracy=0.0,
        balanced_accuracy=0.0,
    )
    pruned, dropped = prune_set(symptoms, found, 0.5, 0)
    assert len(dropped) == 4
    verdict = pruned.provenance.model_dump()["verdict"]
    assert (verdict["usable"], verdict["coverage"], verdict["missing"]) == (False, 0.0, 4)


@pytest.fixture
def nonsense(tmp_path: Path) -> Path:
    written(NONSENSE, agreement=1).save(tmp_path / "nonsense.json")
    return tmp_path / "nonsense.json"


def test_check_shows_the_verdict(nonsense: Path, symptoms: Path) -> None:
    bad = CliRunner().invoke(app, ["symptoms", "check", str(nonsense)])
    assert bad.exit_code == 1 and "verdict: NOT usable: 0% of the symptoms are in a third" in bad.output
    good = CliRunner().invoke(app, ["symptoms", "check", str(symptoms)])
    assert good.exit_code == 0 and "verdict: usable (consensus -, verified -" in good.output


def test_runs_and_sweeps_refuse_an_unusable_set_unless_told_otherwise(
    base_config: dict[str, Any], symptoms: Path, tmp_path: Path
) -> None:
    content = json.loads(symptoms.read_text())
    for entry in content["classes"]:
        entry["symptoms"] = [{"text": f"{entry['name']} sunscreen", "agreement": 1}]
    content["provenance"] = GENERATED
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    own = {**base_config, "symptoms": [str(symptoms), str(bad)]}
    overrides = [f"run.out={tmp_path / 'runs'}", "method=zero_shot", "method.text=symptoms"]
    refusal = rf"^{bad}: not usable: 0% of .* are needed; make a better set, or .*run\.unusable_symptoms=take$"
    with pytest.raises(UserError, match=refusal):
        execute(resolve_config(override(own, overrides)))
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"base": own, "axes": {"seed": [1]}}))
    with pytest.raises(UserError, match=refusal):
        write_plan(grid, tmp_path / "sweep", overrides)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "sweep").exists()
    taken = execute(resolve_config(override(own, [*overrides, "run.unusable_symptoms=take"])))
    assert taken.is_dir()
    (planned,) = write_plan(grid, tmp_path / "sweep", [*overrides, "run.unusable_symptoms=take"])
    assert planned == taken.name, "the option is not in a run's identity"


def test_the_first_unusable_set_is_named(nonsense: Path) -> None:
    refuse_unusable([], None)
    refuse_unusable([SymptomSet.load(COMMITTED / "demo" / "lesions.json")], COMMITTED)
    with pytest.raises(UserError, match=r"nonsense\.json: not usable"):
        refuse_unusable([SymptomSet.load(nonsense)], nonsense)
