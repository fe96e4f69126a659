"""`vipbench symptoms controls`: a set against its controls, and each of its symptoms on images."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vipbench.harness.commands.options import BackboneName, Device, Pretrained, check_output, load
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.system.files import disk_errors, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from vipbench.harness.report.controls import Result
    from vipbench.harness.report.figures.registry import Chart
    from vipbench.sweeps.controls import Compared, Plan

# In OUT: files, and folders of figures.
TABLE, DATA, FIGURE, EVIDENCE = "controls.md", "controls.csv", "controls.svg", "symptoms.json"
COSINES, IMAGES = "symptom_cosines", "symptom_images"
LISTED = 10  # images at each end in the JSON file
MOST_FIGURES = 40  # in each of these folders; the JSON file has all symptoms


def controls(
    file: Annotated[Path, typer.Argument(metavar="SET", help="a symptom set, a JSON file")],
    data: Annotated[str, typer.Option(help="a prepared dataset (folder or URL)")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="train.* and method.* for ViP's runs, other keys for all"),
    ] = None,
    backbone: BackboneName = None,
    pretrained: Pretrained = None,
    out: Annotated[Path, typer.Option(help="where runs, table and figures go")] = Path("controls_out"),
    description: Annotated[
        Path | None, typer.Option(help="descriptions, as a set; default: description.json beside SET")
    ] = None,
    definition: Annotated[
        Path | None, typer.Option(help="definitions, as a set; default: definition.json beside SET")
    ] = None,
    shots: Annotated[str, typer.Option(help="training images per class for ViP, or all")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="runs of ViP with each kind of texts")] = 5,
    draws: Annotated[int, typer.Option(min=1, help="random texts that are drawn for zero-shot")] = 7,
    metric: Annotated[str, typer.Option(help="the metric that decides")] = "accuracy",
    split: Annotated[str, typer.Option(help="the split whose images the symptoms are looked up on")] = "train",
    images: Annotated[bool, typer.Option(help="draw the images that agree most and least")] = True,
    jobs: Annotated[int | None, typer.Option(min=1, help="processes at a time; default: all runs in this one")] = None,
    device: Device = "auto",
) -> None:
    """Compare a set with class names, random words, WaffleCLIP, shuffled classes and other texts, by zero-shot and by ViP."""
    if backbone is None:
        raise UserError("--backbone: name the model that reads the texts")
    if shots != "all" and not (shots.isdecimal() and int(shots) > 0):
        raise UserError(f"--shots: {shots!r} is neither a number from 1 on nor all")
    check_output(out / TABLE)
    from vipbench.harness.data.info import DatasetInfo
    from vipbench.harness.evaluation.statistics.weighted import WEIGHTED
    from vipbench.harness.report.controls import compare_lines, decisions, thin_evidence, to_markdown
    from vipbench.harness.report.rows import resolve_metric
    from vipbench.sweeps.controls import Plan, run_controls
    from vipbench.sweeps.executors.local import LocalExecutor

    if metric not in WEIGHTED:
        raise UserError(f"--metric: {metric!r} is no metric with a paired test; {did_you_mean(metric, WEIGHTED)}")
    splits = DatasetInfo.load(data).splits
    if split not in splits:
        raise UserError(f"--split: {data} has no split {split!r}; {did_you_mean(split, splits)}")
    plan = Plan(
        file=file,
        data=data,
        backbone={"name": backbone, "pretrained": pretrained},
        out=out,
        knowledge={"description": description, "definition": definition},
        shots=shots if shots == "all" else int(shots),
        seeds=seeds,
        draws=draws,
        device=device,
    )
    compared = run_controls(plan, overrides or [], LocalExecutor(jobs=jobs) if jobs else None)
    resolve_metric(metric, compared.runs)
    results = compare_lines(compared.lines, metric)
    with disk_errors(out):
        written = [*_write_comparison(results, compared, metric, out), *_write_symptoms(plan, split, images)]
    failed = [state for state in compared.states if state.state != "done"]
    for state in failed:
        typer.echo(f"{state.state}: {state.name}: {state.reason}", err=True)
    typer.echo(to_markdown(results, metric))
    names = dict.fromkeys(path.name if path.parent == out else f"{path.parent.name}/" for path in written)
    typer.echo(f"in {out}: {', '.join(names)}")
    for sentence in compared.left_out:
        typer.echo(f"left out: {sentence}")
    if thin := thin_evidence(results):
        typer.echo(f"thin evidence: {'; '.join(thin)}")
    typer.echo("\n".join(["", *decisions(results, metric)]))
    raise typer.Exit(1 if failed else 0)


def _write_comparison(results: "Sequence[Result]", compared: "Compared", metric: str, out: Path) -> list[Path]:
    """Write the comparison as a table, as data and as a figure; returns the files."""
    from vipbench.harness.report.controls import decisions, to_csv, to_markdown
    from vipbench.harness.report.figures.controls import draw_controls
    from vipbench.harness.report.figures.registry import Query

    sentences = "\n".join(decisions(results, metric))
    write_text(out / TABLE, f"{to_markdown(results, metric)}\n{sentences}\n")
    write_text(out / DATA, to_csv(results, metric))
    chart = partial(draw_controls, Query(compared.runs, metric), results)
    return [out / TABLE, out / DATA, _draw(chart, out / FIGURE)]


def _write_symptoms(plan: "Plan", split: str, images: bool) -> list[Path]:
    """Write how each symptom agrees with the images of a split: JSON, boxes of its cosines, and the extreme images."""
    from vipbench.harness.data.reader import Dataset
    from vipbench.harness.report.figures.symptom_images import draw_cosines, draw_images, pages
    from vipbench.harness.symptoms.cosines import describe, measure_cosines
    from vipbench.harness.symptoms.score import score_cosines
    from vipbench.harness.symptoms.sets import SymptomSet

    out, dataset, symptoms = plan.out, Dataset(plan.data), SymptomSet.load(plan.file)
    loaded = load(plan.backbone["name"], plan.backbone["pretrained"], plan.device)
    found = measure_cosines(symptoms, dataset, loaded, split)
    scores, _ = score_cosines(found.cosines, found.samples.labels, found.owners)
    aurocs = [auroc for auroc, _ in scores]
    facts = {"symptoms": symptoms.digest(), "data": dataset.info.digest, "backbone": loaded.digest, "split": split}
    described = facts | {"images": len(found.samples), "scores": describe(found, aurocs, LISTED)}
    write_json(out / EVIDENCE, described)
    boxes = (partial(draw_cosines, found, aurocs, labels, split) for labels in pages(found))
    pictures = (partial(draw_images, found, label, split) for label in range(len(found.classes) if images else 0))
    return [out / EVIDENCE, *_draw_all(boxes, out / COSINES), *_draw_all(pictures, out / IMAGES)]


def _draw_all(draws: "Iterable[Callable[[], Chart]]", folder: Path) -> list[Path]:
    """Draw the first figures of many into a folder, in which those of an earlier comparison are removed."""
    for earlier in folder.glob("[0-9][0-9].svg"):
        earlier.unlink()
    numbered = enumerate(islice(draws, MOST_FIGURES), start=1)
    return [_draw(draw, folder / f"{number:02d}.svg") for number, draw in numbered]


def _draw(draw: "Callable[[], Chart]", path: Path) -> Path:
    from vipbench.harness.report.figures.registry import finished, rendered

    write_bytes(path, rendered(finished(draw), "svg"))
    return path
