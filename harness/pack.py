"""Several runs trained together in one process: each step takes all their prompts through the text tower in one pass.

    python harness/pack.py A.yaml B.yaml ...        (what `vipbench sweep run --pack` starts)

The runs differ in seed, shots or learning rate and share data, backbone and method. A step of prompt learning is a handful of
prompts, which leaves a GPU idle; those of many runs fill it. Each run keeps its own batches, optimiser, selection and run
directory, and ends as it would alone. One that fails does so alone.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # started as a file: our modules are harness.config and so on, not config

if __name__ == "__main__":
    from harness.console import interruptions_from_here_on

    interruptions_from_here_on()

import torch
import typer
from greenlet import getcurrent, greenlet
from torch import Tensor

from harness.backbone import TextTower
from harness.checkpoint import Checkpoints
from harness.config import Config, run_name
from harness.console import end_with_runner, setup_logging, user_errors
from harness.engines import read_state, write_state
from harness.errors import UserError
from harness.files import disk_errors
from harness.progress import Progress
from harness.prompts import Prompts
from harness.results import is_finished, new_run
from harness.run import Job, load_inputs
from harness.topology import Topology
from harness.train import Trained, Training

log = logging.getLogger("harness.pack")


def compute_together(tower: TextTower, computations: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """The results of computations that ask a text tower for features: it answers all that ask at a time in one pass.

    Each computation is a greenlet, which is put aside where it calls the tower and goes on with its own part of the answer;
    so a method need not know of the others.
    """
    here = getcurrent()
    tasks = [greenlet(computation, here) for computation in computations]
    tower.elsewhere = here.switch
    try:
        results = [task.switch() for task in tasks]
        while asking := [place for place, task in enumerate(tasks) if not task.dead]:
            features = tower.compute(Prompts.concatenate([results[place] for place in asking]))
            parts = features.split([len(results[place]) for place in asking])
            for place, part in zip(asking, parts, strict=True):
                results[place] = tasks[place].switch(part)
        return results
    finally:
        tower.elsewhere = None


def fit_together(
    trainings: Sequence[Training], checkpoints: Sequence[Checkpoints], tower: TextTower, topology: Topology
) -> list[Trained | UserError]:
    """Train methods in place, side by side; for each the kept epoch, or why it failed. The first steps of all come first.

    Each goes on from its own newest checkpoint. Raises SystemExit where a signal asked for an end, and all are saved.
    """
    outcomes: dict[int, Trained | UserError] = {}
    for training, own in zip(trainings, checkpoints, strict=True):
        write_state(training.optimizer, training.loss.trainable(), own.resume(training))
    rhythm = checkpoints[0].rhythm
    streams = [training.batches() for training in trainings]
    steps = sum(training.steps - training.step for training in trainings)
    with Progress("train together", steps, "steps") as progress, rhythm.listening():
        while len(outcomes) < len(trainings):
            batches = {
                place: batch
                for place, stream in enumerate(streams)
                if place not in outcomes and (batch := next(stream, None)) is not None
            }
            for place in set(range(len(trainings))) - set(batches) - set(outcomes):
                outcomes[place] = trainings[place].finish()
            if not batches:
                continue
            with topology.autocast():
                computations = [
                    partial(trainings[place].loss, batch.inputs, batch.labels, batch.weights)
                    for place, batch in batches.items()
                ]
                losses = compute_together(tower, computations)
            torch.stack(losses).sum().backward()
            save = rhythm.due(ended=any(trainings[place].step + 1 == trainings[place].steps for place in batches))
            for place, loss in zip(batches, losses, strict=True):
                try:
                    _step(trainings[place], loss.detach(), checkpoints[place] if save else None)
                except UserError as error:
                    outcomes[place] = error
            rhythm.end_if_asked()
            progress.advance(len(batches), note=f"{len(batches)} runs")
    return [outcomes[place] for place in range(len(trainings))]


def _step(training: Training, loss: Tensor, save_to: Checkpoints | None) -> None:
    if training.train.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(training.method.trainable().values(), training.train.max_grad_norm)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.advance(loss)
    if save_to:
        save_to.save(training, read_state(training.optimizer, training.loss.trainable()))


def execute_together(configs: Sequence[Config]) -> dict[Path, str]:
    """Run configs that `sweeps.packing` would group; returns why runs failed, by run directory.

    What is finished is not run again. Raises UserError for what stops all of them.
    """
    topology = Topology(configs[0].run.device, configs[0].precision)
    try:
        if topology.world > 1:
            raise UserError("runs are packed in one process; start harness/pack.py with python, not with a launcher")
        setup_logging()
        inputs = load_inputs(configs[0], topology)
        finals = {config.run.out / run_name(config, inputs.digests): config for config in configs}
        with ExitStack() as everything, disk_errors(configs[0].run.out):
            opened: list[_Opened] = []
            for final, config in finals.items():
                if not is_finished(final):
                    stack = everything.enter_context(ExitStack())
                    job = Job(config, inputs, topology, stack.enter_context(new_run(final)))
                    opened.append(_Opened(final, job, stack))
            trainings = [run.job.training for run in opened if run.job.training]
            assert len(trainings) == len(opened), "methods that train nothing are not packed"
            checkpoints = [run.job.checkpoints for run in opened]
            kept = fit_together(trainings, checkpoints, inputs.backbone.text, topology) if opened else []
            for run, outcome in zip(opened, kept, strict=True):
                run.end(outcome)
        return {run.final: run.error for run in opened if run.error}
    finally:
        topology.close()


class _Opened:
    """A run directory being written, which can fail without the others."""

    def __init__(self, final: Path, job: Job, stack: ExitStack) -> None:
        self.final, self.job, self.stack, self.error = final, job, stack, ""

    def end(self, outcome: Trained | UserError) -> None:
        """Test what was trained and finish the directory, or leave it as a failed one."""
        try:
            if isinstance(outcome, UserError):
                raise outcome
            self.job.test(outcome)
        except UserError as error:
            self.error = str(error)
            self.stack.__exit__(type(error), error, error.__traceback__)
            log.error("error: %s: %s", self.final.name, error)
        else:
            self.stack.close()
            log.info("%s", self.final)


def main(configs: Annotated[list[Path], typer.Argument(help="configs of one group, in YAML")]) -> None:
    """Run configs together."""
    end_with_runner()
    with user_errors():
        failures = execute_together([Config.load(path) for path in configs])
        if failures:
            raise UserError(f"{len(failures)} of {len(configs)} runs failed: {next(iter(failures.values()))}")


if __name__ == "__main__":
    typer.run(main)
