"""Count the cores that processes may use, and end a process when the one that started it is gone, even by SIGKILL."""

import os
import signal
import threading
import time

SECONDS_BETWEEN_LOOKS = 0.5


def available_cores() -> int:
    """The number of cores that this process may use: under Slurm or in a container not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(parent: int | None = None, by: signal.Signals = signal.SIGKILL) -> None:
    """Send this process a signal within a second of its parent's death; call it once, early, in the child.

    A thread looks at the parent's id. The kernel's PR_SET_PDEATHSIG would end the child as soon as the *thread* that started it
    ends, which a pool of threads does while all is well.

    Args:
        parent: the process id that the parent gave, which also ends a child whose parent died before this call; None takes the
            parent of this moment.
        by: SIGTERM lets a process tidy up or write a checkpoint.
    """
    watched = os.getppid() if parent is None else parent
    threading.Thread(target=_watch, args=(watched, by), name="end-with-parent", daemon=True).start()


def _watch(parent: int, by: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), by)
