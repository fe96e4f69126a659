"""The `vipbench` command; each verb is a few lines that call a module. Heavy packages are imported inside the verbs."""

import os
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vipbench.harness.commands import (
    backbone,
    bank,
    data,
    demo,
    doctor,
    figures,
    init,
    methods,
    page,
    report,
    serve,
    sweep,
    symptoms,
)
from vipbench.harness.commands.options import MovedPlugins, Plugins, Rename
from vipbench.harness.data.choices import OnError
from vipbench.harness.errors import UserError
from vipbench.harness.system.console import interruptions, setup_logging, user_errors


class Verbs(TyperGroup):
    """The verbs; Ctrl-C ends each in one line, before typer makes something else of it."""

    def invoke(self, ctx: Any) -> Any:
        with interruptions():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vipbench {version('vipbench')}")
        raise typer.Exit


@app.callback()
def options(
    shown: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Benchmark methods that adapt CLIP-like models to medical images with prompts."""


ConfigFile = Annotated[Path, typer.Argument(help="a config in YAML")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, such as data.shots=4 method=coop, or @FILE.yaml")
]


class Device(StrEnum):
    """Names of devices, as in `run.device`."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


app.command()(init.init)
app.command()(data.prepare)
app.command()(data.index)
app.command()(data.inspect)
app.command()(data.datasets)
app.command()(report.table)
app.command()(report.compare)
app.command()(report.runs)
app.command()(page.report)
app.command()(page.bundle)
app.command()(figures.plot)
app.command()(figures.explain)
app.command()(figures.predict)
app.command()(demo.demo)
app.command()(methods.methods)
app.command()(doctor.doctor)
app.add_typer(sweep.app, name="sweep")
app.add_typer(bank.app, name="bank")
app.add_typer(backbone.app, name="backbone")
app.command()(serve.serve)
app.add_typer(symptoms.app, name="symptoms")


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    plugin: Plugins = None,
    force: Annotated[bool, typer.Option("--force", help="run again although it is finished")] = False,
) -> None:
    """Run one config: train, test, write the run directory."""
    from vipbench.harness.runs.execute import execute
    from vipbench.harness.runs.resolve import load_config

    execute(load_config(config, overrides or [], plugin or []), force)


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="a config in YAML")] = None,
    overrides: Overrides = None,
    plugin: Plugins = None,
    explain: Annotated[bool, typer.Option("--explain", help="print every key with its values and meaning")] = False,
) -> None:
    """Print a config resolved: every default filled in; or explain every key."""
    from vipbench.harness.commands.explain_config import explain as explanation
    from vipbench.harness.runs.resolve import load_config

    if explain:
        typer.echo(explanation(), nl=False)
    elif config is None:
        raise UserError("name a config, a YAML file, or give --explain")
    else:
        typer.echo(load_config(config, overrides or [], plugin or []).to_yaml(), nl=False)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="a finished run directory")],
    data: Annotated[str, typer.Option(help="a prepared dataset, a folder or URL")],
    split: Annotated[str, typer.Option(help="the split to score")] = "test",
    symptoms: Annotated[Path | None, typer.Option(help="a symptom set, where the run's own does not fit")] = None,
    device: Annotated[Device, typer.Option(help="where to compute; auto is a GPU where there is one")] = Device.auto,
    on_error: Annotated[OnError | None, typer.Option(help="what a damaged image does; default: as in the run")] = None,
    rename: Rename = None,
    plugin: MovedPlugins = None,
) -> None:
    """Score a run's saved prompts on another dataset."""
    from vipbench.harness.data.names import renames
    from vipbench.harness.runs.transfer import evaluate_run

    damaged, changes = on_error.value if on_error else None, renames(rename or [])
    evaluate_run(run, data, split, symptoms, device.value, damaged, plugin or [], changes)


def main() -> None:
    """Entry point of the `vipbench` command."""
    setup_logging()
    with user_errors():
        app([_expand_home(argument) for argument in sys.argv[1:]])


def _expand_home(argument: str) -> str:
    """Expand "~" in an argument such as "--out=~/x" too; the shell does so only where a word begins."""
    option, equals, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and value.startswith("~") else os.path.expanduser(argument)
