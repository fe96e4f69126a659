"""Grids: axes are crossed, combinations adjusted, left out and added."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vipbench.harness.errors import UserError
from vipbench.sweeps.grid import read_grid

BASE = {"data": {"path": "data"}, "backbone": "ViT-B-16", "symptoms": "set.json"}
ROOT = Path(__file__).parents[2]


def grid(folder: Path, **content: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, **content}, sort_keys=False))
    return path


def test_axes_are_crossed_in_order(tmp_path: Path) -> None:
    axes = {"method": ["coop", {"name": "vip", "merge": "mean"}], "data.shots": [1, 16], "seed": [1, 2]}
    configs = read_grid(grid(tmp_path, axes=axes))
    points = [(config.method.name, config.data.shots, config.seed) for config in configs]
    assert points == [(method, shots, seed) for method in ("coop", "vip") for shots in (1, 16) for seed in (1, 2)]
    assert [config.train.epochs for config in configs[:4] if config.train] == [50, 50, 200, 200]


def test_adjust_exclude_include_and_overrides(tmp_path: Path) -> None:
    path = grid(
        tmp_path,
        axes={"method": ["coop", "cocoop"], "data.shots": [1, "all"]},
        adjust=[{"where": {"method.name": "coop", "data.shots": "all"}, "set": {"train.lr": 0.001}}],
        exclude=[{"method": "cocoop", "data.shots": 1}],
        include=[{"method": "vip", "data.shots": 2}],
    )
    configs = read_grid(path, ["train.epochs=3"])
    found = [(config.method.name, config.data.shots, config.train.lr) for config in configs if config.train]
    assert found == [("coop", 1, 0.002), ("coop", "all", 0.001), ("cocoop", "all", 0.002), ("vip", 2, 0.002)]
    assert {config.train.epochs for config in configs if config.train} == {3}


def test_the_base_may_be_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**BASE, "method": "coop"}))
    configs = read_grid(grid(tmp_path, base=str(config), axes={"seed": [4, 5]}))
    assert [(config.method.name, config.seed) for config in configs] == [("coop", 4), ("coop", 5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axis": {}}, "axis: unknown key; did you mean 'axes'"),
        ({"axes": {"seed": 1}}, "axes.seed: input should be a valid list; found 1"),
        ({"axes": {"seed": "x" * 200}}, r"axes.seed: input should be a valid list; found x{77}\.\.\.$"),
        (
            {"axes": {"seed": list(range(1000)), "data.shots": list(range(1000))}},
            "axes: 1000000 combinations; a grid may",
        ),
        ({"adjust": [{"where": {}, "sets": {}}]}, r"adjust\[0\]\.sets: unknown key; did you mean 'set'\?$"),
        ({"axes": {"method": ["coop"], "data.shot": [1]}}, "data.shot: unknown key; did you mean 'shots'"),
        ({"axes": {"method": ["coop"]}, "exclude": [{"method.name": "coop"}]}, "the grid is empty"),
        (
            {"axes": {"method": ["coop"]}, "exclude": [{"method.nam": "coop"}]},
            "exclude: method.nam: no combination has",
        ),
        ({"axes": {"method": ["coop"]}, "exclude": [{"method": "vip"}]}, "exclude: .* matches no combination"),
        (
            {"axes": {"data.shots": [1]}, "adjust": [{"where": {"shots": 1}, "set": {"train.lr": 1}}]},
            "adjust: shots: no combination has this key; did you mean 'data.shots'",
        ),
    ],
)
def test_mistakes_are_told(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid(grid(tmp_path, **content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {seed: [1]}\naxes: {seed: [2]}", "grid.yaml: line 2: the key axes stands here twice"),
        ("base: {1: 2}", "grid.yaml: line 1: base: the key 1 is no text"),
        (
            "axes: {seed: !!python/object:os.system [1]}",
            "grid.yaml: line 1: axes.seed: the tag !!python/object:os.system",
        ),
        ("base: ~/no/such/file.yaml\naxes: {seed: [1]}", r"^/.*/no/such/file.yaml: cannot be read"),
    ],
)
def test_mistakes_of_yaml_are_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_grid(path)


@pytest.mark.parametrize(("name", "runs"), [("demo", 29), ("few_shot", 47), ("ablation", 10), ("vip_paper", 30)])
def test_the_grids_that_come_along_resolve(name: str, runs: int) -> None:
    configs = read_grid(ROOT / "sweeps" / f"{name}.yaml")
    assert len({config.model_dump_json() for config in configs}) == runs
    if name == "vip_paper":
        rates = {
            config.method.name: config.train.lr
            for config in configs
            if config.train and config.backbone.name == "ViT-B-16"
        }
        assert rates == {"coop": 0.001, "cocoop": 0.001, "vip": 0.002}
        recipes = {(config.train.epochs, config.train.select) for config in configs if config.train}
        assert recipes == {(50, "best")}
