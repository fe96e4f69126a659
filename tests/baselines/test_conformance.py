"""Conformance of every method, for each one that is registered: a new one is tested by being there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests.zoo import run_unwritten, small_config
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.runs.data import RunData
from vipbench.harness.runs.directory import read_prompts
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.inputs import Inputs, build_method, load_inputs
from vipbench.harness.runs.packed import execute_together
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.runs.transfer import evaluate_run
from vipbench.harness.training.loop import Training

METHODS = method_names()
TRAINED = [name for name in METHODS if method_class(name).trains]


def logits(run: Path) -> np.ndarray:
    return np.stack(pd.read_parquet(run / "predictions.parquet")["logits"].to_list())


def assert_close(run: Path, reference: Path, within: float = 1e-5) -> None:
    """Compare what was learned, and logits, within a distance."""
    assert run.name == reference.name, "how a run is executed is not in its identity"
    assert np.abs(logits(run) - logits(reference)).max() <= 10 * within
    if (reference / "prompts.safetensors").exists():
        learned, expected = (load_file(path / "prompts.safetensors") for path in (run, reference))
        assert learned.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (learned[name] - tensor).abs().max() <= within, name


@pytest.fixture(scope="module")
def base(base_config: dict[str, Any], model_folder: Path) -> dict[str, Any]:
    """One backbone, images in batches that 21 test images do not fill; `train` says no more than it must."""
    return {**base_config, "backbone": {"name": str(model_folder / "vit.json")}, "train": {}}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def runs(base: dict[str, Any], out: Path) -> dict[str, Path]:
    """Each method's run on a backbone of its own, by name."""
    return {name: execute(small_config(base, name, out)) for name in METHODS}


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    topology = Topology("cpu", "fp32")
    yield topology
    topology.close()


@pytest.fixture(scope="module")
def shared(base: dict[str, Any], out: Path, topology: Topology) -> Inputs:
    """Dataset, task and backbone, which all methods use one after the other."""
    return load_inputs(small_config(base, "vip", out), topology)


@pytest.mark.parametrize("name", METHODS)
def test_one_after_the_other_is_as_alone(
    base: dict[str, Any], out: Path, runs: dict[str, Path], topology: Topology, shared: Inputs, name: str
) -> None:
    """No bit differs, and the backbone that they share stays as it was; gradients reach what is learned and nothing else."""
    frozen = {key: value.clone() for key, value in shared.backbone.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in shared.backbone.named_parameters()}
    outcome = run_unwritten(small_config(base, name, out), topology, shared)
    assert outcome.logits.shape == (21, 3) and np.isfinite(outcome.logits).all()
    assert (outcome.logits == logits(runs[name])).all()
    state = shared.backbone.state_dict()
    assert state.keys() == frozen.keys() and all(torch.equal(state[key], value) for key, value in frozen.items())
    assert not any(flags.values())
    for key, parameter in shared.backbone.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, key
    trainable = outcome.method.trainable()
    assert bool(trainable) == method_class(name).trains
    assert not [key for key in trainable if key.startswith("backbone.")]
    assert trainable.keys() <= outcome.learned.keys()


@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_every_parameter(
    base: dict[str, Any], out: Path, runs: dict[str, Path], topology: Topology, shared: Inputs, name: str
) -> None:
    config = small_config(base, name, out)
    method = build_method(config, shared.task, shared.backbone)
    data = RunData(config, shared, topology, type(method))
    if data.support_views:
        method.prepare(*data.support())
    learned = read_prompts(runs[name])
    for key, parameter in method.trainable().items():
        assert not torch.equal(learned[key], parameter), key


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_all_that_predicts(
    base: dict[str, Any], out: Path, runs: dict[str, Path], topology: Topology, shared: Inputs, name: str
) -> None:
    """A fresh instance with what was saved gives the same bits, without the training images."""
    config = small_config(base, name, out, "seed=9")  # another start
    method = build_method(config, shared.task, shared.backbone)
    method.load_learned(read_prompts(runs[name]))
    predictions = RunData(config, shared, topology, type(method)).test_set().predict(method)
    assert (predictions.logits == logits(runs[name])).all()


