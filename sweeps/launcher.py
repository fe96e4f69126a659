"""torchrun that ends with the process that started it: python -m sweeps.launcher ARGUMENTS_OF_TORCHRUN."""

import sys

from harness.system.console import end_with_runner

if __name__ == "__main__":
    end_with_runner()
    from torch.distributed.run import main

    main(sys.argv[1:])
