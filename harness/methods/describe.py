"""Descriptions of methods, from what their classes declare and their files say: `vipbench methods` prints them."""

import dis
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vipbench.harness.config.options import Option, describe_options
from vipbench.harness.config.schema import MethodConfig, TrainConfig
from vipbench.harness.config.validation import validate
from vipbench.harness.methods.base import Method, Support, Task
from vipbench.harness.methods.recipes import family_recipe
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.backbone import Backbone

SHOTS: tuple[int | str, ...] = (1, 2, 4, 8, 16, "all")  # for which published recipes are shown
INPUTS = {"features": "features", "unnormalised": "un-normalised features", "images": "images"}
ALWAYS_SHOWN = ("optimizer", "lr", "batch_size", "epochs", "steps", "select")  # of a recipe


@dataclass(frozen=True)
class Description:
    """A method as it is with its default options.

    Attributes:
        paper: the "Paper:" of its module's docstring; "" without one.
        family: what it trains, see `Method.family`.
        needs: what a run of it reads.
        not_packed: the reason why its runs do not train together; "" where they do.
    """

    name: str
    paper: str
    family: str
    needs: tuple[str, ...]
    not_packed: str


def describe(name: str) -> Description:
    """Describe a method. Raises UserError where there is none of this name."""
    cls = method_class(name)
    config = _defaults(name, cls)
    return Description(name, _paper(_docstring(cls)), cls.family(), tuple(_needs(cls, config)), cls.not_packed(config))


def _defaults(name: str, cls: type[Method]) -> MethodConfig:
    return validate(cls.Config, {"name": name}, "method.")


def _docstring(cls: type[Method]) -> str:
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


def protocol(name: str) -> str:
    """The docstring of a method's module, which has paper, protocol, command and expected figure."""
    return _docstring(method_class(name))


def _paper(docstring: str) -> str:
    found = re.search(r"^Papers?: (.+?)(?=^\S[^\n]*: |\n\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()).rstrip(".") if found else ""


def short_paper(paper: str) -> str:
    """A paper without its title, up to the first remark: "CVPR 2025, arXiv 2411.15232"."""
    untitled = re.sub(r'"[^"]*"(?: \([^)]*\))?,? ?', "", paper)
    return re.split(r" \(|;|\. ", untitled)[0]


def _needs(cls: type[Method], config: MethodConfig) -> list[str]:
    needs = [INPUTS[cls.needs]]
    if cls.support(config) is not None:
        needs.append("training features")
    if cls.uses_symptoms(config):
        needs.append("symptoms")
    if cls.uses_templates:
        needs.append("templates")
    if any(train.select == "best" for _, train in published(cls, config)):
        needs.append("validation")
    elif any(_reads(getattr(cls, step), "validation") for step in ("prepare", "finish")):
        needs.append("validation, if there is any")
    return needs


def _reads(function: Any, argument: str) -> bool:
    """Check that a function reads one of its arguments."""
    found = (
        part.argval for part in dis.get_instructions(inspect.unwrap(function)) if part.opname.startswith("LOAD_FAST")
    )
    return any(argument == name or (isinstance(name, tuple) and argument in name) for name in found)


def published(cls: type[Method], config: MethodConfig, backbone: str = "ViT-B-16") -> list[tuple[str, TrainConfig]]:
    """The published recipes by shots, "1" or "2, 4", those that are equal together; none of a method without a training loop."""
    if not cls.trains:
        return []
    recipes = {shots: validate(TrainConfig, dict(cls.recipe(config, shots, backbone)), "train.") for shots in SHOTS}
    equal: dict[TrainConfig, list[str]] = {}
    for shots, train in recipes.items():
        equal.setdefault(train, []).append(str(shots))
    return [(", ".join(shots), train) for train, shots in equal.items()]


def recipes(name: str, backbone: str) -> dict[str, dict[str, Any]]:
    """The recipes of a method, by their kind in words: entries of `train` that differ from the defaults, or the grid."""
    cls = method_class(name)
    config = _defaults(name, cls)
    if not cls.trains:
        return {}
    family = family_recipe(cls.family())
    found = {f"published (shots: {shots})": _entries(train) for shots, train in published(cls, config, backbone)}
    found["fixed"] = _entries(validate(TrainConfig, family.fixed, "train."))
    grid = dict(cls.grid(config)) or family.grid
    return found | {"tuned: published, but the best of": {key: list(values) for key, values in grid.items()}}


def _entries(train: TrainConfig) -> dict[str, Any]:
    default = TrainConfig()
    return {
        name: value
        for name, value in train.model_dump(mode="json").items()
        if value is not None and (name in ALWAYS_SHOWN or getattr(train, name) != getattr(default, name))
    }


def options(name: str) -> list[Option]:
    """The options of a method beside its name."""
    config = _defaults(name, method_class(name))
    return [option for option in describe_options(type(config), config) if option.name != "name"]


def trained_numbers(name: str, task: Task, backbone: Backbone, shots: int = 16) -> int:
    """Count the numbers that a method trains, on a task and a backbone whose weights do not matter.

    Args:
        shots: training images per class, for a method that learns something for each of them.

    Raises:
        UserError: the method does not fit the backbone or the task.
    """
    cls = method_class(name)
    if not cls.trains:
        return 0
    config = _defaults(name, cls)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = cls(config, task, backbone)
        views = cls.support(config)
        if views and any(not parameter.numel() for parameter in method.trainable().values()):
            method.prepare(_drawn(max(views.number, 1), shots, len(task.classes), backbone.dim), None)
    return sum(parameter.numel() for parameter in method.trainable().values())


def _drawn(views: int, shots: int, classes: int, dim: int) -> Support:
    """Random features in the form of a support set."""
    features = F.normalize(torch.randn(views, shots * classes, dim), dim=-1)
    labels = torch.arange(classes).repeat_interleave(shots)
    return Support(features, torch.ones(views, len(labels)), labels, torch.randn(views, len(labels), classes))
