"""Scores of a set: AUROC, redundancy and coverage by hand, on training images only; pruning by them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import CLASSES, COUNTS, SYMPTOMS
from vipbench.harness.commands.symptoms import app
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.symptoms.score import CHANCE_COVERAGE, Scores, covered_share, prune_set, score_cosines, score_set
from vipbench.harness.symptoms.sets import SymptomSet


def by_pairs(of_class: np.ndarray, values: np.ndarray) -> float:
    """AUROC by its meaning: how often an image of the class scores higher than another, ties count half."""
    pairs = values[of_class][:, None] - values[~of_class]
    return float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())


def test_auroc_redundancy_and_coverage() -> None:
    numbers = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 30, 20])
    cosines = numbers.normal(size=(90, 5)).round(1)  # rounded, so that there are ties
    cosines[:, 1] = 2 * cosines[:, 0] + 0.01 * numbers.normal(size=90)  # nearly the same as the first
    cosines[:, 3] += 9.0 * (labels == 1)  # separates its class perfectly
    owners = np.array([0, 0, 1, 1, 2])
    scores, coverage = score_cosines(cosines, labels, owners)
    for (auroc, _), owner, column in zip(scores, owners, cosines.T, strict=True):
        assert auroc == pytest.approx(by_pairs(labels == owner, column))
    assert scores[3][0] == 1.0 and coverage[1] == 1.0
    assert scores[0][1] == scores[1][1] and (scores[0][1] or 0) > 0.999
    assert scores[2][1] == pytest.approx(np.corrcoef(cosines[:, 2], cosines[:, 3])[0, 1])
    assert scores[4][1] is None  # alone in its class
    empty, nothing = score_cosines(cosines, labels[:30].repeat(3), owners)  # a class without images, one with all
    assert empty[4] == (None, None) and nothing == [None, None, None]


@pytest.mark.parametrize("symptoms", [1, 4, 10])
def test_symptoms_that_know_nothing_cover_as_little_as_stated(symptoms: int) -> None:
    numbers = np.random.default_rng(symptoms)
    share = covered_share(numbers.normal(size=(40_000, symptoms)), np.arange(40_000) % 2 == 0)
    assert share == pytest.approx(CHANCE_COVERAGE, abs=0.01)


def spoil_other_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Dataset.split

    def only_train(self: Dataset, name: str) -> Any:
        assert name == "train", "a set is scored, and pruned, by training images only"
        return split(self, name)

    monkeypatch.setattr(Dataset, "split", only_train)


def test_a_set_is_scored_on_training_images_only(
    dataset: Path, symptoms: Path, vit_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_other_splits(monkeypatch)
    loaded, images = SymptomSet.load(symptoms), Dataset(dataset)
    scores = score_set(loaded, images, vit_backbone)
    assert scores.images == COUNTS["train"] * len(CLASSES)
    assert {(score.name, score.text) for score in scores.scores} == {(n, t) for n, own in SYMPTOMS.items() for t in own}
    aurocs = [score.auroc for score in scores.scores]
    assert None not in aurocs and aurocs == sorted(aurocs, key=lambda auroc: auroc or 0.0)

    samples = images.split("train")  # plainly once more: each image, each text
    pixels = torch.stack([vit_backbone.eval_transform(samples.image(place)) for place in range(len(samples))])
    features = vit_backbone.encode_images(pixels).numpy()
    guesses = []
    for feature in features:
        means = []
        for name in CLASSES:
            text = vit_backbone.text.encode_texts([f"{text}." for text in SYMPTOMS[name]]).numpy()
            means.append((text @ feature / np.linalg.norm(text, axis=1)).mean())
        guesses.append(int(np.argmax(means)))
    assert scores.accuracy == pytest.approx((np.array(guesses) == samples.labels).mean())
    recalls = [
        np.mean([guess == label for guess, own in zip(guesses, samples.labels, strict=True) if own == label])
        for label in range(3)
    ]
    assert scores.balanced_accuracy == pytest.approx(np.mean(recalls))


def test_weights_that_are_not_finite_are_one_line_before_the_images(
    dataset: Path, symptoms: Path, vit_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy.deepcopy(vit_backbone)
    next(broken.text.parameters()).fill_(float("nan"))
    monkeypatch.setattr("vipbench.harness.symptoms.encode.encode_samples", None)
    with pytest.raises(UserError, match="weights hold NaN or infinity"):
        score_set(SymptomSet.load(symptoms), Dataset(dataset), broken)
    monkeypatch.setattr(
        "vipbench.harness.symptoms.encode.encode_samples", lambda *_, **__: torch.full((21, 32), torch.inf)
    )
    with pytest.raises(UserError, match="weights hold NaN or infinity"):
        score_set(SymptomSet.load(symptoms), Dataset(dataset), vit_backbone)


def scores_of(symptoms: SymptomSet, aurocs: dict[str, float | None]) -> Scores:
    rows = [
        {"name": entry.name.upper(), "text": text, "auroc": aurocs[text], "redundancy": None}
        for entry in symptoms.classes
        for text in entry.texts
    ]
    digests = {"symptoms": symptoms.digest(), "data": "d", "backbone": "b"}
    return Scores.model_validate(
        {**digests, "images": 9, "scores": rows, "coverage": {}, "accuracy": 0.5, "balanced_accuracy": 0.5}
    )


def test_pruning_drops_the_worst_and_leaves_each_class_its_best(symptoms: Path) -> None:
    loaded = SymptomSet.load(symptoms)
    before = loaded.digest()
    aurocs = {
        "jagged uneven border": 0.3,
        "many colours": 0.4,
        "shiny bump": None,
        "round": 0.2,
        "one even brown colour": 0.8,
        "small": 0.49,
    }
    scores = scores_of(loaded, aurocs)
    pruned, dropped = prune_set(loaded, scores, below=0.5, keep=1)
    assert pruned.texts(["melanoma", "nevus", "basal cell carcinoma"]) == [
        ["many colours"],
        ["one even brown colour"],
        ["shiny bump"],
    ]
    assert sorted(text for _, text in dropped) == ["jagged uneven border", "round", "small"]
    assert pruned.provenance.model_dump()["pruned"]["dropped"] == 3 and pruned.provenance.kind == "hand-written"
    assert prune_set(loaded, scores, below=0.5, keep=2)[0].texts(["nevus"]) == [["one even brown colour", "small"]]
    assert loaded.digest() == before
    with pytest.raises(UserError, match="another symptom set"):
        prune_set(pruned, scores, below=0.5, keep=1)


def test_the_verbs(tmp_path: Path, dataset: Path, symptoms: Path, model_folder: Path) -> None:
    run, scores, out = CliRunner(), tmp_path / "scores.json", tmp_path / "pruned.json"
    command = ["score", str(symptoms), "--data", str(dataset)]
    assert "--backbone" in str(run.invoke(app, command).exception)
    backbone = ["--backbone", str(model_folder / "vit.json"), "--device", "cpu"]
    scored = run.invoke(app, [*command, *backbone, "--json", str(scores)])
    assert scored.exit_code == 0 and "zero-shot accuracy" in scored.output and "coverage of nevus" in scored.output
    pruned = run.invoke(app, ["prune", str(symptoms), str(scores), "--below", "1", "--out", str(out)])
    assert pruned.exit_code == 0 and "dropped: nevus:" in pruned.output
    assert [len(texts) for texts in SymptomSet.load(out).texts(CLASSES)] == [1, 1, 1]
    wrong = run.invoke(app, ["prune", str(symptoms), str(symptoms), "--out", str(tmp_path / "x.json")])
    assert isinstance(wrong.exception, UserError) and "not the scores" in str(wrong.exception)
