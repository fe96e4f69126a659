"""Real processes: torchrun, on one node and on two."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import (
    RUN,
    SCRIPTS,
    assert_same_run,
    environment,
    free_port,
    run,
    run_directory,
    run_on_ranks,
    torchrun,
    write_config,
)
from vipbench.harness.system.files import read_json

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("processes", [2, 4])
def test_one_node(vip_config: dict[str, Any], vip_run: Path, tmp_path: Path, processes: int) -> None:
    path = run(torchrun(processes), vip_config, tmp_path)
    assert_same_run(path, vip_run)
    hardware = read_json(path / "provenance.json")["hardware"]
    assert (hardware["launcher"], hardware["engine"], hardware["processes"]) == ("torchrun", "DDP", processes)


def test_most_ranks_without_a_sample(cocoop_config: dict[str, Any], cocoop_run: Path, tmp_path: Path) -> None:
    assert_same_run(run_on_ranks(3, cocoop_config, tmp_path), cocoop_run)


def test_two_nodes(vip_config: dict[str, Any], vip_run: Path, tmp_path: Path) -> None:
    """A torchrun for each of two nodes, which share a folder."""
    write_config(vip_config, tmp_path)
    port = free_port()
    torchrun = [str(SCRIPTS / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), *RUN, "config.yaml"],
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    errors = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    path = run_directory(tmp_path)
    assert_same_run(path, vip_run)
    assert sorted(log.name for log in (path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert "rank 1 of 2" in (path / "logs" / "rank-1.log").read_text()
    bars = [sum("train: 9 steps" in line for line in error.splitlines()) for error in errors]
    assert sorted(bars) == [0, 1], "one progress display for all"
