"""Merge the symptom sets of several LLMs (or people) into one: by vote, or by worth on training images.

Near-same wordings of a class (`same_words`) are one symptom, in the words of the first set that has it.

    vipbench symptoms merge A B C --out SET
    vipbench symptoms merge A B C --by worth --data DIR --backbone ViT-B-16 --pretrained openai --out SET
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.improve import parent_of
from vipbench.harness.symptoms.score import Scores
from vipbench.harness.symptoms.sets import ClassSymptoms, SetProvenance, Symptom, SymptomSet, fold
from vipbench.harness.symptoms.verdict import with_verdict
from vipbench.harness.symptoms.words import same_words

LEAST_VOTES = 2
LEAST_AUROC = 0.5


@dataclass
class _Merged:
    """A symptom of a class, the numbers of the sets that hold it, its best place in them, and the sum of its agreements."""

    text: str
    sets: set[int]
    place: int
    agreement: int | None


def check_mergeable(sets: Sequence[SymptomSet], names: Sequence[str]) -> None:
    """Raise UserError where there are fewer than two sets, two are the same, or their classes differ (names set and class)."""
    if len(sets) < 2:
        raise UserError("merge takes two symptom sets or more")
    first = {fold(entry.name): entry.name for entry in sets[0].classes}
    digests: dict[str, str] = {}
    for symptoms, name in zip(sets, names, strict=True):
        own = {fold(entry.name): entry.name for entry in symptoms.classes}
        if own.keys() != first.keys():
            odd = next(iter(first.keys() - own.keys() or own.keys() - first.keys()))
            lacks, has = (name, names[0]) if odd in first else (names[0], name)
            raise UserError(
                f"{lacks}: no class {(first | own)[odd]!r}, which {has} has; merge takes sets of the same classes"
            )
        if (digest := symptoms.digest()) in digests:
            raise UserError(f"{name} holds the same symptoms as {digests[digest]}; merge takes different sets")
        digests[digest] = name


def unite(sets: Sequence[SymptomSet]) -> SymptomSet:
    """Collect the symptoms of all sets."""
    return _made(sets, {"by": "union"}, lambda _, own: own)


def by_vote(sets: Sequence[SymptomSet], count: int | None = None) -> SymptomSet:
    """Keep the symptoms that several sets hold, at most `count` of a class, most votes first, then the earlier in their sets.

    A class whose sets share no symptom keeps the first of each set; the provenance lists it in `without_a_vote`.
    """
    alone: list[str] = []

    def chosen(name: str, own: list[_Merged]) -> list[_Merged]:
        found = [symptom for symptom in own if len(symptom.sets) >= LEAST_VOTES]
        if own and not found:
            alone.append(name)
            return [symptom for symptom in own if symptom.place == 0]
        return sorted(found, key=lambda symptom: (-len(symptom.sets), symptom.place))

    return _made(sets, {"by": "vote", "without_a_vote": alone}, chosen, count)


def by_worth(sets: Sequence[SymptomSet], scores: Scores, count: int | None = None) -> SymptomSet:
    """Keep the symptoms of the highest AUROC, at most `count` of a class; from 0.5 on, but the best one of each class at least.

    Args:
        scores: of `unite(sets)`, on training images.
    """
    assert scores.symptoms == unite(sets).digest(), "the scores are those of the united sets"
    aurocs = {(fold(score.name), score.text): score.auroc for score in scores.scores}

    def chosen(name: str, own: list[_Merged]) -> list[_Merged]:
        def worth(symptom: _Merged) -> float:
            return aurocs[fold(name), symptom.text] or 0.0

        ranked = sorted(own, key=lambda symptom: -worth(symptom))
        return [symptom for symptom in ranked if worth(symptom) >= LEAST_AUROC] or ranked[:1]

    return _made(sets, {"by": "worth", "data": scores.data, "backbone": scores.backbone}, chosen, count)


def _made(
    sets: Sequence[SymptomSet],
    details: dict[str, Any],
    chosen: Callable[[str, list[_Merged]], list[_Merged]],
    count: int | None = None,
) -> SymptomSet:
    """Make the set of the symptoms that `chosen` picks of each class."""
    classes = []
    for entry in sets[0].classes:
        parts = [part for symptoms in sets for part in symptoms.classes if fold(part.name) == fold(entry.name)]
        most = count or max(len(part.symptoms) for part in parts)
        own = chosen(entry.name, _united(parts))
        own = own if details["by"] == "union" else own[:most]
        symptoms = [Symptom(text=symptom.text, agreement=symptom.agreement) for symptom in own]
        classes.append(ClassSymptoms(name=entry.name, symptoms=symptoms))
    origins = [symptoms.provenance for symptoms in sets]
    kinds = {origin.kind for origin in origins}
    provenance = {
        "kind": kinds.pop() if len(kinds) == 1 else "generated",
        "author": ", ".join(dict.fromkeys(origin.author for origin in origins)),
        "created": max(origin.created for origin in origins),
        "how": f"vipbench symptoms merge --by {details['by']}",
        "parents": [parent_of(symptoms) for symptoms in sets],
        "merged": {"count": count, **details},
        **_wanted(origins, count),
    }
    merged = SymptomSet(
        task=sets[0].task,
        modality=next((symptoms.modality for symptoms in sets if symptoms.modality), None),
        classes=classes,
        provenance=SetProvenance.model_validate(provenance),
    )
    return with_verdict(merged)


def _wanted(origins: Sequence[SetProvenance], count: int | None) -> dict[str, int]:
    """The samples that agreements of a merged set are out of, and the symptoms wanted for each class, where all sets state them.

    The verdict reads them, so that a merged set is held to what its parts were.
    """
    stated = [origin.model_dump() for origin in origins]
    found = {key: [entry[key] for entry in stated if isinstance(entry.get(key), int)] for key in ("samples", "count")}
    found = {key: values for key, values in found.items() if len(values) == len(stated)}
    wanted = {"samples": sum(found["samples"])} if "samples" in found else {}
    return wanted | ({"count": count or max(found["count"])} if "count" in found else {})


def _united(parts: Sequence[ClassSymptoms]) -> list[_Merged]:
    """Collect a class's symptoms out of the sets, near-same wordings as one."""
    found: list[_Merged] = []
    for number, part in enumerate(parts):
        for place, symptom in enumerate(part.symptoms):
            same = next((other for other in found if same_words(other.text, symptom.text)), None)
            if same is None:
                found.append(_Merged(symptom.text, {number}, place, symptom.agreement))
                continue
            both = (same.agreement, symptom.agreement)
            same.agreement = None if None in both else sum(value for value in both if value is not None)
            same.sets.add(number)
            same.place = min(same.place, place)
    return found
