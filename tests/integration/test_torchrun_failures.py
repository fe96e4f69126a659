"""Real processes: one rank of two fails, and the run ends at once with that rank's error on the screen."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import PYTHON, RUN, launch, torchrun, write_config
from vipbench.harness.system.files import read_json

pytestmark = pytest.mark.integration

FAILING = str(Path(__file__).with_name("failing_run.py"))


def fail(config: dict[str, Any], folder: Path, how: str, *overrides: str) -> tuple[str, float]:
    """Run; return what is on the screen, and how many seconds it took."""
    write_config(config, folder)
    started = time.monotonic()
    result = launch([*torchrun(2), FAILING, "config.yaml", *overrides], folder, HOW=how)
    assert result.returncode != 0
    return result.stderr, time.monotonic() - started


def failed(folder: Path) -> tuple[Path, str]:
    """The partial run directory, and why the run failed according to it."""
    (path,) = (folder / "runs").glob("*.partial")
    return path, read_json(path / "failed.json")["error"]


def test_a_user_error_is_said_once_and_by_the_rank_that_has_it(vip_config: dict[str, Any], tmp_path: Path) -> None:
    screen, seconds = fail(vip_config, tmp_path, "user error")
    errors = [line for line in screen.splitlines() if "error:" in line]
    assert errors == ["error: rank 1: the disk is full"]
    assert seconds < 60, "most of which is the start of torch"
    path, reason = failed(tmp_path)
    assert reason == "rank 1: the disk is full"
    assert "UserError: the disk is full" in (path / "logs" / "rank-1.log").read_text()


def test_a_data_error_is_not_a_silent_process_whatever_its_words(vip_config: dict[str, Any], tmp_path: Path) -> None:
    screen, _ = fail(vip_config, tmp_path, "data error")
    reason = "rank 1: https://example.org/a.tar: timed out; connection reset by peer"
    assert [line for line in screen.splitlines() if "error:" in line] == [f"error: {reason}"]
    assert failed(tmp_path)[1] == reason


def test_a_bug_shows_its_traceback(vip_config: dict[str, Any], tmp_path: Path) -> None:
    screen, _ = fail(vip_config, tmp_path, "bug")
    assert "ZeroDivisionError: one over nothing" in screen
    assert "closed by peer" not in screen.lower(), "what happens to rank 0 then is not the reason"
    assert "ZeroDivisionError: one over nothing" in failed(tmp_path)[1]


def test_a_rank_that_is_stuck_ends_the_run_after_the_timeout(vip_config: dict[str, Any], tmp_path: Path) -> None:
    screen, seconds = fail(vip_config, tmp_path, "stuck", "run.timeout_minutes=0.2")
    assert "run.timeout_minutes" in screen
    assert 12 < seconds < 90


def test_a_killed_rank_is_named(vip_config: dict[str, Any], tmp_path: Path) -> None:
    screen, _ = fail(vip_config, tmp_path, "killed")
    assert "exitcode  : -9" in screen
    assert "another process of this run ended without a word" in failed(tmp_path)[1]


def test_a_mistake_is_one_line_however_many_processes_there_are(vip_config: dict[str, Any], tmp_path: Path) -> None:
    write_config(vip_config, tmp_path)
    message = "error: config: train.epoch: unknown key; did you mean 'epochs'?"
    run = [*RUN, "config.yaml", "train.epoch=3"]
    one, two = launch([*PYTHON, *run], tmp_path), launch([*torchrun(2), *run], tmp_path)
    assert (one.returncode, one.stderr.strip()) == (2, message)
    assert two.returncode != 0
    assert two.stderr.count(message) == 1
