"""Several runs trained together in one process: each step takes all their prompts through the text tower in one pass.

    python harness/pack.py A.yaml B.yaml ...        (what `vipbench sweep run --pack` starts)

The runs differ in seed, shots or learning rate and share data, backbone and method. A step of prompt learning is a handful of
prompts, which leaves a GPU idle; those of many runs fill it. Each run keeps its own batches, optimiser, selection and run
directory, and ends as it would alone. One that fails does so alone.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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
from harness.config import Config, run_name
from harness.console import end_with_runner, log_only_to, setup_logging, user_errors
from harness.engines import read_state, write_state
from harness.errors import UserError
from harness.features import Batch
from harness.files import disk_errors
from harness.progress import Progress
from harness.prompts import Prompts
from harness.results import PARTIAL, is_finished
from harness.run import Inputs, Job, load_inputs, log_file, open_run
from harness.signals import Stopped
from harness.topology import Topology
from harness.tracking import ONE_RUN_PER_PROCESS
from harness.train import Trained, Training

log = logging.getLogger("harness.pack")


class RandomStream:
    """Random numbers of torch for one run among several: what is drawn inside `with` goes on from what was drawn there last.

    It starts where the generators of this process are when it is made.
    """

    def __init__(self) -> None:
        self._save()

    def _save(self) -> None:
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def __enter__(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)

    def __exit__(self, *_: object) -> None:
        self._save()


def compute_together(
    tower: TextTower, computations: Sequence[Callable[[], Tensor]], streams: Sequence[RandomStream]
) -> list[Tensor]:
    """Results of computations that ask a text tower for features, which answers all that ask at a time in one pass.

    Each computation is a greenlet, which is put aside where it calls the tower and goes on with its own part of the answer;
    so a method need not know of the others. Each draws from its own one of `streams`.
    """
    here = getcurrent()
    tasks = [greenlet(computation, here) for computation in computations]

    def go_on(place: int, *answer: Tensor) -> Any:
        with streams[place]:
            return tasks[place].switch(*answer)

    tower.elsewhere = here.switch
    try:
        results = [go_on(place) for place in range(len(tasks))]
        while asking := [place for place, task in enumerate(tasks) if not task.dead]:
            features = tower.compute(Prompts.concatenate([results[place] for place in asking]))
            parts = features.split([len(results[place]) for place in asking])
            for place, part in zip(asking, parts, strict=True):
                results[place] = go_on(place, part)
        return results
    finally:
        tower.elsewhere = None


class PackedRun:
    """One run among several of a process: its directory, its log, its training, and how it ended.

    Attributes:
        error: why it failed, which does not stop the others; "" while it goes well.
        stack: what is open for it; closing it finishes the run's directory.
        batch, random: of the step that is next.
        kept: the epoch kept, once the training has ended.
    """

    job: Job
    training: Training
    batches: Iterator[Batch]
    random: RandomStream

    def __init__(self, final: Path, config: Config) -> None:
        self.final, self.config, self.stack, self.error = final, config, ExitStack(), ""
        self.batch: Batch | None = None
        self.kept: Trained | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Do what concerns this run alone: messages go into its log only, and an error of the user ends this run only."""
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
        """Open the directory, and bring the training to where its newest checkpoint was."""
        directory = self.stack.enter_context(open_run(self.config, self.final, topology))
        self.job = Job(self.config, inputs, topology, directory)
        assert self.job.training, "methods that train nothing are not packed"
        self.training = self.job.training
        state = self.job.checkpoints.resume(self.training)
        write_state(self.training.optimizer, self.training.loss.trainable(), state)
        self.batches = self.training.batches()

    def prepare_step(self) -> None:
        """Get the next batch, whose step draws from random numbers of its own; where there is none, end the training."""
        self.batch = next(self.batches, None)
        self.random = RandomStream()
        if self.batch is None:
            self.kept = self.training.finish()

    def step(self, loss: Tensor) -> None:
        """Update what is learned with the gradients that are there, and count the step."""
        training = self.training
        if training.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(training.method.trainable().values(), training.train.max_grad_norm)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        training.advance(loss)

    def save(self) -> None:
        self.job.checkpoints.save(self.training, read_state(self.training.optimizer, self.training.loss.trainable()))

    def finish(self) -> None:
        """Test what was trained; the directory is whole then."""
        assert self.kept
        self.job.test(self.kept)
        self.stack.close()


