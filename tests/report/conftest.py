"""Small real runs for figures: three methods, two seeds, two numbers of shots."""

import json
from pathlib import Path
from typing import Any

import pytest

from vipbench.harness.config.overrides import override
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config

BACKBONE = Path(__file__).parents[2] / "harness" / "demo" / "model"  # so that runs differ in what they predict
VARIANTS = {
    "zero_shot": ["method={name: zero_shot, text: symptoms}", "train=null"],
    "coop": ["method={name: coop, context_length: 2}", "symptoms=null"],
    "vip": ["train.select=best"],
}
MEAN_MERGE = ["method={name: vip, context_length: 2, merge: mean}"]


@pytest.fixture(scope="session")
def run_paths(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs in one directory by "method shots seed"; "vip_mean 4 seed" is the ablation."""
    out = tmp_path_factory.mktemp("figures") / "runs"
    paths = {}
    for name, settings in {**VARIANTS, "vip_mean": MEAN_MERGE}.items():
        shots_of = {"zero_shot": [0], "vip_mean": [4]}.get(name, [1, 4])
        for shots in shots_of:
            for seed in [0] if name == "zero_shot" else [1, 2]:
                keys = [*settings, f"run.out={json.dumps(str(out))}", f"backbone={json.dumps(str(BACKBONE))}"]
                keys += [] if name == "zero_shot" else [f"seed={seed}", f"data.shots={shots}", "train.batch_size=4"]
                base = {key: value for key, value in base_config.items() if name != "zero_shot" or key != "train"}
                paths[f"{name} {shots} {seed}"] = execute(resolve_config(override(base, keys)))
    return paths
