"""Start ONE run: a config in, a run directory out.

python harness/run.py CONFIG.yaml [key=value ...] [--plugin METHOD.py] [--force]
torchrun --nproc-per-node 2 harness/run.py CONFIG.yaml
accelerate launch harness/run.py CONFIG.yaml
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # started as a file: our modules are vipbench.harness.config and so on, not config

from vipbench.harness.system.console import interruptions_from_here_on

interruptions_from_here_on()

from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from vipbench.harness.commands.options import Plugins  # noqa: E402
from vipbench.harness.runs.execute import execute  # noqa: E402
from vipbench.harness.runs.resolve import load_config  # noqa: E402
from vipbench.harness.system.console import end_with_runner, user_errors  # noqa: E402


def main(
    config: Annotated[Path, typer.Argument(help="a config in YAML")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as data.shots=4 method=coop, or @FILE.yaml")
    ] = None,
    plugin: Plugins = None,
    force: Annotated[
        bool, typer.Option("--force", help="start again although it is finished or has a checkpoint")
    ] = False,
) -> None:
    """Run one config."""
    end_with_runner()
    with user_errors():
        execute(load_config(config, overrides or [], plugin or []), force)


if __name__ == "__main__":
    typer.run(main)
