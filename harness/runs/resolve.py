"""Resolve a config: fill in the recipe of its method and every default.

`vipbench config CONFIG.yaml [key=value ...]` prints one resolved. Paths are relative to the current directory.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from vipbench.harness.config.overrides import longhand, override
from vipbench.harness.config.schema import (
    BackboneConfig,
    Config,
    DataConfig,
    Grid,
    MethodConfig,
    Precision,
    Recipe,
    RunConfig,
    Seed,
    SymptomFiles,
    Templates,
    TrainConfig,
)
from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.recipes import family_recipe
from vipbench.harness.methods.registry import load_plugins, method_class
from vipbench.harness.system.files import read_yaml

log = logging.getLogger(__name__)

MOST_CANDIDATES = 100  # of a grid


def load_config(path: Path, overrides: Sequence[str] = (), plugins: Sequence[Path] = ()) -> Config:
    """Read a YAML file, apply `key.subkey=value` overrides, resolve.

    Args:
        plugins: Python files that register methods, besides those in `run.plugins`.

    Raises:
        UserError: no such file, not YAML, unknown or misspelt key, wrong type or impossible value, or a plugin that cannot be
            loaded.
    """
    return resolve_config(override(read_yaml(path), overrides), plugins)


def resolve_config(mapping: Mapping[str, Any], plugins: Sequence[Path] = ()) -> Config:
    """Validate and resolve a plain mapping; its plugins are loaded. Arguments and errors are those of `load_config`."""
    given = {key: longhand(key, value) for key, value in mapping.items()}
    draft = _with_plugins(validate(_Draft, given), plugins)
    load_plugins(draft.run.plugins)
    method_type = method_class(draft.method.get("name"))
    method = validate(method_type.Config, draft.method, "method.")
    values = dict(draft) | {"method": method}
    if draft.templates and not method_type.uses_templates:
        raise UserError(f"templates: method {method.name!r} reads none of them; leave them out")
    if method_type.uses_symptoms(method):
        if draft.symptoms is None:
            raise UserError(f"symptoms: method {method.name!r} reads a symptom set; give symptoms: FILE.json")
    else:
        values["symptoms"] = None
    if method_type.trains or method_type.support(method):
        values |= _resolve_draw(draft)
    if method_type.trains:
        values |= _resolve_training(draft, method_type, method)
    else:
        for name in ("train", "grid"):
            if getattr(draft, name):
                log.warning("%s: ignored, method %r has no training loop", name, method.name)
        values |= {"train": None, "recipe": "published", "grid": None}
        values |= {} if method_type.support(method) else _unused_draw(draft, method_type)
    return Config(**values)


class _Draft(Section):
    """A config as written, before the method's defaults are known."""

    seed: Seed = 1
    precision: Precision = "fp32"
    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    symptoms: SymptomFiles = None
    templates: Templates = None
    method: dict[str, Any]
    recipe: Recipe = "published"
    grid: Grid | None = None
    train: dict[str, Any] | None = None
    run: RunConfig = RunConfig()


def _with_plugins(draft: _Draft, plugins: Sequence[Path]) -> _Draft:
    """Add plugins to a config by their absolute paths, each once."""
    every = tuple(dict.fromkeys([*draft.run.plugins, *(path.absolute() for path in plugins)]))
    return draft.model_copy(update={"run": draft.run.model_copy(update={"plugins": every})})


def _resolve_draw(draft: _Draft) -> dict[str, Any]:
    """Resolve the draw of the training images: its split seed, None where nothing is drawn."""
    if draft.data.shots == 0:
        raise UserError(f"data.shots: method {draft.method['name']!r} trains and needs images; give a number or 'all'")
    split_seed = None  # where nothing is drawn
    if draft.data.shots != "all":
        split_seed = draft.seed if draft.data.split_seed is None else draft.data.split_seed
    return {"data": draft.data.model_copy(update={"split_seed": split_seed})}


def _unused_draw(draft: _Draft, method_type: type[Method]) -> dict[str, Any]:
    """Fixed seeds and shots for a method that reads no training images, so that equal runs have one identity."""
    seed = draft.seed if method_type.draws else 0
    return {"seed": seed, "data": draft.data.model_copy(update={"shots": 0, "split_seed": 0})}


def _resolve_training(draft: _Draft, method_type: type[Method], method: MethodConfig) -> dict[str, Any]:
    """Resolve the recipe: that of the paper or of the method's family, under what `train` gives; and the grid of a tuned one."""
    if draft.recipe == "fixed":
        recipe: Mapping[str, Any] = family_recipe(method_type.family()).fixed
    else:
        recipe = method_type.recipe(method, draft.data.shots, draft.backbone.name)
    settings = {**recipe, **(draft.train or {})}
    points = _points(draft, method_type, method)
    candidates = [validate(TrainConfig, {**settings, **point}, "train.") for point in points]
    grid = {key: tuple(dict.fromkeys(getattr(one, key) for one in candidates)) for key in points[0]}  # as validated
    train = candidates[0]
    if train.augmentation_seed is None:
        train = train.model_copy(update={"augmentation_seed": draft.seed})
    return {"train": train, "recipe": draft.recipe, "grid": grid or None}


def _points(draft: _Draft, method_type: type[Method], method: MethodConfig) -> list[dict[str, Any]]:
    """The settings of each candidate of a tuned recipe; one without settings for the other recipes.

    Raises:
        UserError: a grid without effect, of unknown entries, of too many candidates, or of entries that `train` gives too.
    """
    if draft.recipe != "tuned":
        if draft.grid is not None:
            raise UserError(f"grid: has no effect with recipe: {draft.recipe}; leave it out, or give recipe: tuned")
        return [{}]
    own = {key: tuple(values) for key, values in method_type.grid(method).items()}
    grid = draft.grid or own or family_recipe(method_type.family()).grid
    for key in grid:
        if key not in TrainConfig.model_fields:
            raise UserError(f"config: grid.{key}: unknown key; {did_you_mean(key, TrainConfig.model_fields)}")
        if key in (draft.train or {}):
            raise UserError(
                f"train.{key}: recipe: tuned chooses it among {', '.join(map(str, grid[key]))}; leave it out, or give a grid "
                "without it"
            )
    count = prod(len(values) for values in grid.values())
    if count > MOST_CANDIDATES:
        raise UserError(f"grid: {count} candidates, each of which is trained; a grid may have {MOST_CANDIDATES}")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
