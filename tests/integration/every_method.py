"""harness/run.py for several methods in one launch: python every_method.py CONFIG.yaml, with METHODS (names with commas)."""

import os
import sys
from pathlib import Path

from harness.config import Config
from harness.console import user_errors
from harness.run import execute

if __name__ == "__main__":
    with user_errors():
        for method in os.environ["METHODS"].split(","):
            execute(Config.load(Path(sys.argv[1]), [f"method={method}"]))
