"""Packing: the method decides whether its runs train together, and its reason against it is logged once."""

import logging
from typing import Any

import pytest

from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.methods.registry import method_class
from vipbench.harness.runs.resolve import resolve_config
from vipbench.sweeps.packing import group


def configs(base: dict[str, Any], *overrides: str) -> dict[str, Config]:
    return {str(seed): resolve_config(override(base, [*overrides, f"seed={seed}"])) for seed in (1, 2, 3)}


@pytest.mark.parametrize(
    ("overrides", "method", "reason"),
    [
        (["method=coop", "precision=fp16"], "coop", "the loss scaling of fp16 belongs to one run"),
        (["method=coop", "run.tracking=[mlflow]"], "coop", "mlflow follows one run per process"),
        (["method=maple"], "maple", "it trains inside the image tower"),
    ],
)
def test_runs_that_train_alone_have_a_reason(
    base_config: dict[str, Any], caplog: pytest.LogCaptureFixture, overrides: list[str], method: str, reason: str
) -> None:
    runs = configs(base_config, *overrides)
    caplog.clear()
    with caplog.at_level(logging.INFO, "vipbench.sweeps"):
        assert group(runs) == [["1"], ["2"], ["3"]]
        assert group(runs, pack=False) == [["1"], ["2"], ["3"]]
    assert caplog.messages == [f"--pack: {method} runs alone: {reason}"]


def test_the_method_has_a_say(
    base_config: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at its own options."""
    runs = configs(base_config, "method=coop") | {"4": resolve_config(override(base_config, ["method.merge=mean"]))}
    assert group(runs) == [["1", "2", "3"], ["4"]]

    def not_packed(config: Any) -> str:
        return "it draws random numbers" if config.position == "end" else ""

    monkeypatch.setattr(method_class("coop"), "not_packed", not_packed)
    caplog.clear()
    with caplog.at_level(logging.INFO, "vipbench.sweeps"):
        assert group(runs) == [["1"], ["2"], ["3"], ["4"]]
    assert caplog.messages == ["--pack: coop runs alone: it draws random numbers"]
