"""Judge a symptom set by what is in it: do answers agree, are phrases verified and visual, do classes have enough of them?

Sets of phrases that an LLM wrote are not usable below the shares in `LEAST`. For a set that a person wrote the person answers:
its figures are for information, and so are those of controls such as class names or random words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.sets import SymptomSet
from vipbench.harness.symptoms.words import is_visual

LEAST = {"consensus": 1 / 3, "verified": 1 / 3, "visual": 1 / 2, "coverage": 1 / 2}
MEANS = {
    "consensus": "of a class's answers contain a symptom, on average",
    "verified": "of the phrases that an LLM was asked to verify passed",
    "visual": "of the phrases have a word for a colour, shape, texture, border, size or place",
    "coverage": "of the classes have at least half of the symptoms that were wanted",
}
WRITTEN_BY_LLM = (
    "vipbench symptoms generate --knowledge symptoms",
    "vipbench symptoms improve",
    "vipbench symptoms merge",
)


class Verdict(BaseModel):
    """The figures of a set, as shares from 0 to 1 (None: cannot be computed), and the reasons why it is not usable, if any.

    Attributes:
        missing: the number of symptoms that were wanted and not found.
    """

    model_config = ConfigDict(extra="forbid")

    usable: bool
    reasons: list[str]
    consensus: float | None
    verified: float | None
    visual: float | None
    coverage: float
    missing: int

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {_percent(getattr(self, name))}" for name in LEAST)
        conclusion = "usable" if self.usable else f"NOT usable: {'; '.join(self.reasons)}"
        return f"verdict: {conclusion} ({figures}, missing {self.missing})"


def judge(symptoms: SymptomSet) -> Verdict:
    """Compute the verdict from a set's phrases, their agreement and beliefs, and the settings in its provenance."""
    provenance = symptoms.provenance.model_dump()
    phrases = [symptom for entry in symptoms.classes for symptom in entry.symptoms]
    wanted = _count(provenance.get("count")) or 1
    enough = [len(entry.symptoms) * 2 >= wanted and bool(entry.symptoms) for entry in symptoms.classes]
    passed = sum(symptom.seen is not None or symptom.truer is not None for symptom in phrases)
    failed = _count(_entry(provenance, "removed", "not verified"))
    figures = {
        "consensus": _mean(_shares_of_answers(symptoms, provenance)),
        "verified": passed / (passed + failed) if passed + failed else None,
        "visual": _mean([float(is_visual(symptom.text)) for symptom in phrases]),
        "coverage": sum(enough) / len(enough),
    }
    strict = provenance["kind"] == "generated" and provenance["how"].startswith(WRITTEN_BY_LLM)
    reasons = [
        f"{_percent(share)} {MEANS[name]}; {_percent(LEAST[name])} are needed"
        for name, share in figures.items()
        if strict and share is not None and share < LEAST[name]
    ]
    missing = sum(max(0, wanted - len(entry.symptoms)) for entry in symptoms.classes)
    rounded = {name: None if value is None else round(value, 3) for name, value in figures.items()}
    return Verdict.model_validate({"usable": not reasons, "reasons": reasons, **rounded, "missing": missing})


def with_verdict(symptoms: SymptomSet) -> SymptomSet:
    """Return the set with its verdict in the provenance."""
    described = symptoms.provenance.model_copy(update={"verdict": judge(symptoms).model_dump()})
    return symptoms.model_copy(update={"provenance": described})


def refuse_unusable(sets: Sequence[SymptomSet], files: Path | Sequence[Path] | None) -> None:
    """Raise UserError for the first set that is not usable."""
    paths = [files] if isinstance(files, Path) else (files or ())
    for symptoms, path in zip(sets, paths, strict=True):
        verdict = judge(symptoms)
        if not verdict.usable:
            raise UserError(
                f"{path}: not usable: {'; '.join(verdict.reasons)}; make a better set, or take it as it is with "
                "run.unusable_symptoms=take"
            )


def _shares_of_answers(symptoms: SymptomSet, provenance: dict[str, Any]) -> list[float]:
    """List for each symptom with an agreement the share of the answers about its class that contain it."""
    samples = _count(provenance.get("samples"))
    return [
        min(1.0, symptom.agreement / asked)
        for entry in symptoms.classes
        if (asked := _count(_entry(provenance, "asked", entry.name)) or samples)
        for symptom in entry.symptoms
        if symptom.agreement is not None
    ]


def _entry(provenance: dict[str, Any], name: str, key: str) -> object:
    table = provenance.get(name)
    return table.get(key) if isinstance(table, dict) else None


def _count(value: object) -> int:
    """Read a count from a provenance, which may hold anything; 0 where it is none."""
    return value if isinstance(value, int) and value > 0 else 0


def _mean(shares: list[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
