"""The GPU benchmarks run in a small form on a CPU and on a GPU that is not there; a failure is on record, and stops no other."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from benchmarks import markdown
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import compiled, filling, kernels, memory, packed, setting, steps, tower, waits, wheels
from benchmarks.gpu.suite import SUITE
from tests.distributed.test_cuda_graph import replayed_by_computing
from tests.pretended_gpu import pretended_gpu
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.distributed.engines import graph
from vipbench.harness.models.backbone import load_backbone

MODULES: dict[str, Callable[..., Any]] = {
    "tower": tower.measure,
    "steps": steps.measure,
    "packed": packed.measure,
    "waits": waits.measure,
    "filling": filling.measure,
    "memory": memory.measure,
    "compiled": compiled.measure,
}
FEW = replace(setting.SMALL, methods=("vip", "prograd", "clip_lora", "zero_shot"))
ROWS = {"tower": 8, "steps": 3, "packed": 1, "waits": 4, "filling": 1, "memory": 3, "compiled": 3}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pretended one, without what CUDA alone can do: the profiler, and its account of memory."""
    monkeypatch.setattr(graph, "capture", replayed_by_computing)
    for module in (steps, packed, memory):
        for function in ("peak_mib", "count_kernels"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, lambda *arguments: None)
    with pretended_gpu():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_runs_in_its_small_form(name: str, request: pytest.FixtureRequest) -> None:
    """It begins once, after it has prepared, keeps to one device where a pretended one takes it, and no row has failed."""
    precision = "fp32"
    if name in ("steps", "packed", "memory", "filling"):
        request.getfixturevalue("gpu")
        precision = "bf16"
    begun: list[int] = []
    rows = list(MODULES[name](FEW, lambda: begun.append(1), *(() if name == "tower" else (precision,))))
    assert begun == [1]
    assert [row["error"] for row in rows if "error" in row] == []
    assert len(rows) == ROWS[name]
    assert name == "tower" or {row["precision"] for row in rows} == {precision}
    times = [value for row in rows for key, value in row.items() if key.endswith(("_ms", "_per_s"))]
    assert all(value is None or value > 0 for value in times)


def test_a_method_that_fails_is_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps._row

    def failing(place: Any, given: Any, name: str) -> Any:
        if name == "coop":
            raise RuntimeError("made\nup")
        return whole(place, given, name)

    monkeypatch.setattr(steps, "_row", failing)
    coop, kgcoop = steps.measure(replace(FEW, methods=("coop", "kgcoop")), lambda: None, "fp32")
    assert coop["error"] == "RuntimeError: made up" and "step_ms" not in coop
    assert kgcoop["step_ms"] > 0 and "error" not in kgcoop


def test_matrices_cast_once_give_the_bits_of_autocast(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # as it is on CUDA under autocast
    backbone = load_backbone(BackboneConfig(name=str(model_folder / "vit.json")))
    towers = tower.Towers(backbone, FEW, "cpu")
    pixels = towers.pixels(3)
    once = towers.tower(tower.MATRICES, torch.bfloat16)
    found = towers.features(once, pixels, tower.MATRICES, torch.bfloat16)
    assert once is not backbone.image
    assert torch.equal(found, towers.features(backbone.image, pixels, tower.AS_RUN, torch.bfloat16))
    rounded = towers.features(towers.tower(tower.ALL, torch.bfloat16), pixels.bfloat16(), tower.ALL, torch.bfloat16)
    assert F.cosine_similarity(found, rounded).min() > 0.99


def test_nothing_is_counted_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert kernels.count_kernels(lambda: None) is kernels.peak_mib(lambda: None) is None
    with kernels.synchronisations() as found:
        float(torch.ones(1))
    assert not found


WORKER = """
import json, sys, time
name, rows = sys.argv[1:3]
sys.stdin.readline()
with open(rows, "a") as file:
    file.write(json.dumps({"a": 1.5}) + "\\n")
    file.flush()
    if name == "tower":
        time.sleep(600)
    if name == "steps_fp32":
        file.write(json.dumps({"b": "x|y", "error": "made up"}) + "\\n")
        sys.exit(1)
    if name == "packed":
        sys.exit(3)
"""


def test_what_fails_or_takes_too_long_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were measured stay; the next benchmark runs; the exit status tells."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(runner, "WORKER", (sys.executable, str(tmp_path / "worker.py")))
    monkeypatch.setitem(SUITE, "tower", SUITE["tower"]._replace(seconds=1))
    app, out = typer.Typer(), tmp_path / "found.json"
    app.command()(runner.main)
    names = ["tower", "steps_fp32", "packed", "memory"]
    result = CliRunner().invoke(app, [*names, "--out", str(out)])
    assert result.exit_code == 1
    found = json.loads(out.read_text())["results"]
    assert list(found) == names
    errors = ["ended after 1 s", "made up", "exit status 3", ""]
    assert [found[name]["error"] for name in names] == errors
    assert all(f"FAILED: {error}" in result.output for error in errors[:3])
    assert found["tower"]["rows"] == found["memory"]["rows"] == [{"a": 1.5}]
    assert found["steps_fp32"]["rows"][1] == {"a": None, "b": "x|y", "error": "made up"}

    result = CliRunner().invoke(app, ["memory", "--out", str(out)])
    assert result.exit_code == 0, "what failed before is not asked for"
    result = CliRunner().invoke(app, ["packed", "memory", "--seconds", "0", "--out", str(out)])
    assert result.exit_code == 1
    found = json.loads(out.read_text())["results"]
    assert found["packed"]["error"] == found["memory"]["error"] == "not run: the time was up"
    assert list(found) == names, "the others are still in the file"

    result = CliRunner().invoke(app, ["memory", "--small", "--out", str(out)])
    assert result.exit_code == 2 and "another small" in result.output
    other = {**json.loads(out.read_text()), "context": {"device": "another"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    result = CliRunner().invoke(app, ["memory", "--out", str(tmp_path / "other.json")])
    assert result.exit_code == 2 and "another context" in result.output
    assert json.loads((tmp_path / "other.json").read_text()) == other, "the figures of two machines are not mixed"

    tables = CliRunner().invoke(_markdown(), [str(out)]).output
    assert "| a | b | error |" in tables and "|  | x/y | made up |" in tables
    assert "Failed: ended after 1 s" in tables


def _markdown() -> Any:
    app = typer.Typer()
    app.command()(markdown.main)
    return app


def test_wheels_are_of_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is carried that is there, nor what only that needs; versions are those that were tested."""
    commands: list[list[str]] = []

    def pip(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "big.whl").write_bytes(bytes(61 * 2**20 * len(commands[2:])))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    app = typer.Typer()
    app.command()(wheels.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    wanted = [word for command in commands for word in command if "==" in word]
    assert [word for word in commands[1] if "==" in word] == [word for word in wanted if word.startswith("deepspeed")]
    assert {word.partition("==")[0] for word in wanted} >= {"open-clip-torch", "pydantic-core", "deepspeed", "typer"}
    assert not {word.partition("==")[0] for word in wanted} & {"torch", "numpy", "timm", "wordfreq", "sympy"}
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    assert set(wanted) <= set(lines)

    freeze = tmp_path / "freeze.txt"
    freeze.write_text("# a comment\ntorch==2.11.0\nopen_clip_torch @ file:///somewhere\n-e git+somewhere\n")
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), "--have", str(freeze)])
    assert result.exit_code == 1 and "more than 60 MiB" in result.output
    assert not [word for word in commands[2] if word.startswith(("torch==", "open-clip-torch"))]
    assert [word for word in commands[2] if word.startswith("numpy==")], "it is not on that machine"
