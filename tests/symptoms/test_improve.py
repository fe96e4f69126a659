"""The loop that improves a set: on the embedded benchmark from nonsense, on record, never with test images; merging of sets."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.symptoms.fake_endpoint import FakeEndpoint
from tests.symptoms.lesion_phrases import NONSENSE, TRUE, PhraseModel, nonsense_texts
from vipbench.harness.commands.symptoms import app
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.demo.benchmark import CLASSES, make_dataset
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.symptoms.encode import image_features
from vipbench.harness.symptoms.generate import Plan
from vipbench.harness.symptoms.improve import PATIENCE, _best, improve
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Identity, Request, Response
from vipbench.harness.symptoms.measure import measure
from vipbench.harness.symptoms.plans import Classes, make_plan
from vipbench.harness.symptoms.pool import Images, Measured
from vipbench.harness.symptoms.sets import ClassSymptoms, SetProvenance, Symptom, SymptomSet
from vipbench.harness.symptoms.verify import Belief, Claim
from vipbench.harness.symptoms.worth import (
    accuracy,
    aurocs,
    choose,
    confused_pairs,
    fold_numbers,
    leave_one_out_margins,
)

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "harness" / "demo" / "model"
WHO = Identity("fake", "r1", "1.0")
SAMPLING: dict[str, float | int] = {"temperature": 0.7, "seed": 0}


class Demo(NamedTuple):
    """The embedded benchmark with its backbone, measured; `test`: of its test images, for the tests alone."""

    data: Path
    backbone: Backbone
    measured: Measured
    test: Images


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    data = tmp_path_factory.mktemp("lesions") / "data"
    make_dataset(data)
    dataset, backbone = Dataset(data), load_backbone(BackboneConfig(name=str(MODEL)))
    samples = dataset.split("test")
    test = Images(image_features(backbone, samples, 64, 0, "encode").numpy(), samples.labels, samples.patients)
    return Demo(data, backbone, measure(dataset, backbone), test)


def plan_for(backbone: Backbone | None, names: Sequence[str] = CLASSES, **options: Any) -> Plan:
    described = None if backbone is None else ("demo", None, backbone)
    settings = {"sampling": SAMPLING, "samples": 4, "count": 8, "rounds": 5, **options}
    classes = Classes("drawn lesions", "dermoscopy", [(name, "") for name in names])
    return make_plan(classes, kind="symptoms", backbone=described, **settings)


def made_set(texts: dict[str, list[str]], agreement: int | None = None, author: str = "tests") -> SymptomSet:
    classes = [
        ClassSymptoms(name=name, symptoms=[Symptom(text=text, agreement=agreement) for text in own])
        for name, own in texts.items()
    ]
    provenance = SetProvenance(kind="hand-written", author=author, created="2026-01-01", how="made up")
    return SymptomSet(task="drawn lesions", modality="dermoscopy", classes=classes, provenance=provenance)


def percent_right(symptoms: SymptomSet, demo: Demo) -> float:
    """Zero-shot accuracy in percent on test images, plainly."""
    scores = [
        (demo.test.features @ demo.measured.encode(own).T).mean(axis=1) for own in symptoms.texts(demo.measured.classes)
    ]
    return 100 * float((np.argmax(scores, axis=0) == demo.test.labels).mean())


def believe_all_but_nonsense(claims: Sequence[Claim]) -> list[Belief]:
    return [Belief(float(claim.text not in NONSENSE)) for claim in claims]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_from_nonsense_to_the_hand_written_set(seed: int, demo: Demo, tmp_path: Path) -> None:
    wanted = percent_right(SymptomSet.load(ROOT / "symptoms_cache" / "demo" / "lesions.json"), demo)
    start = made_set(nonsense_texts(seed))
    with FakeEndpoint() as endpoint, ResponseCache(tmp_path / "responses.sqlite") as cache:
        PhraseModel(seed).install(endpoint)
        client = Client([endpoint.url], "fake", cache)
        improved = improve(
            plan_for(demo.backbone),
            start,
            demo.measured,
            client.identity,
            client.complete,
            verify=believe_all_but_nonsense,
        )
    rounds = improved.provenance.model_dump()["rounds"]
    before, after = (percent_right(symptoms, demo) for symptoms in (start, improved))
    print(f"seed {seed}: {before:.2f} -> {after:.2f} in {len(rounds) - 1} rounds, hand-written {wanted:.2f}")
    assert before < 40 and len(rounds) <= 1 + 5
    assert after >= wanted - 3
    assert not {text for own in improved.texts(CLASSES) for text in own} & set(NONSENSE)


class Script:
    """An LLM that answers the same phrases about a class every time; it keeps what it was asked."""

    def __init__(self, texts: dict[str, list[str]]) -> None:
        self.texts, self.asked = texts, list[Request]()

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        answers = []
        for request in requests:
            self.asked.append(request)
            name = request.messages[-1]["content"].rsplit("Class: ", 1)[1]
            text = json.dumps({"symptoms": self.texts.get(name, [])})
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            answers.append((request, Response(text, "stop", usage, "2026-02-01T00:00:00+00:00")))
        yield from reversed(answers)  # in another order


def planted(validation: bool = True, per_class: int = 40) -> Measured:
    """Images of two classes along two axes of four; a text's feature is the axis that its first word names."""
    rng = np.random.default_rng(0)
    axes = np.eye(4, dtype=np.float32)

    def images() -> Images:
        labels = np.repeat([0, 1], per_class)
        features = axes[labels] + 0.5 * rng.normal(size=(len(labels), 4)).astype(np.float32)
        return Images(features / np.linalg.norm(features, axis=1, keepdims=True), labels, [None] * len(labels))

    order = {"dark": 0, "pale": 1, "round": 2, "jagged": 3}

    def encode(texts: list[str]) -> np.ndarray:
        return np.stack([axes[order[text.split()[0]]] for text in texts])

    train = images()
    return Measured(
        ["nevus", "melanoma"], train, images() if validation else None, encode, 10.0, {"data": "d", "backbone": "b"}
    )


