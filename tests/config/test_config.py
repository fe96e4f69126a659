"""Configs: what is written resolves to what the papers say, mistakes are told in one line, identities mean the same result."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vipbench.harness.config.identity import Digests, run_name
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.errors import UserError
from vipbench.harness.runs.resolve import load_config, resolve_config

BASE: dict[str, Any] = {"data": {"path": "data", "shots": 16}, "method": "vip", "symptoms": "set.json"}
DIGESTS = Digests("d", "b", "s")


def config(**changes: Any) -> Config:
    return resolve_config({**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"lr": 0.002, "batch_size": 32, "epochs": 200, "select": "last"}),
        ({"data": {"path": "data"}}, {"epochs": 50, "select": "best", "select_ties": "lower_loss"}),
        ({"backbone": "ViT-L-14-336"}, {"lr": 0.002, "batch_size": 16}),
        ({"backbone": "RN50x64"}, {"lr": 0.001, "batch_size": 8}),
        ({"backbone": "RN50x64-quickgelu"}, {"lr": 0.001, "batch_size": 8}),
        ({"backbone": "ViT-L/14-336-quickgelu"}, {"lr": 0.002, "batch_size": 16}),
        ({"method": "coop"}, {"lr": 0.002, "batch_size": 32, "epochs": 200, "select": "last"}),
        ({"method": "coop", "data": {"path": "data", "shots": 1}}, {"epochs": 50}),
        ({"method": "coop", "data": {"path": "data", "shots": 4}}, {"epochs": 100}),
        ({"method": "cocoop"}, {"lr": 0.002, "batch_size": 1, "epochs": 10, "select": "last"}),
        ({"method": "coop", "train": {"epochs": 7}}, {"lr": 0.002, "epochs": 7}),
    ],
)
def test_defaults_are_the_papers(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    resolved = config(**changes).to_mapping()
    assert {key: resolved["train"][key] for key in expected} == expected
    common = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "warmup_epochs": 1, "warmup_lr": 1e-5}
    assert {key: resolved["train"][key] for key in common} == common
    assert resolved["train"]["crop_scale"] == [0.08, 1.0]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({**BASE, "metod": "vip"}, "config: metod: unknown key; did you mean 'method'?"),
        ({**BASE, "data": {"path": "d", "shot": 4}}, "config: data.shot: unknown key; did you mean 'shots'?"),
        ({**BASE, "train": {"learning_rate": 1}}, "config: train.learning_rate: unknown key; choose from"),
        ({**BASE, "train": {"epoch": 1}}, "config: train.epoch: unknown key; did you mean 'epochs'?"),
        ({**BASE, "method": "vipp"}, "there is no method 'vipp'; did you mean 'vip'?"),
        (
            {**BASE, "method": {"name": "vip", "mrege": "mean"}},
            "config: method.mrege: unknown key; did you mean 'merge'?",
        ),
        (
            {**BASE, "method": {"name": "vip", "merge": "max"}},
            "config: method.merge: input should be 'attention' or 'mean'",
        ),
        (
            {**BASE, "method": {"name": "vip", "merge": "mean", "context": "fixed"}},
            "nothing to train; use method zero_shot",
        ),
        ({**BASE, "method": {"name": "zero_shot", "templates": ["no place"]}}, "must hold {} once"),
        ({**BASE, "train": {"lr": -1}}, "config: train.lr: input should be greater than 0; found -1"),
        ({**BASE, "train": {"lr": "fast"}}, "config: train.lr: input should be a valid number"),
        ({**BASE, "train": {"crop_scale": [0.9, 0.1]}}, "config: train: crop_scale [0.9, 0.1] is no range"),
        ({**BASE, "train": {"crop_scale": [0.9, 2]}}, "config: train: crop_scale [0.9, 2.0] is no range"),
        ({"metod": "vip"}, "config: metod: unknown key; did you mean 'method'? (and 2 more)"),
        (
            {**BASE, "train": {"warmup_epochs": 5, "epochs": 5}},
            "config: train: warmup_epochs=5 leaves none of 5 epochs",
        ),
        (
            {**BASE, "train": {"optimizer": "adamw", "momentum": 0.5}},
            "momentum has no effect, since the optimizer is adamw",
        ),
        ({**BASE, "train": {"warmup_epochs": 0, "warmup_lr": 1}}, "warmup_lr has no effect, since there is no warm-up"),
        (
            {**BASE, "method": "coop", "train": {"select_ties": "first"}},
            "select_ties has no effect, since select is last",
        ),
        (
            {**BASE, "method": {"name": "cocoop", "context_length": 8}},
            "config: method: context_length has no effect, since init",
        ),
        (
            {**BASE, "method": {"name": "coop", "init_words": "a photo", "context_length": 4}},
            "config: method: context_length has no effect, since init_words gives the context vectors; leave it out",
        ),
        (
            {**BASE, "method": {"name": "vip", "context": "fixed", "context_length": 8}},
            "context_length has no effect, since the context is fixed to 'a photo of a'",
        ),
        (
            {**BASE, "method": {"name": "vip", "context": "fixed", "class_specific_context": True}},
            "class_specific_context has no effect",
        ),
        ({**BASE, "method": {"name": "coop", "init_words": '""'}}, "config: method.init_words: string should match"),
        (
            {**BASE, "method": {"name": "zero_shot", "templates": ["{} of {x}"]}},
            "once, where the text goes, and no other brace",
        ),
        ({**BASE, "seed": 2**63}, "config: seed: input should be less than 9223372036854775808"),
        ({**BASE, "seed": 10**400}, "found a number too long to show"),
        ({**BASE, "seed": "x" * 500}, "xxx..."),
        ({**BASE, "train": {"lr": float("inf")}}, "config: train.lr: input should be a finite number"),
        ({**BASE, "train": {"weight_decay": float("nan")}}, "config: train.weight_decay: input should be"),
        ({**BASE, "train": {"epochs": 10**9}}, "config: train.epochs: input should be less than or equal to 1000000"),
        ({**BASE, "run": {"timeout_minutes": 1e300}}, "config: run.timeout_minutes: input should be less than"),
        (
            {**BASE, "method": {"name": "vip", "context_length": 10**9}},
            "config: method.context_length: input should be less",
        ),
        ({**BASE, "data": {"path": "d", "shots": "few"}}, "config: data.shots: input should be"),
        ({**BASE, "data": {"path": "d", "shots": 0}}, "data.shots: method 'vip' trains and needs images"),
        (
            {**BASE, "precision": "fp8"},
            "config: precision: input should be 'fp32', 'tf32', 'bf16' or 'fp16'; found 'fp8'",
        ),
        ({**BASE, "symptoms": None}, "symptoms: method 'vip' reads a symptom set"),
        ({"method": "vip"}, "config: data: is missing"),
    ],
)
def test_mistakes_are_told_in_one_line(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        resolve_config(mapping)
    assert "\n" not in str(caught.value)


def test_loading_tells_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"bad\.yaml: not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="should be a mapping of keys; found list"):
        load_config(tmp_path / "list.yaml")


def test_overrides_are_dotted_yaml_values() -> None:
    changed = override(BASE, ["data.shots=4", "method.merge=mean", "train.lr=1e-3", "method.position=front"])
    resolved = resolve_config(changed).to_mapping()
    assert resolved["data"]["shots"] == 4
    assert resolved["method"]["merge"] == "mean"
    assert resolved["train"]["lr"] == 0.001
    assert BASE["data"] == {"path": "data", "shots": 16}, "the original must not change"
    with pytest.raises(UserError, match="write key=value"):
        override(BASE, ["data.shots"])
    with pytest.raises(UserError, match=r"^override 'x{77}\.\.\.': write key=value"):
        override(BASE, ["x" * 5000])
    with pytest.raises(UserError, match="seed is a value, not a section"):
        override({**BASE, "seed": 1}, ["seed.x=2"])


def test_a_file_of_overrides_stands_for_them_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("data.shots: 4\nmethod: coop\nseed: 2\n")
    changed = override(BASE, ["seed=1", f"@{tmp_path / 'many.yaml'}", "data.shots=8"])
    assert (changed["data"], changed["method"], changed["seed"]) == ({"path": "data", "shots": 8}, {"name": "coop"}, 2)
    (tmp_path / "list.yaml").write_text("- data.shots=4")
    with pytest.raises(UserError, match=r"list\.yaml: should be a mapping of keys; found list"):
        override(BASE, [f"@{tmp_path / 'list.yaml'}"])


def test_a_resolved_config_resolves_to_itself() -> None:
    for method in ("vip", "coop", "cocoop", "zero_shot"):
        once = config(method=method)
        assert resolve_config(yaml.safe_load(once.to_yaml())) == once


def test_identity_changes_with_what_determines_the_result_and_nothing_else() -> None:
    name = run_name(config(), DIGESTS)
    assert re.fullmatch(r"vip_16shot_seed1_[0-9a-f]{12}", name)
    moved = config(data={"path": "elsewhere", "shots": 16}, symptoms="copy.json", run={"workers": 7, "out": "other"})
    assert run_name(moved, DIGESTS) == name
    others = [
        config(seed=2),
        config(precision="bf16"),
        config(precision="tf32"),
        config(run={"compile": True}),
        config(train={"lr": 0.003}),
        config(train={"augmentation_seed": 5}),
        config(train={"select": "best"}),
        config(train={"select": "best", "select_ties": "first"}),
        config(data={"path": "data", "shots": 8}),
        config(data={"path": "data", "shots": 16, "split_seed": 9}),
        config(method={"name": "vip", "context_length": 5}),
    ]
    names = [run_name(other, DIGESTS) for other in others] + [
        run_name(config(), DIGESTS._replace(**{field: "x"})) for field in Digests._fields
    ]
    assert len({name, *names}) == len(names) + 1


def test_one_result_has_one_identity() -> None:
    """Defaults that are written out, a draw of nothing and permission to take fewer images change no result."""
    same: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"method": "cocoop"}, {"method": {"name": "cocoop", "context_length": 4}}),
        ({"train": {"optimizer": "adamw"}}, {"train": {"optimizer": "adamw", "momentum": 0.9}}),
        ({"data": {"path": "d"}}, {"data": {"path": "d", "split_seed": 7}}),
        ({}, {"data": {"path": "d", "shots": 16, "fewer": "take"}}),
    ]
    for first, second in same:
        assert run_name(config(**first), DIGESTS) == run_name(config(**second), DIGESTS)


def test_home_is_expanded_wherever_a_config_names_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    places = config(
        data={"path": "~/data"},
        backbone={"name": "~/m.json", "pretrained": "~/w.pt"},
        symptoms="~/s.json",
        run={"out": "~/r"},
    )
    found = (places.data.path, places.backbone.name, places.backbone.pretrained, places.symptoms, places.run.out)
    assert list(map(str, found)) == [f"/home/me/{name}" for name in ("data", "m.json", "w.pt", "s.json", "r")]
    assert config(data={"path": "https://host/~me/data"}).data.path == "https://host/~me/data"


def test_what_a_method_does_not_read_is_not_part_of_it(caplog: pytest.LogCaptureFixture) -> None:
    assert config(method="coop").symptoms is None
    first = config(method="zero_shot", seed=1, train={"lr": 0.5})
    assert "train: ignored" in caplog.text
    second = config(method="zero_shot", seed=3, data={"path": "data", "shots": 4})
    assert run_name(first, DIGESTS) == run_name(second, DIGESTS)


def test_home_is_expanded_in_arguments_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell expands "~" where a word begins, and not in --out=~/runs or in quotes."""
    from vipbench.harness.cli import _expand_home

    monkeypatch.setenv("HOME", "/home/me")
    given = ["--out=~/runs", "~/data", "run.out=~/runs", "a~b", "--note=5~6", "https://host/~me"]
    expected = [
        "--out=/home/me/runs",
        "/home/me/data",
        "run.out=/home/me/runs",
        "a~b",
        "--note=5~6",
        "https://host/~me",
    ]
    assert [_expand_home(argument) for argument in given] == expected
