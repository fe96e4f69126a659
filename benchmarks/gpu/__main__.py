"""All benchmarks of one GPU: tables on the screen, and a JSON file with the device's name that grows with each of them.

    python -m benchmarks.gpu [NAME ...] [--out FILE] [--seconds S] [--small]        (make gpu-bench)

Each runs in a process of its own, which prepares while the one before it measures. One that fails or takes too long is printed
and on record with the rows that it had; the others go on, and the exit status is 1.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu.suite import SUITE
from benchmarks.markdown import table
from benchmarks.measure import context
from vipbench.harness.system.files import read_json, write_json

OUT = Path("gpu-bench.json")
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
PATIENCE = 20.0  # the small form gets as many times longer, for a CPU that does other work too


class Process:
    """A benchmark's process, which waits for its turn."""

    def __init__(self, name: str, folder: Path, small: bool) -> None:
        self.name, self.rows = name, folder / f"{name}.jsonl"
        command = [*WORKER, name, str(self.rows), *(["--small"] if small else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def measure(self, seconds: float) -> dict[str, Any]:
        """Let it begin; returns title, rows, seconds and error ("" for none)."""
        began, error = time.monotonic(), ""
        if seconds > 0:
            try:
                self.process.communicate(b"begin\n", timeout=seconds)
            except subprocess.TimeoutExpired:
                error = f"ended after {seconds:.0f} s"
        else:
            error = "not run: the time was up"
        self.end()
        lines = self.rows.read_text(encoding="utf-8").splitlines() if self.rows.is_file() else []
        rows = [json.loads(line) for line in lines]
        failures = [str(row["error"]) for row in rows if "error" in row]
        if not error and (failures or self.process.returncode):
            error = failures[0] if failures else f"exit status {self.process.returncode}"
        columns = dict.fromkeys(key for row in rows for key in row)
        found = {
            "title": SUITE[self.name].title,
            "rows": [{key: row.get(key) for key in columns} for row in rows],
            "notes": [],
        }
        return found | {"seconds": time.monotonic() - began, "error": error}

    def end(self) -> None:
        """End it and the processes that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"which of {', '.join(SUITE)}; default: all")] = None,
    out: Annotated[
        Path,
        typer.Option(help="where the figures go; those of other benchmarks here stay in it"),
    ] = OUT,
    seconds: Annotated[float, typer.Option(help="after which no other benchmark begins")] = 230,
    small: Annotated[bool, typer.Option(help="try the code with a tiny model; a CPU will do")] = False,
) -> None:
    """Measure, print and write."""
    names = names or list(SUITE)
    if unknown := [name for name in names if name not in SUITE]:
        raise typer.BadParameter(f"{unknown[0]!r}: choose from {', '.join(SUITE)}")
    head = {"small": small, "context": context()}
    before: dict[str, Any] = read_json(out) if out.is_file() else {**head, "results": {}}
    if differing := [key for key in head if before[key] != head[key]]:
        raise typer.BadParameter(f"{out} has figures of another {differing[0]}; name another file", param_hint="--out")
    found: dict[str, Any] = before["results"]
    until = time.monotonic() + seconds * (PATIENCE if small else 1)
    with tempfile.TemporaryDirectory() as folder:
        ahead: Process | None = Process(names[0], Path(folder), small)
        try:
            for name, following in zip(names, [*names[1:], None], strict=True):
                assert ahead is not None
                process, ahead = ahead, Process(following, Path(folder), small) if following else None
                limit = SUITE[name].seconds * (PATIENCE if small else 1)
                found[name] = process.measure(min(limit, until - time.monotonic()))
                write_json(out, head | {"results": found})
                _show(name, found[name])
        finally:
            if ahead is not None:
                ahead.end()
    typer.echo(f"written: {out}")
    raise typer.Exit(int(any(found[name]["error"] for name in names)))


def _show(name: str, found: dict[str, Any]) -> None:
    typer.echo(table(found))
    typer.echo(f"{name}: {found['seconds']:.0f} s{', FAILED: ' + found['error'] if found['error'] else ''}\n")


if __name__ == "__main__":
    typer.run(main)
