"""The methods verb: `vipbench methods` lists all of them, `vipbench methods NAME` shows one."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipbench.harness.commands.options import BackboneName, Plugins, Pretrained
from vipbench.harness.errors import UserError

if TYPE_CHECKING:
    from vipbench.harness.methods.describe import Description

ROOT = Path(__file__).parents[2]
BACKBONE = ROOT / "harness" / "demo" / "model"
SYMPTOMS = ROOT / "symptoms_cache" / "demo" / "lesions.json"
SHOTS = 16  # where the count of trained numbers depends on them
TRAINS = {
    "prompts": "prompts",
    "adapters": "adapter or head",
    "image_tower": "in the image tower",
    "untrained": "nothing",
}


def methods(
    name: Annotated[str | None, typer.Argument(help="a method; default: list them all")] = None,
    backbone: BackboneName = None,
    pretrained: Pretrained = None,
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List the methods, with what each trains and needs; or show one, with its options and recipes."""
    from vipbench.harness.methods.describe import describe
    from vipbench.harness.methods.registry import load_plugins, method_names

    load_plugins(plugin or [])
    described = []
    for one in [name] if name else method_names():
        try:
            described.append(describe(one))
        except UserError as error:  # an option without a default, or an installed package that cannot be imported
            if name:
                raise
            typer.echo(f"left out: {one}: {error}", err=True)
    counts = _counts([one.name for one in described], backbone, pretrained)
    entries = [_plain(one, count) for one, count in zip(described, counts, strict=True)]
    if name:
        entries[0] |= _details(name, backbone or "ViT-B-16")
    if as_json:
        typer.echo(json.dumps(entries[0] if name else entries, indent=2, ensure_ascii=False))
    elif name:
        _show(entries[0])
    else:
        _list(entries, backbone)


def _counts(names: list[str], backbone: str | None, pretrained: str | None) -> list[int | str]:
    """The numbers that each method trains on the task of the embedded benchmark, or the reason why it cannot."""
    from vipbench.harness.commands.options import load
    from vipbench.harness.methods.describe import trained_numbers
    from vipbench.harness.runs.inputs import make_task
    from vipbench.harness.symptoms.sets import load_sets

    sets = load_sets(SYMPTOMS)
    task = make_task([entry.name for entry in sets[0].classes], sets)
    loaded, counts = load(backbone or str(BACKBONE), pretrained, "cpu"), list[int | str]()
    for name in names:
        try:
            counts.append(trained_numbers(name, task, loaded, SHOTS))
        except UserError as error:
            counts.append(str(error))
    return counts


def _plain(one: "Description", count: int | str) -> dict[str, Any]:
    fits = isinstance(count, int)
    return asdict(one) | {"trained_numbers": count if fits else None, "does_not_fit": None if fits else count}


def _details(name: str, backbone: str) -> dict[str, Any]:
    from vipbench.harness.methods.describe import options, protocol, recipes

    return {
        "options": [asdict(option) for option in options(name)],
        "recipes": recipes(name, backbone),
        "docstring": protocol(name),
    }


def _list(entries: list[dict[str, Any]], backbone: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from vipbench.harness.methods.describe import short_paper

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("method", "paper", "trains", "numbers", "needs", "packed"):
        table.add_column(title, justify="right" if title == "numbers" else "left", overflow="fold")
    for entry in entries:
        count = entry["trained_numbers"]
        numbers = "–" if count is None else f"{count:,}"
        needs, packed = ", ".join(entry["needs"]), "no" if entry["not_packed"] else "yes"
        table.add_row(entry["name"], short_paper(entry["paper"]), _trains(entry), numbers, needs, packed)
    console = Console(highlight=False, markup=False)
    console.print(table)
    where = backbone or "the embedded benchmark's model"
    console.print(
        f"numbers: trained on {where}, for the benchmark's four classes and {SHOTS} shots, with default options"
    )
    for reason in dict.fromkeys(entry["not_packed"] for entry in entries if entry["not_packed"]):
        console.print(
            f"not packed: {', '.join(one['name'] for one in entries if one['not_packed'] == reason)}: {reason}"
        )
    for entry in entries:
        if entry["does_not_fit"]:
            console.print(f"{entry['name']} does not fit: {entry['does_not_fit']}")


def _trains(entry: dict[str, Any]) -> str:
    fitted = entry["family"] == "untrained" and "training features" in entry["needs"]
    return "nothing; it is fitted" if fitted else TRAINS[entry["family"]]


def _show(entry: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(
        re.sub(r"(?<!\n)\n(?![\n ]|[A-Z][a-z ]+: )", " ", entry["docstring"]) + "\n"
    )  # paragraphs in one line
    count = entry["trained_numbers"]
    console.print(f"trains:  {_trains(entry)}, {entry['does_not_fit'] if count is None else f'{count:,} numbers'}")
    console.print(f"needs:   {', '.join(entry['needs'])}")
    console.print(f"packed:  {'no: ' + entry['not_packed'] if entry['not_packed'] else 'yes'}")
    console.print("\noptions (method.NAME=VALUE)" if entry["options"] else "\nno options")
    for option in entry["options"]:
        comment = f"  # {option['comment']}" if option["comment"] else ""
        console.print(f"  {option['name']}: {option['values']} = {json.dumps(option['default'])}{comment}")
    console.print(
        "\nrecipes (recipe=KIND, train.NAME=VALUE)" if entry["recipes"] else "\nno recipes: nothing is trained"
    )
    for kind, settings in entry["recipes"].items():
        console.print(f"  {kind}: " + ", ".join(f"{key}={json.dumps(value)}" for key, value in settings.items()))
