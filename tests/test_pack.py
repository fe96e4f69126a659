"""Runs trained together end as they would alone, in the same directories, and fail alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from harness.backbone import TextTower
from harness.config import Config, override
from harness.errors import UserError
from harness.files import read_json
from harness.pack import compute_together, execute_together
from harness.prompts import Prompts
from harness.results import failure
from harness.run import execute
from harness.topology import Topology
from sweeps.packing import MOST, group

VARIANTS = [
    ["seed=1", "data.shots=2"],
    ["seed=2", "data.shots=2", "train.epochs=5"],
    ["seed=1", "data.shots=4", "train.lr=0.01"],
    ["seed=3", "data.shots=all", "train.batch_size=7"],
]


def configs(base: dict[str, Any], out: Path, *overrides: str) -> list[Config]:
    return [Config.from_mapping(override(base, [f"run.out={out}", *overrides, *variant])) for variant in VARIANTS]


@pytest.mark.parametrize("options", [["method=vip"], ["method=coop", "train.select=best"], ["method=cocoop"]])
@pytest.mark.parametrize("kind", ["resnet", "bert"])
def test_together_is_as_alone(
    base_config: dict[str, Any], model_folder: Path, tmp_path: Path, options: list[str], kind: str
) -> None:
    overrides = [*options, f"backbone={model_folder / kind}.json", "train.max_grad_norm=1.0"]
    assert execute_together(configs(base_config, tmp_path / "together", *overrides)) == {}
    for config in configs(base_config, tmp_path / "alone", *overrides):
        alone = execute(config)
        together = tmp_path / "together" / alone.name
        first, second = (load_file(path / "prompts.safetensors") for path in (alone, together))
        assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)
        logits = [
            np.stack(pd.read_parquet(path / "predictions.parquet")["logits"].to_list()) for path in (alone, together)
        ]
        assert np.abs(logits[0] - logits[1]).max() < 1e-3
        assert read_json(alone / "metrics.json")["accuracy"] == read_json(together / "metrics.json")["accuracy"]


def test_a_step_is_one_pass_of_the_text_tower(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    compute = TextTower.compute

    def counted(self: TextTower, prompts: Prompts) -> torch.Tensor:
        if torch.is_grad_enabled():
            passes.append(len(prompts))
        return compute(self, prompts)

    monkeypatch.setattr(TextTower, "compute", counted)
    same = [f"seed={seed}" for seed in (1, 2, 3)]
    runs = [Config.from_mapping(override(base_config, [f"run.out={tmp_path}", "method=coop", seed])) for seed in same]
    assert execute_together(runs) == {}
    assert passes == [3 * 3] * (3 * 3), "three runs of three classes in each of three epochs of three steps"


def test_one_that_fails_fails_alone_and_says_why(base_config: dict[str, Any], tmp_path: Path) -> None:
    good, bad = (
        Config.from_mapping(override(base_config, [f"run.out={tmp_path}", "method=coop", f"train.lr={rate}"]))
        for rate in (0.01, 1e30)
    )
    ((path, reason),) = execute_together([good, bad]).items()
    assert "the loss is" in reason
    assert failure(path) == reason
    assert not path.exists()
    (finished,) = (
        entry for entry in tmp_path.iterdir() if not entry.name.startswith(".") and entry.name[-8:] != ".partial"
    )
    assert read_json(finished / "metrics.json")["samples"] == 21
    assert list(execute_together([good, bad])) == [path], "what is finished is not run again"


def test_an_error_in_one_computation_leaves_the_tower_as_it_was(vit_backbone: Any) -> None:
    def broken() -> torch.Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        compute_together(vit_backbone.text, [broken])
    assert vit_backbone.text.elsewhere is None


def test_groups_are_runs_that_differ_in_seed_shots_or_rate(base_config: dict[str, Any]) -> None:
    def config(*overrides: str) -> Config:
        return Config.from_mapping(override(base_config, list(overrides)))

    runs = {
        "a": config("seed=1"),
        "b": config("method=coop"),
        "c": config("seed=2", "data.shots=1", "train.lr=0.1"),
        "zero": config("method=zero_shot"),
        "other": config("method.merge=mean"),
        "d": config("method=coop", "data.shots=4"),
    }
    assert group(runs) == [["a", "c"], ["b", "d"], ["zero"], ["other"]]
    assert group(runs, pack=False) == [[name] for name in runs]
    many = {str(seed): config(f"seed={seed}") for seed in range(MOST + 1)}
    assert [len(names) for names in group(many)] == [MOST, 1]


def test_several_processes_are_refused(base_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoRanks(Topology):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.world = 2

    monkeypatch.setattr("harness.pack.Topology", TwoRanks)
    with pytest.raises(UserError, match="in one process"):
        execute_together([Config.from_mapping(base_config)])
