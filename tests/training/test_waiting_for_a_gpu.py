"""A training step and a batch of evaluation never wait for a GPU, but where a number is written down."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.waits import train_counting
from tests.pretended_gpu import Waits, pretended_gpu
from tests.zoo import small_config
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.runs.inputs import load_inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.system.devices import each_to_host, to_device

TRAINED = [name for name in method_names() if method_class(name).trains]
SETTINGS = [
    *("run.device=cuda", "train.batch_size=3", "train.epochs=2", "train.select=last"),
    *("run.log_every=100", "run.eval_batch_size=5"),
]


def waits_of_an_epoch(job: Job, waits: Waits) -> tuple[int, Waits]:
    """Steps of the second epoch of a training, and the waits in it."""
    assert job.training is not None
    return train_counting(job.training, waits), waits


@pytest.fixture
def prepared(base_config: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Make a job on the pretended GPU, whose topology is closed at the end."""
    topologies: list[Topology] = []

    def prepare(name: str, *overrides: str) -> Job:
        config = small_config(base_config, name, tmp_path, *SETTINGS, *overrides)
        topologies.append(Topology("cuda", config.precision))
        return Job(config, load_inputs(config, topologies[-1]), topologies[-1], None)

    yield prepare
    for topology in topologies:
        topology.close()


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_waits_for_nothing(prepared: Callable[..., Job], name: str) -> None:
    """An epoch waits for the loss that is logged at its end; its one copy of inputs goes through pinned memory."""
    with pretended_gpu() as waits:
        steps, found = waits_of_an_epoch(prepared(name), waits)
    assert steps == 6
    # Samples that do not count are taken out of a global batch whose values a method wants.
    looks_at_batches = method_class(name).statistics is not Method.statistics
    assert found.total() <= 1 + steps * looks_at_batches, found


@pytest.mark.parametrize("tower", ["bert", "bidirectional"])
def test_no_kind_of_tower_waits(prepared: Callable[..., Job], model_folder: Path, tower: str) -> None:
    with pretended_gpu() as waits:
        steps, found = waits_of_an_epoch(prepared("vip", f"backbone={model_folder / tower}.json"), waits)
    assert steps == 6
    assert found.total() <= 1, found


def test_images_from_loader_are_normalised_without_waiting(prepared: Callable[..., Job]) -> None:
    with pretended_gpu() as waits:
        steps, found = waits_of_an_epoch(prepared("coop", "run.bank=false"), waits)
    assert steps == 6
    assert found.total() <= 1, found


@pytest.mark.parametrize("bank", [True, False])
def test_evaluation_does_not_wait_for_each_batch(prepared: Callable[..., Job], bank: bool) -> None:
    """Outputs are copied while the next ones are computed; 21 samples are 5 batches."""
    with pretended_gpu() as waits:
        job = prepared("coop", f"run.bank={bank}")
        waits.clear()
        job.data.test_set().predict(job.method)
    assert waits.total() == 0, waits


def test_waits_are_counted() -> None:
    """Each of these makes the host wait once."""
    with pretended_gpu() as waits:
        there = to_device(torch.tensor([1.0, 0.0]), torch.device("cuda"))
        pinned = there.to("cpu", non_blocking=True)
        assert not waits and not pinned.is_cuda
        waiting: list[Callable[[], Any]] = [
            lambda: float(there[0]),
            lambda: there.cpu(),
            lambda: there[there > 0],
            lambda: there.nonzero(),
            lambda: torch.tensor([2.0], device="cuda"),
            lambda: torch.ones(2).to("cuda", non_blocking=True),
            lambda: there.tolist(),
            lambda: there.copy_(torch.ones(2)),
        ]
        for number, wait in enumerate(waiting, start=1):
            wait()
            assert waits.total() == number, (number, waits)
    assert all("test_waiting_for_a_gpu.py" in place for place in waits)


def test_outputs_come_in_order_and_none_is_lost() -> None:
    """The last output is given out before what ended the outputs is raised."""

    def outputs() -> Iterator[Tensor]:
        for number in range(3):
            yield to_device(torch.tensor([number]), torch.device("cuda"))
        raise SystemExit(143)

    with pretended_gpu():
        found: list[float] = []
        with pytest.raises(SystemExit):
            found.extend(map(float, each_to_host(outputs())))
        assert found == [0.0, 1.0, 2.0]
        some = each_to_host(outputs())
        assert float(next(some)) == 0.0
        some.close()  # in the middle, nothing more comes
