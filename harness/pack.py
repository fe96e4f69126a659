"""Start several runs that train together in one process: python harness/pack.py A.yaml B.yaml ...

`vipbench sweep run --pack` starts this; see harness/runs/packed.py.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # started as a file: our modules are vipbench.harness.config and so on, not config

from vipbench.harness.system.console import interruptions_from_here_on

interruptions_from_here_on()

from typing import Annotated  # noqa: E402

import typer  # noqa: E402

from vipbench.harness.errors import UserError  # noqa: E402
from vipbench.harness.runs.packed import execute_together  # noqa: E402
from vipbench.harness.runs.resolve import load_config  # noqa: E402
from vipbench.harness.system.console import end_with_runner, user_errors  # noqa: E402


def main(configs: Annotated[list[Path], typer.Argument(help="configs of one group, in YAML")]) -> None:
    """Run configs together."""
    end_with_runner()
    with user_errors():
        failures = execute_together([load_config(path) for path in configs])
        if failures:
            raise UserError(f"{len(failures)} of {len(configs)} runs failed: {next(iter(failures.values()))}")


if __name__ == "__main__":
    typer.run(main)
