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
    from vipbench.harness.models.known import known

    header = ("NAME", "ID", "FAMILY", "LICENCE", "MODALITY", "STATE")
    rows = [
        (entry.name, entry.id, entry.family, entry.licence, entry.modality, _state(entry.run, entry.note))
        for entry in known().backbones
    ]
    # Lines for grep and cut: a rich table wraps them at the terminal's width.
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _state(run: bool, note: str | None) -> str:
    return "; ".join(filter(None, ["run" if run else "not run here", note]))
