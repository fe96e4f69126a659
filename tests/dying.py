"""Ends a training at a chosen step, as a death of its process would."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from vipbench.harness.training.loop import Training


class Death(BaseException):
    """Stands for the end of a process: nothing handles it."""


def at_step(number: int, act: Callable[[Training], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen once, as a step has been counted, logged and selected by."""
    advance = Training.advance

    def advance_and_act(training: Training, loss: Tensor) -> None:
        advance(training, loss)
        if training.step == number:
            monkeypatch.setattr(Training, "advance", advance)
            act(training)

    monkeypatch.setattr(Training, "advance", advance_and_act)


def die(*_: Any) -> None:
    raise Death
