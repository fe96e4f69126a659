"""Names for rows and columns that follow from the config: the family of a method, and the name of a symptom set.

`family` is what a method trains (`Method.family`). `symptom_set` is the set's name without its place, so that sets of one kind
for several datasets (symptoms_cache/derm7pt/description.json and symptoms_cache/pneumonia/description.json) stand in one row.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from vipbench.harness.errors import UserError

FAMILY, SYMPTOM_SET = "family", "symptom_set"
FAMILIES = ("untrained", "adapters", "prompts", "image tower")  # in the order of a table
UNKNOWN = "unknown"  # of a plugin that is not loaded

log = logging.getLogger(__name__)


def with_groupings(runs: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Runs, finished and missing ones, with those of `FAMILY` and `SYMPTOM_SET` that are among some names."""
    added = [name for name in GROUPINGS if name in names and name not in runs]
    if not added:
        return runs
    rows = runs.to_dict("records")
    columns: dict[str, Any] = {name: [GROUPINGS[name](row) for row in rows] for name in added}
    found = runs.assign(**columns)
    missing = [row | {name: GROUPINGS[name](row) for name in added} for row in runs.attrs.get("missing", [])]
    found.attrs = runs.attrs | {"missing": missing}
    return found


def family_place(name: Any) -> int:
    """The place of a family in a table."""
    return FAMILIES.index(name) if name in FAMILIES else len(FAMILIES)


def _family(row: Mapping[Any, Any]) -> str | None:
    name = row.get("method.name")
    return _family_of(name) if isinstance(name, str) else None


@cache
def _family_of(method: str) -> str:
    from vipbench.harness.methods.registry import method_class  # needs PyTorch, which takes seconds to import

    try:
        return method_class(method).family().replace("_", " ")
    except UserError as error:
        log.warning("%s: %s", FAMILY, error)
        return UNKNOWN


def _symptom_set(row: Mapping[Any, Any]) -> str | None:
    named = row.get("symptoms")
    if isinstance(named, str):
        return Path(named).stem
    return " + ".join(Path(str(one)).stem for one in named) if isinstance(named, tuple) else None


GROUPINGS: Mapping[str, Callable[[Mapping[Any, Any]], str | None]] = {FAMILY: _family, SYMPTOM_SET: _symptom_set}