@pytest.mark.parametrize("name", METHODS)
def test_evaluate_scores_what_was_saved(runs: dict[str, Path], dataset: Path, name: str) -> None:
    scored = evaluate_run(runs[name], dataset, "test", None, "cpu")
    assert np.abs(logits(scored) - logits(runs[name])).max() <= 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_what_belongs_to_no_class_serves_other_classes(
    base: dict[str, Any], out: Path, runs: dict[str, Path], shared: Inputs, name: str
) -> None:
    symptoms = [["a jagged border"], ["round", "small"]]
    task, backbone = Task(["wart", "cyst"], symptoms, (symptoms,)), shared.backbone
    method, learned = build_method(small_config(base, name, out), task, backbone), read_prompts(runs[name])
    if method.per_class:
        with pytest.raises(UserError, match="they must agree"):
            method.load_learned(learned)
        return
    method.load_learned(learned)
    shape = backbone.pixels_shape if method.needs == "images" else (backbone.dim,)
    with torch.no_grad():
        logits = method(torch.randn(4, *shape)).logits
    assert logits.shape == (4, 2) and logits.isfinite().all()


@pytest.mark.parametrize("name", TRAINED)
def test_micro_batches_are_as_whole_ones(
    base: dict[str, Any], tmp_path: Path, runs: dict[str, Path], name: str
) -> None:
    assert_close(execute(small_config(base, name, tmp_path, "run.micro_batch=2")), runs[name])


@pytest.mark.parametrize("name", TRAINED)
def test_resumed_is_as_whole(
    base: dict[str, Any], tmp_path: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, advance = small_config(base, name, tmp_path, "run.checkpoint_steps=2"), Training.advance

    def dying(training: Training, loss: torch.Tensor) -> None:
        if training.step == 3:
            raise KeyboardInterrupt
        advance(training, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", dying)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    resumed = execute(config)
    assert '"resumed_after_step": 2' in (resumed / "provenance.json").read_text()
    assert_close(resumed, runs[name], within=0)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_is_refused(base: dict[str, Any], out: Path, name: str) -> None:
    config = small_config(base, name, out).to_mapping()
    with pytest.raises(UserError) as refused:
        resolve_config({**config, "method": {**config["method"], "no_such_option": 1}})
    assert str(refused.value).startswith("config: method.no_such_option: unknown key; ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", METHODS)
def test_packed_is_as_alone_or_refused(base: dict[str, Any], tmp_path: Path, runs: dict[str, Path], name: str) -> None:
    together = [small_config(base, name, tmp_path, *options) for options in ([], ["seed=2"])]
    if reason := method_class(name).not_packed(together[0].method):
        with pytest.raises(UserError) as refused:
            execute_together(together)
        assert reason in str(refused.value) and "\n" not in str(refused.value)
        return
    assert execute_together(together) == {}
    assert_close(tmp_path / runs[name].name, runs[name])


NAMED_BY = {
    "harness/methods/vip.py": {"vip"},
    # `vipbench symptoms controls` is an experiment with these.
    "sweeps/controls.py": {"vip", "zero_shot", "waffle"},
    "harness/report/controls.py": {"vip", "zero_shot"},
}


def test_a_method_is_one_small_file() -> None:
    """At most 150 lines, and no other file of the program names it, so that it has a special case nowhere."""
    root = Path(__file__).parents[2]
    for path in root.glob("baselines/*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 150, path
    others = [path for folder in ("harness", "sweeps") for path in root.glob(f"{folder}/**/*.py")]
    assert len(others) > 100
    for path in others:
        named = {name for name in METHODS if re.search(rf"""["']{name}["']""", path.read_text("utf-8"))}
        assert named <= NAMED_BY.get(path.relative_to(root).as_posix(), set()), path
