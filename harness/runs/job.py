"""Prepare, train and test the method of one run, and write its results."""

import logging
from typing import Any

from vipbench.harness.config.schema import Config, TrainConfig
from vipbench.harness.distributed.engines.zero import gathered_parameters
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.evaluation.predict import Predictions
from vipbench.harness.methods.base import Support
from vipbench.harness.runs.data import RunData
from vipbench.harness.runs.directory import RunDirectory
from vipbench.harness.runs.inputs import Inputs, build_method
from vipbench.harness.runs.provenance import Provenance
from vipbench.harness.training.checkpoint import Checkpoints
from vipbench.harness.training.cost import Meter
from vipbench.harness.training.loop import BestEpoch, Training, fit

log = logging.getLogger(__name__)


class Job:
    """A run in progress: its training, then its test. All ranks compute; the one that has a directory writes.

    Attributes:
        training: None for a method without a training loop.
        checkpoints: of the training, which is resumed from the newest.
        meter: of what fitting the method costs.
        runs_together: how many runs trained in this process at once, and so share seconds and memory.
    """

    def __init__(self, config: Config, inputs: Inputs, topology: Topology, directory: RunDirectory | None) -> None:
        self.config, self.inputs, self.topology, self.directory = config, inputs, topology, directory
        self.provenance = Provenance(inputs.dataset, inputs.digests, topology)
        self.provenance.add(seeds=config.seeds)
        if inputs.backbone.source:
            self.provenance.add(backbone=inputs.backbone.source)
        self.method = build_method(config, inputs.task, inputs.backbone)
        self.data = RunData(config, inputs, topology, type(self.method))
        self.runs_together = 1
        self.meter = Meter(topology, self.data.seconds_filling)
        self._note_training_samples()
        self._held_out: Support | None = None  # the frozen features of the validation samples
        if self.data.support_views:
            support, self._held_out = self.data.support()
            with self.meter.running():
                self.method.prepare(support, self._held_out)
        self.training = self._training(config.train) if config.train else None
        self.checkpoints = Checkpoints(directory, topology, config.run)
        if directory:
            directory.write_config(config)
        if inputs.plugins:
            self.provenance.add(plugins=inputs.plugins)

    def train(self) -> BestEpoch | None:
        """Train the method; returns the epoch that is kept, None where nothing is trained."""
        run = self.config.run
        return fit(self.training, self.checkpoints, run.micro_batch, run.cuda_graph) if self.training else None

    def test(self, best: BestEpoch | None) -> None:
        """Predict the test split with what was learned, and write all that a run leaves."""
        self._finish()
        if best:
            assert self.config.train is not None
            self.provenance.add(kept_epoch=best.epoch, validation_accuracy=best.validation_accuracy)
            self.provenance.add(validation_loss=best.validation_loss, selection=best.warnings(self.config.train))
            for warning in best.warnings(self.config.train):
                log.warning("selection: %s", warning)
            self.provenance.add(resumed_after_step=self.checkpoints.resumed_after)  # times are since then
        classes = self.inputs.dataset.classes
        predictions = self.data.test_set().predict(self.method)
        if skipped := self.data.skipped():
            self.provenance.add(skipped=skipped)
        self.provenance.add(cost=self._cost())
        description = self.provenance.describe()
        with gathered_parameters(self.method.trainable().values()):
            learned = self.method.learned()
            if self.directory and learned:
                self.directory.write_prompts(learned)
        if self.directory:
            self.directory.write_evaluation(predictions, classes, description)
            log.info("test: %s", predictions.summary(classes))

    def validate(self) -> Predictions:
        """Predict the validation samples with what was learned."""
        self._finish()
        held_out = self.data.validation_set()
        assert held_out is not None
        return held_out.predict(self.method)

    def _finish(self) -> None:
        with gathered_parameters(self.method.trainable().values()), self.meter.running():
            self.method.finish(self._held_out)

    def _cost(self) -> dict[str, Any]:
        """The cost of the run: trained and fitted numbers, seconds of fitting, GiB at the peak; all ranks call it together.

        Trained are the numbers that an optimizer moves; fitted those that are learned in another way.
        """
        parameters = self.method.trainable()
        with gathered_parameters(parameters.values()):
            trained = sum(parameter.numel() for parameter in parameters.values())
            learned = sum(tensor.numel() for tensor in self.method.learned().values())
        return {
            "trained": trained,
            "fitted": learned - trained,
            "train_seconds": round(self.meter.seconds, 3),
            "peak_gib": round(self.meter.peak() / 2**30, 3),
            "peak_of": "allocated GPU memory"
            if self.topology.device.type == "cuda"
            else "resident memory of the process",
            "runs_together": self.runs_together,
        }

    def _training(self, train: TrainConfig) -> Training:
        config = self.config
        published = self.method.recipe(config.method, config.data.shots, config.backbone.name).get("views", "all")
        if train.views not in ("all", published):
            shown = (
                f"{train.epochs} epochs show {train.views} views of an image in turn, not a new one each (train.views)"
            )
            self.provenance.add(approximations=[shown])
        batches = self.data.batches(train)
        validation = self.data.validation_set() if train.select == "best" else None
        write_step = self.directory.write_step if self.directory else lambda row: None
        every = self.config.run.log_every
        return Training(self.method, batches, validation, train, self.topology, write_step, every, self.meter)

    def _note_training_samples(self) -> None:
        """Add to the provenance the number of training samples, and the classes with fewer than `data.shots`."""
        if self.data.samples is None:
            return
        self.provenance.add(training_samples=len(self.data.samples))
        if short := self.data.classes_below_shots():
            log.warning("data.fewer=take: fewer than %d images of %s", self.config.data.shots, ", ".join(short))
            self.provenance.add(fewer_than_shots=short)
