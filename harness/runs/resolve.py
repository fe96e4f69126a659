"""Resolve a config: fill in the recipe of its method and every default.

`vipbench config CONFIG.yaml [key=value ...]` prints one resolved. Paths are relative to the current directory.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vipbench.harness.config.overrides import longhand, override
from vipbench.harness.config.schema import (
    BackboneConfig,
    Config,
    DataConfig,
    Precision,
    RunConfig,
    Seed,
    SymptomFiles,
    Templates,
    TrainConfig,
)
from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import load_plugins, method_class
from vipbench.harness.system.files import read_yaml

log = logging.getLogger(__name__)


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
        values |= _resolve_training(draft, method_type.recipe(method, draft.data.shots, draft.backbone.name))
    else:
        if draft.train:
            log.warning("train: ignored, method %r has no training loop", method.name)
        values |= {"train": None} if method_type.support(method) else _unused_draw(draft, method_type)
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
    return {"train": None, "seed": seed, "data": draft.data.model_copy(update={"shots": 0, "split_seed": 0})}


def _resolve_training(draft: _Draft, recipe: Mapping[str, Any]) -> dict[str, Any]:
    train = validate(TrainConfig, {**recipe, **(draft.train or {})}, "train.")
    if train.augmentation_seed is None:
        train = train.model_copy(update={"augmentation_seed": draft.seed})
    return {"train": train}
