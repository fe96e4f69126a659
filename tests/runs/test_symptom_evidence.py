"""Symptom evidence: weights, cosines and leave-one-out of a run against a plain second computation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from tests.conftest import CLASSES, SYMPTOMS
from vipbench.harness.config.overrides import override
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Task, TextClassifier
from vipbench.harness.methods.vip import ViP, ViPConfig
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.runs.symptom_evidence import Explainer, leave_one_out_changes, run_samples

TEXTS = [text for name in CLASSES for text in SYMPTOMS[name]]
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {},
    "sink": {"attention_sink": True},
    "mean": {"merge": "mean"},
    "ensemble": {"sets": "ensemble"},
    "class context": {"class_specific_context": True},
}


def build(backbone: Backbone, options: dict[str, Any], *sets: list[list[str]]) -> ViP:
    """ViP with random values, the same for any symptoms."""
    joined = [[text for own in of_class for text in own] for of_class in zip(*sets, strict=True)]
    torch.manual_seed(1)
    method = ViP(ViPConfig(name="vip", context_length=2, **options), Task(CLASSES, joined, tuple(sets)), backbone)
    generator = torch.Generator().manual_seed(2)
    for parameter in method.trainable().values():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return method.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_leave_one_out_is_the_method_of_a_set_that_lacks_the_symptom(
    vit_backbone: Backbone, options: dict[str, Any]
) -> None:
    own = [SYMPTOMS[name] for name in CLASSES]
    other = [["dark red", "flat"], ["bleeds easily", "pearly"], ["pale"]]
    sets = [own, other] if options.get("sets") else [own]
    left = build(vit_backbone, options, *sets).leave_one_out()
    row = 0
    for label in range(len(CLASSES)):
        for which, symptoms in enumerate(sets):
            for place in range(len(symptoms[label])):
                lacking = [[list(texts) for texts in one] for one in sets]
                del lacking[which][label][place]
                if lacking[which][label]:
                    expected = build(vit_backbone, options, *lacking).class_features()[label]
                    torch.testing.assert_close(left[row], expected, atol=1e-5, rtol=1e-4)
                else:
                    assert left[row].isnan().all() != bool(options.get("attention_sink")), "nothing else is left"
                row += 1
    assert row == len(left)


@torch.no_grad()
def test_weights_make_the_class_features(vit_backbone: Backbone) -> None:
    own = [SYMPTOMS[name] for name in CLASSES]
    for options in (OPTIONS["attention"], OPTIONS["sink"], OPTIONS["class context"]):
        method = build(vit_backbone, options, own)
        weights, features = method.symptom_weights(), method.symptom_features()
        assert method.merge is not None
        parts = (weights[:, None] * features).split([len(texts) for texts in own])
        merged = torch.stack([query + part.sum(0) for query, part in zip(method.merge.queries, parts, strict=True)])
        torch.testing.assert_close(F.normalize(merged, dim=-1), method.class_features(), atol=1e-5, rtol=1e-4)
        sums = torch.stack([part.sum() for part in weights.split([len(texts) for texts in own])])
        assert (sums < 0.99).any() if options.get("attention_sink") else torch.allclose(sums, torch.ones(3))
    uniform = build(vit_backbone, OPTIONS["mean"], own).symptom_weights()
    torch.testing.assert_close(uniform, torch.tensor([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3]))
    two = build(vit_backbone, OPTIONS["ensemble"], own, own).symptom_weights()
    assert two.sum() == pytest.approx(3) and len(two) == 12


@pytest.fixture(scope="module")
def run(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(execute(resolve_config(override(base_config, [f"run.out={tmp_path_factory.mktemp('evidence')}"]))))


def test_evidence_of_a_run(run: Run, dataset: Path) -> None:
    explainer, samples = Explainer(run), run_samples(run, "test")
    evidence = explainer.look_at(samples)
    expected = np.stack(run.predictions().set_index("id").loc[list(samples.keys), "logits"].to_list())
    np.testing.assert_allclose(evidence.logits, expected, atol=1e-4)
    assert explainer.symptoms and explainer.symptoms.texts == TEXTS
    assert explainer.symptoms.owners.tolist() == [0, 0, 1, 2, 2, 2]
    backbone = explainer.backbone
    with torch.no_grad():
        pixels = torch.stack([backbone.eval_transform(samples.image(place)) for place in range(3)])
        images, texts = backbone.encode_images(pixels), explainer.method.symptom_features()
        cosines = F.cosine_similarity(images[:, None], texts[None], dim=-1)
    np.testing.assert_allclose(evidence.cosines[:3], cosines.numpy(), atol=1e-5)


def test_worth_of_a_symptom(run: Run) -> None:
    explainer, samples = Explainer(run), run_samples(run, "test")
    worth, evidence = explainer.worth(samples), explainer.look_at(samples)
    for place, owner in enumerate([0, 0, 1, 2, 2, 2]):
        auroc = roc_auc_score(samples.labels == owner, evidence.cosines[:, place])
        assert worth.auroc[place] == pytest.approx(auroc, abs=0.02)  # equal up to ties that rounding breaks
    assert worth.without is not None
    assert np.isnan(worth.without).tolist() == [False, False, True, False, False, False]


def test_changes_by_hand() -> None:
    labels = np.array([0, 0, 1, 1])
    logits = np.array([[2.0, 1], [2, 1], [0, 1], [2, 1]])  # 3 of 4 right: sensitivities 1 and 1/2
    without = np.array([[2.0, 3], [0, 1], [0, 1], [0, 1]])  # of a symptom of class 0, and one of class 1
    changes = leave_one_out_changes(logits, without, labels, np.array([0, 1]))
    assert changes.tolist() == [0.0, -0.25]
    assert np.isnan(leave_one_out_changes(logits, without + np.nan, labels, np.array([0, 1]))).all()


def test_methods_without_a_merge_prompt_have_cosines_of_plain_sentences(
    base_config: dict[str, Any], tmp_path: Path
) -> None:
    base = {key: value for key, value in base_config.items() if key != "train"}
    settings = ["method={name: zero_shot, text: symptoms}", f"run.out={tmp_path}"]
    run = Run(execute(resolve_config(override(base, settings))))
    explainer = Explainer(run)
    assert explainer.symptoms and explainer.symptoms.weights is None
    evidence = explainer.look_at(run_samples(run, "test"))
    means = np.stack(
        [evidence.cosines[:, explainer.symptoms.owners == label].mean(axis=1) for label in range(3)], axis=1
    )
    scale = float(explainer.backbone.logit_scale)
    np.testing.assert_allclose(evidence.logits, scale * means, atol=1e-3)
    assert explainer.worth(run_samples(run, "val")).without is None


def test_another_dataset_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run_samples(run, "test", tmp_path / "nowhere")
    other = json.loads((run.path / "provenance.json").read_text())["digests"]["dataset"]
    run.provenance["digests"]["dataset"] = "0" * 64
    try:
        with pytest.raises(UserError, match=r"not the dataset that vip_\S+ was made with; name that one in --data"):
            run_samples(run, "test")
    finally:
        run.provenance["digests"]["dataset"] = other
    assert len(Dataset(run.config.data.path).split("test")) == len(run_samples(run, "test"))
    assert isinstance(Explainer(run).method, TextClassifier)
