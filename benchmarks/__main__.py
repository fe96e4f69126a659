"""All benchmarks, as ratios measured in one run: tables on the screen, and a JSON file with the hardware's name.

    python -m benchmarks [NAME ...] [--out FILE]        (make bench)

Each runs in a process of its own. Nothing else should run on the machine.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import Result, context
from vipbench.harness.system.files import read_json, write_json

NAMES = ("training_step", "tower_step", "sweep", "packing", "bank", "reader", "compile", "collect", "symptom_client")
OUT = Path("bench.json")


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"which of {', '.join(NAMES)}; default: all")] = None,
    out: Annotated[Path, typer.Option(help="where the figures go")] = OUT,
) -> None:
    """Measure, print and write; what the file holds of other benchmarks stays."""
    found: dict[str, Any] = read_json(out)["results"] if out.is_file() else {}
    for name in names or NAMES:
        if name not in NAMES:
            raise typer.BadParameter(f"{name!r}: choose from {', '.join(NAMES)}")
        command = [sys.executable, "-m", "benchmarks.__main__", "--", name]
        found[name] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        Result(**found[name]).show()
        write_json(out, {"context": context(), "results": found})
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:  # one benchmark, for the process above
        print(json.dumps(asdict(importlib.import_module(f"benchmarks.{sys.argv[2]}").measure())))
    else:
        typer.run(main)
