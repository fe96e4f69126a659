"""Waits and memory on a CUDA device: training seldom waits for it, copies are whole, and large problems fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu.kernels import peak_mib, synchronisations
from benchmarks.gpu.waits import train_counting
from tests.gpu import GPU
from tests.zoo import small_config
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.models.tower_view import ImageTowerView
from vipbench.harness.runs.inputs import load_inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.system.devices import each_to_host

pytestmark = GPU


@pytest.mark.parametrize("name", [name for name in method_names() if method_class(name).trains])
def test_a_training_step_seldom_waits(
    base_config: dict[str, Any], tmp_path: Path, name: str, record_property: Any
) -> None:
    """Counted by CUDA's own warnings; an epoch of six steps waits for the loss that is logged at its end."""
    settings = ["run.device=cuda", "train.batch_size=3", "train.epochs=2", "train.select=last", "run.log_every=100"]
    config = small_config(base_config, name, tmp_path, *settings)
    topology = Topology("cuda", "fp32")
    try:
        training = Job(config, load_inputs(config, topology), topology, None).training
        assert training is not None
        with synchronisations() as waits:
            steps = train_counting(training, waits)
    finally:
        topology.close()
    record_property("waits", dict(waits))
    looks_at_batches = method_class(name).statistics is not Method.statistics
    assert waits.total() <= 1 + steps * looks_at_batches, waits


def test_waits_are_counted() -> None:
    there = torch.ones(3, device="cuda")
    with synchronisations() as waits:
        assert not waits
        float(there[0])
        there.nonzero()
    assert waits.total() >= 2
    assert all(place.startswith("tests/gpu/test_waits_and_memory.py") for place in waits)


def test_copies_to_the_host_are_whole() -> None:
    """Each is read while the next one is still being computed."""
    numbers = torch.Generator("cuda").manual_seed(0)
    wanted = [torch.randn(1024, 1024, device="cuda", generator=numbers) for _ in range(8)]

    def slow(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            torch.mm(x, x)
        return x * 2

    for number, found in enumerate(each_to_host(slow(x) for x in wanted)):
        assert torch.equal(found, (wanted[number] * 2).cpu())


def test_cocoop_with_batch_32_and_100_classes_fits(record_property: Any) -> None:
    backbone = load_backbone(BackboneConfig(name="ViT-B-16"), "cuda")
    cls = method_class("cocoop")
    method = cls(cls.Config(name="cocoop"), Task([f"finding number {index}" for index in range(100)]), backbone).cuda()
    inputs = F.normalize(torch.randn(32, backbone.dim, device="cuda"), dim=-1)

    def passes() -> None:
        labels = torch.zeros(32, dtype=torch.long, device="cuda")
        with torch.autocast("cuda", torch.float16):
            loss = method.losses(method(inputs), labels)["cross_entropy"].mean()
        loss.backward()

    peak = _peak_gib(passes)
    record_property("peak_gib", peak)
    assert peak < 8


def test_training_inside_the_image_tower_fits(record_property: Any) -> None:
    """Gradients reach the pixels through the view that methods train with, which takes no more than the tower itself."""
    backbone = load_backbone(BackboneConfig(name="ViT-B-16"), "cuda")
    pixels = torch.randn(32, 3, 224, 224, device="cuda", requires_grad=True)

    def passes(tower: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast("cuda", torch.float16):
                loss = tower(pixels).float().square().sum()
            loss.backward()

        return run

    plain, viewed = _peak_gib(passes(backbone.image)), _peak_gib(passes(ImageTowerView(backbone.image)))
    record_property("peak_gib", {"plain": plain, "view": viewed})
    assert viewed < 1.1 * plain < 16


def _peak_gib(call: Callable[[], None]) -> float:
    peak = peak_mib(call)
    assert peak is not None
    return peak / 1024
