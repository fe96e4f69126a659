"""The verbs that show what a run learned and did: `vipbench plot KIND DIR`, `explain RUN` and `predict RUN IMAGE...`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipbench.harness.commands.options import MovedPlugins, check_output, listed_names
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import output_errors

if TYPE_CHECKING:
    from vipbench.harness.report.figures.cards import Case

FORMATS = (".svg", ".png")


class Kind(StrEnum):
    """Kinds of figures."""

    few_shot = "few_shot"
    bars = "bars"
    ablation = "ablation"
    confusion = "confusion"
    roc = "roc"
    reliability = "reliability"
    risk_coverage = "risk_coverage"
    training = "training"
    cost = "cost"
    critical_difference = "critical_difference"
    subgroups = "subgroups"
    attention = "attention"
    card = "card"
    gallery = "gallery"


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")]
Data = Annotated[str | None, typer.Option(help="where the run's dataset lies now; default: where it lay then")]


def plot(
    kind: Annotated[Kind, typer.Argument(help="what to draw; docs/figures.md shows each")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a sweep's --out, a directory of run directories, or one run")
    ],
    filters: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE...", help="draw only such runs: method=vip shots=16")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the file, .svg or .png; default: KIND.svg")] = None,
    metric: Annotated[str | None, typer.Option(help="a metric of the runs; default: accuracy")] = None,
    rows: Annotated[
        str | None, typer.Option(help="config values that name a line or bar: A,B; default: method")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="config values that name a panel: A,B")] = None,
    by: Annotated[str | None, typer.Option(help="subgroups: a column of the predictions; default: class")] = None,
    image: Annotated[str | None, typer.Option(help="card: the id of a test image; default: the surest")] = None,
    images: Annotated[int | None, typer.Option(min=1, max=24, help="gallery: how many; default: 6")] = None,
    data: Data = None,
) -> None:
    """Draw a figure of runs as SVG or PNG, with 95% intervals where it has any, and its n."""
    out = out or Path(f"{kind.value}.svg")
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out: {out} is neither .svg nor .png")
    check_output(out)
    from vipbench.harness.report.figures.data import load
    from vipbench.harness.report.figures.registry import Query, kinds, render
    from vipbench.harness.system.files import disk_errors, write_bytes

    asked: dict[str, Any] = {"metric": metric, "rows": listed_names(rows), "columns": listed_names(columns), "by": by}
    asked |= {"image": image, "images": images, "data": data}
    given = {name: value for name, value in asked.items() if value is not None}
    if unread := sorted(set(given) - kinds()[kind.value].options):
        raise UserError(f"--{unread[0]} has no effect on {kind.value}; leave it out")
    with disk_errors(directory):
        content = render(kind.value, Query(load(directory, filters or []), **given), out.suffix.lower()[1:])
    with output_errors(out):
        write_bytes(out, content)
    typer.echo(f"{out}")


def explain(
    run: RunPath,
    worth: Annotated[bool, typer.Option(help="measure each symptom's worth, which reads the dataset")] = True,
    split: Annotated[str, typer.Option(help="the split to measure it on")] = "test",
    data: Data = None,
    plugin: MovedPlugins = None,
) -> None:
    """Print the weight of each symptom in a run's merge prompt, and its worth on images."""
    from vipbench.harness.report.explain import explain_run, show
    from vipbench.harness.runs.api import Run

    show(explain_run(Run.load(run, plugin or []), split if worth else None, data))


def predict(
    run: RunPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="image files, DICOM files, folders of them")],
    out: Annotated[Path | None, typer.Option(help="a JSON file to write; default: print it")] = None,
    card: Annotated[Path | None, typer.Option(help="a folder for a diagnosis card (SVG) of each image")] = None,
    plugin: MovedPlugins = None,
) -> None:
    """Predict single images, with the cosine of each symptom as evidence: JSON, and a card."""
    if out:
        check_output(out)
    import json

    from vipbench.harness.data.files import image_files
    from vipbench.harness.report.single_images import predict_files, to_json
    from vipbench.harness.runs.api import Run
    from vipbench.harness.system.files import write_json

    loaded, files = Run.load(run, plugin or []), image_files(images)
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(predict_files(loaded, files), start=1):
        rows.append(to_json(case))
        if card:
            prefix = f"{number:0{len(str(len(files)))}d}_" if len(files) > 1 else ""
            _write_card(case, card / f"{prefix}{Path(case.name).stem}.svg")
    found = {"run": loaded.path.name, "classes": loaded.classes, "images": rows}
    if out:
        with output_errors(out):
            write_json(out, found)
    else:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


def _write_card(case: "Case", path: Path) -> None:
    from functools import partial

    from vipbench.harness.report.figures.cards import draw_card
    from vipbench.harness.report.figures.registry import finished, rendered
    from vipbench.harness.system.files import write_bytes

    content = rendered(finished(partial(draw_card, case)), "svg")
    with output_errors(path):
        write_bytes(path, content)
