"""The backbone verbs: `vipbench backbone check NAME [--pretrained P]` and `vipbench backbone list`."""

from typing import Annotated

import typer

from vipbench.harness.commands.options import Pretrained

app = typer.Typer(no_args_is_help=True, help="Backbones: check one, list the medical ones.")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="an open_clip name, hf-hub: id, folder or JSON, as in backbone.name")],
    pretrained: Pretrained = None,
) -> None:
    """Load a backbone, encode a drawn image and a text, and warn where it is not as is known of its family."""
    from vipbench.harness.config.schema import BackboneConfig
    from vipbench.harness.models.backbone import load_backbone
    from vipbench.harness.models.check import describe, warnings

    config = BackboneConfig(name=name, pretrained=pretrained)
    backbone = load_backbone(config)
    facts = describe(config, backbone)
    width = max(map(len, facts))
    for label, fact in facts.items():
        typer.echo(f"{label:{width}}  {fact}")
    for warning in warnings(config, backbone):
        typer.echo(f"warning: {warning}", err=True)


@app.command("list")
def list_() -> None:
    """List medical backbones with their ids, families, licences and modalities."""
    from rich.console import Console
    from rich.table import Table

    from vipbench.harness.models.known import known

    table = Table(
        "NAME", "ID", "FAMILY", "LICENCE", "MODALITY", "STATE", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for entry in known().backbones:
        state = _state(entry.run, entry.note)
        table.add_row(entry.name, entry.id, entry.family, entry.licence, entry.modality, state)
    # Wider than any row, so that each is one line for grep, with its id whole.
    Console(markup=False, highlight=False, width=1000).print(table)


def _state(run: bool, note: str | None) -> str:
    return "; ".join(filter(None, ["run" if run else "not run here", note]))
