"""The passes of a training step as a CUDA graph, which launches all kernels of the step at once.

A step of prompt learning is about a thousand small kernels: to launch them one by one takes longer than they do. What a
graph holds is the same in every step but for the values of inputs and parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vipbench.harness.errors import UserError

WARM_UPS = 3  # before a capture, in which libraries choose and allocate what they use again


@dataclass
class Captured:
    """Passes that can be replayed: the inputs that they read, and the loss and gradients that they leave."""

    inputs: tuple[Tensor, ...]
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    gradients: list[Tensor | None] = field(default_factory=list)
    replay: Callable[[], None] = lambda: None


class GraphedPasses:
    """Gradients of a model's loss, captured once for each shape of its inputs.

    Args:
        backward: computes the gradients of a loss.
    """

    def __init__(
        self, model: nn.Module, backward: Callable[[Tensor], None], parameters: Sequence[nn.Parameter]
    ) -> None:
        self.model, self.backward, self.parameters = model, backward, parameters
        self.captured: dict[tuple[torch.Size, ...], Captured] = {}

    def __call__(self, part: Sequence[Tensor]) -> Tensor:
        """Set the parameters' gradients for inputs of the model; returns the loss, detached.

        Raises:
            UserError: what the model does cannot be captured.
        """
        shapes = tuple(value.shape for value in part)
        if shapes not in self.captured:
            self.captured[shapes] = self._capture(part)
        captured = self.captured[shapes]
        for held, value in zip(captured.inputs, part, strict=True):
            held.copy_(value)
        captured.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss.clone()

    def _capture(self, part: Sequence[Tensor]) -> Captured:
        captured = Captured(tuple(value.clone() for value in part))

        def passes() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            loss = self.model(*captured.inputs)
            self.backward(loss)
            captured.loss = loss.detach()
            captured.gradients = [parameter.grad for parameter in self.parameters]

        try:
            captured.replay = capture(passes)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"run.cuda_graph: this method's step cannot be captured ({reason}); leave it out"
            ) from error
        return captured


def capture(passes: Callable[[], None]) -> Callable[[], None]:
    """Capture what a function has the GPU do; returns what does it again, on the same memory.

    Raises:
        RuntimeError: it waits for the GPU, or does something else that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            passes()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        passes()
    return graph.replay
