"""Print the figures of a file of benchmarks as Markdown tables, for docs/performance.md.

python -m benchmarks.markdown gpu-bench.json
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from vipbench.harness.system.files import read_json


def main(
    path: Annotated[Path, typer.Argument(help="what `python -m benchmarks` or `python -m benchmarks.gpu` wrote")],
) -> None:
    """Print a heading with the machine, and a table for each benchmark."""
    content = read_json(path)
    machine, context = content["context"]["machine"], content["context"]
    typer.echo(f"{context['device']}, {machine}\n")
    for found in content["results"].values():
        typer.echo(table(found) + "\n")


def table(found: dict[str, Any]) -> str:
    """One benchmark's title, rows of equal columns, notes, and the error if there was one."""
    lines = [f"### {found['title']}", ""]
    if found["rows"]:
        columns = list(found["rows"][0])
        lines.append(f"| {' | '.join(name.replace('_', ' ') for name in columns)} |")
        numbers = [any(isinstance(row[name], int | float) for row in found["rows"]) for name in columns]
        lines.append(f"|{'|'.join('---:' if number else '---' for number in numbers)}|")
        lines += [f"| {' | '.join(_cell(row[name]) for name in columns)} |" for row in found["rows"]]
    lines += ["", *found["notes"]] if found["notes"] else []
    lines += ["", f"Failed: {found['error']}"] if found.get("error") else []
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value in four significant digits, "" for None, and yes or no."""
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/")


if __name__ == "__main__":
    typer.run(main)
