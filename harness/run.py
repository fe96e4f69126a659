"""ONE run: a config in, a run directory out.

python harness/run.py CONFIG.yaml [key=value ...] [--force]
torchrun --nproc-per-node 2 harness/run.py CONFIG.yaml
accelerate launch harness/run.py CONFIG.yaml
"""

import logging
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # started as a file: our modules are harness.config and so on, not config

if __name__ == "__main__":
    from harness.console import interruptions_from_here_on

    interruptions_from_here_on()

import torch
import typer

from harness.backbone import Backbone, load_backbone
from harness.bank import FeatureBank
from harness.checkpoint import Checkpoints
from harness.config import Config, Digests, TrainConfig, run_name
from harness.console import end_with_runner, log_to, setup_logging, user_errors
from harness.data.fewshot import draw, fewer
from harness.data.reader import Dataset, Samples
from harness.devices import to_device
from harness.errors import UserError
from harness.evaluate import EvaluationSet
from harness.features import TrainingViews, bank_facts
from harness.files import disk_errors
from harness.method import Method, Task, method_class
from harness.provenance import Provenance
from harness.results import RunDirectory, flatten, is_finished, new_run
from harness.symptoms.sets import SymptomSet
from harness.topology import Topology
from harness.tracking import FOLDER as TRACKING
from harness.tracking import tracking
from harness.train import Trained, Training, fit
from harness.views import Loading

log = logging.getLogger("harness.run")

BANK = ".bank"  # under run.out, whose runs share it
LOGS = "logs"  # in the run directory
VALIDATION_SHOTS = 4  # at most, per class; as in CoOp's protocol


@dataclass(frozen=True)
class Inputs:
    """What a run reads, loaded. Runs on the same data, backbone and symptoms can share it."""

    dataset: Dataset
    task: Task
    backbone: Backbone
    digests: Digests


def load_inputs(config: Config, topology: Topology) -> Inputs:
    """Load what a config names. Raises UserError where it is missing, damaged or does not fit together."""
    dataset = Dataset(config.data.path)
    symptoms = SymptomSet.load(config.symptoms) if config.symptoms else None
    task = Task(dataset.classes, symptoms.texts(dataset.classes) if symptoms else None)
    backbone = load_backbone(config.backbone, topology.device)
    backbone.text.memory_bytes = int(config.run.text_memory_gib * 2**30)
    if config.run.compile and topology.zero_stage == 3:
        raise UserError("run.compile: weights come and go during a pass under ZeRO-3; use run.compile=false")
    if config.run.compile:
        backbone.image.compile()
    digests = Digests(dataset.info.digest, backbone.digest, symptoms.digest() if symptoms else None)
    return Inputs(dataset, task, backbone, digests)


def execute(config: Config, force: bool = False) -> Path:
    """Train and test as a config says; all ranks call it together. Returns the run directory.

    A finished run is not run again, and an unfinished one goes on from its newest checkpoint, unless `force`. Raises UserError
    for anything that the user can mend, and Stopped where a signal asked for an end, after what was done is written.
    """
    topology = Topology(config.run.device, config.precision, config.run.timeout_minutes)
    try:
        setup_logging(topology.is_main)
        with topology.signals.listening(), topology.as_one(), disk_errors(config.run.out):
            inputs = load_inputs(config, topology)
            topology.signals.heed()
            final = config.run.out / run_name(config, inputs.digests)
            if topology.from_main(is_finished(final) and not force):
                log.info("%s is finished already (--force runs it again)", final)
                return final
            with open_run(config, final, topology, force) as directory:
                job = Job(config, inputs, topology, directory)
                job.test(fit(job.training, job.checkpoints, config.run.micro_batch) if job.training else None)
            log.info("%s", final)
            return final
    finally:
        topology.close()


