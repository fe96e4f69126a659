"""Test samples of a page: what each run predicted, and thumbnails of the images that most runs mistake."""

import logging
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from vipbench.harness.data.images import BadImage
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.statistics.conformal import SCORES, RepeatedSets, repeated_sets
from vipbench.harness.report.page.entries import DONE, Entry
from vipbench.harness.runs.predictions import read_predicted

SIDE, QUALITY = 72, 60  # pixels and WebP quality of thumbnails

log = logging.getLogger(__name__)


@dataclass
class TestSet:
    """Samples that runs predicted: ids and labels [N], class names, and the count of runs that mistake each."""

    dataset: str  # its digest
    ids: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    entries: list[Entry] = field(default_factory=list)
    mistakes: Counter[str] = field(default_factory=Counter)


@dataclass
class Predicted:
    """Predictions of runs by test set, and what derives from them, by the number of the run.

    Attributes:
        runs: the set, classes [N] and confidences [N] in per cent. conformal: prediction sets by each of their scores.
    """

    sets: list[TestSet]
    runs: dict[int, tuple[int, list[int], list[int]]]
    conformal: dict[int, list[RepeatedSets]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Values as page.js reads them."""
        sets = [{"ids": own.ids, "labels": own.labels, "classes": own.classes} for own in self.sets]
        return {"sets": sets, "runs": {number: dict(zip("spc", run, strict=True)) for number, run in self.runs.items()}}


def read_samples(entries: Sequence[Entry]) -> Predicted:
    """Read the predictions of finished runs; a damaged file is named on the screen, and its run has no samples."""
    sets: dict[Any, int] = {}
    found = Predicted([], {})
    for entry in entries:
        if entry.state != DONE:
            continue
        try:
            of, stored = read_predicted(entry.folder)
        except UserError as error:
            log.warning("no samples: %s", entry.source.shown(error))
            continue
        ids, dataset = [str(sample) for sample in stored.ids], entry.provenance["digests"]["dataset"]
        place = sets.setdefault((dataset, tuple(ids), tuple(of.classes)), len(found.sets))
        if place == len(found.sets):
            found.sets.append(TestSet(dataset, ids, of.labels.tolist(), list(of.classes)))
        own = found.sets[place]
        own.entries.append(entry)
        own.mistakes.update(ids[wrong] for wrong in np.flatnonzero(of.predicted != of.labels))
        confidences = np.rint(100 * of.probabilities.max(axis=1)).astype(int)
        found.conformal[entry.number] = [repeated_sets(score, of, stored.clusters) for score in SCORES]
        found.runs[entry.number] = place, of.predicted.tolist(), confidences.tolist()
    return found


def thumbnails(predicted: Predicted, budget: int) -> tuple[list[dict[str, str]], list[str]]:
    """For each test set thumbnails by id, as data URLs that together stay within a budget of bytes, and sentences on what is
    missing. Images that most runs mistake come first.
    """
    found: list[dict[str, str]] = []
    notes: list[str] = []
    left = budget // max(1, len(predicted.sets))
    for own in predicted.sets:
        samples = _test_split(own)
        if samples is None:
            found.append({})
            notes.append(f"The images of {own.entries[0].provenance['dataset']} are not where its runs read them.")
            continue
        shown = _thumbnails(own, samples, left)
        found.append(shown)
        if len(shown) < len(own.ids):
            notes.append(
                f"Thumbnails of {len(shown)} of {len(own.ids)} test images, those that most runs mistake (--image-mb)."
            )
    return found, notes


def _test_split(own: TestSet) -> Samples | None:
    """The test split that runs predicted, where it still lies at the place in a run's config; else None."""
    for path in dict.fromkeys(entry.row.get("data.path") for entry in own.entries if not entry.source.bundle):
        try:
            dataset = Dataset(str(path))
            if dataset.info.digest == own.dataset and dataset.has("test"):
                return dataset.split("test")
        except (UserError, OSError) as error:
            log.info("no images: %s", error)
    return None


def _thumbnails(own: TestSet, samples: Samples, budget: int) -> dict[str, str]:
    places = {name: place for place, name in enumerate(samples.names.to_pylist())}
    shown: dict[str, str] = {}
    spent = 0
    for sample in sorted(own.ids, key=lambda sample: -own.mistakes[sample]):
        if sample not in places:
            continue
        try:
            url = thumbnail(samples.image(places[sample]))
        except (BadImage, UserError, OSError) as error:
            log.warning("no thumbnail: %s", error)
            continue
        spent += len(url)
        if spent > budget:
            break
        shown[sample] = url
    return shown


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """A small copy of an image as a data URL, without any of its metadata."""
    small = Image.new("RGB", image.size)
    small.paste(image)
    small.thumbnail((side, side))
    file = BytesIO()
    small.save(file, "webp", quality=QUALITY)
    return f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}"


def errors_by_sample(predicted: Predicted, most: int) -> list[dict[str, Any]]:
    """For each test set its dataset, and the samples that most runs mistake: id, class, mistakes and runs."""
    found = []
    for own in predicted.sets:
        labels = dict(zip(own.ids, own.labels, strict=True))
        hardest = [(sample, own.classes[labels[sample]], count) for sample, count in own.mistakes.most_common(most)]
        name = own.entries[0].provenance["dataset"]
        found.append({"dataset": name, "runs": len(own.entries), "samples": len(own.ids), "hardest": hardest})
    return found


def confusion(predicted: Predicted, number: int) -> tuple[Sequence[str], list[list[int]]]:
    """Class names [C], and counts of samples [C][C] of a run by class and predicted class."""
    place, classes, _ = predicted.runs[number]
    own = predicted.sets[place]
    counts = np.zeros((len(own.classes), len(own.classes)), int)
    np.add.at(counts, (own.labels, classes), 1)
    return own.classes, counts.tolist()
