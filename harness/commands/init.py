"""The init verb: a config and a sweep for a dataset that is there, and the commands to run next."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipbench.harness.commands.options import check_output
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import output_errors, read_yaml, write_text

if TYPE_CHECKING:
    from vipbench.harness.data.info import DatasetInfo

GRID = Path(__file__).parents[2] / "sweeps" / "own_data.yaml"


def init(
    data: Annotated[str | None, typer.Option(help="the prepared dataset, a folder or URL")] = None,
    backbone: Annotated[str | None, typer.Option(help="open_clip name, or NAME:WEIGHTS, hf-hub: id, folder")] = None,
    symptoms: Annotated[str | None, typer.Option(help="a symptom set; an empty text: there is none yet")] = None,
    out: Annotated[Path, typer.Option(help="the folder for config.yaml and sweep.yaml")] = Path(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there")] = False,
) -> None:
    """Write a config and a sweep for your dataset, and print the commands to run next. Asks for what is not given."""
    from vipbench.harness.data.info import DatasetInfo
    from vipbench.harness.symptoms.sets import SymptomSet

    files = [out / "config.yaml", out / "sweep.yaml"]
    for file in files:
        check_output(file, overwrite)
    data = _answer(data, "--data", "the prepared dataset, a folder or URL")
    info = DatasetInfo.load(data)
    backbone = _answer(backbone, "--backbone", "the backbone, as NAME or NAME:WEIGHTS", "ViT-B-16:openai")
    symptoms = _answer(symptoms, "--symptoms", "the symptom set, a JSON file; empty: there is none yet", "")
    if symptoms:
        SymptomSet.load(Path(symptoms)).texts(info.classes)  # every class has symptoms
    base: dict[str, Any] = {"data": {"path": data, "fewer": "take"}, "backbone": _backbone(backbone)}
    base |= {"symptoms": symptoms} if symptoms else {}
    axes = _axes("train" in info.splits, bool(symptoms))
    for file, text in zip(files, (_config(base, axes, info), _sweep(base, axes, info)), strict=True):
        with output_errors(file):
            write_text(file, text)
    typer.echo(_next(info, data, symptoms, out, len(axes["method"])))


def _answer(given: str | None, option: str, question: str, default: str | None = None) -> str:
    """Return what was given, or ask for it at a terminal. Raises UserError where there is no terminal."""
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UserError(f"{option}: give {question} (there is no terminal to ask at)")
    return str(typer.prompt(question, default=default))


def _backbone(text: str) -> dict[str, str]:
    name, colon, weights = text.rpartition(":")
    split = bool(colon) and name != "hf-hub"
    return {"name": name, "pretrained": weights} if split else {"name": text}


def _axes(train: bool, symptoms: bool) -> dict[str, list[Any]]:
    """Return the axes of `GRID`, without the methods that need training images or a symptom set where there are none."""
    from vipbench.harness.methods.describe import describe

    axes: dict[str, list[Any]] = read_yaml(GRID)["axes"]
    described = map(describe, axes["method"])
    fitting = [
        one.name
        for one in described
        if (symptoms or "symptoms" not in one.needs)
        and (train or (one.family == "untrained" and "training features" not in one.needs))
    ]
    return axes | {"method": fitting} | ({} if train else {"data.shots": [0]})


def _config(base: dict[str, Any], axes: dict[str, list[Any]], info: "DatasetInfo") -> str:
    head = f"# One run on {info.name}: vipbench run config.yaml. `vipbench config --explain` prints every key.\n"
    data = base["data"] | {"shots": axes["data.shots"][-1]}
    return head + _yaml({**base, "data": data, "method": axes["method"][-1], "seed": axes["seed"][0]})


def _sweep(base: dict[str, Any], axes: dict[str, list[Any]], info: "DatasetInfo") -> str:
    head = (
        f"# Methods on {info.name}, few images per class, three seeds each: vipbench sweep run sweep.yaml --out results.\n"
        "# `vipbench methods` lists more methods.\n"
    )
    return head + _yaml({"base": base, "axes": axes})


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def _next(info: "DatasetInfo", data: str, symptoms: str, out: Path, methods: int) -> str:
    """List the commands to run next."""
    config, sweep, results = (shlex.quote(str(out / name)) for name in ("config.yaml", "sweep.yaml", "results"))
    place = shlex.quote(data)
    lines = [
        f"{config} and {sweep} are written, for {methods} methods on {len(info.classes)} classes: {', '.join(info.classes)}",
        "next:",
        f"  vipbench run {config}",
        f"  vipbench sweep run {sweep} --out {results} --pack",
        f"  vipbench table {results} --preset few_shot",
        f"  vipbench report {results} --out {shlex.quote(str(out / 'report.html'))}",
    ]
    if not symptoms:
        lines += [
            "ViP needs a symptom set. Let an LLM write one, or import your own:",
            f"  vipbench symptoms generate --data {place} --url http://127.0.0.1:8000",
            f"  vipbench symptoms import my_symptoms.json --task {shlex.quote(info.name)} --out SET",
            f"  vipbench init --data {place} --symptoms SET --overwrite",
        ]
    return "\n".join(lines)