@contextmanager
def open_run(config: Config, final: Path, topology: Topology, anew: bool = False) -> Iterator[RunDirectory | None]:
    """Open a run's directory for rank 0 to write and track; every rank logs into it, and all fail together.

    It becomes `final` when the block succeeds; see `harness.results.new_run`.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(new_run(final, anew)) if topology.is_main else None
        folder = topology.from_main(directory.path if directory else None)
        stack.enter_context(log_to(log_file(folder, topology.rank)))
        stack.enter_context(topology.as_one())
        stack.enter_context(disk_errors(folder))
        log.debug("rank %d of %d on %s, %s", topology.rank, topology.world, platform.node(), topology.device)
        if directory and config.run.tracking:
            names, project, settings = config.run.tracking, config.run.tracking_project, flatten(config.to_mapping())
            trackers = stack.enter_context(tracking(names, project, final.name, folder / TRACKING, settings))
            directory.listeners.append(trackers.log)
        yield directory


def log_file(run: Path, rank: int) -> Path:
    """A rank's log in a run directory."""
    return run / LOGS / f"rank-{rank}.log"


def fill_banks(configs: Sequence[Config]) -> None:
    """Compute the image features that runs will read, which share one device setting; all ranks call it together."""
    first = configs[0]
    topology = Topology(first.run.device, first.precision, first.run.timeout_minutes)
    loaded: dict[tuple[Any, ...], Inputs] = {}
    try:
        setup_logging(topology.is_main)
        with topology.signals.listening(), topology.as_one(), disk_errors(first.run.out):
            for config in configs:
                reads = (config.data.path, config.backbone, config.symptoms, config.run.compile)
                if reads not in loaded:
                    loaded[reads] = load_inputs(config, topology)
                Job(config, loaded[reads], topology, directory=None).fill_bank()
    finally:
        topology.close()


