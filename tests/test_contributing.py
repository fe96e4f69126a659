"""The code in CONTRIBUTING.md works as it stands there."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import conftest
from tests.data.drawn_images import save
from vipbench import baselines
from vipbench.harness.cli import app
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.data import importers
from vipbench.harness.data.reader import Dataset
from vipbench.harness.evaluation import metrics
from vipbench.harness.methods import registry
from vipbench.harness.models.open_clip import create
from vipbench.harness.models.text_tower import text_tower
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.sweeps.units import FAILED, LOGS, RUNS, unit

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (.+?)\n(?:(?!^## ).*\n)*?```python\n((?:.*\n)*?)```\n", TEXT, re.MULTILINE))


@contextmanager
def as_file(package: ModuleType, name: str, title: str, folder: Path) -> Iterator[None]:
    """Write a block of CONTRIBUTING.md as a file of a package, and forget it afterwards."""
    (folder / f"{name}.py").write_text(BLOCKS[title], encoding="utf-8")
    package.__path__.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        package.__path__.remove(str(folder))
        sys.modules.pop(f"{package.__name__}.{name}", None)
        if hasattr(package, name):
            delattr(package, name)


def test_every_block_is_run_here() -> None:
    assert list(BLOCKS) == ["A method", "An importer", "A backbone family", "An executor", "A metric"]
    assert TEXT.count("```python") == len(BLOCKS)


def test_a_method(base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.method_names()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    train = {"epochs": None, "steps": 2, "warmup_epochs": 0, "batch_size": 5}
    settings = {"method": "zs_lp", "train": train, "run": {**base_config["run"], "out": str(tmp_path / "runs")}}
    with as_file(baselines, "zs_lp", "A method", tmp_path):
        run = execute(resolve_config({**base_config, **settings}))
    assert run.name.startswith("zs_lp_all_seed1_")
    learned = load_file(run / "prompts.safetensors")
    assert list(learned) == ["residual"] and learned["residual"].abs().max() > 0
    assert json.loads((run / "metrics.json").read_text())["samples"] == 21


def test_an_importer(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in ("mel", "nev") for number in range(4)]
    for name in names:
        save(tmp_path / "images" / name)
    source, out = tmp_path / "list.txt", tmp_path / "data"
    source.write_text("".join(f"{name}\t{name[:3]}\n" for name in names))
    command = ["prepare", str(source), "--format", "tab-list", "--image-root", str(tmp_path / "images")]
    with as_file(importers, "tab_list", "An importer", tmp_path):
        result = CliRunner().invoke(app, [*command, "--out", str(out), "--val-fraction", "0", "--workers", "1"])
    assert result.exit_code == 0, result.output
    dataset = Dataset(out)
    assert dataset.classes == ["mel", "nev"]
    assert {key for split in dataset.info.splits for key in dataset.split(split).keys} == {name[:-4] for name in names}


def test_a_backbone_family(tmp_path: Path) -> None:
    models: dict[str, Any] = {}
    exec(BLOCKS["A backbone family"], {"MODELS": models, "VIT": conftest.VIT, "TEXT": conftest.TEXT})
    ((name, config),) = models.items()
    assert name not in conftest.MODELS
    (tmp_path / f"{name}.json").write_text(json.dumps({"model_cfg": config}))
    model, tokenizer, _ = create(BackboneConfig(name=str(tmp_path / f"{name}.json")))
    texts = ["a photo of a melanoma.", "round"]
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts))
        assert (text_tower(model, tokenizer).encode_texts(texts) - expected).abs().max() < 1e-5


def test_an_executor(tmp_path: Path) -> None:
    code: dict[str, Any] = {}
    exec(BLOCKS["An executor"], code)
    for folder in (LOGS, RUNS, FAILED):
        (tmp_path / folder).mkdir()
    script = tmp_path / "run.py"
    script.write_text("import sys, pathlib; name = pathlib.Path(sys.argv[1]).stem; sys.exit(f'no luck with {name}')")
    units = [unit(tmp_path, [name], (sys.executable, str(script))) for name in ("first", "second")]
    code["OneByOne"]().run(tmp_path, units)
    records = {path.stem: json.loads(path.read_text())["error"] for path in (tmp_path / FAILED).iterdir()}
    assert records == {"first": "no luck with first", "second": "no luck with second"}


def test_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    exec(BLOCKS["A metric"], {})
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    computed = metrics.compute_metrics(labels, np.eye(2)[predicted], ["a", "b"])
    assert computed["cohen_kappa"] == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))
    assert computed["accuracy"] == 3 / 4
