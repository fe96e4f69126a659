"""harness/run.py in which rank 1 fails at its third step: python failing_run.py CONFIG.yaml, with HOW in the environment."""

import os
import signal
import time
from unittest.mock import patch

import typer
from torch import Tensor

from vipbench.harness.errors import UserError
from vipbench.harness.run import main
from vipbench.harness.training.loop import Training

advance = Training.advance


def fail_at_the_third_step(training: Training, loss: Tensor) -> None:
    if training.topology.rank == 1 and training.step == 2:
        match os.environ["HOW"]:
            case "user error":
                raise UserError("the disk is full")
            case "data error":
                raise UserError("https://example.org/a.tar: timed out; connection reset by peer")
            case "bug":
                raise ZeroDivisionError("one over nothing")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stuck":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun would wait for our handler for 30 s, then kill
                time.sleep(1000)
    advance(training, loss)


if __name__ == "__main__":
    with patch.object(Training, "advance", fail_at_the_third_step):
        typer.run(main)
