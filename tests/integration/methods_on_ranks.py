"""A worker that accelerate launch starts, or a test: runs every method in one process group and writes what came out.

python methods_on_ranks.py BASE.json OUT
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.zoo import run_unwritten, small_config
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.methods.registry import method_names
from vipbench.harness.system.files import read_json, write_json

TENSORS, REFUSALS = "outcomes.safetensors", "refusals.json"


def run_all(base: dict[str, Any], out: Path, topology: Topology) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Logits and what was learned by "<method>/<name>", and why methods were refused, by method."""
    tensors, refusals = {}, {}
    for name in method_names():
        try:
            outcome = run_unwritten(small_config(base, name, out), topology)
        except UserError as error:
            refusals[name] = str(error)
            continue
        tensors[f"{name}/logits"] = torch.from_numpy(outcome.logits)
        tensors |= {f"{name}/{key}": tensor for key, tensor in outcome.learned.items()}
    return tensors, refusals


def main(base: Path, out: Path) -> None:
    topology = Topology("cpu", "fp32")
    with topology.fail_together():
        tensors, refusals = run_all(read_json(base), out, topology)
    if topology.is_main:
        save_file(tensors, out / TENSORS)
        write_json(out / REFUSALS, refusals)
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
