"""The interface of an executor.

A new one is a subclass in a file of its own, with a `kind` of its own, named in `AnyExecutor` (sweeps/runner.py) and in `Kind` of
harness/commands/sweep.py, whose `run` has its options.
"""

from collections.abc import Sequence
from pathlib import Path

from vipbench.harness.config.validation import Section
from vipbench.sweeps.units import Unit


class Executor(Section):
    """A way to run units. Its settings are plain values, so that the record of a sweep's last launch can hold them."""

    @property
    def exclusive(self) -> bool:
        """True where all other commands are kept off a sweep while it works; otherwise they are only while it plans."""
        return True

    def run(self, out: Path, units: Sequence[Unit]) -> None:
        """Run units of the sweep at `out`, or submit them. A run that fails is recorded, and the rest go on."""
        raise NotImplementedError
