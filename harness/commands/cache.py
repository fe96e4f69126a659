"""`vipbench symptoms cache`: look after the record of the LLM's answers."""

from pathlib import Path
from typing import Annotated

import typer

from vipbench.harness.commands.options import check_output
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.system.files import output_errors

cache_app = typer.Typer(no_args_is_help=True, help="Look after the record of the LLM's answers.")

File = Annotated[Path, typer.Argument(help="the response cache, an SQLite file")]
Model = Annotated[str | None, typer.Option(help="only this model's answers")]
Revision = Annotated[str | None, typer.Option(help="only this revision's")]
ServerVersion = Annotated[str | None, typer.Option(help="only those of this version of the server")]


@cache_app.command()
def stats(file: File) -> None:
    """Count answers and tokens of each model."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "revision", "server")
    for name in ("answers", "prompt tokens", "answer tokens", "cut off"):
        table.add_column(name, justify="right")
    with _open(file) as cache:
        for identity, *counts in cache.stats():
            table.add_row(*identity, *(f"{count:,}" for count in counts))
    Console().print(table)


@cache_app.command()
def export(
    file: File,
    out: Annotated[Path, typer.Argument(help="the JSON lines to write")],
    model: Model = None,
    revision: Revision = None,
    server_version: ServerVersion = None,
) -> None:
    """Write the answers as JSON lines; the same answers give the same bytes."""
    check_output(out)
    with _open(file) as cache, output_errors(out):
        wanted = cache.matching(model, revision, server_version)
        typer.echo(f"{out}: {cache.export(out, wanted)} answers")


@cache_app.command("import")
def load(
    file: Annotated[Path, typer.Argument(help="the response cache, an SQLite file; made when missing")],
    exported: Annotated[Path, typer.Argument(help="JSON lines from `export`")],
) -> None:
    """Read an export; an answer that is on record already is kept."""
    with ResponseCache(file) as cache:
        added, kept = cache.load(exported)
    typer.echo(f"{file}: {added} answers added, {kept} were there")


@cache_app.command()
def prune(file: File, model: Model = None, revision: Revision = None, server_version: ServerVersion = None) -> None:
    """Remove answers by model, revision or server version."""
    if not (model or revision or server_version):
        raise UserError("name the answers to remove: --model, --revision or --server-version (see `cache stats`)")
    with _open(file) as cache:
        typer.echo(f"{file}: {cache.prune(cache.matching(model, revision, server_version))} answers removed")


@cache_app.command()
def verify(file: File) -> None:
    """Check the file, and every answer's key against its request."""
    with _open(file) as cache:
        typer.echo(f"{file}: {cache.verify()} answers, all sound")


def _open(file: Path) -> ResponseCache:
    if not file.exists():
        raise UserError(f"{file}: no such response cache")
    return ResponseCache(file)