def fit_together(runs: Sequence[PackedRun], tower: TextTower, topology: Topology) -> None:
    """Train started runs in place, side by side, each from its own step on. Those that fail are left out from then on.

    Raises:
        Stopped: a signal asked for an end, and all are saved.
    """

    def training() -> list[PackedRun]:
        return [run for run in runs if not run.error and run.kept is None]

    rhythm = runs[0].job.checkpoints.rhythm
    steps = sum(run.training.steps - run.training.step for run in runs)
    with Progress("train together", steps, "steps") as progress:
        try:
            while training():
                for run in training():
                    with run.alone():
                        run.prepare_step()
                stepping = training()
                for run, loss in zip(stepping, backward_together(stepping, tower, topology), strict=True):
                    with run.alone():
                        run.step(loss)
                progress.advance(len(stepping), note=f"{len(stepping)} runs")
                if stepping and rhythm.due(ended=any(run.training.step == run.training.steps for run in stepping)):
                    _save(training())
        except Stopped:
            _save(training())
            raise


def _save(runs: Sequence[PackedRun]) -> None:
    for run in runs:
        with run.alone():
            run.save()


def backward_together(runs: Sequence[PackedRun], tower: TextTower, topology: Topology) -> list[Tensor]:
    """Add up the gradients of the runs' batches, one micro batch of each run at a time; returns their losses (scalars)."""
    batches = [run.batch.parts(run.config.run.micro_batch) if run.batch else [] for run in runs]
    losses: list[list[Tensor]] = [[] for _ in runs]
    for index in range(max(map(len, batches), default=0)):
        places = [place for place, parts in enumerate(batches) if index < len(parts)]
        computations = [partial(runs[place].training.loss, *batches[place][index]) for place in places]
        with topology.autocast():
            found = compute_together(tower, computations, [runs[place].random for place in places])
        torch.stack(found).sum().backward()
        for place, loss in zip(places, found, strict=True):
            losses[place].append(loss.detach())
    return [torch.stack(own).sum() for own in losses]


def execute_together(configs: Sequence[Config]) -> dict[Path, str]:
    """Run configs that `sweeps.packing` would group; returns why runs failed, by run directory.

    What is finished is not run again. Raises UserError for what stops all of them, and Stopped as `harness.run.execute` does.
    """
    if not_packed := sorted(set(configs[0].run.tracking) & set(ONE_RUN_PER_PROCESS)):
        raise UserError(f"run.tracking: {not_packed[0]} follows one run per process; run these without --pack")
    topology = Topology(configs[0].run.device, configs[0].precision)
    try:
        if topology.world > 1:
            raise UserError("runs are packed in one process; start harness/pack.py with python, not with a launcher")
        setup_logging()
        with topology.signals.listening(), disk_errors(configs[0].run.out), ExitStack() as everything:
            inputs = load_inputs(configs[0], topology)
            topology.signals.heed()
            finals = {config.run.out / run_name(config, inputs.digests): config for config in configs}
            runs = [PackedRun(final, config) for final, config in finals.items() if not is_finished(final)]
            for run in runs:
                everything.enter_context(run.stack)
                with run.alone():
                    run.start(inputs, topology)
            started = [run for run in runs if not run.error]
            if started:
                fit_together(started, inputs.backbone.text, topology)
            for run in started:
                if not run.error:
                    with run.alone():
                        run.finish()
                        log.info("%s", run.final)
        return {run.final: run.error for run in runs if run.error}
    finally:
        topology.close()


def main(configs: Annotated[list[Path], typer.Argument(help="configs of one group, in YAML")]) -> None:
    """Run configs together."""
    end_with_runner()
    with user_errors():
        failures = execute_together([Config.load(path) for path in configs])
        if failures:
            raise UserError(f"{len(failures)} of {len(configs)} runs failed: {next(iter(failures.values()))}")


if __name__ == "__main__":
    typer.run(main)