START = {"nevus": ["round small spot"], "melanoma": ["jagged wide border"]}  # neither tells them apart
ANSWERS = {"nevus": ["dark brown spot", "jagged broken line"], "melanoma": ["pale blue area", "fever", "melanoma spot"]}


def test_what_helps_is_added_and_all_is_on_record() -> None:
    model, measured = Script(ANSWERS), planted()
    plan = plan_for(None, measured.classes, samples=3)
    improved = improve(plan, made_set(START, agreement=2), measured, WHO, model.ask)
    assert [own[0] for own in improved.texts(measured.classes)] == ["dark brown spot", "pale blue area"]
    assert improved.classes[0].symptoms[0].agreement == 3
    details = improved.provenance.model_dump()
    assert details["parents"] == [
        {"digest": made_set(START).digest(), "kind": "hand-written", "author": "tests", "created": "2026-01-01"}
    ]
    first, second = details["rounds"][:2]
    assert first["round"] == 0 and second["validation_accuracy"] > first["validation_accuracy"] + 0.2
    assert ["nevus", "dark brown spot"] in second["added"] and ["nevus", "jagged broken line"] in second["tried"]
    left = {text for own in improved.texts(measured.classes) for text in own}
    assert (
        second["dropped"]
        == [pair for pair in (["nevus", "round small spot"], ["melanoma", "jagged wide border"]) if pair[1] not in left]
        != []
    )
    assert second["removed"] == {"names the class": 1, "not visual": 1}
    assert (
        sum(step["gain"] for step in second["steps"]) > 0.1
        and second["answers"] == 6
        and second["confused"][0][:2] == ["nevus", "melanoma"]
    )
    assert {entry["text"] for entry in second["worth"]} == {
        text for own in improved.texts(measured.classes) for text in own
    }
    assert details["result_of_round"] == 1 and len(details["rounds"]) - 1 == 1 + PATIENCE
    assert details["rounds"][2]["removed"]["tried before"] == 3
    again = improve(plan, made_set(START, agreement=2), measured, WHO, Script(ANSWERS).ask)
    assert again.model_dump_json() == improved.model_dump_json()


def test_the_question_shows_what_worked_and_what_failed() -> None:
    model, measured = Script(ANSWERS), planted()
    improve(plan_for(None, measured.classes, samples=2, rounds=2), made_set(START), measured, WHO, model.ask)
    assert [request.sample for request in model.asked] == [0, 1, 0, 1, 2, 3, 2, 3]
    before, after = (model.asked[place].messages[-1]["content"] for place in (0, 4))
    assert "Failed:\n- round small spot" in before and "Worked:" not in before
    assert before.endswith("\nTrue of the class, and not of melanoma.\nClass: nevus")
    worked, failed = after.split("Failed:")
    assert "- dark brown spot" in worked and "- jagged broken line" in failed and "- round small spot" in failed
    assert len({request.messages[0]["content"] for request in model.asked}) == 1  # one prefix for all


