"""Grids: axes are crossed, combinations adjusted, left out and added."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vipbench.harness.demo.benchmark import make_dataset
from vipbench.harness.errors import UserError
from vipbench.harness.report.tables import make_table
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.execute import execute
from vipbench.sweeps.grid import read_grid

BASE = {"data": {"path": "data"}, "backbone": "ViT-B-16", "symptoms": "set.json"}
ROOT = Path(__file__).parents[2]
DATASETS = (
    "BTMRI", "BUSI", "CHMNIST", "COVID_QU_Ex", "CTKidney", "DermaMNIST", "KneeXray", "Kvasir", "LungColon", "OCTMNIST", "RETINA",
)  # fmt: skip


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


def test_names_are_filled_in_before_overrides(tmp_path: Path) -> None:
    base = {"vars": {"set": "clinical"}, "data": {"path": "data/$task"}, "symptoms": "sets/${task}_$set.json"}
    axes = {
        "vars.task": ["skin", "lung"],
        "method": [{"name": "zero_shot", "text": "symptoms", "templates": ["$$ {}."]}],
    }
    path = grid(tmp_path, base=base, axes=axes)
    found = read_grid(path)
    assert [config.data.path for config in found] == ["data/skin", "data/lung"]
    assert [str(config.symptoms) for config in found] == ["sets/skin_clinical.json", "sets/lung_clinical.json"]
    assert list(found[0].method.templates) == ["$ {}."]  # type: ignore[attr-defined]
    (one, other) = read_grid(path, ["data.path=a$task", "vars.task=eye", "vars.set=llm"])
    assert one == other
    assert (one.data.path, str(one.symptoms)) == ("a$task", "sets/eye_llm.json"), "an override is taken as it stands"
    for override, message in [
        ("vars.tsk=eye", "grid.yaml: vars.tsk: the grid has no such name; did you mean 'vars.task'"),
        ("vars.task=[1]", "grid.yaml: vars: should be a mapping of names to texts; found {'set': 'clinical', 'task'"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            read_grid(path, [override])
    for text, message in [("$tsk", "vars has no tsk; did you mean 'task'"), ("5$ {}", "write $$ for a $")]:
        with pytest.raises(UserError, match=re.escape(message)):
            read_grid(grid(tmp_path, base={**base, "symptoms": text}, axes=axes))


def test_a_file_of_overrides(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("data.path: small\nbackbone: RN50\nseed: 3\n")
    path = grid(tmp_path, axes={"method": ["vip"], "seed": [1, 2]})
    found = read_grid(path, [f"@{tmp_path / 'small.yaml'}", "seed=4"])
    assert {(one.data.path, one.backbone.name, one.seed) for one in found} == {("small", "RN50", 4)}
    with pytest.raises(UserError, match=r"^/.*/none.yaml: cannot be read"):
        read_grid(path, [f"@{tmp_path / 'none.yaml'}"])


@pytest.mark.parametrize(
    ("name", "runs"),
    [("demo", 29), ("few_shot", 47), ("ablation", 10), ("vip_paper", 60), ("knowledge", 44), ("zero_shot", 78)],
)
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


@pytest.mark.slow
def test_the_biomedcoop_table_resolves_and_a_small_form_of_it_runs(tmp_path: Path) -> None:
    """Each dataset has its own texts; on the embedded data one run of each method, in two epochs."""
    path = ROOT / "sweeps" / "biomedcoop_table.yaml"
    configs = read_grid(path)
    texts: dict[str, set[str]] = {}
    for config in configs:
        if config.symptoms:
            texts.setdefault(config.data.path, set()).add(str(config.symptoms))
    assert texts == {f"data/{name}": {f"symptoms_cache/{name}/texts.json"} for name in DATASETS}
    runs = {config.model_dump_json() for config in configs}
    methods = {config.method.name for config in configs}
    assert len(runs) == len(DATASETS) * (1 + (len(methods) - 1) * 5 * 3), "zero-shot draws no shots"
    assert {
        "zero_shot",
        "linear_probe",
        "tip_adapter",
        "tip_adapter_f",
        "coop",
        "cocoop",
        "kgcoop",
        "prograd",
    } < methods
    make_dataset(tmp_path / "data")
    model, symptoms = ROOT / "harness" / "demo" / "model", ROOT / "symptoms_cache" / "demo" / "lesions.json"
    places = [
        f"data.path={tmp_path / 'data'}",
        f"backbone={model}",
        f"symptoms={symptoms}",
        f"run.out={tmp_path / 'runs'}",
    ]
    small = [
        "data.shots=1",
        "seed=1",
        "run.device=cpu",
        "run.workers=0",
        "train={epochs: 2, warmup_epochs: 0, batch_size: 4}",
    ]
    for config in {one.model_dump_json(): one for one in read_grid(path, [*places, *small])}.values():
        execute(config)
    table = make_table(read_runs(tmp_path / "runs"), ["method", "dataset"], ["shots"], ["accuracy", "cost.trained"])
    assert {row[0].partition(" (")[0] for row in table.rows} == methods
