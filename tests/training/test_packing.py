"""Runs trained together end as they would alone, in the same directories, and fail alone."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vipbench.baselines.coop import CoOp
from vipbench.harness.config.identity import run_name
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods import registry
from vipbench.harness.methods.base import Output, cosine_logits
from vipbench.harness.models.prompts import PromptBatch, Prompts
from vipbench.harness.models.text_tower import TextTower
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.data import training_samples
from vipbench.harness.runs.directory import STEPS, failure, is_finished, new_run
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.inputs import load_inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.packed import execute_together
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_json
from vipbench.harness.system.signals import Stopped
from vipbench.harness.training.loop import WeightedLoss
from vipbench.harness.training.packing import RandomStream, compute_together
from vipbench.sweeps.packing import MOST, group

VARIANTS = [
    ["seed=1", "data.shots=2"],
    ["seed=2", "data.shots=2", "train.epochs=5"],
    ["seed=1", "data.shots=4", "train.lr=0.01"],
    ["seed=3", "data.shots=all", "train.batch_size=7"],
]


def configs(base: dict[str, Any], out: Path, *overrides: str) -> list[Config]:
    return [resolve_config(override(base, [f"run.out={out}", *overrides, *variant])) for variant in VARIANTS]


@pytest.mark.parametrize("options", [["method=vip"], ["method=coop", "train.select=best"], ["method=cocoop"]])
@pytest.mark.parametrize("kind", ["resnet", "bert"])
@pytest.mark.slow
def test_together_is_as_alone(
    base_config: dict[str, Any], model_folder: Path, tmp_path: Path, options: list[str], kind: str
) -> None:
    overrides = [*options, f"backbone={model_folder / kind}.json", "train.max_grad_norm=1.0"]
    assert execute_together(configs(base_config, tmp_path / "together", *overrides)) == {}
    for config in configs(base_config, tmp_path / "alone", *overrides):
        alone = execute(config)
        together = tmp_path / "together" / alone.name
        first, second = (load_file(path / "prompts.safetensors") for path in (alone, together))
        assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)
        logits = [
            np.stack(pd.read_parquet(path / "predictions.parquet")["logits"].to_list()) for path in (alone, together)
        ]
        assert np.abs(logits[0] - logits[1]).max() < 1e-3
        assert read_json(alone / "metrics.json")["accuracy"] == read_json(together / "metrics.json")["accuracy"]


def test_a_step_is_one_pass_of_the_text_tower(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    compute = TextTower.compute

    def counted(self: TextTower, prompts: Prompts) -> torch.Tensor:
        if torch.is_grad_enabled():
            passes.append(len(prompts))
        return compute(self, prompts)

    monkeypatch.setattr(TextTower, "compute", counted)
    same = [f"seed={seed}" for seed in (1, 2, 3)]
    runs = [resolve_config(override(base_config, [f"run.out={tmp_path}", "method=coop", seed])) for seed in same]
    assert execute_together(runs) == {}
    assert passes == [3 * 3] * (3 * 3), "three runs of three classes in each of three epochs of three steps"


def test_one_that_fails_fails_alone_and_says_why(base_config: dict[str, Any], tmp_path: Path) -> None:
    good, bad = (
        resolve_config(override(base_config, [f"run.out={tmp_path}", "method=coop", f"train.lr={rate}"]))
        for rate in (0.01, 1e30)
    )
    ((path, reason),) = execute_together([good, bad]).items()
    assert "the loss is" in reason
    assert failure(path) == reason
    assert not path.exists()
    (finished,) = (
        entry for entry in tmp_path.iterdir() if not entry.name.startswith(".") and entry.name[-8:] != ".partial"
    )
    assert read_json(finished / "metrics.json")["samples"] == 21
    assert list(execute_together([good, bad])) == [path], "what is finished is not run again"


def test_runs_without_a_training_loop_share_a_process(base_config: dict[str, Any], tmp_path: Path) -> None:
    """Each is the run that it would be alone, to the last bit, and one that fails fails alone."""
    own = (["seed=1"], ["data.shots=1000"], ["seed=2", "data.shots=3"])

    def runs(out: str) -> list[Config]:
        base = {**base_config, "method": "tip_adapter"}
        del base["train"]
        return [resolve_config(override(base, [f"run.out={tmp_path / out}", *options])) for options in own]

    first, failing, last = runs("together")
    ((path, reason),) = execute_together([first, failing, last]).items()
    assert "1000 shots" in reason and failure(path) == reason
    for config in (runs("alone")[0], runs("alone")[2]):
        alone = execute(config)
        together = tmp_path / "together" / alone.name
        for name in ("prompts.safetensors", "predictions.parquet", "metrics.json"):
            assert (alone / name).read_bytes() == (together / name).read_bytes(), name


def test_a_signal_ends_runs_without_a_training_loop_between_two(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {**base_config, "method": "ss_text"}
    del base["train"]
    runs = [resolve_config(override(base, [f"run.out={tmp_path}", f"seed={seed}"])) for seed in (1, 2)]
    test = Job.test

    def signalled(job: Job, *arguments: Any) -> None:
        test(job, *arguments)
        job.topology.signals.received.append(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "test", signalled)
        with pytest.raises(Stopped):
            execute_together(runs)
    assert sorted(is_finished(path) for path in tmp_path.glob("ss_text_*")) == [False, True]
    assert execute_together(runs) == {}
    assert sorted(is_finished(path) for path in tmp_path.glob("ss_text_*")) == [True, True]


class Noisy(CoOp):
    """A method that draws random numbers before it asks the text tower and after."""

    def forward(self, inputs: Tensor) -> Output:
        if not self.training:
            return super().forward(inputs)
        inputs = F.dropout(inputs, 0.3)
        features = F.normalize(F.dropout(self.backbone.text(self.prompts.fill(self.context)), 0.3), dim=-1)
        return Output(cosine_logits(self.backbone.logit_scale, inputs, features) + torch.randn(3))


@pytest.mark.parametrize("micro_batch", ["null", "2"])
def test_a_method_that_draws_draws_what_it_draws_alone(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: str
) -> None:
    monkeypatch.setitem(registry._methods, "coop", Noisy)
    options = ["method=coop", f"run.micro_batch={micro_batch}", "run.log_every=1"]
    assert execute_together(configs(base_config, tmp_path / "together", *options)[:2]) == {}
    for config in configs(base_config, tmp_path / "alone", *options)[:2]:
        alone = execute(config)
        together = tmp_path / "together" / alone.name
        first, second = (load_file(path / "prompts.safetensors") for path in (alone, together))
        assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)
        losses = [[json.loads(line)["loss"] for line in (path / STEPS).open()] for path in (alone, together)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_each_computation_has_a_random_stream_of_its_own(vit_backbone: Any) -> None:
    tower = vit_backbone.text
    prompts = PromptBatch(tower, [tower.tokenize("nevus")], ["a prompt"])

    def draw() -> Tensor:
        before = torch.rand(1)
        tower(prompts.fill(torch.zeros(1, 0, tower.width)))
        return torch.cat([before, torch.rand(2)])

    def stream(seed: int) -> RandomStream:
        torch.manual_seed(seed)
        return RandomStream()

    alone = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        alone.append(torch.rand(6))
    streams = [stream(1), stream(2)]
    parts = [compute_together(tower, [draw, draw], streams) for _ in range(2)]
    for place in range(2):
        drawn = torch.cat([parts[0][place], parts[1][place]])
        expected = torch.cat([alone[place][:1], alone[place][1:3], alone[place][3:]])
        assert torch.equal(drawn, expected)


def test_micro_batches_are_those_of_a_run_alone(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = WeightedLoss.forward

    def counted(self: WeightedLoss, inputs: Tensor, labels: Tensor, *others: Tensor) -> Tensor:
        sizes.append(len(labels))
        return forward(self, inputs, labels, *others)

    monkeypatch.setattr(WeightedLoss, "forward", counted)
    options = ["method=coop", "train.epochs=2", "run.micro_batch=2"]
    runs = [
        resolve_config(override(base_config, [f"run.out={tmp_path}", *options, *own]))
        for own in (["seed=1", "train.batch_size=5"], ["seed=2", "train.batch_size=9"])
    ]
    assert execute_together(runs) == {}
    both = [2, 2, 2, 2, 1, 2, 2, 1]  # a step on 5 images as 2 + 2 + 1, and one on 9, which take turns
    assert runs[0].train and runs[0].train.epochs
    epochs = runs[0].train.epochs  # of three steps of one run, and two of the other
    assert sizes == [*(2 * epochs * both), *(epochs * [2, 2, 1])]


@pytest.mark.parametrize("method", ["prograd", "biomedcoop"])
def test_gradients_are_combined_and_batches_looked_at_for_each_run(
    base_config: dict[str, Any], tmp_path: Path, method: str
) -> None:
    """Train as alone, with micro batches of which one run has more than the other."""
    base = {**base_config, "train": {"epochs": 2, "warmup_epochs": 0, "lr": 0.05}}
    own = (["seed=1", "train.batch_size=5"], ["seed=2", "train.batch_size=9"])

    def runs(out: str) -> list[Config]:
        options = [f"run.out={tmp_path / out}", f"method={method}", "run.micro_batch=2", "run.log_every=1"]
        return [resolve_config(override(base, [*options, *others])) for others in own]

    assert execute_together(runs("together")) == {}
    for config in runs("alone"):
        alone = execute(config)
        together = tmp_path / "together" / alone.name
        first, second = (load_file(path / "prompts.safetensors") for path in (alone, together))
        assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)
        losses = [[json.loads(line)["loss"] for line in (path / STEPS).open()] for path in (alone, together)]
        assert len(losses[0]) >= 4 and losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_packed_runs_leave_logs_and_tracking_of_their_own(base_config: dict[str, Any], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ["method=coop", "run.tracking=[tensorboard]"]
    assert execute_together(configs(base_config, tmp_path / "together", *options)[:2]) == {}
    for config in configs(base_config, tmp_path / "alone", *options)[:2]:
        alone = execute(config)
        together = tmp_path / "together" / alone.name
        assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
        log = (together / "logs" / "rank-0.log").read_text()
        accuracy = read_json(together / "metrics.json")["accuracy"]
        assert re.findall(r"test:? accuracy (\d\.\d+)", log) == [f"{accuracy:.4f}"], "its own result and no other run's"
        assert "train together" in log, "what they share"
        curves = []
        for path in (alone, together):
            events = accumulator.EventAccumulator(str(path / "tracking")).Reload()
            curves.append({name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]})
        assert curves[0] == curves[1]
        assert "test/accuracy" in curves[0]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_trackers_of_one_run_per_process_are_not_packed(
    base_config: dict[str, Any], tmp_path: Path, tracker: str
) -> None:
    runs = configs(base_config, tmp_path, "method=coop", f"run.tracking=[{tracker}]")
    with pytest.raises(UserError, match=f"{tracker} follows one run per process; run these without --pack"):
        execute_together(runs)
    assert group({str(place): run for place, run in enumerate(runs)}) == [["0"], ["1"], ["2"], ["3"]]


def test_a_run_that_cannot_start_does_not_stop_the_others(base_config: dict[str, Any], tmp_path: Path) -> None:
    """More shots than a class has images."""
    runs = [
        resolve_config(override(base_config, [f"run.out={tmp_path}", "method=coop", f"data.shots={shots}"]))
        for shots in (16, 1, 4)
    ]
    for _ in range(2):
        ((path, reason),) = execute_together(runs).items()
        assert "fewer than the 16 shots asked for" in reason
        assert failure(path) == reason
        assert len(read_runs(tmp_path)) == 2
    log = (path.with_name(path.name + ".partial") / "logs" / "rank-0.log").read_text()
    assert f"error: {path.name}: {reason}" in log


def test_a_run_that_another_process_works_on_does_not_stop_the_others(
    base_config: dict[str, Any], tmp_path: Path
) -> None:
    runs = configs(base_config, tmp_path, "method=coop")[:2]
    name = run_name(runs[1], load_inputs(runs[1], Topology("cpu", "fp32")).digests)
    with new_run(tmp_path / name):
        ((path, reason),) = execute_together(runs).items()
    assert path.name == name
    assert "another process is working on this run" in reason
    assert len(read_runs(tmp_path)) == 1


def test_an_image_that_is_damaged_eot_only_the_run_that_reads_it(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = configs(base_config, tmp_path, "method=coop", "run.bank=false")[:2]
    drawn = [set(training_samples(run, Dataset(run.data.path))[0].keys) for run in runs]
    bad = min(drawn[0] - drawn[1])
    image = Samples.image_bytes

    def damaged(self: Samples, position: int) -> bytes:
        return b"\x89PNG\r\n\x1a\nno image" if self.key(position) == bad else image(self, position)

    monkeypatch.setattr(Samples, "image_bytes", damaged)
    ((path, reason),) = execute_together(runs).items()
    assert f"sample '{bad}'" in reason
    assert failure(path) == reason
    assert len(read_runs(tmp_path)) == 1


def test_an_error_in_one_computation_leaves_the_tower_as_it_was(vit_backbone: Any) -> None:
    def broken() -> torch.Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        compute_together(vit_backbone.text, [broken], [RandomStream()])
    assert vit_backbone.text.forward_override is None


def test_groups_are_runs_that_differ_in_seed_shots_or_rate(base_config: dict[str, Any]) -> None:
    def config(*overrides: str) -> Config:
        return resolve_config(override(base_config, list(overrides)))

    runs = {
        "a": config("seed=1"),
        "b": config("method=coop"),
        "c": config("seed=2", "data.shots=1", "train.lr=0.1"),
        "zero": config("method=zero_shot"),
        "other": config("method.merge=mean"),
        "d": config("method=coop", "data.shots=4"),
    }
    assert group(runs) == [["a", "c"], ["b", "d"], ["zero"], ["other"]]
    assert group(runs, pack=False) == [[name] for name in runs]
    many = {str(seed): config(f"seed={seed}") for seed in range(MOST + 1)}
    assert [len(names) for names in group(many)] == [MOST, 1]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("data.path=elsewhere", "data.path"),
        ("method.context_length=3", "method.context_length"),
        ("method=coop", "method.merge"),
        ("run.out=elsewhere", "run.out"),
    ],
)
def test_runs_on_other_inputs_are_refused(
    base_config: dict[str, Any], tmp_path: Path, change: str, differs: str
) -> None:
    """Else they would be trained on the inputs of the first."""
    base = override(base_config, [f"run.out={tmp_path}"])
    runs = [resolve_config(override(base, own)) for own in (["seed=1"], ["seed=2", change])]
    with pytest.raises(UserError, match=r"not the same in all configs; .*; run the others apart") as caught:
        execute_together(runs)
    assert differs in str(caught.value).partition(": ")[0].split(", ")
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoRanks(Topology):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.world = 2

    monkeypatch.setattr("vipbench.harness.runs.packed.Topology", TwoRanks)
    with pytest.raises(UserError, match="in one process"):
        execute_together([resolve_config(base_config)])
