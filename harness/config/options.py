"""Options of the command line that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="a Python file that registers a method; repeatable")
]
