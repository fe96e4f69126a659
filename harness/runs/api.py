"""Finished runs for notebooks and scripts; docs/notebooks.md shows them in use.

run = Run.load("runs/vip_16shot_seed1_0123456789ab")
run.metrics, run.predictions(), run.curve(), run.method()
"""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vipbench.harness.config.identity import RESULT_VERSION
from vipbench.harness.config.schema import Config
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import Predicted
from vipbench.harness.evaluation.predict import Predictions
from vipbench.harness.evaluation.statistics.intervals import Intervals
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import method_digest
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.runs.directory import (
    CONFIG,
    MOST_LOG_BYTES,
    STEPS,
    check_run,
    read_classes,
    read_metrics,
    read_prompts,
    read_provenance,
)
from vipbench.harness.runs.inputs import build_method, make_task
from vipbench.harness.runs.predictions import read_intervals, read_predictions
from vipbench.harness.runs.resolve import load_config
from vipbench.harness.symptoms.sets import SymptomSet, load_sets, sets_digest
from vipbench.harness.system.devices import choose_device
from vipbench.harness.system.files import parse_json, read_whole

log = logging.getLogger(__name__)


class Run:
    """A finished run, whose files are as it wrote them.

    Attributes:
        path: its directory.
        classes: the classes that it learned, in the order of its logits.
        metrics, provenance: the contents of metrics.json and provenance.json.
    """

    def __init__(self, path: Path, plugins: Sequence[Path] = ()) -> None:
        check_run(path)
        self.path, self._plugins = path, plugins
        self.metrics, self.provenance, self.classes = read_metrics(path), read_provenance(path), read_classes(path)

    @classmethod
    def load(cls, path: Path | str, plugins: Sequence[Path | str] = ()) -> "Run":
        """Open a run directory; nothing of the backbone is loaded, and no plugin.

        Args:
            plugins: where the files lie now that register the run's method, if not at the places in its config.

        Raises:
            UserError: not a finished run, or a file of it is missing or damaged.
        """
        return cls(Path(path).expanduser(), [Path(plugin).expanduser() for plugin in plugins])

    @cached_property
    def config(self) -> Config:
        """The resolved config. Its plugins are loaded, which runs their code."""
        named = [str(path.absolute()) for path in self._plugins]
        return load_config(self.path / CONFIG, [f"run.plugins={json.dumps(named)}"] if named else [])

    def predictions(self) -> pd.DataFrame:
        """The predictions of the test split, a row per sample in the order of ids.

        Columns: id, label (position of the class), class and predicted (names), logits and probabilities (lists of C float32),
        a column of text for each of `groups`, and for each class, under its name, its probability ("NAME (class)" where the
        name is that of another column).

        Raises:
            UserError: the file is damaged.
        """
        frame = self._predictions.to_frame(self.classes)
        probabilities = np.stack(frame["probabilities"].to_list())
        names = [f"{name} (class)" if name in frame else name for name in self.classes]
        return frame.join(pd.DataFrame(probabilities, columns=names))

    @cached_property
    def _predictions(self) -> Predictions:
        return read_predictions(self.path, len(self.classes))

    @cached_property
    def predicted(self) -> Predicted:
        """The predictions of the test split as `vipbench.harness.evaluation.statistics` takes them."""
        return self._predictions.predicted(self.classes, bool(self.provenance.get("ordinal")))

    @property
    def patients(self) -> np.ndarray | None:
        """The patient of each test sample, [N] int, as statistics take them (`clusters`); None where the dataset has none."""
        return self._predictions.clusters

    @property
    def groups(self) -> Mapping[str, Sequence[str | None]]:
        """[N] values of "patient" and of each column of metadata that the dataset has; None where unknown."""
        return self._predictions.groups

    @cached_property
    def intervals(self) -> Intervals:
        """The intervals of the metrics, from intervals.json or, for a run of an earlier version, computed."""
        return read_intervals(self.path)

    def curve(self) -> pd.DataFrame:
        """The log of steps, a row per step: step, epoch, lr and loss, and where an epoch was validated its accuracy and loss.

        Empty for a method without a training loop. Raises UserError where the file is damaged.
        """
        path = self.path / STEPS
        if not path.is_file():
            return pd.DataFrame(columns=["step", "epoch", "lr", "loss"])
        try:
            rows = pd.DataFrame([parse_json(line) for line in read_whole(path, MOST_LOG_BYTES).splitlines()])
            return rows.groupby("step", as_index=False).first()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from error

    def method(self, device: str = "cpu") -> Method:
        """The method with what it learned, in evaluation mode: `method(features).logits`, or of images where `needs` names them.

        It computes in fp32, whatever the precision of the run.

        Args:
            device: "cpu", "cuda" or "auto".

        Raises:
            UserError: backbone, symptom set or plugin are missing, or have another content than when the run was made.
        """
        return self.restore(choose_device(device, "device"), self.classes, self.symptom_sets())

    def restore(
        self, device: torch.device, classes: list[str], symptoms: list[SymptomSet], data: Path | str | None = None
    ) -> Method:
        """The method with what it learned, for classes that may be others than the run's where what is learned fits them.

        Args:
            data: the dataset that the classes are of, for the error.

        Raises:
            UserError: they are others and it does not, or backbone or plugin have another content now.
        """
        config, learned = self.config, read_prompts(self.path)
        digests, name = self.provenance["digests"], config.method.name
        if self.provenance.get("result_version") != RESULT_VERSION:
            made = self.provenance.get("result_version")
            log.warning("%s: made by result version %s of vipbench; this is %s", self.path, made, RESULT_VERSION)
        if method_digest(name, config.method.files()) != digests.get("method"):
            what = " and ".join(["the code", *(f"method.{option}" for option in config.method.files())])
            raise UserError(
                f"{self.path}: {what} of method {name!r} is not what it was when the run was made; restore it"
            )
        backbone = load_backbone(config.backbone, device)
        if backbone.digest != digests["backbone"]:
            raise UserError(
                f"{self.path}: the backbone {config.backbone.name!r} has other weights now than when the run was made"
                + self._pinned_backbone()
            )
        method = build_method(config, make_task(classes, symptoms, config.templates), backbone)
        if method.per_class and set(classes) != set(self.classes):
            raise UserError(
                f"{data or self.path}: {name} learned for {self.classes}; {classes} are other classes (`vipbench evaluate "
                '--rename "OLD=NEW"` maps names that differ)'
            )
        method.load_learned(learned)
        return method

    def _pinned_backbone(self) -> str:
        """The end of an error that names the commit of the run's backbone; "" where that is not on record."""
        source = self.provenance.get("backbone")
        if not isinstance(source, dict) or not {"repository", "commit"} <= set(source):
            return ""
        return f"; it was hf-hub:{source['repository']}@{source['commit']}"

    def symptom_sets(self, other: Path | None = None) -> list[SymptomSet]:
        """The symptom sets that the run was trained with, or another one where it is named.

        Raises:
            UserError: a set is missing, or has another content than when the run was made; or the method reads none.
        """
        config = self.config
        if not config.symptoms:
            if other:
                raise UserError(f"--symptoms: {config.method.name} reads no symptom set; leave it out")
            return []
        found = load_sets(other or config.symptoms)
        if sets_digest(found) != self.provenance["digests"]["symptoms"]:
            if other is None:
                named = config.symptoms if isinstance(config.symptoms, Path) else ", ".join(map(str, config.symptoms))
                raise UserError(
                    f"{named}: holds other symptoms now than when {self.path.name} was trained; restore it, or name the set "
                    "to evaluate with in --symptoms"
                )
            log.warning("%s: not the symptom set that the prompts were trained with", other)
        return found
