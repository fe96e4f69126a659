"""Load the inputs of a run (dataset, task and backbone), and build its method from them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vipbench.harness.config.identity import Digests
from vipbench.harness.config.schema import Config
from vipbench.harness.data.reader import Dataset
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import DEFAULT_TEMPLATES, Method, Task
from vipbench.harness.methods.registry import method_class, method_digest, plugin_digests
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.models.tower_view import Block
from vipbench.harness.symptoms.sets import SymptomSet, load_sets, sets_digest
from vipbench.harness.symptoms.verdict import refuse_unusable
from vipbench.harness.system.devices import to_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The loaded inputs of a run. Runs on the same data, backbone and symptoms, with the same plugins, can share them.

    Attributes:
        plugins: SHA-256 by path.
    """

    dataset: Dataset
    task: Task
    backbone: Backbone
    digests: Digests
    plugins: dict[str, str] = field(default_factory=dict)


def load_inputs(config: Config, topology: Topology) -> Inputs:
    """Load dataset, symptom sets and backbone of a config; all ranks call it together.

    Raises:
        UserError: one is missing, damaged, does not fit, or is another one on another rank.
    """
    if config.run.compile and topology.zero_stage == 3:
        raise UserError("run.compile: weights come and go during a pass under ZeRO-3; use run.compile=false")
    dataset = Dataset(config.data.path)
    symptoms = load_sets(config.symptoms)
    if config.run.unusable_symptoms == "refuse":
        refuse_unusable(symptoms, config.symptoms)
    task = make_task(dataset.classes, symptoms, config.templates)
    backbone = load_backbone(config.backbone, topology.device)
    backbone.text.memory_bytes = int(config.run.text_memory_gib * 2**30)
    if config.run.compile:
        backbone.image.compile()
    digests = Digests(
        dataset.info.digest,
        backbone.digest,
        sets_digest(symptoms),
        method_digest(config.method.name, config.method.files()),
    )
    _check_same(digests, topology)
    return Inputs(dataset, task, backbone, digests, plugin_digests(config.run.plugins))


def _check_same(digests: Digests, topology: Topology) -> None:
    """Raise UserError where this rank reads another content than rank 0, such as a newer commit of a hub's branch."""
    first: Digests = topology.broadcast(digests)
    others = [name for name, own, its in zip(Digests._fields, digests, first, strict=True) if own != its]
    if others:
        raise UserError(
            f"{', '.join(others)}: differs between the processes of this run; give every node the same files, and of a hub "
            "model one commit: hf-hub:REPOSITORY@COMMIT"
        )


def make_task(classes: list[str], sets: list[SymptomSet], templates: Sequence[str] | None = None) -> Task:
    """Make the task of some classes, their symptoms and templates. Raises UserError where a class is in no set."""
    texts = tuple(symptoms.texts(classes) for symptoms in sets)
    sentences = tuple(templates or DEFAULT_TEMPLATES)
    if not texts:
        return Task(classes, templates=sentences)
    joined = [[text for texts_of in of_class for text in texts_of] for of_class in zip(*texts, strict=True)]
    modality = next((symptoms.modality for symptoms in sets if symptoms.modality), None)
    return Task(classes, joined, texts, modality, sentences)


def build_method(config: Config, task: Task, backbone: Backbone) -> Method:
    """Build a method with its initial values, which the run's seed determines, on the backbone's device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method = method_class(config.method.name)(config.method, task, backbone)
    for module in method.modules():
        if isinstance(module, Block):
            module.memory_bytes = int(config.run.image_memory_gib * 2**30)
    return to_device(method, backbone.logit_scale.device)
