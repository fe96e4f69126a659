"""`vipbench doctor` names what a machine has, and what would not work on it."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.commands import doctor
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm import server

Card = namedtuple("Card", "name total_memory")
Usage = namedtuple("Usage", "total used free")


def findings(folder: Path) -> dict[str, dict[str, str]]:
    result = CliRunner().invoke(app, ["doctor", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return {entry["part"]: entry for entry in json.loads(result.output)}


def test_a_machine_that_has_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card("H100", 80 * doctor.GIB))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(500 * doctor.GIB, 0, 400 * doctor.GIB))
    python = tmp_path / "python"
    python.touch()
    monkeypatch.setenv(server.PYTHON_VARIABLE, str(python))
    found = findings(tmp_path)
    assert not [entry for entry in found.values() if entry["missing"]]
    assert found["GPUs"]["found"] == "H100, 80 GiB; H100, 80 GiB"
    assert str(python) in found["vLLM"]["found"]
    assert CliRunner().invoke(app, ["doctor", str(tmp_path)]).output.endswith("everything would work here\n")


def test_a_machine_that_has_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_vllm() -> Any:
        raise UserError("no vLLM here")

    part = namedtuple("part", "mountpoint fstype")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(doctor.GIB // 4, 0, doctor.GIB // 8))
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [part("/", "ext4"), part(str(tmp_path), "nfs4")])
    monkeypatch.setattr(server, "interpreter", no_vllm)
    found = findings(tmp_path)
    assert {name for name, entry in found.items() if entry["missing"]} == {
        "GPUs",
        "disk",
        "shared memory",
        "Slurm",
        "vLLM",
    }
    assert "nfs4, shared between machines" in found["disk"]["found"]
    assert "0.1 GiB are free" in found["disk"]["missing"]
    assert "run.workers=0" in found["shared memory"]["missing"]
    assert found["vLLM"]["missing"].endswith("no vLLM here")
    lines = CliRunner().invoke(app, ["doctor", str(tmp_path)]).output
    assert "would not work here:\n  GPUs: run.device=cuda" in lines


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "none")])
    assert isinstance(result.exception, UserError)


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("vipbench 0.")
