"""The executor `in_process`: units one after the other in this process, which imports and starts everything once.

vipbench sweep run GRID --out DIR --executor in_process --pack

For many short runs on one device. A run that kills the process ends the sweep; the same command goes on with the others.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from vipbench.harness.errors import UserError
from vipbench.harness.system.console import log_to
from vipbench.harness.system.progress import Progress
from vipbench.sweeps.executors.base import Executor
from vipbench.sweeps.units import CONFIGS, Unit, record_end

log = logging.getLogger(__name__)

OURS = "vipbench"  # the logger of all our messages


class InProcessExecutor(Executor):
    """Units one after the other in this process."""

    kind: Literal["in_process"] = "in_process"

    def run(self, out: Path, units: Sequence[Unit]) -> None:
        """Run units. Raises Stopped where a signal asked for an end."""
        failures, runs = 0, sum(len(unit.names) for unit in units)
        with Progress("sweep", runs, "runs") as progress:
            for unit in units:
                with log_to(unit.log), _quiet():
                    reason = _run(out, unit)
                failures += record_end(out, unit, 1 if reason else 0, reason)
                progress.advance(len(unit.names), note=f"{failures} failed" if failures else None)


def _run(out: Path, unit: Unit) -> str | None:
    """Run a unit; returns why it failed, None where it did not, or its runs have recorded it themselves."""
    from vipbench.harness.runs.execute import execute  # imports torch
    from vipbench.harness.runs.packed import execute_together
    from vipbench.harness.runs.resolve import load_config

    try:
        configs = [load_config(out / CONFIGS / f"{name}.yaml") for name in unit.names]
        if len(configs) > 1:
            execute_together(configs)
        else:
            execute(configs[0])
    except UserError as error:
        return str(error)
    except Exception as error:  # the other runs go on
        log.exception("%s failed", ", ".join(unit.names))
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep messages of single runs that are no warnings off the screen; their logs have them."""

    def louder(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or not record.name.startswith(OURS)

    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    for handler in handlers:
        handler.addFilter(louder)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(louder)
