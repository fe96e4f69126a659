"""The cost of a run: its numbers, its seconds over all sessions, its memory; honest where runs share it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dying import Death, at_step, die
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.features.encode import fill_bank
from vipbench.harness.methods.base import Method
from vipbench.harness.report.tables import make_table, to_latex, to_markdown
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.packed import execute_together
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_json
from vipbench.harness.training.checkpoint import latest
from vipbench.harness.training.cost import Cost, Meter, peak_bytes
from vipbench.harness.training.loop import Training

NAP = 0.05  # seconds


def config(base: dict[str, Any], out: Path, *overrides: str) -> Config:
    return resolve_config(override(base, [f"run.out={out}", "run.checkpoint_steps=1", *overrides]))


def cost(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run / "provenance.json")["cost"]
    return found


@pytest.fixture
def napping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes a while."""
    advance = Training.advance

    def slowly(training: Training, loss: Any) -> None:
        time.sleep(NAP)
        advance(training, loss)

    monkeypatch.setattr(Training, "advance", slowly)


def test_numbers_are_counted_apart_from_what_is_fitted(base_config: dict[str, Any], tmp_path: Path) -> None:
    """Two context vectors of width 32; three weights of 64 and their biases; nothing."""
    found = {
        name: cost(execute(config({**base_config, "method": method}, tmp_path)))
        for name, method in (
            ("coop", {"name": "coop", "context_length": 2}),
            ("linear_probe", "linear_probe"),
            ("zero_shot", "zero_shot"),
        )
    }
    counts = {name: (one["trained"], one["fitted"]) for name, one in found.items()}
    assert counts == {"coop": (2 * 32, 0), "linear_probe": (0, 3 * 64 + 3), "zero_shot": (0, 0)}
    for one in found.values():
        assert one["peak_of"] == "resident memory of the process" and 0.1 < one["peak_gib"] < 64
        assert one["runs_together"] == 1


@pytest.mark.usefixtures("napping")
def test_seconds_are_those_of_training_over_all_sessions(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine steps, five of them before it dies; neither loading nor the time between takes part."""
    began = time.monotonic()
    whole = cost(execute(config(base_config, tmp_path / "whole", "method=coop")))["train_seconds"]
    assert 9 * NAP <= whole < time.monotonic() - began
    at_step(6, die, monkeypatch)
    one = config(base_config, tmp_path / "died", "method=coop")
    with pytest.raises(Death):
        execute(one)
    (partial,) = one.run.out.glob("*.partial")
    checkpoint = latest(partial / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 5
    first = checkpoint.facts["cost"]["seconds"]
    time.sleep(10 * NAP)  # between the sessions
    began = time.monotonic()
    run = execute(one)
    second = time.monotonic() - began
    found = cost(run)["train_seconds"]
    assert first >= 5 * NAP and first + 4 * NAP <= found < first + second
    assert read_json(run / "provenance.json")["resumed_after_step"] == 5


def test_filling_the_bank_is_no_training(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*arguments: Any) -> None:
        time.sleep(20 * NAP)
        fill_bank(*arguments)

    monkeypatch.setattr("vipbench.harness.features.source.fill_bank", slowly)
    began = time.monotonic()
    run = execute(config(base_config, tmp_path, "method=coop", "train.select=best"))
    assert time.monotonic() - began - cost(run)["train_seconds"] > 3 * 20 * NAP, "views, validation and test images"


def test_fitting_in_closed_form_is_measured(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Method, "finish", lambda *_: time.sleep(4 * NAP))
    assert cost(execute(config(base_config, tmp_path, "method=linear_probe")))["train_seconds"] >= 4 * NAP


@pytest.mark.usefixtures("napping")
def test_packed_runs_have_the_cost_of_all_of_them(base_config: dict[str, Any], tmp_path: Path) -> None:
    runs = [config(base_config, tmp_path, "method=coop", f"seed={seed}") for seed in (1, 2)]
    assert execute_together(runs) == {}
    execute(config(base_config, tmp_path, "method=cocoop"))
    found = read_runs(tmp_path)
    together = found[found["method.name"] == "coop"]
    assert (together["metrics.cost.train_seconds"] >= 2 * 9 * NAP).all() and together["shared"].all()
    assert {cost(path)["runs_together"] for path in tmp_path.glob("coop_*")} == {2}
    text = to_markdown(make_table(found, ["method"], ["shots"], ["accuracy", "cost.trained", "cost.train_seconds"]))
    lines = text.splitlines()
    assert lines[0] == "| method | accuracy, shots=all | cost.trained, shots=all | cost.train_seconds, shots=all |"
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines[2:4]}
    assert cells["| coop"][1] == "512 ± 0 (2)" and cells["| coop"][2].endswith("(2)‡ |")
    assert cells["| cocoop"][2].endswith("(1) |") and "**" not in "".join(cells["| coop"][1:] + cells["| cocoop"][1:])
    assert "‡: some run trained together with others" in text and "Costs are no percentages" in text
    assert r"$^\ddagger$" in to_latex(make_table(found, ["method"], ["shots"], ["cost.train_seconds"]))


def test_a_table_of_fractions_says_nothing_of_costs(base_config: dict[str, Any], tmp_path: Path) -> None:
    execute(config(base_config, tmp_path, "method=zero_shot"))
    assert "Costs" not in to_markdown(make_table(read_runs(tmp_path), ["method"], ["shots"], ["accuracy"]))


def test_the_peak_is_that_of_the_highest_rank_and_of_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology("cpu", "fp32")
    meter = Meter(topology)
    block = torch.ones(1 << 26)  # 256 MiB
    assert peak_bytes(topology.device) > block.numel() * 4
    monkeypatch.setattr(topology, "all_gather_objects", lambda items: [*items, 1 << 50])
    assert meter.peak() == 1 << 50
    meter.resume(Cost(seconds=2.0, peak_bytes=1 << 60))
    assert meter.peak() == 1 << 60 and meter.seconds == 2.0
    topology.close()


def test_on_a_gpu_the_peak_is_that_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what torch counts from the start of the meter on; the numbers of a real GPU are not checked here."""
    counted = {"bytes": 1 << 40}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: counted.update(bytes=1 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: counted["bytes"])
    topology = Topology("cpu", "fp32")
    monkeypatch.setattr(topology, "device", torch.device("cuda"))
    assert Meter(topology).peak() == 1 << 30
    topology.close()
