"""The outcome of `vipbench symptoms generate`: the set's file, and what to know about it before it is used."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vipbench.harness.system.files import output_errors

if TYPE_CHECKING:
    from vipbench.harness.symptoms.sets import SymptomSet

SHOWN = 10  # classes in a message about missing symptoms, and words of jargon


def finish(symptoms: "SymptomSet", file: Path) -> None:
    """Write the set; print what was removed and what is missing. Exit status 1 when a class has no symptom at all."""
    from vipbench.harness.symptoms.verdict import judge

    with output_errors(file):
        symptoms.save(file)
    counts = [len(entry.symptoms) for entry in symptoms.classes]
    typer.echo(f"{file}: {len(counts)} classes, {sum(counts)} symptoms")
    details = symptoms.provenance.model_dump()
    removed = {reason: count for reason, count in details.get("removed", {}).items() if count}
    if removed:
        typer.echo("removed: " + ", ".join(f"{reason} {count}" for reason, count in removed.items()))
    if details.get("jargon"):
        typer.echo(
            "jargon met: " + ", ".join(f"{word} ({count})" for word, count in list(details["jargon"].items())[:SHOWN])
        )
    missing = details.get("missing", {})
    if missing:
        named = ", ".join(f"{name} {count}" for name, count in list(missing.items())[:SHOWN])
        more = f", and {len(missing) - SHOWN} more classes" if len(missing) > SHOWN else ""
        typer.echo(f"missing after {details['rounds']} rounds: {named}{more}")
    verdict = judge(symptoms)
    if (verification := details.get("verification")) and not verification["used"]:
        typer.echo(
            f"not verified: {verification['model']} answers {verification['controls'] or 0:.0%} of the questions with known "
            "answers right; by chance half of them are"
        )
    typer.echo(str(verdict))
    if 0 in counts:
        typer.echo(f"{counts.count(0)} of the classes have no symptom at all, so the set cannot be used as it is")
        raise typer.Exit(1)
