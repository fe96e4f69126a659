"""The evidence that a run leaves: patients and metadata beside its predictions, and intervals beside its metrics."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import CLASSES, COUNTS, write_images
from tests.methods.documented import code_blocks
from vipbench.harness.config.overrides import override
from vipbench.harness.data.importers import csv
from vipbench.harness.data.shards import write_dataset
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.statistics.intervals import Interval, to_json
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.directory import write_digests
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.predictions import read_intervals, read_predicted
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.runs.transfer import evaluate_run


def described(folder: Path, metadata: list[str], patients: bool, ordinal: bool = False) -> Path:
    """The test dataset from a manifest: two images a patient, the sex of some."""
    lines = ["path,label,split,patient,sex"]
    for split, count in COUNTS.items():
        for name in CLASSES:
            for number in range(count):
                patient = f"{split} {name} {number // 2}" if patients else ""
                sex = ("f", "m", "")[number % 3]
                lines.append(f"{split}/{name}/{name[:3]}{number}.png,{name},{split},{patient},{sex}")
    write_images(folder / "images")
    (folder / "images" / "all.csv").write_text("\n".join(lines))
    source = csv.read(folder / "images" / "all.csv", CLASSES, None, metadata)
    write_dataset(source, folder / "data", name="described", ordinal=ordinal)
    return folder / "data"


def run(base: dict[str, Any], data: Path, out: Path) -> Path:
    settings = [f"data.path={data}", "train.epochs=2", f"run.out={out}"]
    return execute(resolve_config(override(base, settings)))


@pytest.fixture(scope="module")
def paths(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on data with patients, metadata and grades, and the same run on the bare data."""
    folder = tmp_path_factory.mktemp("described")
    rich = described(folder / "rich", ["sex"], patients=True, ordinal=True)
    bare = described(folder / "bare", [], patients=False)
    return run(base_config, rich, folder / "runs rich"), run(base_config, bare, folder / "runs bare")


def test_patients_and_metadata_travel_and_change_nothing_else(paths: tuple[Path, Path]) -> None:
    rich, bare = paths
    assert rich.name == bare.name, "they are no part of a run's identity"
    frame, other = (pd.read_parquet(path / "predictions.parquet") for path in paths)
    assert list(other.columns) == ["id", "label", "class", "predicted", "logits", "probabilities"]
    assert list(frame.columns) == [*other.columns, "patient", "sex"]
    pd.testing.assert_frame_equal(frame[other.columns], other)
    assert frame["patient"].str.fullmatch(r"p\d{4}").all(), "pseudonyms"
    assert frame["patient"].value_counts().max() == 2 and frame["sex"].isna().sum() == 6
    assert list(Run.load(rich).predictions()["sex"].isna()) == list(frame["sex"].isna())


def test_grades_have_metrics_of_distance(paths: tuple[Path, Path]) -> None:
    rich, bare = (Run.load(path) for path in paths)
    assert rich.provenance["ordinal"] is True and "ordinal" not in bare.provenance
    assert isinstance(rich.metrics["mae"], float) and bare.metrics["mae"] is bare.metrics["quadratic_kappa"] is None
    assert {**rich.metrics, "mae": None, "quadratic_kappa": None} == bare.metrics
    assert rich.predicted.ordinal and not bare.predicted.ordinal and "mae" in rich.intervals


def test_intervals_are_over_patients_where_they_are_known(paths: tuple[Path, Path]) -> None:
    rich, bare = (Run.load(path) for path in paths)
    assert rich.patients is not None and len(set(rich.patients)) == 12 and bare.patients is None
    for run, method in ((rich, "Wilson of effective n over patients"), (bare, "Wilson")):
        own = run.intervals["accuracy"]
        assert isinstance(own, Interval) and own.method == method
        assert own.low <= run.metrics["accuracy"] <= own.high
    assert rich.groups.keys() == {"patient", "sex"} and not bare.groups


def test_runs_without_intervals_have_them_computed(paths: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(paths[0], tmp_path / "run")
    path = tmp_path / "run" / "intervals.json"
    stored = json.loads(path.read_text())
    path.unlink()
    write_digests(path.parent)
    assert to_json(Run.load(path.parent).intervals) == stored
    path.write_text('{"accuracy": {"low": 0.1}}')
    with pytest.raises(UserError, match=r"intervals\.json: damaged"):
        read_intervals(path.parent)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"intervals\.json: damaged"):
        read_intervals(path.parent)


def test_the_documented_code_runs(paths: tuple[Path, Path]) -> None:
    (block,) = code_blocks("statistics.md")
    names = dict[str, Any]()
    code = block.replace('"runs/first"', repr(str(paths[0]))).replace('"runs/second"', repr(str(paths[1])))
    exec(compile(code, "statistics.md", "exec"), names)
    assert names["by_sex"].gap is not None and len(names["by_sex"].groups) == 3


def test_evaluations_elsewhere_have_them_too(paths: tuple[Path, Path]) -> None:
    rich, bare = paths
    data = rich.parents[1] / "rich" / "data"
    out = evaluate_run(bare, data, "val", None, "cpu")
    predicted, predictions = read_predicted(out)
    assert predicted.ordinal and list(predictions.groups) == ["patient", "sex"]
    assert to_json(read_intervals(out)) == json.loads((out / "intervals.json").read_text())
