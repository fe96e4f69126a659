"""The recipes that belong to families of methods: harness/methods/recipes.yaml, read and checked."""

from functools import cache
from pathlib import Path
from typing import Any

from vipbench.harness.config.schema import Grid
from vipbench.harness.config.validation import Section, validate
from vipbench.harness.methods.base import Family
from vipbench.harness.system.files import read_yaml

RECIPES = Path(__file__).with_suffix(".yaml")


class FamilyRecipe(Section):
    """The one setting of a family, and the grid among which its methods are tuned; both in entries of `TrainConfig`."""

    fixed: dict[str, Any]
    grid: Grid


class Families(Section):
    """The families that are trained."""

    prompts: FamilyRecipe
    adapters: FamilyRecipe
    image_tower: FamilyRecipe


@cache
def _families() -> Families:
    return validate(Families, read_yaml(RECIPES), where=str(RECIPES))


def family_recipe(family: Family) -> FamilyRecipe:
    """The recipe of a family that is trained."""
    found: FamilyRecipe = getattr(_families(), family)
    return found
