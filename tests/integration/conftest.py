"""One run per recipe in one process, with which those of many processes are compared; and a Slurm cluster."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import run_on_ranks
from tests.integration.slurm_cluster import missing, running_cluster


@pytest.fixture(scope="session")
def vip_config(base_config: dict[str, Any], model_folder: Path) -> dict[str, Any]:
    """Selects an epoch, clips gradients, trains in micro batches; 5 per batch and 21 test images divide by no world here."""
    train = {**base_config["train"], "warmup_epochs": 0, "select": "best", "max_grad_norm": 0.05}
    execution = {**base_config["run"], "micro_batch": 1, "eval_batch_size": 4}
    backbone = {"name": str(model_folder / "vit.json")}
    return {**base_config, "backbone": backbone, "train": train, "run": execution}


@pytest.fixture(scope="session")
def cocoop_config(base_config: dict[str, Any]) -> dict[str, Any]:
    """One image per batch, so that most ranks have none, encoded as it is needed, without a bank."""
    train = {"epochs": 1, "batch_size": 1, "lr": 0.02, "warmup_epochs": 0}
    return {**base_config, "method": "cocoop", "train": train, "run": {**base_config["run"], "bank": False}}


@pytest.fixture(scope="session")
def vip_run(vip_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_ranks(1, vip_config, tmp_path_factory.mktemp("vip"))


@pytest.fixture(scope="session")
def cocoop_run(cocoop_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_ranks(1, cocoop_config, tmp_path_factory.mktemp("cocoop"))


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[None]:
    """A cluster that Slurm's commands find; the test is skipped where Slurm is not installed."""
    if missing():
        pytest.skip(f"{', '.join(missing())}: not installed (Debian's packages slurm-wlm and munge)")
    with running_cluster() as configuration, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:  # of a job that runs these tests
            patch.delenv(name)
        patch.setenv("SLURM_CONF", str(configuration))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