class Job:
    """One run at work: its training, then its test. All ranks compute; the one that has a directory writes.

    Attributes:
        training: None for a method that does not train.
        checkpoints: where the training is saved, and goes on from.
    """

    def __init__(self, config: Config, inputs: Inputs, topology: Topology, directory: RunDirectory | None) -> None:
        self.config, self.inputs, self.topology, self.directory = config, inputs, topology, directory
        self.provenance = Provenance(inputs.dataset, inputs.digests, topology)
        self.provenance.add(seeds=config.seeds)
        self.method = build_method(config, inputs.task, inputs.backbone)
        self.training = self._training(config.train) if config.train else None
        self.checkpoints = Checkpoints(directory, topology, config.run)
        if directory:
            directory.write_config(config)

    def test(self, kept: Trained | None) -> None:
        """Predict the test split with what was learned, and write all that a run leaves."""
        if kept:
            assert self.config.train is not None
            self.provenance.add(kept_epoch=kept.epoch, validation_accuracy=kept.validation_accuracy)
            self.provenance.add(validation_loss=kept.validation_loss, selection=kept.warnings(self.config.train))
            for warning in kept.warnings(self.config.train):
                log.warning("selection: %s", warning)
            self.provenance.add(resumed_after_step=self.checkpoints.resumed_after)  # times are since then
        dataset = self.inputs.dataset
        tested = self._evaluation_set(dataset.split("test"), "test")
        predictions = tested.predict(self.method)
        self._add_skipped(tested)
        description = self.provenance.describe()
        with self.topology.whole(self.method.trainable().values()):
            if self.directory and kept:
                self.directory.write_prompts(self.method.trainable())
        if self.directory:
            self.directory.write_evaluation(predictions, dataset.classes, description)
            log.info("test: %s", predictions.summary(dataset.classes))

    def fill_bank(self) -> None:
        """Compute the image features that the run will read, and no more; all runs of the folder then find them."""
        if self.training:
            self.training.views.fill()
            if self.training.validation:
                self.training.validation.fill()
        self._evaluation_set(self.inputs.dataset.split("test"), "test").fill()

    def _training(self, train: TrainConfig) -> Training:
        config, backbone = self.config, self.inputs.backbone
        samples, validation = training_samples(config, self.inputs.dataset)
        self.provenance.add(training_samples=len(samples))
        if config.data.shots != "all" and (short := fewer(samples, self.inputs.dataset.classes, config.data.shots)):
            log.warning("data.fewer=take: fewer than %d images of %s", config.data.shots, ", ".join(short))
            self.provenance.add(fewer_than_shots=short)
        if train.views != "all":
            shown = (
                f"{train.epochs} epochs show {train.views} views of an image in turn, not a new one each (train.views)"
            )
            self.provenance.add(approximations=[shown])
        bank = self._bank(samples, "train", train)
        views = TrainingViews(
            samples, backbone, self.method.needs, train, config.seed, self.topology, self._loading(), bank
        )
        held_out = self._evaluation_set(validation, "val") if validation and train.select == "best" else None
        write_step = self.directory.write_step if self.directory else lambda row: None
        return Training(self.method, views, held_out, train, self.topology, write_step, config.run.log_every)

    def _evaluation_set(self, samples: Samples, split: str) -> EvaluationSet:
        backbone, needs = self.inputs.backbone, self.method.needs
        return EvaluationSet(
            samples, backbone, needs, self.topology, self._loading(), split, self._bank(samples, split)
        )

    def _add_skipped(self, tested: EvaluationSet) -> None:
        """Put into the provenance which damaged samples were left out, and why."""
        read = {"test": tested.dataset}
        if self.training:
            read["train"] = self.training.views.dataset
            if self.training.validation:
                read["val"] = self.training.validation.dataset
        skipped = {split: dict(self.topology.gather(views.skipped.items())) for split, views in read.items()}
        if any(skipped.values()):
            self.provenance.add(skipped={split: found for split, found in skipped.items() if found})

    def _loading(self) -> Loading:
        return Loading(self.config.run.eval_batch_size, self.config.run.workers, self.config.data.on_error)

    def _bank(self, samples: Samples, split: str, train: TrainConfig | None = None) -> FeatureBank | None:
        """Where features of a split's samples are stored, unless the config or the method wants images."""
        config, inputs = self.config, self.inputs
        if not config.run.bank or self.method.needs != "features":
            return None
        facts = bank_facts(
            inputs.backbone.digest,
            inputs.dataset.info.digest,
            split,
            config.precision,
            train,
            device=self.topology.device.type,
            compiled=config.run.compile,
        )
        bound = int(config.run.bank_gib * 2**30) if config.run.bank_gib else None
        return FeatureBank(config.run.out / BANK, facts, samples.split_size, inputs.backbone.dim, bound)


def build_method(config: Config, task: Task, backbone: Backbone) -> Method:
    """A method at its start, on the backbone's device; its random values are keyed by the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method = method_class(config.method.name)(config.method, task, backbone)
    return to_device(method, backbone.logit_scale.device)


def training_samples(config: Config, dataset: Dataset) -> tuple[Samples, Samples | None]:
    """The training samples and those to select with: k per class and up to min(k, 4) per class, or all of both."""
    train = dataset.split("train")
    validation = dataset.split("val") if dataset.has("val") else None
    shots, seed = config.data.shots, config.data.split_seed
    if shots == "all":
        return train, validation
    assert isinstance(shots, int) and seed is not None
    if validation is not None:
        validation = draw(validation, dataset.classes, min(shots, VALIDATION_SHOTS), seed, fewer=True)
    return draw(train, dataset.classes, shots, seed, fewer=config.data.fewer == "take"), validation


def main(
    config: Annotated[Path, typer.Argument(help="a config in YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.shots=4 method=coop")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="run anew although it is finished or has a checkpoint")
    ] = False,
) -> None:
    """Run one config."""
    end_with_runner()
    with user_errors():
        execute(Config.load(config, overrides or []), force)


if __name__ == "__main__":
    typer.run(main)
