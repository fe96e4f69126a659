"""Packed runs: several runs trained together in one process (harness/training/packing.py).

The runs differ in seed, shots or learning rate and share data, backbone and method. Each run keeps its own batches, optimiser,
selection and run directory, and gives the same result as alone. A run that fails does not end the others. Runs of a method
without a training loop are done one after the other.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vipbench.harness.config.identity import run_name
from vipbench.harness.config.schema import Config
from vipbench.harness.distributed.engines.ddp import add_gradients
from vipbench.harness.distributed.engines.optimizer_state import read_state, write_state
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.text_tower import TextTower
from vipbench.harness.runs.directory import PARTIAL, is_finished, log_file
from vipbench.harness.runs.inputs import Inputs, load_inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.open import open_run
from vipbench.harness.runs.tracking import ONE_RUN_PER_PROCESS
from vipbench.harness.system.console import log_only_to, setup_logging
from vipbench.harness.system.files import disk_errors
from vipbench.harness.system.plain_values import flatten
from vipbench.harness.system.progress import Progress
from vipbench.harness.system.signals import Stopped
from vipbench.harness.training.batches import Batch
from vipbench.harness.training.loop import BestEpoch, Training
from vipbench.harness.training.packing import RandomStream, compute_together

log = logging.getLogger(__name__)

# Settings in which runs may differ that train together; all others decide what they share.
MAY_DIFFER: dict[str, Any] = {
    "seed": True,
    "data": {"shots", "split_seed"},
    "train": {"lr", "epochs", "select", "select_ties", "augmentation_seed", "batch_size"},
}


class PackedRun:
    """One of several runs in a process: its directory, log, training and outcome.

    Attributes:
        error: the reason of its failure, which does not stop the others; "" where there is none.
        stack: its open resources; closing it finishes the run's directory.
        batch, random: of the next step.
        best: the epoch kept, once the training has ended.
    """

    job: Job
    training: Training
    batches: Iterator[Batch]
    random: RandomStream

    def __init__(self, final: Path, config: Config) -> None:
        self.final, self.config, self.stack, self.error = final, config, ExitStack(), ""
        self.batch: Batch | None = None
        self.best: BestEpoch | None = None

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Confine a block to this run: messages go into its log only, and a UserError ends this run only."""
        log_path = log_file(self.final.with_name(self.final.name + PARTIAL), rank=0)
        with log_only_to(log_path):
            try:
                with disk_errors(self.final):
                    yield
            except UserError as error:
                self.error = str(error)
                log.error("error: %s: %s", self.final.name, error)
                self.stack.__exit__(type(error), error, error.__traceback__)  # records it in the run's directory

    def start(self, inputs: Inputs, topology: Topology) -> None:
        """Open the directory and resume the training from its newest checkpoint; without a training loop, finish the run."""
        directory = self.stack.enter_context(open_run(self.config, self.final, topology))
        self.job = Job(self.config, inputs, topology, directory)
        if self.job.training is None:
            self.finish()
            return
        self.job.provenance.add(packed=True)  # shared passes round differently, by about 1e-6
        self.training = self.job.training
        state = self.job.checkpoints.resume(self.training)
        write_state(self.training.optimizer, self.training.loss.trainable(), state)
        self.batches = self.training.batches()

    def prepare_step(self) -> None:
        """Get the next batch and a random stream for its step; after the last batch, finish the training."""
        self.batch = next(self.batches, None)
        self.random = RandomStream()
        if self.batch is None:
            self.training.meter.stop()
            self.best = self.training.finish()

    def parts(self) -> list[tuple[Tensor, ...]]:
        """Inputs of the loss for the batch, in parts."""
        if self.batch is None:
            return []
        with self.random:
            return self.training.parts(self.batch, self.config.run.micro_batch)

    def step(self, loss: Tensor) -> None:
        """Update the parameters with the accumulated gradients, and count the step."""
        training = self.training
        if training.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(training.method.trainable().values(), training.train.max_grad_norm)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        training.advance(loss)

    def save(self) -> None:
        self.job.checkpoints.save(self.training, read_state(self.training.optimizer, self.training.loss.trainable()))

    def finish(self) -> None:
        """Test the trained method; this completes the directory."""
        self.job.test(self.best)
        self.stack.close()
        log.info("%s", self.final)


def fit_together(runs: Sequence[PackedRun], tower: TextTower, topology: Topology) -> None:
    """Train started runs side by side, each from its own step on. A run that fails is left out from then on.

    Of each run the cost is that of all of them until it ended.

    Raises:
        Stopped: a signal asked for an end; checkpoints of all were written before.
    """

    def training() -> list[PackedRun]:
        return [run for run in runs if not run.error and run.best is None]

    for run in runs:
        run.job.runs_together = len(runs)
        run.training.meter.filling = lambda: sum(other.job.data.seconds_filling() for other in runs)
        run.training.meter.start()
    schedule = runs[0].job.checkpoints.schedule
    steps = sum(run.training.steps - run.training.step for run in runs)
    with Progress("train together", steps, "steps") as progress:
        try:
            while training():
                for run in training():
                    with run.isolated():
                        run.prepare_step()
                stepping = training()
                for run, loss in zip(stepping, backward_together(stepping, tower, topology), strict=True):
                    with run.isolated():
                        run.step(loss)
                progress.advance(len(stepping), note=f"{len(stepping)} runs")
                if stepping and schedule.due(ended=any(run.training.step == run.training.steps for run in stepping)):
                    _save(training())
        except Stopped:
            _save(training())
            raise


