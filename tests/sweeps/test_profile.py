"""Settings of a cluster's jobs: times in Slurm's ways, what overrides what, mistakes in one line."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.commands.sweep import Kind, _executor
from vipbench.harness.errors import UserError
from vipbench.sweeps.executors.profile import Profile
from vipbench.sweeps.runner import AnyExecutor


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("4:00:00", 240),
        ("0:00:30", 1),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("1-2:30:05", 1591),
    ],
)
def test_times_are_slurms(tmp_path: Path, written: str, minutes: int) -> None:
    """Without quotes too, where YAML alone would read a number in base 60."""
    path = tmp_path / "profile.yaml"
    for text in (written, f'"{written}"'):
        path.write_text(f"time: {text}\n")
        assert Profile.load(path, {}).time == Profile.load(None, {"time": written}).time == minutes


def test_options_override_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("{partition: gpu, gpus_per_run: 8, nodes_per_run: 2, cpus_per_run: 16, options: {exclude: n1}}")
    profile = Profile.load(path, {"partition": "short", "account": None})
    assert (profile.partition, profile.account, profile.processes_per_node) == ("short", None, 4)
    asked = profile.sbatch()
    assert (asked["nodes"], asked["gpus_per_node"], asked["cpus_per_task"], asked["ntasks_per_node"]) == (2, 4, 8, 1)
    assert asked["additional_parameters"] == {"requeue": True, "exclude": "n1"}
    assert "gpus_per_node" not in Profile.load(None, {"gpus_per_run": 0}).sbatch()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("partitoin: gpu", "partitoin: unknown key; .*partition"),
        ("time: soon", "time: .*not a time; write minutes, hours:minutes:seconds"),
        ("time: 2024-01-02", "time: .*not a time; write minutes.*; found 2024-01-02"),
        ("mem: 1G\nmem: 2G", "profile.yaml: line 2: the key mem stands here twice"),
        ("{options: {1: x}}", "profile.yaml: line 1: options: the key 1 is no text"),
        ("setup: !!set {x}", "profile.yaml: line 1: setup: the tag !!set is not for settings"),
        ("{gpus_per_run: 3, nodes_per_run: 2}", "gpus_per_run: 3 cannot be split evenly among 2 nodes"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        Profile.load(path, {})


def test_options_of_another_executor_are_refused(tmp_path: Path) -> None:
    command = ["sweep", "run", "grid.yaml", "--out", str(tmp_path), "--executor", "slurm", "--jobs", "2"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == "--jobs is for --executor local, not slurm"


def test_the_command_line_offers_every_executor() -> None:
    schema = TypeAdapter(AnyExecutor).json_schema()
    assert set(schema["discriminator"]["mapping"]) == {str(kind) for kind in Kind}
    for kind in Kind:
        executor = _executor(kind, {})
        assert executor.model_dump()["kind"] == kind
