"""`vipbench init` writes a config and a sweep that run as they stand, and names the commands that follow."""

import json
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.commands import init
from vipbench.harness.demo.benchmark import make_dataset
from vipbench.harness.errors import UserError
from vipbench.harness.runs.resolve import load_config
from vipbench.sweeps.grid import read_grid

ROOT = Path(__file__).parents[2]
MODEL, LESIONS = str(ROOT / "harness/demo/model"), str(ROOT / "symptoms_cache/demo/lesions.json")
SUGGESTED = yaml.safe_load(init.GRID.read_text())["axes"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_dataset(folder)
    return str(folder)


def written(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["init", "--out", str(folder), *options])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_with_a_symptom_set(data: str, tmp_path: Path) -> None:
    assert len(read_grid(init.GRID)) == 45, "a grid as it stands, too"
    output = written(tmp_path, "--data", data, "--backbone", MODEL, "--symptoms", LESIONS)
    config, configs = load_config(tmp_path / "config.yaml", []), read_grid(tmp_path / "sweep.yaml")
    assert (config.method.name, config.data.path, config.backbone.name, str(config.symptoms)) == (
        "vip",
        data,
        MODEL,
        LESIONS,
    )
    assert {run.method.name for run in configs} == set(SUGGESTED["method"])
    assert {run.data.shots for run in configs if run.method.name == "coop"} == set(SUGGESTED["data.shots"])
    assert f"vipbench sweep run {tmp_path}/sweep.yaml --out {tmp_path}/results --pack" in output
    assert "symptoms generate" not in output


def test_without_one(data: str, tmp_path: Path) -> None:
    output = written(tmp_path, "--data", data, "--backbone", "ViT-B-32:laion2b_s34b_b79k", "--symptoms", "")
    assert load_config(tmp_path / "config.yaml", []).backbone.pretrained == "laion2b_s34b_b79k"
    assert {run.method.name for run in read_grid(tmp_path / "sweep.yaml")} == {*SUGGESTED["method"]} - {"vip"}
    assert f"vipbench symptoms generate --data {data}" in output


def test_a_dataset_that_is_only_tested_on(data: str, tmp_path: Path) -> None:
    info = json.loads((Path(data) / "dataset.json").read_text())
    info["splits"] = {"test": info["splits"]["test"]}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    written(tmp_path, "--data", str(tmp_path), "--backbone", MODEL, "--symptoms", LESIONS)
    assert {run.method.name for run in read_grid(tmp_path / "sweep.yaml")} == {"zero_shot"}


def test_questions_at_a_terminal(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"the prepared dataset": data, "the backbone": "ViT-B-16:openai", "the symptom set": LESIONS}
    asked = []

    def prompt(question: str, default: str | None) -> str:
        asked.append(question)
        return next(answer for start, answer in answers.items() if question.startswith(start))

    monkeypatch.setattr(typer, "prompt", prompt)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    init.init(out=tmp_path)
    assert len(asked) == 3
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["backbone"] == {
        "name": "ViT-B-16",
        "pretrained": "openai",
    }


def test_what_is_wrong_is_one_line(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--data: give the prepared dataset, .*no terminal"):
        written(tmp_path)
    with pytest.raises(UserError, match="not a prepared dataset"):
        written(tmp_path, "--data", str(tmp_path), "--backbone", MODEL, "--symptoms", "")
    written(tmp_path, "--data", data, "--backbone", MODEL, "--symptoms", "")
    with pytest.raises(UserError, match=r"config\.yaml exists; give --overwrite"):
        written(tmp_path, "--data", data, "--backbone", MODEL, "--symptoms", "")
