"""Control sets and the cosines of images with symptoms, each against its plain meaning."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import CLASSES, COUNTS, SYMPTOMS
from vipbench.harness.data.reader import Dataset
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.report.figures.registry import finished
from vipbench.harness.report.figures.symptom_images import MOST_ROWS, SHOWN, draw_cosines, draw_images, pages
from vipbench.harness.symptoms.controls import class_names, derangement, random_words, shuffled
from vipbench.harness.symptoms.cosines import Cosines, describe, measure_cosines
from vipbench.harness.symptoms.score import score_cosines
from vipbench.harness.symptoms.sets import SymptomSet


@pytest.fixture
def lesions(symptoms: Path) -> SymptomSet:
    return SymptomSet.load(symptoms)


@pytest.fixture(scope="module")
def measured(dataset: Path, symptoms: Path, vit_backbone: Backbone) -> Cosines:
    return measure_cosines(SymptomSet.load(symptoms), Dataset(dataset), vit_backbone, "test")


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_no_class_keeps_its_place(count: int) -> None:
    orders = [derangement(count, draw) for draw in range(30)]
    for order in orders:
        assert sorted(order) == list(range(count))
        assert all(place != of for place, of in enumerate(order))
    assert orders == [derangement(count, draw) for draw in range(30)]
    different = len({tuple(order) for order in orders})
    assert different == {2: 1, 3: 2}[count] if count < 4 else different > 20, "draws differ"


def test_a_shuffled_set_gives_each_class_the_symptoms_of_another(lesions: SymptomSet) -> None:
    for draw in range(1, 6):
        found = shuffled(lesions, CLASSES, draw)
        given = {entry.name: entry.texts for entry in found.classes}
        assert list(given) == CLASSES and sorted(given.values()) == sorted(SYMPTOMS.values())
        assert all(given[name] != SYMPTOMS[name] for name in CLASSES)
        facts = found.provenance.model_dump()
        assert facts["parent"] == lesions.digest() and facts["draw"] == draw
        assert all(SYMPTOMS[other] == given[name] for name, other in facts["symptoms_of"].items())
        assert shuffled(lesions, CLASSES, draw).digest() == found.digest()


def test_random_words_have_the_form_of_the_symptoms(lesions: SymptomSet) -> None:
    first, second = (random_words(lesions, CLASSES, draw) for draw in (1, 2))
    assert first.digest() == random_words(lesions, CLASSES, 1).digest() != second.digest()
    for entry in first.classes:
        assert [len(text.split()) for text in entry.texts] == [len(text.split()) for text in SYMPTOMS[entry.name]]
        assert not set(" ".join(entry.texts).split()) & set(" ".join(SYMPTOMS[entry.name]).split())
    assert first.provenance.model_dump()["parent"] == lesions.digest()


def test_long_texts_become_phrases_that_fit(lesions: SymptomSet) -> None:
    lesions.classes[0].symptoms[0].text = " ".join(["word"] * 300)
    longest = max(len(text.split()) for entry in random_words(lesions, CLASSES, 1).classes for text in entry.texts)
    assert longest == 20


def test_class_names_stand_alone(lesions: SymptomSet) -> None:
    assert [entry.texts for entry in class_names(lesions, ["basal_cell carcinoma", "nevus"]).classes] == [
        ["basal cell carcinoma"],
        ["nevus"],
    ]


def test_extreme_images_are_those_of_the_plain_cosines(
    dataset: Path, measured: Cosines, vit_backbone: Backbone
) -> None:
    samples, texts = Dataset(dataset).split("test"), [text for name in CLASSES for text in SYMPTOMS[name]]
    assert list(measured.texts) == texts and len(measured.samples) == COUNTS["test"] * len(CLASSES)
    pixels = torch.stack([vit_backbone.eval_transform(samples.image(place)) for place in range(len(samples))])
    images = vit_backbone.encode_images(pixels).numpy()
    scores, _ = score_cosines(measured.cosines, samples.labels, measured.owners)
    described = describe(measured, [auroc for auroc, _ in scores], count=5)
    for symptom, text in zip(described, texts, strict=True):
        feature = vit_backbone.text.encode_texts([f"{text}."])[0].numpy()
        cosines: np.ndarray = images @ feature / np.linalg.norm(feature)
        values, labels = (dict(zip(samples.keys.tolist(), own, strict=True)) for own in (cosines, samples.labels))
        own = CLASSES.index(symptom["class"])
        lowest, highest = np.sort(cosines[samples.labels == own])[:5], np.sort(cosines)[::-1][:5]
        for shown, wanted in ((symptom["most"], highest), (symptom["least_of_its_class"], lowest)):
            np.testing.assert_allclose([float(values[one["id"]]) for one in shown], wanted, atol=1e-5)
            np.testing.assert_allclose([one["cosine"] for one in shown], wanted, atol=1e-5)
            assert [one["class"] for one in shown] == [CLASSES[labels[one["id"]]] for one in shown]
        assert {labels[one["id"]] for one in symptom["least_of_its_class"]} == {own}
        for label, name in enumerate(CLASSES):
            column = cosines[samples.labels == label]
            found = symptom["cosine"][name]
            assert found["images"] == COUNTS["test"]
            assert found["0.5"] == pytest.approx(np.median(column), abs=1e-5)
            assert found["mean"] == pytest.approx(column.mean(), abs=1e-5)


def test_figures_show_each_symptom_with_its_n(measured: Cosines) -> None:
    chart = finished(lambda: draw_cosines(measured, [0.5] * len(measured.texts), [0, 1, 2], "test"))
    (ax,) = chart.figure.axes
    medians = [float(np.ravel(line.get_xdata())[0]) for line in ax.lines if line.get_linewidth() == 1.0]
    wanted = [
        np.median(measured.cosines[mask, symptom])
        for symptom in range(len(measured.texts))
        for mask in (measured.of_class(symptom), ~measured.of_class(symptom))
    ]
    np.testing.assert_allclose(medians, wanted)
    assert f"n = {COUNTS['test'] * len(CLASSES)} test images" in chart.note
    renamed = measured._replace(classes=["a long name " * 9, measured.texts[0], CLASSES[2]])
    labels = finished(lambda: draw_cosines(renamed, [None] * len(measured.texts), [0, 1, 2], "test")).figure.axes[0]
    weights = [tick.get_fontweight() for tick in labels.get_yticklabels()]
    rows = [weight for name in CLASSES for weight in ("bold", *["normal"] * len(SYMPTOMS[name]))]
    assert weights == rows, "names of classes alone are bold"
    images = finished(lambda: draw_images(measured, 2, "test"))
    assert len(images.figure.axes) == len(SYMPTOMS[CLASSES[2]]) * 2 * SHOWN
    captions = [ax.get_xlabel() for ax in images.figure.axes[:SHOWN]]
    first = list(measured.owners).index(2)
    assert captions == [f"{value:.3f}".replace("-", "−") for value in np.sort(measured.cosines[:, first])[::-1][:SHOWN]]


def test_figures_of_many_symptoms_are_divided_by_class(measured: Cosines) -> None:
    owners = np.repeat(np.arange(5), [20, 20, 10, 4, 40])
    many = measured._replace(classes=list("abcde"), owners=owners)
    assert list(pages(many)) == [[0], [1, 2, 3], [4]] and 34 <= MOST_ROWS < 40
