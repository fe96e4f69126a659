"""Steps as CUDA graphs, but that a replay computes anew: inputs are copied in, losses and gradients handed out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pretended_gpu import pretended_gpu
from tests.zoo import run_unwritten, small_config
from vipbench.harness.config.schema import Config
from vipbench.harness.distributed.engines import graph
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.runs.packed import not_packed

CAPTURED = [
    name for name in method_names() if method_class(name).trains and method_class(name).combine is Method.combine
]


def replayed_by_computing(passes: Callable[[], None]) -> Callable[[], None]:
    """A replay on a GPU that is not there."""
    return passes


def trained(config: Config) -> np.ndarray:
    topology = Topology(config.run.device, config.precision)
    try:
        return run_unwritten(config, topology).logits
    finally:
        topology.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURED)
def test_training_by_replays_is_training(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One capture serves all steps of 5 samples; rates, order and keys differ from step to step."""
    captures: list[int] = []

    def capture(passes: Callable[[], None]) -> Callable[[], None]:
        captures.append(1)
        return replayed_by_computing(passes)

    monkeypatch.setattr(graph, "capture", capture)
    settings = ["train.max_grad_norm=1.0", "train.epochs=2"]
    eager = trained(small_config(base_config, name, tmp_path / "eager", *settings))
    with pretended_gpu():
        replayed = trained(
            small_config(base_config, name, tmp_path / "graph", *settings, "run.device=cuda", "run.cuda_graph=true")
        )
    np.testing.assert_allclose(replayed, eager, atol=1e-4)
    assert len(captures) == 1


def test_what_cannot_be_captured_is_a_clear_end(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(passes: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    def refused(name: str, *settings: str) -> str:
        with pytest.raises(UserError) as error:
            trained(small_config(base_config, name, tmp_path, "run.cuda_graph=true", *settings))
        return str(error.value)

    monkeypatch.setattr(graph, "capture", capture)
    assert refused("coop") == "run.cuda_graph: it needs a GPU; leave it out"
    with pretended_gpu():
        found = refused("coop", "run.device=cuda")
        assert "cannot be captured (operation not permitted when stream is capturing); leave it out" in found
        assert "several passes" in refused("coop", "run.device=cuda", "run.micro_batch=2")
        assert "combines several gradients" in refused("prograd", "run.device=cuda")
    config = small_config(base_config, "coop", tmp_path, "run.cuda_graph=true")
    assert "captures the steps of one run" in not_packed(config)
