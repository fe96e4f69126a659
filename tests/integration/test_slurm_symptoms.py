"""Symptom generation as a Slurm job, with a fake in vLLM's place that the job starts and ends."""

import re
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.symptoms.test_server import FAKE, interpreter_with
from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.sets import SymptomSet
from vipbench.sweeps.executors.submissions import slurm

SECRET = "sk-very-secret"
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("slurm_cluster")]


def test_a_job_serves_the_model_and_writes_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, profile = tmp_path / "tiny", tmp_path / "profile.yaml"
    model.mkdir()
    (model / "config.json").write_text("{}")
    profile.write_text(yaml.safe_dump({"gpus_per_run": 0, "time": "10:00"}))
    monkeypatch.setenv("VIPBENCH_SERVE_PYTHON", str(interpreter_with(FAKE, tmp_path)))
    words = ["--serve", str(model), "--task", "skin", "--classes", "melanoma,blue nevus", "--modality", "dermoscopy"]
    words += ["--rounds", "1", "--keep-jargon", "--cache", str(tmp_path / "answers.sqlite"), "--out", str(tmp_path)]
    words += ["--executor", "slurm", "--profile", str(profile), "--consensus", "1"]  # answers do not agree here
    (tmp_path / "key").write_text(SECRET)
    words += ["--api-key-file", str(tmp_path / "key")]
    result = CliRunner().invoke(app, ["symptoms", "generate", *words])
    assert result.exit_code == 0, result.output
    said = re.fullmatch(r"job (\d+) is in the queue .*; what it says: (.*); scancel .*\n", result.output)
    assert said, result.output
    job, log = said.groups()
    assert SECRET not in slurm("scontrol", "show", "job", "--details", job)
    deadline = time.monotonic() + 120
    while slurm("squeue", "--noheader", f"--jobs={job}", "--states=PD,R,CG"):
        assert time.monotonic() < deadline, Path(log).read_text()
        time.sleep(0.5)
    content = SymptomSet.load(tmp_path / "skin" / "tiny.json")
    assert [entry.name for entry in content.classes] == ["melanoma", "blue nevus"]
    assert str(tmp_path / "skin" / "tiny.json") in Path(log).read_text()
    pickles = list(tmp_path.rglob("*.pkl"))
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "key"]
    assert pickles and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_a_job_serves_its_own_model(tmp_path: Path) -> None:
    words = [
        "--task",
        "skin",
        "--classes",
        "melanoma",
        "--modality",
        "dermoscopy",
        "--url",
        "http://127.0.0.1:1",
        "--executor",
        "slurm",
    ]
    result = CliRunner().invoke(app, ["symptoms", "generate", *words])
    assert isinstance(result.exception, UserError) and str(result.exception).startswith("--serve: say which model")
