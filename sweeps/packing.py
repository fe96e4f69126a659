"""Grouping of runs that can train together in one process (harness/pack.py)."""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vipbench.harness.config.schema import Config
from vipbench.harness.runs.packed import not_packed

log = logging.getLogger(__name__)

MOST = 16  # runs in a process: enough to fill a GPU, few enough to lose little when one dies
MAY_DIFFER: dict[str, Any] = {
    "seed": True,
    "data": {"shots", "split_seed"},
    "train": {"lr", "epochs", "select", "select_ties", "augmentation_seed", "batch_size"},
}


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
        same = groups[name if reason else json.dumps(config.model_dump(mode="json", exclude=MAY_DIFFER))]
        if not same or len(same[-1]) == MOST:
            same.append([])
        same[-1].append(name)
    for method, reason in alone:
        log.info("--pack: %s runs alone: %s", method, reason)
    return [names for same in groups.values() for names in same]
