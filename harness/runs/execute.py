"""Execute one run from its config to its directory, or fill the feature bank for many."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vipbench.harness.config.identity import run_name
from vipbench.harness.config.schema import Config
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.methods.registry import method_class
from vipbench.harness.runs.data import RunData
from vipbench.harness.runs.directory import is_finished
from vipbench.harness.runs.inputs import Inputs, load_inputs
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.open import open_run
from vipbench.harness.runs.tuning import tuned_job
from vipbench.harness.system.console import setup_logging
from vipbench.harness.system.files import disk_errors

log = logging.getLogger(__name__)


def execute(config: Config, force: bool = False) -> Path:
    """Train and test one config; all ranks call it together. Returns the run directory.

    A finished run is not run again, and an unfinished one goes on from its newest checkpoint, unless `force`. Raises UserError
    for anything that the user can mend, and Stopped where a signal asked for an end, after what was done is written.
    """
    topology = Topology(config.run.device, config.precision, config.run.timeout_minutes)
    try:
        setup_logging(topology.is_main)
        with topology.signals.listening(), topology.fail_together(), disk_errors(config.run.out):
            inputs = load_inputs(config, topology)
            topology.signals.stop_if_asked()
            final = config.run.out / run_name(config, inputs.digests)
            if topology.broadcast(is_finished(final) and not force):
                log.info("%s is finished already (--force runs it again)", final)
                return final
            with open_run(config, final, topology, force) as directory:
                start = tuned_job if config.grid else Job
                job = start(config, inputs, topology, directory)
                job.test(job.train())
            log.info("%s", final)
            return final
    finally:
        topology.close()


def fill_banks(configs: Sequence[Config]) -> None:
    """Compute the image features that runs will read; all ranks call it together."""
    groups: dict[tuple[str, str], list[Config]] = {}
    for config in configs:
        groups.setdefault((config.run.device, config.precision), []).append(config)
    for group in groups.values():
        _fill_banks(group)


def _fill_banks(configs: Sequence[Config]) -> None:
    """Fill banks for runs that share one device setting."""
    first = configs[0]
    topology = Topology(first.run.device, first.precision, first.run.timeout_minutes)
    loaded: dict[tuple[Any, ...], Inputs] = {}
    try:
        setup_logging(topology.is_main)
        with topology.signals.listening(), topology.fail_together(), disk_errors(first.run.out):
            for config in configs:
                reads = (config.data.path, config.backbone, config.symptoms, config.run.compile)
                if reads not in loaded:
                    loaded[reads] = load_inputs(config, topology)
                RunData(config, loaded[reads], topology, method_class(config.method.name)).fill_bank()
    finally:
        topology.close()
