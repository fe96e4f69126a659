"""Which runs of a sweep can train together in one process (harness/pack.py)."""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from harness.config.schema import Config
from harness.methods.registry import method_class
from harness.runs.tracking import ONE_RUN_PER_PROCESS

MOST = 16  # runs in a process: enough to fill a GPU, few enough to lose little when one dies
MAY_DIFFER: dict[str, Any] = {
    "seed": True,
    "data": {"shots", "split_seed"},
    "train": {"lr", "epochs", "select", "select_ties", "augmentation_seed", "batch_size"},
}


def group(configs: Mapping[str, Config], pack: bool = True) -> list[list[str]]:
    """Names of runs, those together that one process works on, in the order of the plan.

    Runs that differ only in seed, shots or learning rate (and what follows from them) train together. Methods that train
    nothing or read images, fp16, whose loss scaling belongs to one run, and trackers that follow one run per process stay alone.
    """
    if not pack:
        return [[name] for name in configs]
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for name, config in configs.items():
        method = method_class(config.method.name)
        packs = method.trains and method.needs == "features" and config.precision != "fp16"
        packs = packs and not set(config.run.tracking) & set(ONE_RUN_PER_PROCESS)
        same = groups[json.dumps(config.model_dump(mode="json", exclude=MAY_DIFFER)) if packs else name]
        if not same or len(same[-1]) == MOST:
            same.append([])
        same[-1].append(name)
    return [names for same in groups.values() for names in same]
