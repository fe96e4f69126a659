"""One benchmark in its own process: python -m benchmarks.gpu.worker NAME ROWS.jsonl [--small]

Imports and prepares what needs no GPU, waits for a line on its standard input, measures, and writes each row as it has it.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.setting import FULL, SMALL
from benchmarks.gpu.suite import SUITE


def main(name: str, rows: str, *options: str) -> int:
    """Measure; returns 1 where a row has an error, or all ended in one."""
    benchmark, failed = SUITE[name], False
    module = importlib.import_module(f"benchmarks.gpu.{benchmark.module}")
    setting = SMALL if "--small" in options else FULL
    with Path(rows).open("a", encoding="utf-8", buffering=1) as file:
        try:
            for row in module.measure(setting, sys.stdin.readline, *benchmark.arguments):
                failed = failed or "error" in row
                file.write(json.dumps(row) + "\n")
        except Exception as error:  # noqa: BLE001 - of whatever kind, it is on record in the place of what is missing
            traceback.print_exc()
            file.write(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}) + "\n")
            return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
