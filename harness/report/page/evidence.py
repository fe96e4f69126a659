"""The symptom sets that runs read, with their provenance and scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vipbench.harness.errors import UserError
from vipbench.harness.report.page.entries import DONE, Entry
from vipbench.harness.symptoms.score import Scores
from vipbench.harness.symptoms.sets import SymptomSet, fold, load_sets, sets_digest


@dataclass(frozen=True)
class SetView:
    """A symptom set: its classes as (name, [(text, agreement, AUROC)]), its provenance, and the runs that read it.

    `note` is on what is unlike when the runs were made; `scored` tells of what images its scores are.
    """

    path: str
    task: str
    digest: str
    classes: Sequence[tuple[str, Sequence[tuple[str, int | None, float | None]]]]
    provenance: Sequence[tuple[str, str]]
    scored: str
    runs: Sequence[int]
    note: str


def symptom_sets(entries: Sequence[Entry], scores: Sequence[Path] = ()) -> list[SetView]:
    """The sets that finished runs read, from where they read them.

    Args:
        scores: files that `vipbench symptoms score --json` wrote, each for the set whose digest it names.

    Raises:
        UserError: a file of scores is none.
    """
    scored = [Scores.load(path) for path in scores]
    by_place: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        if entry.state == DONE and (named := entry.row.get("symptoms")):
            by_place.setdefault(tuple(map(str, named)) if isinstance(named, tuple) else (str(named),), []).append(entry)
    views = []
    for named, of in by_place.items():
        runs = [entry.number for entry in of]
        digests = {entry.provenance["digests"]["symptoms"] for entry in of}
        try:
            if any(entry.source.bundle for entry in of):
                raise UserError("runs of a bundle come without their symptom sets")
            loaded = load_sets(tuple(map(Path, named)))
        except (UserError, OSError) as error:
            views.append(SetView(", ".join(named), "", "", [], [], "", runs, f"Not shown: {error}"))
            continue
        changed = digests != {sets_digest(loaded)}
        note = "It has other symptoms now than when some of these runs were made." if changed else ""
        views += [_view(", ".join(named), own, scored, runs, note) for own in loaded]
    return views


def _view(path: str, own: SymptomSet, scored: Sequence[Scores], runs: Sequence[int], note: str) -> SetView:
    scores = next((found for found in scored if found.symptoms == own.digest()), None)
    aurocs = {(fold(one.name), one.text): one.auroc for one in scores.scores} if scores else {}
    classes = [
        (
            entry.name,
            [(one.text, one.agreement, aurocs.get((fold(entry.name), one.text))) for one in entry.symptoms],
        )
        for entry in own.classes
    ]
    facts = own.provenance.model_dump(mode="json", exclude_none=True)
    provenance = [(name, value if isinstance(value, str) else f"{value}") for name, value in facts.items()]
    words = ""
    if scores:
        words = (
            f"AUROC: cosine of text and image on {scores.images} training images, the class against the others; the set alone "
            f"classifies them with a balanced accuracy of {100 * scores.balanced_accuracy:.2f}%."
        )
    return SetView(path, own.task, own.digest(), classes, provenance, words, runs, note)
