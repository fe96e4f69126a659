"""Processes that end when their parent is killed, and only then."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

CHILD = "import sys, time; from vipbench.harness.system.processes import end_with_parent; end_with_parent({}); time.sleep(120)"
PARENT = """
import subprocess, sys, threading, time
def start():
    print(subprocess.Popen([sys.executable, "-c", {child!r}]).pid, flush=True)
thread = threading.Thread(target=start)  # a thread that ends at once, which is no reason to end its child
thread.start()
thread.join()
time.sleep(120)
"""


def gone(pid: int, seconds: float) -> bool:
    """Wait for a process to end; a zombie that nobody reaps counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.integration
def test_a_child_ends_with_its_parent_and_not_with_the_thread_that_started_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(child=CHILD.format(""))], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert not gone(child, 3)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert gone(child, 10)
    finally:
        parent.kill()
        parent.stdout.close()
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)


@pytest.mark.integration
def test_a_child_whose_parent_died_before_it_looked_ends_by_the_signal_asked_for() -> None:
    finished = subprocess.Popen(["true"])
    finished.wait()
    child = subprocess.run([sys.executable, "-c", CHILD.format(f"{finished.pid}, by=15")], timeout=30, check=False)
    assert child.returncode == -signal.SIGTERM
