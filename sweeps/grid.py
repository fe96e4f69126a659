"""A grid of runs in YAML: a base config, axes that are crossed, runs to add and combinations to leave out.

base: {data: {path: data/derm7pt}, backbone: ViT-B-16, ...}      # or the path of a config
axes:
  method: [coop, {name: vip, merge: mean}]
  data.shots: [1, 4, 16]
  seed: [1, 2, 3]
adjust: [{where: {method: vip}, set: {train.lr: 0.01}}]          # changes to the combinations that match in every key
exclude: [{method: coop, data.shots: 1}]                         # combinations to leave out
include: [{method: zero_shot}]                                   # single runs, as changes to the base
"""

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from pydantic import Field

from vipbench.harness.config.overrides import override, set_key
from vipbench.harness.config.schema import Config
from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.runs.directory import flatten
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_yaml

MOST_COMBINATIONS = 100_000


class Adjustment(Section):
    """Changes to the runs that match in every key of `where`."""

    where: dict[str, Any]
    set: dict[str, Any]


class Grid(Section):
    """A grid as written; all keys within its parts are dotted."""

    base: dict[str, Any] | str
    axes: dict[str, list[Any]] = Field(default_factory=dict)
    adjust: list[Adjustment] = Field(default_factory=list)
    exclude: list[dict[str, Any]] = Field(default_factory=list)
    include: list[dict[str, Any]] = Field(default_factory=list)


def read_grid(path: Path, overrides: Sequence[str] = (), plugins: Sequence[Path] = ()) -> list[Config]:
    """The resolved config of each combination, in the grid's order: the last axis varies fastest, then what is included.

    `overrides` (key=value) change every run, and `plugins` are added to each. Combinations may resolve to the same config:
    zero-shot ignores seed and shots.

    Raises:
        UserError: the file or one of its configs is wrong, or `adjust` or `exclude` name what no combination has.
    """
    grid = validate(Grid, read_yaml(path), where=str(path))
    base = read_yaml(Path(grid.base).expanduser()) if isinstance(grid.base, str) else grid.base
    count = prod(len(values) for values in grid.axes.values())
    if count > MOST_COMBINATIONS:
        raise UserError(f"{path}: axes: {count} combinations; a grid may have {MOST_COMBINATIONS}")
    points = [dict(zip(grid.axes, values, strict=True)) for values in product(*grid.axes.values())] if grid.axes else []
    mappings = [_apply(base, point) for point in points]
    for rule in grid.adjust:
        where = _pattern("adjust", rule.where, mappings, path)
        mappings = [_apply(mapping, rule.set) if _matches(mapping, where) else mapping for mapping in mappings]
    left_out = [_pattern("exclude", pattern, mappings, path) for pattern in grid.exclude]
    kept = [mapping for mapping in mappings if not any(_matches(mapping, pattern) for pattern in left_out)]
    kept += [_apply(base, changes) for changes in grid.include]
    if not kept:
        raise UserError(f"{path}: the grid is empty; give axes or include, and exclude less")
    return [resolve_config(override(mapping, overrides), plugins) for mapping in kept]


def _apply(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    mapping = override(dict(base), [])
    for key, value in changes.items():
        set_key(mapping, key, value)
    return mapping


def _pattern(
    part: str, pattern: Mapping[str, Any], mappings: Sequence[Mapping[str, Any]], grid: Path
) -> dict[str, Any]:
    """A pattern in dotted keys, made sure to match something: one that never does is a mistake that would go unnoticed."""
    dotted = flatten(_apply({}, pattern))
    keys = {key for mapping in mappings for key in flatten(mapping)}
    for key in dotted:
        if key not in keys:
            raise UserError(f"{grid}: {part}: {key}: no combination has this key; {did_you_mean(key, sorted(keys))}")
    if not any(_matches(mapping, dotted) for mapping in mappings):
        raise UserError(f"{grid}: {part}: {dict(pattern)} matches no combination of the axes")
    return dotted


def _matches(mapping: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    values = flatten(mapping)
    return all(key in values and values[key] == value for key, value in pattern.items())
