"""Start torchrun so that it ends with the process that started it: python -m sweeps.executors.launcher ARGUMENTS_OF_TORCHRUN."""

import sys

from torch.distributed.run import main

from harness.system.console import end_with_runner

if __name__ == "__main__":
    end_with_runner()
    main(sys.argv[1:])
