"""Real processes: more ranks than images to validate or test with, so that some rank has none."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import CLASSES
from tests.integration.launching import run_on_ranks
from vipbench.harness.cli import app
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config

pytestmark = pytest.mark.integration


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


@pytest.mark.parametrize(
    ("method", "bank"), [("zero_shot", True), ("coop", True), ("cocoop", True), ("cocoop", False), ("vip", True)]
)
def test_a_rank_may_have_no_image(
    base_config: dict[str, Any], small_dataset: Path, tmp_path: Path, method: str, bank: bool
) -> None:
    train = {"epochs": 2, "batch_size": 5, "lr": 0.02, "select": "best"}
    runs = {**base_config["run"], "bank": bank}
    config = {**base_config, "method": method, "data": {"path": str(small_dataset)}, "train": train, "run": runs}
    alone = execute(resolve_config({**config, "run": {**runs, "out": str(tmp_path / "alone")}}))
    together = run_on_ranks(3, config, tmp_path)
    frames = [pd.read_parquet(path / "predictions.parquet") for path in (alone, together)]
    assert [len(frame) for frame in frames] == [2, 2], "each test image once"
    expected, found = (np.stack(frame["logits"].to_list()) for frame in frames)
    np.testing.assert_allclose(found, expected, atol=1e-3)
