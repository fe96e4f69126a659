"""Score a symptom set with a backbone on the training images of a dataset, never on others.

vipbench symptoms score SET --data DIR --backbone ViT-B-16 --pretrained openai [--json SCORES]
vipbench symptoms prune SET SCORES --below 0.5 --out SET
"""

from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import balanced_accuracy_score

from vipbench.harness.config.validation import parse
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.cosines import measure_cosines
from vipbench.harness.symptoms.sets import SymptomSet, fold
from vipbench.harness.symptoms.verdict import with_verdict
from vipbench.harness.symptoms.worth import aurocs
from vipbench.harness.system.files import read_json

if TYPE_CHECKING:
    from vipbench.harness.models.backbone import Backbone

SPLIT = "train"
AUROC_MEANS = (
    "AUROC: how well the cosine with the symptom alone tells images of its class from all others; 0.5 is chance, 1 perfect, "
    "below 0.5 the symptom is seen more in other classes."
)
REDUNDANCY_MEANS = (
    "redundancy: the highest correlation, over images, of its cosine with that of another symptom of its class; near 1 the two "
    "say the same. -: undefined, as of a class's only symptom."
)
CHANCE_COVERAGE = 0.05  # of a class by uninformative symptoms
COVERAGE_MEANS = (
    "coverage: the share of a class's images that have a symptom of the class which hardly any image of another class has as "
    f"much; symptoms without information cover about {CHANCE_COVERAGE} at most."
)
ACCURACY_MEANS = (
    "zero-shot accuracy: an image goes to the class with the highest mean cosine of its symptoms; balanced: the mean over "
    "classes; chance: guessing a class. All of training images."
)


class SymptomScore(BaseModel):
    """The discrimination and the redundancy of a symptom.

    Attributes:
        auroc: of its image-text cosine, images of its class against the rest; null where either has no image.
        redundancy: the highest correlation (over images) of its cosine with that of another symptom of the class.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    text: str
    auroc: float | None
    redundancy: float | None


class Scores(BaseModel):
    """The scores of a set, the worst symptom first.

    Attributes:
        symptoms, data, backbone: digests of the set, the dataset and the backbone.
        coverage: for each class the share of its images that a symptom explains, see `covered_share`.
        accuracy, balanced_accuracy: of zero-shot classification by the mean cosine over each class's symptoms.
    """

    model_config = ConfigDict(extra="forbid")

    symptoms: str
    data: str
    backbone: str
    images: int
    scores: list[SymptomScore]
    coverage: dict[str, float | None]
    accuracy: float
    balanced_accuracy: float

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file that `score --json` wrote. Raises UserError where it is another."""
        return parse(cls, read_json(path), f"{path}: not the scores of a symptom set")


def score_set(
    symptoms: SymptomSet, dataset: Dataset, backbone: "Backbone", *, batch_size: int = 64, workers: int = 0
) -> Scores:
    """Score a set on the training split of a dataset.

    Raises:
        UserError: a class of the dataset is not in the set or has no symptom; there is no training split.
    """
    found = measure_cosines(symptoms, dataset, backbone, SPLIT, batch_size=batch_size, workers=workers)
    cosines, owners, labels = found.cosines, found.owners, found.samples.labels
    scores, coverage = score_cosines(cosines, labels, owners)
    means = np.stack([cosines[:, owners == label].mean(axis=1) for label in range(len(found.classes))], axis=1)
    guesses = means.argmax(axis=1)
    named = [
        SymptomScore(name=dataset.classes[owner], text=text, auroc=auroc, redundancy=redundancy)
        for owner, text, (auroc, redundancy) in zip(owners, found.texts, scores, strict=True)
    ]
    return Scores(
        symptoms=symptoms.digest(),
        data=dataset.info.digest,
        backbone=backbone.digest,
        images=len(labels),
        scores=sorted(named, key=lambda score: (score.auroc is None, score.auroc or 0.0, score.name, score.text)),
        coverage=dict(zip(dataset.classes, coverage, strict=True)),
        accuracy=float((guesses == labels).mean()),
        balanced_accuracy=float(balanced_accuracy_score(labels, guesses)),
    )


