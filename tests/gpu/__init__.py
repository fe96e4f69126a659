"""On a CUDA device: the numbers of a CPU, half precision, memory, waits, NCCL and DeepSpeed; `make gpu-check`.

Twins that need no GPU: whole runs of every method on one that is not there (tests/system/test_devices.py), waits
(tests/training/test_waiting_for_a_gpu.py), ZeRO and several processes on the CPU (tests/integration), memory of a pass in parts
(tests/models/test_packed_text.py). What CUDA alone can show has none: rounding of its kernels, NCCL, peak memory, CUDA graphs.
"""

import pytest
import torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible here"),
]
