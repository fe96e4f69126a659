"""Short runs of every registered method: what a test needs to put any of them through the same things."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.distributed.engines.zero import gathered_parameters
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import method_class
from vipbench.harness.runs.inputs import Inputs, load_inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.devices import to_host
from vipbench.harness.training.checkpoint import Checkpoints
from vipbench.harness.training.loop import fit

# Options with which small towers and few texts show what a method does.
SMALL: dict[str, dict[str, Any]] = {
    # Features of random towers lie so close together that their last bits are seen in its logits.
    "gda": {"alpha": 0.001},
    # A choice by validation accuracy, a step function, may fall otherwise for features rounded otherwise: it is made here.
    "linear_probe": {"c": 1.0},
    "biomedcoop": {"tau": 0.8},  # of three prompts more than 1.15 would keep all
    "maple": {"depth": 2},
    "promptsrc": {"depth": 2},
    "vpt": {"depth": 2},
}
# Adam divides gradients by their size; with its own eps of 1e-8 those that are nearly rounding errors would move values as far.
# With 1e-4 two threads, whose products of matrices add up in another order, moved one by 1.15e-5.
RECIPES: dict[str, dict[str, Any]] = {"clip_svd": {"eps": 1e-3}}


def backbone_of(base: dict[str, Any], name: str) -> str:
    """The backbone of a base config, or the ViT beside it for a method that changes an image tower of blocks."""
    own = Path(base["backbone"]["name"])
    return str(own.with_name("vit.json") if method_class(name).needs == "images" else own)


def small_config(base: dict[str, Any], name: str, out: Path, *overrides: str) -> Config:
    """A run of a second: two epochs of a method's own recipe, but for a rate at which something happens."""
    content = override(base, [f"backbone={backbone_of(base, name)}", f"run.out={out}", "run.log_every=1", *overrides])
    content["method"] = {"name": name, **SMALL.get(name, {})}
    if method_class(name).trains:
        content["train"] = {"epochs": 2, "steps": None, "warmup_epochs": 0, "lr": 0.01, "batch_size": 5} | content[
            "train"
        ]
        content["train"] |= RECIPES.get(name, {})
    else:
        content.pop("train")
    return resolve_config(content)


@dataclass(frozen=True)
class Outcome:
    """A run that wrote nothing: the method as it ended, what it learned, and its logits [N, C] on the test split."""

    method: Method
    learned: dict[str, Tensor]
    logits: np.ndarray


def run_unwritten(config: Config, topology: Topology, inputs: Inputs | None = None) -> Outcome:
    """Train and test as `vipbench.harness.runs.execute.execute` does, without a run directory; all ranks call it together."""
    job = Job(config, inputs or load_inputs(config, topology), topology, None)
    checkpoints = Checkpoints(None, topology, config.run)
    run = config.run
    job.test(fit(job.training, checkpoints, run.micro_batch, run.cuda_graph) if job.training else None)
    predictions = job.data.test_set().predict(job.method)
    with gathered_parameters(job.method.trainable().values()):
        learned = {name: to_host(tensor).clone() for name, tensor in job.method.learned().items()}
    return Outcome(job.method, learned, predictions.logits)
