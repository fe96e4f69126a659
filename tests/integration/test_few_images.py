"""Real processes: more ranks than images to validate or test with, so that some rank has none."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from harness.cli import app
from harness.method import method_names
from tests.conftest import CLASSES
from tests.integration.launching import PYTHON, launch, torchrun, write_config

pytestmark = pytest.mark.integration

EVERY_METHOD = str(Path(__file__).with_name("every_method.py"))


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training images of each class, and two images each to validate and test with."""
    folder = tmp_path_factory.mktemp("small")
    numbers = np.random.default_rng(3)
    counts = {"train": [4, 4, 4], "val": [1, 0, 1], "test": [1, 1, 0]}
    for split, per_class in counts.items():
        for name, count in zip(CLASSES, per_class, strict=True):
            for index in range(count):
                path = folder / "images" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(numbers.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    command = ["prepare", str(folder / "images"), "--format", "folder", "--out", str(folder / "data")]
    result = CliRunner().invoke(app, [*command, "--classes", ",".join(CLASSES)])
    assert result.exit_code == 0, result.output
    return folder / "data"


@pytest.mark.parametrize("bank", [True, False], ids=["bank", "images"])
def test_a_rank_may_have_no_image(base_config: dict[str, Any], small_dataset: Path, tmp_path: Path, bank: bool) -> None:
    train = {"epochs": 2, "batch_size": 5, "lr": 0.02, "select": "best"}
    runs = {**base_config["run"], "bank": bank}
    config = {**base_config, "data": {"path": str(small_dataset)}, "train": train, "run": runs}
    logits: list[dict[str, np.ndarray]] = []
    for launcher in (PYTHON, torchrun(3)):
        folder = tmp_path / str(len(logits))
        write_config(config, folder)
        result = launch([*launcher, EVERY_METHOD, "config.yaml"], folder, METHODS=",".join(method_names()))
        assert result.returncode == 0, result.stderr
        frames = {path.parent.name: pd.read_parquet(path) for path in folder.glob("runs/*/predictions.parquet")}
        assert len(frames) == len(method_names())
        assert all(len(frame) == 2 for frame in frames.values()), "each test image once"
        logits.append({name: np.stack(frame["logits"].to_list()) for name, frame in frames.items()})
    for name, expected in logits[0].items():
        np.testing.assert_allclose(logits[1][name], expected, atol=1e-3)
