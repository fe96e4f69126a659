"""DeepSpeed's settings as accelerate launch hands them over, in environment variables."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from vipbench.harness.distributed.launcher import deepspeed_settings
from vipbench.harness.errors import UserError


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment of `accelerate launch --use_deepspeed` in which more can be set."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return monkeypatch


def settings() -> dict[str, Any] | None:
    return deepspeed_settings(os.environ, cpu=True)


def test_without_deepspeed_there_are_none() -> None:
    assert settings() is None


def test_what_the_runs_config_says_is_left_out(
    launched: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zero = {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 1000}
    content = {"zero_optimization": zero, "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}}
    (tmp_path / "own.json").write_text(json.dumps({**content, "train_micro_batch_size_per_gpu": "auto"}))
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "own.json"))
    kept = settings()
    assert kept is not None
    assert kept["zero_optimization"] == {"stage": 2, "allgather_bucket_size": 1000}
    assert not {"optimizer", "bf16", "train_micro_batch_size_per_gpu"} & kept.keys()
    assert "DeepSpeed's settings: optimizer is ignored, the run's config decides" in caplog.text


def test_a_stage_is_needed(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(UserError, match=r"zero_optimization.stage must be 1, 2 or 3"):
        settings()


def test_a_file_that_is_not_there(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    with pytest.raises(UserError, match=r"DeepSpeed's settings: .*nowhere.json"):
        settings()


def test_deepspeed_that_is_not_installed(launched: pytest.MonkeyPatch) -> None:
    launched.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="not installed: pip install deepspeed"):
        settings()
