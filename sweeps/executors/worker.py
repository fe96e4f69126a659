"""Start ONE process of a sweep that torchrun shares out: torchrun -m vipbench.sweeps.executors.worker DIR TASK.json."""

import signal
import sys
from pathlib import Path

from vipbench.harness.system.console import setup_logging, user_errors
from vipbench.harness.system.processes import end_with_parent
from vipbench.sweeps.executors.torchrun import work

if __name__ == "__main__":
    end_with_parent(by=signal.SIGTERM)
    setup_logging()
    with user_errors():
        work(Path(sys.argv[1]), Path(sys.argv[2]))
