"""The engine of one process, and of distributed data parallel (DDP), through accelerate."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vipbench.harness.distributed.engines.graph import GraphedPasses
from vipbench.harness.distributed.engines.optimizer_state import read_state, write_state
from vipbench.harness.distributed.failures import collective
from vipbench.harness.distributed.topology import Topology

SCALER = "loss scale"  # of fp16, in an optimizer's state


class PlainEngine:
    """One process, or distributed data parallel."""

    @collective()
    def __init__(
        self,
        topology: Topology,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
        combine: Callable[[Sequence[Mapping[str, Tensor]]], Mapping[str, Tensor]] | None,
        cuda_graph: bool = False,
    ) -> None:
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.topology, self.accelerator = topology, topology.accelerator
        self.base, self.max_norm, self.combine = optimizer, max_norm, combine  # accelerate replaces its state
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # newer torch has a new name for it
            self.model, scaling = self.accelerator.prepare(model, optimizer)
        # Without fp16 the optimizer itself takes the step: accelerate's wrapper looks in each one if some package is installed,
        # which takes as long as a small step.
        self.optimizer = scaling if self.accelerator.scaler else optimizer
        trained = list(self.parameters.values())
        self.graphed = GraphedPasses(self.model, self._backward, trained) if cuda_graph else None

    @collective()
    def step(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._combined_gradients(parts) if self.combine else self._gradients(parts)
        if self.max_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return loss

    def _gradients(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Add up the gradients of a batch's parts; returns the sum of their losses."""
        if self.graphed:
            (part,) = parts
            return self.graphed(part)
        losses: list[Tensor] = []
        for part in parts:
            last = len(losses) == len(parts) - 1  # gradients go over the ranks once
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(*part)
                self._backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _backward(self, loss: Tensor) -> None:
        scaler = self.accelerator.scaler
        (scaler.scale(loss) if scaler else loss).backward()

    def _combined_gradients(self, parts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Combine the K gradients of the global batch, each reduced over the ranks first; returns the sum of all losses."""
        assert self.combine
        scaler, parameters = self.accelerator.scaler, list(self.parameters.values())
        scale = scaler.scale(torch.ones((), device=self.topology.device)) if scaler else 1.0
        sums: list[list[Tensor]] = []
        losses: list[Tensor] = []
        for part in parts:
            with self.accelerator.no_sync(self.model):
                own = self.model(*part)
            add_gradients(sums, own * scale, parameters)
            losses.append(own.detach().sum())
        means = [[self.topology.mean(gradient) / scale for gradient in gradients] for gradients in sums]
        combined = self.combine([dict(zip(self.parameters, gradients, strict=True)) for gradients in means])
        for name, parameter in self.parameters.items():
            parameter.grad = combined[name] * scale
        return torch.stack(losses).sum()

    def optimizer_state(self) -> dict[str, Tensor]:
        scaler = self.accelerator.scaler
        scale = {f"{SCALER}.{key}": torch.tensor(value) for key, value in scaler.state_dict().items()} if scaler else {}
        return {**read_state(self.base, self.parameters), **scale}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        scale = {key.removeprefix(f"{SCALER}."): value for key, value in state.items() if key.startswith(f"{SCALER}.")}
        if scale:
            self.accelerator.scaler.load_state_dict({key: value.item() for key, value in scale.items()})
        write_state(self.base, self.parameters, {key: state[key] for key in state if not key.startswith(f"{SCALER}.")})


def add_gradients(sums: list[list[Tensor]], losses: Tensor, parameters: Sequence[Tensor]) -> None:
    """Add the gradients of losses [K], one for each parameter, to K sums; `sums` is empty at first."""
    for place in range(len(losses)):
        found = torch.autograd.grad(
            losses[place], parameters, retain_graph=place < len(losses) - 1, allow_unused=True, materialize_grads=True
        )
        if place == len(sums):
            sums.append(list(found))
        else:
            sums[place] = [total + gradient for total, gradient in zip(sums[place], found, strict=True)]
