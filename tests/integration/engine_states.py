"""A worker that accelerate launch starts: trains, stops, goes on from the optimizer's state, and writes what came out.

python engine_states.py OUT.safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vipbench.harness.distributed.engines.engine import Engine, make_engine
from vipbench.harness.distributed.engines.zero import gathered_parameters
from vipbench.harness.distributed.topology import Topology

RATES = [0.1, 0.1, 0.05, 0.02, 0.01]
STOP = 3


class Model(nn.Module):
    """A frozen layer, and two that learn; the forward pass is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.first, self.second = nn.Linear(8, 5), nn.Linear(5, 1)

    def forward(self, inputs: Tensor, weight: Tensor) -> Tensor:
        return (self.second(torch.tanh(self.first(torch.tanh(self.frozen(inputs))))) - 1).square().sum() * weight


def make(name: str) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = Model()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return model, torch.optim.SGD(learned, 0.1, momentum=0.9, weight_decay=5e-4)
    return model, torch.optim.AdamW(learned, 0.1, weight_decay=5e-4)


def train(topology: Topology, engine: Engine, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        batch = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        mine = batch[topology.rank :: topology.world]
        engine.step([(row[None], torch.tensor(topology.world / 5)) for row in mine])


def learned(model: Model) -> dict[str, Tensor]:
    with gathered_parameters(model.parameters()):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stop_and_go_on(topology: Topology, name: str) -> dict[str, dict[str, Tensor]]:
    """Train; return what was learned without a stop ("whole") and with one ("resumed"), and the state at the stop ("state")."""
    model, optimizer = make(name)
    engine = make_engine(topology, model, optimizer, max_norm=0.5, passes=topology.passes(5, 1))
    train(topology, engine, optimizer, range(STOP))
    stopped, state = learned(model), engine.optimizer_state()
    train(topology, engine, optimizer, range(STOP, len(RATES)))
    whole = learned(model)

    model, optimizer = make(name)
    model.load_state_dict(stopped)
    engine = make_engine(topology, model, optimizer, max_norm=0.5, passes=topology.passes(5, 1))
    engine.load_optimizer_state(state)
    train(topology, engine, optimizer, range(STOP, len(RATES)))
    return {"whole": whole, "resumed": learned(model), "state": state}


def main(out: Path) -> None:
    topology = Topology("cpu", "fp32")
    with topology.fail_together():
        tensors = {
            f"{name}.{part}.{key}": value
            for name in ("sgd", "adamw")
            for part, values in stop_and_go_on(topology, name).items()
            for key, value in values.items()
        }
    if topology.is_main:
        save_file(tensors, out)
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
