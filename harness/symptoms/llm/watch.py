"""Run a command and end it, with all its processes, as soon as the process that started this script is gone.

    python watch.py GRACE COMMAND ...     with a pipe on standard input, which the starter keeps open until the command is to end

The starter may be killed in any way: the system then closes the pipe, which ends the command. The exit status is the
command's own. GRACE: seconds between the request to end and the kill. Standard library only, since it runs as a plain script.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1


def main(grace: float, command: list[str]) -> int:
    """Run `command` in a session of its own until it ends or standard input does; returns its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _end(child, grace))
    threading.Thread(target=_end_with_input, args=(child, grace), daemon=True).start()
    status = child.wait()
    _signal(child, signal.SIGKILL)  # processes left in its group
    return status if status >= 0 else 128 - status


def _end_with_input(child: subprocess.Popen[bytes], grace: float) -> None:
    while os.read(0, 1024):  # not sys.stdin, whose lock would be held at exit
        pass
    _end(child, grace)


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    # The leader alone, as from a terminal's `kill`: vLLM ends its engines itself, and complains when they go first.
    if child.poll() is None:
        child.terminate()
        killer = threading.Timer(grace, _signal, (child, signal.SIGKILL))
        killer.daemon = True
        killer.start()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all gone
        os.killpg(child.pid, number)


def _die_with_parent() -> None:
    """On Linux: should this script itself be killed, the command gets a SIGTERM."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
