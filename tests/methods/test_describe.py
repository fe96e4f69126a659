"""`vipbench methods`: what the classes and files of methods say, for whatever is registered, plugins included."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.methods.documented import write_plugin
from vipbench.harness.cli import app
from vipbench.harness.config.schema import TrainConfig
from vipbench.harness.errors import UserError
from vipbench.harness.methods.describe import describe, options, recipes, short_paper
from vipbench.harness.methods.recipes import RECIPES, family_recipe
from vipbench.harness.methods.registry import method_class, method_names


def listed(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["methods", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def every() -> dict[str, Any]:
    return {entry["name"]: entry for entry in listed()}


def test_every_method_is_described(every: dict[str, Any]) -> None:
    assert list(every) == method_names()
    for name, entry in every.items():
        cls = method_class(name)
        assert entry["paper"], f"{name}: its module's docstring names a paper, or none"
        if entry["does_not_fit"]:
            assert entry["trained_numbers"] is None and "\n" not in entry["does_not_fit"]
        else:
            assert (entry["trained_numbers"] > 0) == cls.trains, name


def test_what_is_known_of_some(every: dict[str, Any]) -> None:
    """On the embedded model (d 128, w 64): 16 context vectors; ViP's 4, queries and two d x d; a key for each training image."""
    assert every["coop"]["trained_numbers"] == 16 * 64
    assert every["vip"]["trained_numbers"] == 4 * 64 + 4 * 128 + 2 * 128 * 128
    assert every["tip_adapter_f"]["trained_numbers"] == 4 * 16 * 128
    assert every["coop"]["paper"] == '"Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134'
    assert short_paper(every["coop"]["paper"]) == "IJCV 2022, arXiv 2109.01134"
    needs = {name: entry["needs"] for name, entry in every.items()}
    assert needs["coop"] == ["features"]
    assert needs["biomedcoop"] == ["features", "symptoms"]
    assert needs["clip_lora"] == ["images", "templates"]
    assert needs["vip"] == ["features", "symptoms", "validation"], "with all images it keeps the best epoch"
    assert needs["linear_probe"] == ["features", "training features", "validation, if there is any"]
    assert needs["tip_adapter"][1:] == ["training features", "templates", "validation, if there is any"]
    assert every["zero_shot"]["not_packed"] == every["coop"]["not_packed"] == ""
    assert every["maple"]["not_packed"] == "it trains inside the image tower"
    assert short_paper("none. It is a reference") == "none"


def test_the_numbers_are_those_of_the_backbone_that_is_named(model_folder: Path, every: dict[str, Any]) -> None:
    assert listed("coop", "--backbone", str(model_folder / "resnet.json"))["trained_numbers"] == 16 * 32
    with pytest.raises(UserError, match="is no open_clip model"):
        CliRunner().invoke(app, ["methods", "--backbone", "no/such/model"], catch_exceptions=False)


def test_options_have_defaults_bounds_and_the_comments_beside_them() -> None:
    coop = {option.name: option for option in options("coop")}
    assert coop["position"].values == "end or middle or front" and coop["position"].default == "end"
    assert coop["position"].comment == "of the class name among the context vectors"
    assert coop["context_length"].default == 16, "as it is settled"
    assert coop["context_length"].values == "whole number >= 1, <= 4096 or null"
    tip = {option.name: option for option in options("tip_adapter_f")}
    assert tip["search_steps"].values == "2 of whole number >= 1, <= 10000" and tip["search_steps"].default == [200, 20]
    inherited = {option.name: option for option in options("biomedcoop")}
    assert inherited["text_weight"].comment == "lambda_1" and inherited["position"].comment == coop["position"].comment
    for name in method_names():
        assert {one.name for one in options(name)} == method_class(name).Config.model_fields.keys() - {"name"}


def test_recipes_are_those_that_a_run_gets() -> None:
    found = recipes("coop", "ViT-B-16")
    assert [kind for kind in found if kind.startswith("published")] == [
        "published (shots: 1)",
        "published (shots: 2, 4)",
        "published (shots: 8, 16, all)",
    ]
    assert found["published (shots: 2, 4)"]["epochs"] == 100
    assert found["fixed"].items() >= {"optimizer": "sgd", "lr": 0.002, "epochs": 100, "select": "last"}.items()
    assert found["tuned: published, but the best of"] == {"lr": list(family_recipe("prompts").grid["lr"])}
    assert recipes("zero_shot", "ViT-B-16") == {}
    assert recipes("vip", "RN50x64")["published (shots: all)"]["batch_size"] == 8


@pytest.mark.parametrize("family", ["prompts", "adapters", "image_tower"])
def test_the_declared_recipes_say_when_training_ends_and_what_is_kept(family: Any) -> None:
    recipe = family_recipe(family)
    assert {"optimizer", "lr", "batch_size", "epochs", "select"} <= recipe.fixed.keys(), RECIPES
    assert TrainConfig(**recipe.fixed).select == "last", "so that no validation split is needed"
    assert 2 <= len(recipe.grid["lr"]) <= 5 and list(recipe.grid) == ["lr"]


def test_the_screen_takes_80_columns(tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path)
    for arguments in ([], ["my_kgcoop"], ["clip_lora"], ["linear_probe"]):
        result = CliRunner().invoke(app, ["methods", *arguments, "--plugin", str(plugin)], env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert max(map(len, lines)) <= 80
        if not arguments:
            assert any(line.split()[:1] == ["my_kgcoop"] for line in lines), "plugins too"
            assert {name for line in lines for name in line.split()[:1] if name in method_names()} == {*method_names()}
    shown = CliRunner().invoke(app, ["methods", "coop"], env={"COLUMNS": "200"}).stdout
    assert 'position: end or middle or front = "end"  # of the class name among the context vectors' in shown
    assert "Protocol: 16 vectors N(0, 0.02)" in shown and "fixed: " in shown


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(UserError, match="there is no method 'cop'; did you mean 'coop'"):
        describe("cop")
    result = CliRunner().invoke(app, ["methods", "cop"])
    assert isinstance(result.exception, UserError)


def test_a_method_whose_options_have_no_defaults_does_not_hide_the_others(tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path)
    plugin.write_text(plugin.read_text().replace('init_words: str = "a photo of a"', "init_words: str"))
    result = CliRunner().invoke(app, ["methods", "--plugin", str(plugin), "--json"])
    assert result.exit_code == 0 and "my_kgcoop" not in [entry["name"] for entry in json.loads(result.stdout)]
    assert "left out: my_kgcoop: config: method.init_words: is missing" in result.stderr
    result = CliRunner().invoke(app, ["methods", "my_kgcoop", "--plugin", str(plugin)])
    assert "method.init_words: is missing" in str(result.exception)