def _save(runs: Sequence[PackedRun]) -> None:
    for run in runs:
        with run.isolated():
            run.save()


def backward_together(runs: Sequence[PackedRun], tower: TextTower, topology: Topology) -> list[Tensor]:
    """Compute the gradients of the runs' batches, one micro batch of each run at a time; returns their losses (scalars)."""
    batches = [run.parts() for run in runs]
    losses: list[list[Tensor]] = [[] for _ in runs]
    combines = any(run.training.loss.combines for run in runs)  # all or none, since they share the method
    trained = [run.training.loss.trainable() for run in runs]
    sums: list[list[Tensor]] = []  # of each loss that is combined, the gradients of all parameters of all runs
    for index in range(max(map(len, batches), default=0)):
        places = [place for place, parts in enumerate(batches) if index < len(parts)]
        computations = [partial(runs[place].training.loss, *batches[place][index]) for place in places]
        with topology.autocast():
            found = compute_together(tower, computations, [runs[place].random for place in places])
        if combines:
            add_gradients(sums, torch.stack(found).sum(dim=0), [value for own in trained for value in own.values()])
        else:
            torch.stack(found).sum().backward()
        for place, loss in zip(places, found, strict=True):
            losses[place].append(loss.detach().sum())
    if combines:
        rest = [iter(gradients) for gradients in sums]
        for run, own in zip(runs, trained, strict=True):
            combined = run.training.loss.combine([{name: next(of_loss) for name in own} for of_loss in rest])
            for name, parameter in own.items():
                parameter.grad = combined[name]
    return [torch.stack(own).sum() for own in losses]


def not_packed(config: Config) -> str:
    """The reason why a run does not train together with others; "" where it may."""
    if reason := method_class(config.method.name).not_packed(config.method):
        return reason
    if config.run.cuda_graph:
        return "run.cuda_graph captures the steps of one run"
    if config.recipe == "tuned":
        return "its recipe is tuned, by training one candidate after the other"
    if config.precision == "fp16" and config.train:
        return "the loss scaling of fp16 belongs to one run"
    trackers = sorted(set(config.run.tracking) & set(ONE_RUN_PER_PROCESS))
    return f"{trackers[0]} follows one run per process" if trackers else ""


def shared_settings(config: Config) -> str:
    """The settings, as JSON, that runs which train together have in common."""
    return json.dumps(config.model_dump(mode="json", exclude=MAY_DIFFER))


def _differences(configs: Sequence[Config]) -> list[str]:
    """Dotted names of settings that differ between configs and may not."""
    settings = [flatten(json.loads(shared_settings(config))) for config in configs]
    names = dict.fromkeys(name for own in settings for name in own)
    return [name for name in names if any(own.get(name) != settings[0].get(name) for own in settings)]


def execute_together(configs: Sequence[Config]) -> dict[Path, str]:
    """Run configs that share all settings but MAY_DIFFER; returns the reasons of failures by run directory.

    Finished runs are skipped. Raises UserError for an error that concerns all of them, and Stopped as
    `vipbench.harness.runs.execute.execute` does.
    """
    if differences := _differences(configs):
        raise UserError(
            f"{', '.join(differences)}: not the same in all configs; runs train together that differ in seed, shots or "
            "learning rate; run the others apart"
        )
    if reason := not_packed(configs[0]):
        raise UserError(f"{configs[0].method.name}: {reason}; run these without --pack")
    topology = Topology(configs[0].run.device, configs[0].precision)
    try:
        if topology.world > 1:
            raise UserError("runs are packed in one process; start harness/pack.py with python, not with a launcher")
        setup_logging()
        with topology.signals.listening(), disk_errors(configs[0].run.out), ExitStack() as everything:
            inputs = load_inputs(configs[0], topology)
            topology.signals.stop_if_asked()
            finals = {config.run.out / run_name(config, inputs.digests): config for config in configs}
            runs = [PackedRun(final, config) for final, config in finals.items() if not is_finished(final)]
            for run in runs:
                everything.enter_context(run.stack)
                with run.isolated():
                    run.start(inputs, topology)
            started = [run for run in runs if run.config.train and not run.error]
            if started:
                fit_together(started, inputs.backbone.text, topology)
            for run in started:
                if not run.error:
                    with run.isolated():
                        run.finish()
        return {run.final: run.error for run in runs if run.error}
    finally:
        topology.close()
