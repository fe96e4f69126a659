"""Open a run: its directory, its logs and its trackers; the same way for a run and for packed runs."""

import logging
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vipbench.harness.config.schema import Config
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.runs.directory import RunDirectory, log_file, new_run
from vipbench.harness.runs.tracking import FOLDER as TRACKING
from vipbench.harness.runs.tracking import tracking
from vipbench.harness.system.console import log_to
from vipbench.harness.system.files import disk_errors
from vipbench.harness.system.plain_values import flatten

log = logging.getLogger(__name__)


@contextmanager
def open_run(config: Config, final: Path, topology: Topology, restart: bool = False) -> Iterator[RunDirectory | None]:
    """Open a run's directory for rank 0 to write and track; every rank logs into it, and all fail together.

    It becomes `final` when the block succeeds; see `vipbench.harness.runs.directory.new_run`.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(new_run(final, restart)) if topology.is_main else None
        folder = topology.broadcast(directory.path if directory else None)
        stack.enter_context(log_to(log_file(folder, topology.rank)))
        stack.enter_context(topology.fail_together())
        stack.enter_context(disk_errors(folder))
        log.debug("rank %d of %d on %s, %s", topology.rank, topology.world, platform.node(), topology.device)
        if directory and config.run.tracking:
            names, project, settings = config.run.tracking, config.run.tracking_project, flatten(config.to_mapping())
            trackers = stack.enter_context(tracking(names, project, final.name, folder / TRACKING, settings))
            directory.listeners.append(trackers.log)
        yield directory
