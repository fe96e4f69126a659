"""The data of a run: its training batches, its support set and its evaluation sets, from the splits of one dataset."""

import logging
from collections.abc import Sequence

import torch

from vipbench.harness.config.schema import Config, TrainConfig
from vipbench.harness.data.augment import Augmentation
from vipbench.harness.data.draws import draw, fewer
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.views import EVALUATION, Loading
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.evaluation.predict import EvaluationSet
from vipbench.harness.features.cache import FeatureBank
from vipbench.harness.features.encode import bank_facts
from vipbench.harness.features.source import Needs, Source
from vipbench.harness.methods.base import Method, Support, SupportViews, template_features
from vipbench.harness.runs.inputs import Inputs
from vipbench.harness.system.devices import to_device
from vipbench.harness.training.batches import TrainingBatches

log = logging.getLogger(__name__)

BANK = ".bank"  # under run.out, whose runs share it
VALIDATION_SHOTS = 4  # at most, per class; as in CoOp's protocol


class RunData:
    """The samples that one run reads of its dataset, on the device, as its method reads them.

    Attributes:
        samples, validation: those to learn from and those to select with, None where the run has none.
    """

    def __init__(self, config: Config, inputs: Inputs, topology: Topology, method: type[Method]) -> None:
        self.config, self.inputs, self.topology, self.method = config, inputs, topology, method
        self.samples: Samples | None = None
        self.validation: Samples | None = None
        self.support_views = method.support(config.method)
        if config.train or self.support_views:
            self.samples, self.validation = training_samples(config, inputs.dataset)
        self._sources: list[Source] = []

    def classes_below_shots(self) -> dict[str, int]:
        """The number of training samples of each class that has fewer than `data.shots`."""
        shots = self.config.data.shots
        if self.samples is None or shots == "all":
            return {}
        return fewer(self.samples, self.inputs.dataset.classes, shots)

    def batches(self, train: TrainConfig) -> TrainingBatches:
        """The batches of the training loop."""
        assert self.samples is not None and train.augmentation_seed is not None
        augmentation = Augmentation(train.augmentation_seed, train.crop_scale, train.flip)
        source = self._source(self.samples, "train", augmentation)
        return TrainingBatches(source, train, self.config.seed, self.topology)

    def validation_set(self) -> EvaluationSet | None:
        """The samples to select an epoch with."""
        return self._evaluation_set(self.validation, "val") if self.validation else None

    def test_set(self) -> EvaluationSet:
        """The samples to test on."""
        return self._evaluation_set(self.inputs.dataset.split("test"), "test")

    def support(self) -> tuple[Support, Support | None]:
        """The frozen features that `Method.prepare` takes: of the training samples, and of the validation samples."""
        source, views = self._support_source()
        held_out = self._source(self.validation, "val", needs="features") if self.validation else None
        text = template_features(self.inputs.task, self.inputs.backbone)[:, 0]
        frozen = self._frozen(source, views, text)
        return frozen, (self._frozen(held_out, [EVALUATION], text) if held_out else None)

    def fill_bank(self) -> None:
        """Compute the image features that the run will read, and no more; all runs of the folder then find them."""
        if self.support_views:
            source, views = self._support_source()
            source.fill(views)
        if self.config.train:
            self.batches(self.config.train).fill()
        selects = self.config.grid is not None or bool(self.config.train and self.config.train.select == "best")
        if self.validation and (self.support_views or selects):
            self._source(self.validation, "val").fill([EVALUATION])
        self.test_set().source.fill([EVALUATION])

    def seconds_filling(self) -> float:
        """Seconds spent on the feature bank up to now."""
        return sum(source.seconds_filling for source in self._sources)

    def skipped(self) -> dict[str, dict[str, str]]:
        """The reason for each damaged sample that was left out, by split and id; all ranks call it together."""
        found: dict[str, dict[str, str]] = {}
        for source in self._sources:
            skipped = self.topology.all_gather_objects(source.images.skipped.items())
            found.setdefault(source.name, {}).update(skipped)
        return {split: own for split, own in found.items() if own}

    def _support_source(self) -> tuple[Source, list[int]]:
        assert self.samples is not None and isinstance(self.support_views, SupportViews)
        train = self.config.train
        seed = train.augmentation_seed if train and train.augmentation_seed is not None else self.config.seed
        source = self._source(self.samples, "train", self.support_views.augmentation(seed), "features")
        return source, list(range(1, self.support_views.number + 1)) or [EVALUATION]

    def _frozen(self, source: Source, views: Sequence[int], text: torch.Tensor) -> Support:
        """The frozen features of a source's undamaged samples, on the device; `text` [C, d]: those of the classes."""
        rows, good = source.all_rows(views)
        labels = torch.from_numpy(source.samples.labels[good])
        rows, labels = (to_device(part, self.topology.device) for part in (rows[:, good], labels))
        features = rows[..., :-1].contiguous()
        return Support(features, rows[..., -1], labels, self.inputs.backbone.logit_scale * features @ text.T)

    def _evaluation_set(self, samples: Samples, split: str) -> EvaluationSet:
        return EvaluationSet(self._source(samples, split), self.topology)

    def _source(
        self, samples: Samples, split: str, augmentation: Augmentation | None = None, needs: Needs | None = None
    ) -> Source:
        needs, config = needs or self.method.needs, self.config
        loading = Loading(config.run.eval_batch_size, config.run.workers, config.data.on_error)
        bank = self._bank(samples, split, augmentation) if config.run.bank and needs != "images" else None
        source = Source(samples, self.inputs.backbone, needs, self.topology, loading, split, bank, augmentation)
        self._sources.append(source)
        return source

    def _bank(self, samples: Samples, split: str, augmentation: Augmentation | None) -> FeatureBank:
        """The feature bank of a split's samples."""
        config, inputs = self.config, self.inputs
        facts = bank_facts(
            inputs.backbone.digest,
            inputs.dataset.info.digest,
            split,
            config.precision,
            augmentation,
            device=self.topology.device.type,
            compiled=config.run.compile,
        )
        bound = int(config.run.bank_gib * 2**30) if config.run.bank_gib else None
        return FeatureBank(config.run.out / BANK, facts, samples.split_size, inputs.backbone.dim + 1, bound)


def training_samples(config: Config, dataset: Dataset) -> tuple[Samples, Samples | None]:
    """Draw the training and validation samples: k and at most min(k, 4) per class, or all of both."""
    train = dataset.split("train")
    validation = dataset.split("val") if dataset.has("val") else None
    shots, seed = config.data.shots, config.data.split_seed
    if shots == "all":
        return train, validation
    assert isinstance(shots, int) and seed is not None
    if validation is not None:
        validation = draw(validation, dataset.classes, min(shots, VALIDATION_SHOTS), seed, fewer=True)
    return draw(train, dataset.classes, shots, seed, fewer=config.data.fewer == "take"), validation
