"""The phrases that a symptom set is improved with: cosines with labelled images, each text encoded once, and their figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vipbench.harness.symptoms.score import score_cosines
from vipbench.harness.symptoms.sets import Symptom
from vipbench.harness.symptoms.verify import Belief
from vipbench.harness.symptoms.worth import Kept, accuracy, class_scores, leave_one_out_margins, losses

DIGITS = 6  # of figures in the provenance


@dataclass(frozen=True)
class Images:
    """Labelled images: L2-normalised features [N, d] float32, labels [N] int64, the patients' pseudonyms (None: unknown)."""

    features: np.ndarray
    labels: np.ndarray
    patients: Sequence[str | None]


@dataclass(frozen=True)
class Measured:
    """All that a set is improved with beside the LLM.

    Attributes:
        classes: in the order of the labels.
        encode: texts to L2-normalised features [P, d]; each text is encoded once.
        scale: the backbone's logit scale.
        identity: what is recorded of data and backbone.
    """

    classes: list[str]
    train: Images
    validation: Images | None
    encode: Callable[[list[str]], np.ndarray]
    scale: float
    identity: dict[str, Any]


@dataclass
class Pool:
    """The phrases of each class so far, current ones and others, with their cosines.

    Attributes:
        texts: by class. kept: the columns of the current set. answers: those that hold a phrase, by class and text.
        beliefs: in those that were verified.
        columns: cosines with the images of each split, by text.
    """

    measured: Measured
    texts: list[list[str]]
    kept: Kept
    answers: dict[tuple[int, str], int | None]
    beliefs: dict[tuple[int, str], Belief] = field(default_factory=dict)
    columns: list[dict[str, np.ndarray]] = field(default_factory=lambda: [{}, {}])

    @property
    def splits(self) -> list[Images]:
        return [images for images in (self.measured.train, self.measured.validation) if images is not None]

    def cosines(self, split: int = 0) -> list[np.ndarray]:
        """Stack the cosines [N, P] of each class's phrases with the training images (0) or validation images (1)."""
        new = [text for own in self.texts for text in own if text not in self.columns[0]]
        if new := list(dict.fromkeys(new)):
            features = self.measured.encode(new)
            for images, columns in zip(self.splits, self.columns, strict=False):
                columns.update(zip(new, (images.features @ features.T).T, strict=True))
        return [np.stack([self.columns[split][text] for text in own], axis=1) for own in self.texts]

    def current(self) -> list[list[str]]:
        return [[own[column] for column in columns] for own, columns in zip(self.texts, self.kept, strict=True)]

    def symptom(self, label: int, text: str) -> Symptom:
        """Make the entry of a phrase in a set."""
        belief = self.beliefs.get((label, text), Belief())
        return Symptom(text=text, agreement=self.answers[label, text], seen=belief.seen, truer=belief.truer)

    def figures(self) -> dict[str, Any]:
        """Compute loss and accuracies of the current set."""
        train = self.measured.train
        scores = class_scores(self.cosines(), self.kept)
        figures = {
            "train_loss": float(losses(scores, train.labels, self.measured.scale).mean()),
            "train_accuracy": accuracy(scores, train.labels),
        }
        if self.measured.validation is not None:
            scores = class_scores(self.cosines(1), self.kept)
            figures["validation_accuracy"] = accuracy(scores, self.measured.validation.labels)
        return {name: rounded(value) for name, value in figures.items()}

    def worth(self) -> list[dict[str, Any]]:
        """List the figures of each symptom of the current set, class by class."""
        labels = self.measured.train.labels
        cosines = [own[:, columns] for own, columns in zip(self.cosines(), self.kept, strict=True)]
        owners = np.repeat(np.arange(len(cosines)), [own.shape[1] for own in cosines])
        scores, _ = score_cosines(np.concatenate(cosines, axis=1), labels, owners)
        margins = np.concatenate(leave_one_out_margins(cosines, labels))
        texts = [text for own in self.current() for text in own]
        return [
            {
                "class": self.measured.classes[owner],
                "text": text,
                "margin": rounded(margin),
                "auroc": rounded(auroc),
                "redundancy": rounded(redundancy),
            }
            for owner, text, margin, (auroc, redundancy) in zip(owners, texts, margins, scores, strict=True)
        ]

    def remove(self, refused: set[tuple[int, str]]) -> None:
        """Take phrases out, but not all of a class. A class that loses its current ones goes on with another."""
        for label, own in enumerate(self.texts):
            left = [text for text in own if (label, text) not in refused]
            if left and len(left) < len(own):
                current = [text for text in self.current()[label] if text in left]
                self.texts[label] = list(dict.fromkeys([*current, *left]))
                self.kept[label] = list(range(len(current) or 1))


def rounded(value: float | None) -> float | None:
    """Round a figure for the record; None where it is not defined."""
    return None if value is None or np.isnan(value) else round(float(value), DIGITS)
