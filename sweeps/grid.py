"""A grid of runs in YAML: a base config, axes that are crossed, runs to add and combinations to leave out.

base: {data: {path: data/$task}, backbone: ViT-B-16, ...}        # or the path of a config
axes:
  vars.task: [derm7pt, pneumonia]                                # `vars` stand for $task in the texts of a run, $$ for a $
  method: [coop, {name: vip, merge: mean}]
  data.shots: [1, 4, 16]
  seed: [1, 2, 3]
adjust: [{where: {method: vip}, set: {train.lr: 0.01}}]          # changes to the combinations that match in every key
exclude: [{method: coop, data.shots: 1}]                         # combinations to leave out
include: [{method: zero_shot}]                                   # single runs, as changes to the base
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from string import Template
from typing import Any

from pydantic import Field

from vipbench.harness.config.overrides import override, read_assignments, set_key
from vipbench.harness.config.schema import Config
from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError, did_you_mean, shortened
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.system.files import read_yaml
from vipbench.harness.system.plain_values import flatten

MOST_COMBINATIONS = 100_000
VARS = "vars"  # a section that runs of a grid may have beside those of a config


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

    `overrides` (key=value, @FILE) change every run, and `plugins` are added to each. Those of `vars` are applied before names
    are filled in, the others after it, as they stand. Combinations may resolve to the same config: zero-shot ignores seed and
    shots.

    Raises:
        UserError: the file or one of its configs is wrong, `adjust` or `exclude` name what no combination has, or a text names
            what `vars` has not.
    """
    grid = validate(Grid, read_yaml(path), where=str(path))
    base = read_yaml(Path(grid.base).expanduser()) if isinstance(grid.base, str) else grid.base
    count = prod(len(values) for values in grid.axes.values())
    if count > MOST_COMBINATIONS:
        raise UserError(f"{path}: axes: {count} combinations; a grid may have {MOST_COMBINATIONS}")
    points = [dict(zip(grid.axes, values, strict=True)) for values in product(*grid.axes.values())] if grid.axes else []
    mappings = [_apply(base, point.items()) for point in points]
    for rule in grid.adjust:
        where = _pattern("adjust", rule.where, mappings, path)
        mappings = [_apply(mapping, rule.set.items()) if _matches(mapping, where) else mapping for mapping in mappings]
    left_out = [_pattern("exclude", pattern, mappings, path) for pattern in grid.exclude]
    kept = [mapping for mapping in mappings if not any(_matches(mapping, pattern) for pattern in left_out)]
    kept += [_apply(base, changes.items()) for changes in grid.include]
    if not kept:
        raise UserError(f"{path}: the grid is empty; give axes or include, and exclude less")
    given = read_assignments(overrides)
    names = [(key, value) for key, value in given if key.partition(".")[0] == VARS]
    known = {key for mapping in kept for key in flatten(mapping) if key.partition(".")[0] == VARS}
    for key, _ in names:
        if key not in known:
            raise UserError(f"{path}: {key}: the grid has no such name; {did_you_mean(key, known)}")
    others = [(key, value) for key, value in given if key.partition(".")[0] != VARS]
    filled = [_fill(_apply(mapping, names), path) for mapping in kept]
    return [resolve_config(_apply(mapping, others), plugins) for mapping in filled]


def _fill(mapping: dict[str, Any], grid: Path) -> dict[str, Any]:
    """Replace $name in the texts of a run by that entry of its `vars`, and take `vars` out; without them all stays as it is."""
    names = mapping.pop(VARS, None)
    if names is None:
        return mapping
    if not isinstance(names, dict) or not all(isinstance(value, str | int | float) for value in names.values()):
        raise UserError(f"{grid}: {VARS}: should be a mapping of names to texts; found {shortened(names)}")

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        if not isinstance(value, str):
            return value
        try:
            return Template(value).substitute(names)
        except KeyError as error:
            name = error.args[0]
            raise UserError(
                f"{grid}: {shortened(value)!r}: {VARS} has no {name}; {did_you_mean(name, names)}"
            ) from error
        except ValueError as error:
            raise UserError(f"{grid}: {shortened(value)!r}: write $$ for a $ that names none of {VARS}") from error

    return {key: filled(value) for key, value in mapping.items()}


def _apply(base: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    mapping = override(dict(base), [])
    for key, value in changes:
        set_key(mapping, key, value)
    return mapping


def _pattern(
    part: str, pattern: Mapping[str, Any], mappings: Sequence[Mapping[str, Any]], grid: Path
) -> dict[str, Any]:
    """A pattern in dotted keys, made sure to match something: one that never does is a mistake that would go unnoticed."""
    dotted = flatten(_apply({}, pattern.items()))
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
