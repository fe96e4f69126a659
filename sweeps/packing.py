"""Grouping of runs that can train together in one process (harness/pack.py)."""

import logging
from collections import defaultdict
from collections.abc import Mapping

from vipbench.harness.config.schema import Config
from vipbench.harness.runs.packed import not_packed, shared_settings

log = logging.getLogger(__name__)

MOST = 16  # runs in a process: enough to fill a GPU, few enough to lose little when one dies


def group(configs: Mapping[str, Config], pack: bool = True) -> list[list[str]]:
    """Group the names of runs that one process trains together, in the order of the plan.

    Runs that differ only in seed, shots or learning rate (and what follows from them) train together, unless `not_packed` has a
    reason against it, which is logged once for each method.
    """
    if not pack:
        return [[name] for name in configs]
    groups: dict[str, list[list[str]]] = defaultdict(list)
    alone: dict[tuple[str, str], None] = {}  # in order
    for name, config in configs.items():
        reason = not_packed(config)
        if reason:
            alone[config.method.name, reason] = None
        same = groups[name if reason else shared_settings(config)]
        if not same or len(same[-1]) == MOST:
            same.append([])
        same[-1].append(name)
    for method, reason in alone:
        log.info("--pack: %s runs alone: %s", method, reason)
    return [names for same in groups.values() for names in same]
