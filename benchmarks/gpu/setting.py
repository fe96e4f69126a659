"""The setting of the GPU benchmarks: backbone, texts, images and repeats.

The small form runs the same code in seconds, on a CPU too, with a tiny tower of as many layers; its figures mean nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.reader import jpeg
from vipbench.harness.config.identity import Digests
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.data.importers import folder as folder_importer
from vipbench.harness.data.reader import Dataset
from vipbench.harness.data.shards import write_dataset
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.runs.inputs import Inputs, make_task
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.symptoms.sets import load_sets, sets_digest
from vipbench.harness.system.devices import choose_device
from vipbench.harness.system.files import write_json

Row = dict[str, Any]

# Seven classes of four symptoms: 28 prompts, as many as a small medical benchmark has.
SYMPTOMS = {
    "actinic keratosis": [
        "rough scaly surface",
        "pink base with white scale",
        "strawberry pattern",
        "poorly defined border",
    ],
    "basal cell carcinoma": [
        "shiny pearly bump",
        "branching red vessels",
        "blue-grey ovoid nests",
        "central ulceration",
    ],
    "benign keratosis": [
        "stuck-on waxy appearance",
        "milia-like white cysts",
        "brown cerebriform ridges",
        "sharp border",
    ],
    "dermatofibroma": [
        "central white scar-like patch",
        "fine peripheral network",
        "firm brown nodule",
        "dimple when pinched",
    ],
    "melanoma": [
        "asymmetric shape with a jagged border",
        "several shades of brown and black",
        "blue-white veil",
        "streaks",
    ],
    "melanocytic nevus": [
        "round symmetric shape",
        "one even shade of brown",
        "smooth border",
        "regular network of lines",
    ],
    "vascular lesion": [
        "well defined red lacunae",
        "purple or blue colour",
        "blanches under pressure",
        "no pigment network",
    ],
}
PER_CLASS = {"train": 16, "test": 8}
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 12, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 12},
}


@dataclass(frozen=True)
class Setting:
    """Sizes and repeats.

    Attributes:
        repeats: timed calls of a step. batches: images that go through the image tower at a time, the usual number first.
        matrix: side of the matrices whose product gives the peak.
        views: of the training images, with which a bank is filled. workers: numbers of loading processes.
        runs: that are packed. classes: of CoCoOp's memory.
        compiler: of torch.compile.
        methods: those that are measured.
    """

    small: bool = False
    repeats: int = 5
    batches: tuple[int, ...] = (256, 64, 128, 512, 1024)
    matrix: int | None = None
    views: int = 40
    workers: tuple[int, ...] = (15, 8, 4)
    runs: int = 8
    classes: int = 100
    compiler: str = "inductor"
    methods: tuple[str, ...] = field(
        default_factory=lambda: tuple(sorted(method_names(), key=lambda name: name != "vip"))
    )

    def trained(self) -> list[str]:
        """The methods with a training loop, ViP first, in case the time is up before the last."""
        return [name for name in self.methods if method_class(name).trains]

    def backbone(self) -> Backbone:
        """ViT-B-16, or a tiny model, with random weights, on the CPU."""
        if not self.small:
            return load_backbone(BackboneConfig(name="ViT-B-16"))
        with TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.json"
            path.write_text(json.dumps({"model_cfg": TINY}))
            return load_backbone(BackboneConfig(name=str(path)))


FULL = Setting()
SMALL = Setting(
    small=True, repeats=1, batches=(2, 3), matrix=64, views=2, workers=(1,), runs=2, classes=3, compiler="aot_eager"
)


@dataclass(frozen=True)
class Workspace:
    """A dataset with symptoms, and what runs on it share: all that it takes to make jobs.

    Attributes:
        precision: of all jobs. device: "cuda" or "cpu".
    """

    folder: Path
    inputs: Inputs
    topology: Topology
    precision: str

    @property
    def device(self) -> str:
        return self.topology.device.type

    def job(self, name: str, seed: int = 1, **settings: Mapping[str, Any]) -> Job:
        """A run of a method by its own recipe, one view an image; it writes nothing but its bank.

        Args:
            settings: more entries of its config's sections.
        """
        content: dict[str, Any] = {
            "seed": seed,
            "precision": self.precision,
            "data": {"path": str(self.folder / "data"), "shots": "all"},
            "symptoms": str(self.folder / "symptoms.json"),
            "method": {"name": name},
            "run": {"out": str(self.folder / "runs"), "workers": 0, "log_every": 10**6},
        }
        if method_class(name).trains:
            content["train"] = {"views": 1, "augmentation_seed": 0}
        for section, entries in settings.items():
            if entries:
                content[section] = {**content.get(section, {}), **entries}
        return Job(resolve_config(content), self.inputs, self.topology, None)

    def attempt(self, row: Row, measure: Callable[[], Row]) -> Row:
        """A row with what was measured, or with the error in which that ended, so that the others can go on."""
        try:
            return row | measure()
        except Exception as error:  # noqa: BLE001 - of whatever kind, it is printed, and the benchmark has failed
            return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        finally:
            self.topology.accelerator.free_memory()


@contextmanager
def workspace(setting: Setting, precision: str, begin: Callable[[], None]) -> Iterator[Workspace]:
    """Prepare all that needs no GPU, wait for one's turn, and go on the device."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        symptoms = _write_data(folder)
        dataset, backbone, sets = Dataset(str(folder / "data")), setting.backbone(), load_sets(symptoms)
        digests = Digests(dataset.info.digest, backbone.digest, sets_digest(sets))
        begin()
        topology = Topology("auto", precision if choose_device("auto").type == "cuda" else "fp32")
        try:
            inputs = Inputs(dataset, make_task(dataset.classes, sets), backbone.to(topology.device), digests)
            yield Workspace(folder, inputs, topology, topology.precision)
        finally:
            topology.close()


def _write_data(folder: Path) -> Path:
    """Textured JPEGs of 600 x 450, prepared into shards at `data`; returns the symptom set."""
    numbers = np.random.default_rng(0)
    for split, count in PER_CLASS.items():
        for name in SYMPTOMS:
            target = folder / "images" / split / name
            target.mkdir(parents=True)
            for index in range(count):
                (target / f"{index}.jpg").write_bytes(jpeg(numbers, 600, 450))
    write_dataset(folder_importer.read(folder / "images", list(SYMPTOMS)), folder / "data", name="benchmark")
    classes = [{"name": name, "symptoms": [{"text": text} for text in texts]} for name, texts in SYMPTOMS.items()]
    provenance = {"kind": "hand-written", "author": "benchmark", "created": "2026-01-01", "how": "for timing"}
    content = {"format": "vipbench-symptoms/1", "task": "benchmark", "modality": None, "classes": classes}
    write_json(folder / "symptoms.json", content | {"provenance": provenance})
    return folder / "symptoms.json"
