"""Identities of runs, which must stay what they are while nothing that changes a result changes."""

from typing import Any

import pytest

from vipbench.harness.config.identity import Digests, run_name
from vipbench.harness.runs.resolve import resolve_config

NAMES = [
    ({"method": "coop", "data": {"path": "x", "shots": 4}}, "coop_4shot_seed1_e2349568a289"),
    ({"method": "cocoop", "data": {"path": "x"}, "train": {"optimizer": "adamw"}}, "cocoop_all_seed1_43127bba3a5d"),
    (
        {"method": "vip", "data": {"path": "x", "shots": 16}, "symptoms": "s.json", "seed": 3, "precision": "bf16"},
        "vip_16shot_seed3_6a8f22e53e2c",
    ),
    ({"method": "zero_shot", "data": {"path": "x"}}, "zero_shot_0shot_seed0_4348002ffa3d"),
    (
        {"method": {"name": "zero_shot", "text": "symptoms"}, "data": {"path": "x"}, "symptoms": "s.json"},
        "zero_shot_0shot_seed0_3acdc2d36398",
    ),
    (
        {"method": "vip", "data": {"path": "x"}, "symptoms": "s.json", "run": {"compile": True}},
        "vip_all_seed1_d0b2bc1bc0e2",
    ),
]


@pytest.mark.parametrize(("given", "name"), NAMES, ids=[name for _, name in NAMES])
def test_runs_of_result_version_3_keep_their_names(given: dict[str, Any], name: str) -> None:
    """Raise RESULT_VERSION, and put the new names here, only when a run computes something else than before."""
    symptoms = "s" * 64 if "symptoms" in given else None
    assert run_name(resolve_config(given), Digests("d" * 64, "b" * 64, symptoms)) == name


def test_an_option_that_came_later_counts_once_it_is_given() -> None:
    digests = Digests("d" * 64, "b" * 64, None)
    base: dict[str, Any] = {"method": "coop", "data": {"path": "x"}}
    recipes: list[dict[str, Any]] = [
        {},
        {"steps": 100, "epochs": None, "warmup_epochs": 0},
        {"schedule": "step", "warmup_epochs": 0},
        {"schedule": "step", "warmup_epochs": 0, "final_lr": 1e-6},
        {"optimizer": "adamw", "eps": 1e-4},
        {"optimizer": "adamw", "betas": [0.9, 0.98]},
    ]
    names = [run_name(resolve_config({**base, "train": recipe}), digests) for recipe in recipes]
    assert len(set(names)) == len(recipes)


def test_an_option_of_a_method_that_came_later_counts_once_it_is_given() -> None:
    digests = Digests("d" * 64, "b" * 64, "s" * 64)

    def name(**options: Any) -> str:
        config = {"method": {"name": "vip", **options}, "data": {"path": "x"}, "symptoms": "s.json"}
        return run_name(resolve_config(config), digests)

    off = {"attention_sink": False, "sets": None, "logit_bias": None}
    assert name(**off) == name()
    given: list[dict[str, Any]] = [{}, {"attention_sink": True}, {"sets": "ensemble"}, {"logit_bias": True}]
    assert len({name(**options) for options in given}) == len(given)


def test_a_seed_counts_where_something_is_drawn() -> None:
    """A method that trains nothing has one run for all seeds, unless it draws something at random."""

    def seeds(method: str) -> set[int]:
        config = {"method": method, "data": {"path": "x"}, "symptoms": "s.json"}
        return {resolve_config({**config, "seed": seed}).seed for seed in (1, 2, 3)}

    assert seeds("waffle") == {1, 2, 3}
    assert seeds("dclip") == {0}