def test_each_text_is_encoded_once_and_refused_ones_never() -> None:
    encoded: list[str] = []
    measured = planted()

    def encode(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        return measured.encode(texts)

    def verify(claims: Sequence[Claim]) -> list[Belief]:
        assert all(claim.others == tuple(name for name in measured.classes if name != claim.name) for claim in claims)
        return [Belief(float(claim.text not in ("pale blue area", "round small spot")), 0.9) for claim in claims]

    start = made_set({**START, "nevus": ["round small spot", "dark edge"]})
    improved = improve(
        plan_for(None, measured.classes),
        start,
        replace(measured, encode=encode),
        WHO,
        Script(ANSWERS).ask,
        verify=verify,
    )
    assert len(encoded) == len(set(encoded)) and "pale blue area" not in encoded
    assert not {"pale blue area", "round small spot"} & {
        text for own in improved.texts(measured.classes) for text in own
    }
    rounds = improved.provenance.model_dump()["rounds"]
    assert rounds[0]["refused"] == [["nevus", "round small spot"]] and rounds[1]["refused"] == [
        ["melanoma", "pale blue area"]
    ]
    only = improve(
        plan_for(None, measured.classes),
        made_set(START),
        measured,
        WHO,
        Script({}).ask,
        verify=lambda c: [Belief(0.1)] * len(c),
    )
    assert only.texts(measured.classes) == [START["nevus"], START["melanoma"]]  # a class cannot be without


def test_a_worse_validation_accuracy_is_not_the_result() -> None:
    measured = planted()
    assert measured.validation
    turned = replace(measured, validation=replace(measured.validation, labels=1 - measured.validation.labels))
    improved = improve(plan_for(None, measured.classes), made_set(START), turned, WHO, Script(ANSWERS).ask)
    details = improved.provenance.model_dump()
    assert details["rounds"][1]["train_accuracy"] > 0.9 and details["result_of_round"] == 0
    assert improved.texts(measured.classes) == [START["nevus"], START["melanoma"]]
    trained = improve(
        plan_for(None, measured.classes), made_set(START), planted(validation=False), WHO, Script(ANSWERS).ask
    )
    details = trained.provenance.model_dump()
    assert len(details["rounds"]) == 1 + 5 and "validation_accuracy" not in details["rounds"][1]  # all rounds
    assert trained.texts(measured.classes)[0][0] == "dark brown spot"


def test_the_result_is_within_a_standard_error_of_the_best_validation_accuracy() -> None:
    pairs = ((0.70, 1.0), (0.66, 0.5), (0.64, 0.1))  # one standard error of 100 images: 0.046
    figures = [{"validation_accuracy": share, "train_loss": loss} for share, loss in pairs]
    images = Images(np.zeros((100, 2)), np.zeros(100, dtype=int), [None] * 100)
    assert _best(figures, images) == 1 and _best(figures, None) == 2


def test_folds_are_stratified_and_keep_patients_together() -> None:
    labels = np.repeat([0, 1], [30, 20])
    patients = [f"p{row // 2}" for row in range(40)] + [None] * 10
    folds = fold_numbers(labels, patients, ["a", "b"])
    assert sorted(set(folds.tolist())) == list(range(5))
    for patient in set(patients) - {None}:
        assert len({fold for fold, own in zip(folds, patients, strict=True) if own == patient}) == 1
    for label, count in ((0, 30), (1, 20)):
        assert np.abs(np.bincount(folds[labels == label], minlength=5) - count / 5).max() <= 2
    few = np.array([0] * 9 + [1] * 4)
    assert fold_numbers(few, [None] * 13, ["a", "b"]).max() == 3  # four images of b: four folds
    with pytest.raises(UserError, match="class 'b' has 3 training images; improving takes 4 of each class"):
        fold_numbers(few[:-1], [None] * 12, ["a", "b"])
    with pytest.raises(UserError, match="class 'b' has training images of one patient only"):
        fold_numbers(few, [*map(str, range(9)), *["p"] * 4], ["a", "b"])


def test_worth_by_hand() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    cosines = [rng.normal(size=(40, 3)).round(1), rng.normal(size=(40, 1)).round(1)]
    pairs = cosines[0][labels == 0, 1][:, None] - cosines[0][labels == 1, 1]
    assert aurocs(cosines[0], labels == 0)[1] == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean())
    sign = np.where(labels == 0, 1, -1)
    others = cosines[1][:, 0]
    with_it, without = cosines[0].mean(axis=1) - others, cosines[0][:, [0, 2]].mean(axis=1) - others
    margins = leave_one_out_margins(cosines, labels)
    assert margins[0][1] == pytest.approx((sign * (with_it - without)).mean()) and np.isnan(margins[1][0])
    scores = np.array([[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=float)
    truth = np.array([0, 1, 0, 1, 2])
    assert confused_pairs(scores, truth, 5) == [(0, 1, 2), (1, 2, 2)] and confused_pairs(scores, truth, 1) == [
        (0, 1, 2)
    ]
    assert accuracy(scores, truth) == pytest.approx(1 / 5)


def test_a_choice_takes_what_generalises_and_leaves_noise() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 60)
    folds = fold_numbers(labels, [None] * 120, ["a", "b"])
    noise = [rng.normal(size=(120, 30)) * 0.02 for _ in range(2)]
    kept = choose(noise, [[0], [0]], labels, folds, 10.0, 4)
    assert all(gain >= 1e-3 for gain in (step.gain for step in kept.steps))
    fresh = [
        rng.normal(size=(6000, 30)) * 0.02 for _ in range(2)
    ]  # the same columns on new images: no more than chance
    assert (
        kept.loss > 0.6
        and accuracy(
            np.stack([own[:, cols].mean(axis=1) for own, cols in zip(fresh, kept.kept, strict=True)], axis=1),
            np.repeat([0, 1], 3000),
        )
        < 0.55
    )
    signal = [own.copy() for own in noise]
    signal[0][:, 7] += 0.2 * (labels == 0)
    found = choose(signal, [[0], [0]], labels, folds, 10.0, 4)
    assert 7 in found.kept[0] and found.loss < 0.5 and max(map(len, found.kept)) <= 4


def options(demo: Demo, start: Path, out: Path, cache: Path, *more: str) -> list[str]:
    where = ["--data", str(demo.data), "--backbone", str(MODEL), "--device", "cpu", "--modality", "dermoscopy"]
    return ["improve", str(start), *where, "--out", str(out), "--cache", str(cache), "--rounds", "1", "--verify", *more]


@pytest.mark.slow
def test_the_command_replays_offline_and_never_opens_the_test_split(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cache = CliRunner(), tmp_path / "responses.sqlite"
    start, first, second = (tmp_path / f"{name}.json" for name in ("start", "first", "second"))
    made_set(nonsense_texts(0)).save(start)
    with FakeEndpoint() as endpoint:
        PhraseModel(0).install(endpoint)
        done = run.invoke(app, options(demo, start, first, cache, "--url", endpoint.url, "--model", "fake"))
    assert done.exit_code == 0, done.output
    assert "before: training accuracy" in done.output and "round 1: training accuracy" in done.output
    details = SymptomSet.load(first).provenance.model_dump()
    assert details["parents"][0]["digest"] == SymptomSet.load(start).digest()
    assert (
        details["verification"]["used"]
        and details["removed"]["not verified"] > 10
        and details["verdict"]["verified"] > 0
    )
    assert not {text for own in SymptomSet.load(first).texts(CLASSES) for text in own} & set(NONSENSE)
    for shard in demo.data.glob("test*.tar"):
        shard.unlink()
    whole = Dataset.split

    def split(self: Dataset, name: str) -> Samples:
        assert name in ("train", "val"), "the test split is never asked for"
        return whole(self, name)

    monkeypatch.setattr(Dataset, "split", split)
    again = run.invoke(app, options(demo, start, second, cache, "--offline"))
    assert again.exit_code == 0, again.output
    assert second.read_bytes() == first.read_bytes()
    assert not list(demo.data.glob("test*.tar")) and list(demo.data.glob("train*.tar"))
    nowhere = tmp_path / "no.sqlite"
    refused = run.invoke(app, options(demo, start, tmp_path / "third.json", nowhere, "--offline"))
    assert str(refused.exception).startswith(f"{nowhere}: no such response cache") and not nowhere.exists()


def test_too_few_images_are_one_line(tmp_path: Path, symptoms: Path, model_folder: Path) -> None:
    from tests.conftest import CLASSES as NAMES
    from tests.conftest import COUNTS, write_images
    from vipbench.harness.cli import app as whole

    write_images(tmp_path / "images")
    for file in sorted((tmp_path / "images" / "train" / "nevus").iterdir())[3:]:
        file.unlink()
    run = CliRunner()
    data, out = tmp_path / "data", tmp_path / "out.json"
    command = [
        "prepare",
        str(tmp_path / "images"),
        "--format",
        "folder",
        "--out",
        str(data),
        "--classes",
        ",".join(NAMES),
    ]
    assert run.invoke(whole, command).exit_code == 0 and COUNTS["train"] > 3
    improve_it = ["improve", str(symptoms), "--data", str(data), "--out", str(out), "--offline"]
    refused = run.invoke(app, [*improve_it, "--backbone", str(model_folder / "vit.json")])
    assert isinstance(refused.exception, UserError) and not out.exists()
    assert str(refused.exception) == "class 'nevus' has 3 training images; improving takes 4 of each class"
    for wrong, message in (([], "--backbone"), (["--backbone", "x", "--url", "http://127.0.0.1:9"], "say who answers")):
        assert message in str(run.invoke(app, [*improve_it, *wrong]).exception)


def test_phrases_of_the_pool_are_true_of_one_class() -> None:
    assert all(len(own) >= 15 for own in TRUE.values()) and not set(NONSENSE) & {
        text for own in TRUE.values() for text in own
    }
