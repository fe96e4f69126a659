"""Finished runs in notebooks: what comes back of them is what the run computed, and docs/notebooks.md works as it stands."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.special import softmax

from tests.conftest import CLASSES
from tests.methods.documented import code_blocks
from vipbench.harness.config.overrides import override
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.directory import write_digests
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config


@pytest.fixture(scope="module")
def path(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["train.select=best", f"run.out={tmp_path_factory.mktemp('runs')}"]
    return execute(resolve_config(override(base_config, settings)))


def test_a_run_is_read_with_its_config_and_metrics(path: Path) -> None:
    run = Run.load(str(path))
    assert run.config.method.name == "vip" and run.classes == CLASSES
    assert run.metrics == json.loads((path / "metrics.json").read_text())
    curve = run.curve()
    assert curve["step"].tolist() == [3, 6, 9], "of an epoch's last step its loss and its validation are one row"
    assert curve[["lr", "loss", "validation_accuracy"]].notna().all(axis=None)
    with pytest.raises(UserError, match="no finished run"):
        Run.load(path.parent)


def test_predictions_name_classes_beside_probabilities_that_are_the_softmax(path: Path) -> None:
    frame = Run.load(path).predictions()
    logits = np.stack(frame["logits"].to_list())
    assert frame["class"].tolist() == [CLASSES[label] for label in frame["label"]]
    assert frame["predicted"].tolist() == [CLASSES[index] for index in logits.argmax(axis=1)]
    assert (frame["predicted"] == frame["class"]).mean() == pytest.approx(Run.load(path).metrics["accuracy"])
    np.testing.assert_allclose(frame[CLASSES].to_numpy(), softmax(logits.astype(float), axis=1), atol=1e-6)
    stored = pd.read_parquet(path / "predictions.parquet")
    assert list(stored.columns) == ["id", "label", "class", "predicted", "logits", "probabilities"]
    np.testing.assert_array_equal(np.stack(stored["probabilities"].to_list()), frame[CLASSES].to_numpy())
    assert stored["probabilities"][0].dtype == np.float32


def test_predictions_of_earlier_versions_are_read_too(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / path.name)
    file = tmp_path / path.name / "predictions.parquet"
    pd.read_parquet(file)[["id", "label", "logits"]].to_parquet(file, index=False)
    write_digests(file.parent)
    pd.testing.assert_frame_equal(Run.load(file.parent).predictions(), Run.load(path).predictions())
    pd.DataFrame({"id": ["a"], "label": [7], "logits": [[0.0, 1.0]]}).to_parquet(file, index=False)
    write_digests(file.parent)
    with pytest.raises(UserError, match=r"predictions\.parquet: damaged"):
        Run.load(file.parent).predictions()


def test_a_class_may_have_the_name_of_a_column(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / path.name)
    file = tmp_path / path.name / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": ["label", *CLASSES[1:]]}))
    write_digests(file.parent)
    frame = Run.load(file.parent).predictions()
    assert frame["label"].dtype == np.int64 and 0 < frame["label (class)"].mean() < 1


def test_the_method_comes_back_and_predicts_the_same(path: Path, dataset: Path) -> None:
    run, samples = Run.load(path), Dataset(dataset).split("test")
    method = run.method()
    assert not method.training
    pixels = torch.stack([method.backbone.eval_transform(samples.image(index)) for index in range(len(samples))])
    with torch.no_grad():
        logits = method(method.backbone.encode_images(pixels)).logits
    expected = np.stack(run.predictions().set_index("id").loc[list(samples.keys), "logits"].to_list())
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def test_a_backbone_of_other_weights_is_refused(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / path.name)
    file = tmp_path / path.name / "provenance.json"
    content = json.loads(file.read_text())
    content["digests"]["backbone"] = "0" * 64
    file.write_text(json.dumps(content))
    write_digests(file.parent)
    with pytest.raises(UserError, match=r"has other weights now than when the run was made$"):
        Run.load(file.parent).method()
    content["backbone"] = {"repository": "tiny/clip", "revision": "main", "commit": "c" * 40}
    file.write_text(json.dumps(content))
    write_digests(file.parent)
    with pytest.raises(UserError, match=f"was made; it was hf-hub:tiny/clip@{'c' * 40}$"):
        Run.load(file.parent).method()


def test_the_documented_code_runs(
    path: Path, base_config: dict[str, Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Dataset(dataset).split("test").image(0).save("lesion.png")
    Path("config.yaml").write_text(yaml.safe_dump(override(base_config, ["train.epochs=2"])))
    placeholder, names = '"runs/vip_16shot_seed1_0123456789ab"', dict[str, Any]()
    blocks = code_blocks("notebooks.md")
    assert sum(placeholder in block for block in blocks) == 1
    for block in blocks:
        exec(compile(block.replace(placeholder, repr(str(path))), "notebooks.md", "exec"), names)
    assert names["probabilities"].sum().item() == pytest.approx(1, abs=1e-5)
    assert names["runs"]["method.name"].tolist() == ["coop"]
    assert names["path"].parent == Path("runs")
