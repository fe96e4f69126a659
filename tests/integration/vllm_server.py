"""The real vLLM (its CPU build, see `make serve-env-cpu`) with a tiny random model, as `vipbench serve` starts it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.server import interpreter

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable,
    "-c",
    "from vipbench.harness.cli import main; main()",
    "serve",
]
QUICK = ["--", "--max-num-seqs", "16"]


def vllm_interpreter() -> Path:
    """The interpreter of vLLM's environment; the test is skipped where there is none."""
    if not os.environ.get("VIPBENCH_SERVE_PYTHON") and (ROOT / ".venv-serve" / ".installed").is_file():
        return ROOT / ".venv-serve" / "bin" / "python"
    try:
        return interpreter()
    except UserError as error:
        pytest.skip(str(error))


@contextmanager
def served(model: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`vipbench serve MODEL` from its first line on to its end; it is sent a SIGTERM if it still runs then."""
    command = [*COMMAND, str(model), "--port", str(port), "--python", str(vllm_interpreter()), *QUICK]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert "is served on" in line, "the server did not come up; see standard error"
        yield process
    finally:
        process.terminate()
        process.wait(60)


def group_of(port: int) -> set[int]:
    """The process ids of the server with this port: vLLM's own and its engines', which share a process group."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid,pgid,stat,args"], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 3) for line in listing.splitlines()[1:]]
    groups = {pgid for _, pgid, _, words in rows if " -m vllm." in words and f"--port {port} " in words}
    leaders = {pgid for _, pgid, _, words in rows if "watch.py" in words}
    return {int(pid) for pid, pgid, state, _ in rows if pgid in groups - leaders and not state.startswith("Z")}
