"""`vipbench symptoms`: import, show, check, compare, score and prune symptom sets; `generate` and `cache` beside them."""

from pathlib import Path
from typing import Annotated

import typer

from vipbench.harness.commands.cache import cache_app
from vipbench.harness.commands.controls import controls
from vipbench.harness.commands.generate import generate
from vipbench.harness.commands.improve import improve, merge
from vipbench.harness.commands.options import (
    BackboneName,
    BatchSize,
    Device,
    Out,
    Overwrite,
    Pretrained,
    Rename,
    Workers,
    check_output,
    class_names,
    load,
)
from vipbench.harness.system.files import output_errors

app = typer.Typer(no_args_is_help=True, help="Symptom sets: what is visible in the images of each class, in words.")
app.add_typer(cache_app, name="cache")
app.command()(generate)
app.command()(controls)
app.command()(improve)
app.command()(merge)

SetFile = Annotated[Path, typer.Argument(metavar="SET", help="a symptom set, a JSON file")]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help='JSON of the form {"class": ["symptom", ...]}')],
    task: Annotated[str, typer.Option(help="the task the classes belong to")],
    out: Out,
    modality: Annotated[str | None, typer.Option(help="such as dermoscopy or chest X-ray")] = None,
    author: Annotated[str, typer.Option(help="who or what wrote the symptoms")] = "unknown",
    rename: Rename = None,
    overwrite: Overwrite = False,
) -> None:
    """Read symptoms in their plain form and write a symptom set."""
    from vipbench.harness.data.names import renames
    from vipbench.harness.symptoms.sets import import_plain

    check_output(out, overwrite)
    changes = renames(rename or [])
    symptoms = import_plain(file, task=task, modality=modality, author=author, changes=changes)
    with output_errors(out):
        symptoms.save(out)
    count = sum(len(entry.symptoms) for entry in symptoms.classes)
    typer.echo(
        f"{out}: {len(symptoms.classes)} classes, {count} symptoms; `vipbench symptoms check` looks for mistakes"
    )


@app.command()
def show(file: SetFile) -> None:
    """Print a set: its symptoms by class, and its provenance."""
    import json

    from rich.console import Console
    from rich.table import Table

    from vipbench.harness.symptoms.sets import SymptomSet

    symptoms = SymptomSet.load(file)
    table = Table("class", "symptom", title=f"{symptoms.task} ({symptoms.modality or 'modality not given'})")
    for name in ("agreement", "seen", "truer"):
        table.add_column(name, justify="right")
    for entry in symptoms.classes:
        for place, symptom in enumerate(entry.symptoms):
            figures = (symptom.agreement, symptom.seen, symptom.truer)
            table.add_row(
                "" if place else entry.name, symptom.text, *("" if one is None else str(one) for one in figures)
            )
        if not entry.symptoms:
            table.add_row(entry.name, "(none)")
        table.add_section()
    Console(markup=False, highlight=False).print(table)
    for name, value in symptoms.provenance.model_dump(mode="json").items():
        typer.echo(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    typer.echo(f"digest: {symptoms.digest()}")


@app.command()
def check(
    file: SetFile,
    data: Annotated[
        str | None, typer.Option(help="a prepared dataset (folder or URL) whose classes it must match")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="or the classes themselves: A,B,C")] = None,
    backbone: BackboneName = None,
    pretrained: Pretrained = None,
) -> None:
    """Look for mistakes in a set and judge it; exit status 1 for mistakes, or a set that is not usable."""
    from vipbench.harness.symptoms import sets
    from vipbench.harness.symptoms.verdict import judge

    symptoms = sets.SymptomSet.load(file)
    wanted = class_names(data, classes)
    tower = load(backbone, pretrained).text if backbone else None
    problems = sets.check(symptoms, wanted, tower)
    verdict = judge(symptoms)
    typer.echo(str(verdict))
    for problem in problems:
        typer.echo(problem)
    unchecked = [part for part, given in (("classes (--data)", wanted), ("length (--backbone)", tower)) if not given]
    left_out = f"; not looked at: {', '.join(unchecked)}" if unchecked else ""
    typer.echo(f"{file}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}{left_out}")
    if problems or not verdict.usable:
        raise typer.Exit(1)


@app.command()
def diff(
    left: Annotated[Path, typer.Argument(metavar="A", help="a symptom set")],
    right: Annotated[Path, typer.Argument(metavar="B", help="another one")],
) -> None:
    """Print the symptoms that only B has (+), and those that only A has (-)."""
    from vipbench.harness.symptoms.sets import SymptomSet, difference

    lines = difference(SymptomSet.load(left), SymptomSet.load(right))
    typer.echo("\n".join(lines) if lines else "the same symptoms in the same order")


@app.command()
def score(
    file: SetFile,
    data: Annotated[
        str, typer.Option(help="a prepared dataset (folder or URL); its training split is used, and no other")
    ],
    backbone: BackboneName = None,
    pretrained: Pretrained = None,
    json: Annotated[Path | None, typer.Option("--json", help="write the scores, which `prune` reads")] = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
) -> None:
    """Measure on training images how well each symptom separates its class from the rest; the worst come first."""
    from vipbench.harness.data.reader import Dataset
    from vipbench.harness.errors import UserError
    from vipbench.harness.symptoms import score as scoring
    from vipbench.harness.symptoms.sets import SymptomSet
    from vipbench.harness.system.files import write_json

    if backbone is None:
        raise UserError("--backbone: name the model whose images and texts are compared")
    if json:
        check_output(json)
    symptoms, dataset = SymptomSet.load(file), Dataset(data)
    symptoms.texts(dataset.classes)  # before the work begins: every class has its symptoms
    loaded = load(backbone, pretrained, device)
    scores = scoring.score_set(symptoms, dataset, loaded, batch_size=batch_size, workers=workers)
    scoring.show(scores)
    if json:
        with output_errors(json):
            write_json(json, scores.model_dump(mode="json"))
        typer.echo(
            f"{json}: the scores; drop the worst with: vipbench symptoms prune {file} {json} --below 0.5 --out SET"
        )


@app.command()
def prune(
    file: SetFile,
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="what `score --json` wrote for this set")],
    out: Out,
    below: Annotated[float, typer.Option(min=0, max=1, help="drop symptoms with an AUROC below this")] = 0.5,
    keep: Annotated[int, typer.Option(min=1, help="but leave each class at least so many, its best")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Drop the symptoms that score worst and write what is left as a new set."""
    from vipbench.harness.symptoms.score import Scores, prune_set
    from vipbench.harness.symptoms.sets import SymptomSet

    check_output(out, overwrite)
    symptoms = SymptomSet.load(file)
    pruned, dropped = prune_set(symptoms, Scores.load(scores), below, keep)
    with output_errors(out):
        pruned.save(out)
    for name, text in dropped:
        typer.echo(f"dropped: {name}: {text}")
    typer.echo(f"{out}: {len(dropped)} symptoms dropped")
