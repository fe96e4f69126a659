"""`vipbench prepare` that is killed leaves no process behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.data.drawn_images import drawn, save


@pytest.mark.integration
def test_the_processes_that_decode_end_with_their_parent(tmp_path: Path) -> None:
    image = save(tmp_path / "large.png", drawn("large", (1500, 1500)))
    for label in ("a", "b"):
        (tmp_path / "source" / label).mkdir(parents=True)
        for number in range(400):
            (tmp_path / "source" / label / f"{number}.png").hardlink_to(image)
    command = [sys.executable, "-m", "vipbench", "prepare", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    parent = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(children) < 3 and time.monotonic() < deadline:  # two decoders, and multiprocessing's tracker
            time.sleep(0.2)
            children = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(3)  # until they are at work
        assert len(children) >= 2 and parent.poll() is None
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert psutil.wait_procs(children, timeout=10)[1] == []
    finally:
        parent.kill()
        for child in children:
            if child.is_running():
                child.kill()
