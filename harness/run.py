"""ONE run: a config in, a run directory out.

python harness/run.py CONFIG.yaml [key=value ...] [--force]
torchrun --nproc-per-node 2 harness/run.py CONFIG.yaml
accelerate launch harness/run.py CONFIG.yaml
"""

import logging
import sys
from pathlib import Path
from typing import Annotated

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # started as a file: our modules are harness.config and so on, not config

import torch
import typer

from harness.backbone import Backbone, load_backbone
from harness.bank import FeatureBank
from harness.config import Config, Digests, TrainConfig, run_name
from harness.console import setup_logging, user_errors
from harness.data.fewshot import draw
from harness.data.reader import Dataset, Samples
from harness.evaluate import EvaluationSet
from harness.features import Loading, TrainingViews, bank_facts
from harness.method import Method, Task, method_class
from harness.provenance import Provenance
from harness.results import RunDirectory, is_finished, new_run
from harness.symptoms.sets import SymptomSet
from harness.topology import Topology
from harness.train import fit

log = logging.getLogger("harness.run")

BANK = ".bank"  # under run.out, whose runs share it
VALIDATION_SHOTS = 4  # at most, per class; as in CoOp's protocol


def execute(config: Config, force: bool = False) -> Path:
    """Train and test as a config says; all ranks call it together. Returns the run directory.

    A finished run is not run again unless `force`. Raises UserError for anything that the user can mend.
    """
    topology = Topology(config.run.device, config.precision)
    try:
        setup_logging(topology.is_main)
        dataset = Dataset(config.data.path)
        symptoms = SymptomSet.load(config.symptoms) if config.symptoms else None
        task = Task(dataset.classes, symptoms.texts(dataset.classes) if symptoms else None)
        backbone = load_backbone(config.backbone, topology.device)
        digests = Digests(dataset.info.digest, backbone.digest, symptoms.digest() if symptoms else None)
        final = config.run.out / run_name(config, digests)
        if topology.from_main(is_finished(final) and not force):
            log.info("%s is finished already (--force runs it again)", final)
            return final
        provenance = Provenance(dataset, digests, topology)
        provenance.add(seeds=config.seeds)
        if topology.is_main:
            with new_run(final) as directory:
                _train_and_test(config, dataset, task, backbone, topology, provenance, directory)
        else:
            _train_and_test(config, dataset, task, backbone, topology, provenance, None)
        log.info("%s", final)
        return final
    finally:
        topology.close()


def build_method(config: Config, task: Task, backbone: Backbone) -> Method:
    """A method at its start, on the backbone's device; its random values are keyed by the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        method = method_class(config.method.name)(config.method, task, backbone)
    return method.to(backbone.logit_scale.device)


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
    return draw(train, dataset.classes, shots, seed), validation


def _train_and_test(
    config: Config,
    dataset: Dataset,
    task: Task,
    backbone: Backbone,
    topology: Topology,
    provenance: Provenance,
    directory: RunDirectory | None,
) -> None:
    """All ranks compute; the one with a directory writes."""
    method = build_method(config, task, backbone)
    needs, loading = method.needs, Loading(config.run.eval_batch_size, config.run.workers)

    def bank(split: str, train: TrainConfig | None = None) -> FeatureBank | None:
        if not config.run.bank or needs != "features":
            return None
        facts = bank_facts(backbone.digest, dataset.info.digest, split, config.precision, train)
        return FeatureBank(config.run.out / BANK, facts, dataset.split(split).keys, backbone.dim)

    def evaluation_set(samples: Samples, split: str) -> EvaluationSet:
        return EvaluationSet(samples, backbone, needs, topology, loading, split, bank(split))

    if directory:
        directory.write_config(config)
    if config.train is not None:
        train, validation = training_samples(config, dataset)
        views = TrainingViews(
            train, backbone, needs, config.train, config.seed, topology, loading, bank("train", config.train)
        )
        held_out = evaluation_set(validation, "val") if validation and config.train.select == "best" else None
        write_step = directory.write_step if directory else lambda row: None
        kept = fit(method, views, held_out, config.train, topology, write_step, config.run.log_every)
        provenance.add(training_samples=len(train), kept_epoch=kept.epoch, validation_accuracy=kept.validation_accuracy)
    predictions = evaluation_set(dataset.split("test"), "test").predict(method)
    description = provenance.describe()
    if directory:
        if config.train is not None:
            directory.write_prompts(method.trainable())
        directory.write_evaluation(predictions, dataset.classes, description)
        log.info("test accuracy %.4f on %d images", predictions.accuracy(), len(predictions.ids))


def main(
    config: Annotated[Path, typer.Argument(help="a config in YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.shots=4 method=coop")] = None,
    force: Annotated[bool, typer.Option("--force", help="run again although it is finished")] = False,
) -> None:
    """Run one config."""
    with user_errors():
        execute(Config.load(config, overrides or []), force)


if __name__ == "__main__":
    typer.run(main)
