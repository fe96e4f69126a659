"""The bank verbs: `vipbench bank ls|verify|prune DIR` and `vipbench bank build CONFIG...`.

DIR is the .bank folder beside run directories. `torchrun --nproc-per-node 8 -m vipbench bank build CONFIG...` shares the work.
"""

from pathlib import Path
from typing import Annotated

import typer

from vipbench.harness.commands.options import Plugins

app = typer.Typer(no_args_is_help=True, help="Stored image features, shared by the runs of a folder.")
DAMAGED = "facts.json is missing or damaged; `vipbench bank prune` can remove it"
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the .bank folder beside run directories")]


@app.command("ls")
def list_(folder: Folder) -> None:
    """List banks, the one used longest ago first."""
    from vipbench.harness.features.cache import list_banks
    from vipbench.harness.system.files import disk_errors

    with disk_errors(folder):
        for bank in list_banks(folder):
            size = f"{bank.size / 2**20:.1f} MiB"
            if bank.facts is None:
                typer.echo(f"{bank.folder.name}  {DAMAGED}, {size}")
                continue
            facts = ", ".join(
                f"{name}={value}" for name, value in bank.facts.items() if name in ("split", "precision", "dim")
            )
            augmented = "augmented" if "augmentation" in bank.facts else "evaluation"
            typer.echo(f"{bank.folder.name}  {augmented:10}  {bank.records} views, {size}  {facts}")


@app.command()
def verify(folder: Folder) -> None:
    """Check every stored feature; exits with 1 when one is damaged (it would be computed again when it is needed)."""
    from vipbench.harness.features.cache import list_banks
    from vipbench.harness.system.files import disk_errors

    with disk_errors(folder):
        banks = list_banks(folder)
    for bank in banks:
        if bank.facts is None:
            typer.echo(f"{bank.folder.name}: {DAMAGED}")
        else:
            short = f", too short: {', '.join(bank.short)}" if bank.short else ""
            typer.echo(f"{bank.folder.name}: {bank.records} whole, {bank.damaged} damaged{short}")
    raise typer.Exit(1 if any(bank.damaged or bank.short or bank.facts is None for bank in banks) else 0)


@app.command("prune")
def prune_(folder: Folder, keep_gib: Annotated[float, typer.Option(min=0, help="how much may stay, in GiB")]) -> None:
    """Remove the banks used longest ago until the rest fits."""
    from vipbench.harness.features.cache import prune
    from vipbench.harness.system.files import disk_errors

    with disk_errors(folder):
        for path in prune(folder, int(keep_gib * 2**30)):
            typer.echo(f"removed {path}")


@app.command()
def build(
    configs: Annotated[list[Path], typer.Argument(help="configs in YAML, such as those in a sweep's configs/")],
    plugin: Plugins = None,
) -> None:
    """Compute the image features that runs will read, before they start."""
    from vipbench.harness.runs.execute import fill_banks
    from vipbench.harness.runs.resolve import load_config

    fill_banks([load_config(path, (), plugin or []) for path in configs])
