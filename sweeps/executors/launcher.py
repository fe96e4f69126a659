"""Start torchrun so that it ends with the process that started it.

    python -m vipbench.sweeps.executors.launcher ARGUMENTS_OF_TORCHRUN

It names the GPUs of the node for the processes, which then need not load torch.
"""

import os
import sys

import torch
from torch.distributed.run import main

from vipbench.harness.system.console import end_with_runner

if __name__ == "__main__":
    end_with_runner()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    main(sys.argv[1:])