def score_cosines(
    cosines: np.ndarray, labels: np.ndarray, owners: np.ndarray
) -> tuple[list[tuple[float | None, float | None]], list[float | None]]:
    """Compute AUROC and redundancy of each symptom, and coverage of each class.

    Args:
        cosines: [N, P] image-text cosines. labels: [N] int64. owners: [P] int64, the class of each symptom.
    """
    scores: list[tuple[float | None, float | None]] = []
    for column, owner in enumerate(owners):
        (area,) = aurocs(cosines[:, [column]], labels == owner)
        auroc = None if np.isnan(area) else float(area)
        siblings = np.flatnonzero((owners == owner) & (np.arange(len(owners)) != column))
        scores.append((auroc, _highest_correlation(cosines[:, column], cosines[:, siblings])))
    classes = range(int(owners.max()) + 1)
    return scores, [covered_share(cosines[:, owners == label], labels == label) for label in classes]


def covered_share(cosines: np.ndarray, of_class: np.ndarray) -> float | None:
    """Compute the share of a class's images that at least one of its symptoms explains; None without images to compare.

    A symptom explains an image whose cosine with it is above that of all but a few of the other classes' images: a share
    of `CHANCE_COVERAGE` divided by the number of the class's symptoms, so that uninformative symptoms cover 5 % or less.

    Args:
        cosines: [N, S] with the class's symptoms. of_class: [N] bool.
    """
    if of_class.all() or not of_class.any():
        return None
    thresholds = np.quantile(cosines[~of_class], 1 - CHANCE_COVERAGE / cosines.shape[1], axis=0)
    return float((cosines[of_class] > thresholds).any(axis=1).mean())


def prune_set(
    symptoms: SymptomSet, scores: Scores, below: float, keep: int
) -> tuple[SymptomSet, list[tuple[str, str]]]:
    """Drop symptoms whose AUROC is lower than `below`, but leave at least `keep` per class.

    Returns:
        The new set, and (class, text) of each symptom that was dropped.

    Raises:
        UserError: the scores are those of another set.
    """
    if scores.symptoms != symptoms.digest():
        raise UserError(
            "the scores are those of another symptom set, or of this one before it was changed; score it again"
        )
    aurocs = {(fold(score.name), score.text): score.auroc for score in scores.scores}
    dropped = []
    pruned = symptoms.model_copy(deep=True)
    for entry in pruned.classes:
        worst = sorted(
            (auroc, symptom.text)
            for symptom in entry.symptoms
            if (auroc := aurocs.get((fold(entry.name), symptom.text))) is not None and auroc < below
        )
        out = {text for _, text in worst[: max(0, len(entry.symptoms) - keep)]}
        dropped += [(entry.name, text) for text in entry.texts if text in out]
        entry.symptoms = [symptom for symptom in entry.symptoms if symptom.text not in out]
    how = {"from": scores.symptoms, "below": below, "keep": keep, "data": scores.data, "backbone": scores.backbone}
    pruned.provenance = pruned.provenance.model_copy(update={"pruned": {**how, "dropped": len(dropped)}})
    judged = "verdict" in (symptoms.provenance.model_extra or {})
    return with_verdict(pruned) if judged else pruned, dropped


def show(scores: Scores) -> None:
    """Print the symptoms, the worst first, then the figures of each class and of the set."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table("symptom", "class", title=f"{scores.images} training images, worst symptoms first")
    for column in ("AUROC", "redundancy"):
        table.add_column(column, justify="right")
    for score in scores.scores:
        table.add_row(score.text, score.name, _number(score.auroc), _number(score.redundancy))
    console.print(table)
    console.print(AUROC_MEANS)
    console.print(REDUNDANCY_MEANS)
    for name, coverage in scores.coverage.items():
        console.print(f"coverage of {name}: {_number(coverage)}")
    console.print(COVERAGE_MEANS)
    console.print(f"zero-shot accuracy {scores.accuracy:.3f}, balanced {scores.balanced_accuracy:.3f}; chance "
                  f"{1 / len(scores.coverage):.3f}")  # fmt: skip
    console.print(ACCURACY_MEANS)


def _highest_correlation(column: np.ndarray, others: np.ndarray) -> float | None:
    """Find the highest Pearson correlation; None where there is no other column, or one is constant."""
    if not others.size or column.std() == 0 or (others.std(axis=0) == 0).any():
        return None
    return float(max(np.corrcoef(column, other)[0, 1] for other in others.T))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
