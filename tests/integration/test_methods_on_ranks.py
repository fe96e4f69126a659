"""Real processes: every registered method on two and three ranks, and under DeepSpeed's ZeRO, ends as in one process."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.integration.launching import ROOT, deepspeed, launch, on_ranks
from tests.integration.methods_on_ranks import REFUSALS, TENSORS, main, run_all
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.system.files import read_json

pytestmark = pytest.mark.integration

WORKER = str(Path(__file__).with_name("methods_on_ranks.py"))


@pytest.fixture(scope="module")
def base(base_config: dict[str, Any], model_folder: Path) -> dict[str, Any]:
    """Two samples per batch, so that a third rank has none; two epochs, so that what is carried from one to the next counts."""
    data, train = {**base_config["data"], "shots": 3}, {"batch_size": 2, "epochs": 2}
    return {**base_config, "data": data, "backbone": {"name": str(model_folder / "vit.json")}, "train": train}


@pytest.fixture(scope="module")
def one_process(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    topology = Topology("cpu", "fp32")
    try:
        tensors, refusals = run_all(base, tmp_path_factory.mktemp("one"), topology)
    finally:
        topology.close()
    assert refusals == {}
    assert {name.partition("/")[0] for name in tensors} == set(method_names())
    return tensors


def assert_same(
    start: Callable[[Path, Path], None], base: dict[str, Any], folder: Path, expected: dict[str, Tensor]
) -> dict[str, str]:
    """Compare what every method gave with one process; returns why methods were refused.

    Args:
        start: processes that do `methods_on_ranks.main`.
    """
    (folder / "base.json").write_text(json.dumps(base))
    start(folder / "base.json", folder)
    refusals, tensors = read_json(folder / REFUSALS), load_file(folder / TENSORS)
    assert tensors.keys() == {name for name in expected if name.partition("/")[0] not in refusals}
    distances = {name: float((tensor - expected[name]).abs().max()) for name, tensor in tensors.items()}
    assert {name: far for name, far in distances.items() if far > (1e-4 if name.endswith("/logits") else 1e-5)} == {}
    return dict(refusals)


@pytest.mark.parametrize("processes", [2, 3])
def test_every_method_on_several_ranks(
    base: dict[str, Any], one_process: dict[str, Tensor], tmp_path: Path, processes: int
) -> None:
    assert assert_same(partial(on_ranks, processes, main), base, tmp_path, one_process) == {}


@pytest.mark.parametrize("stage", [2, 3])
def test_every_method_under_zero(
    base: dict[str, Any], one_process: dict[str, Tensor], tmp_path: Path, stage: int
) -> None:
    """Methods that combine gradients are refused, in one line; all others end as in one process."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))

    def start(*arguments: Path) -> None:
        command = [*deepspeed(str(path), 2), WORKER, *map(str, arguments)]
        result = launch(command, tmp_path, PYTHONPATH=str(ROOT))
        assert result.returncode == 0, result.stderr

    refusals = assert_same(start, base, tmp_path, one_process)
    combining = {name for name in method_names() if method_class(name).combine is not Method.combine}
    assert set(refusals) == combining == {"prograd"}
    for reason in refusals.values():
        assert f"ZeRO-{stage} reduces one gradient" in reason and "\n" not in reason
