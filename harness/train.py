"""The one training loop: epochs of batches, one learning rate per epoch, the best or the last epoch kept."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import TrainConfig
from harness.errors import UserError
from harness.evaluate import EvaluationSet
from harness.features import TrainingViews
from harness.method import Method
from harness.progress import Progress
from harness.topology import Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The epoch that is kept (counted from 1) and its validation accuracy, None where there was no validation."""

    epoch: int
    validation_accuracy: float | None


def learning_rate(epoch: int, train: TrainConfig) -> float:
    """Rate of an epoch counted from 1: constant during warm-up, then half a cosine that never reaches 0.

    As Dassl's constant warm-up around torch's CosineAnnealingLR: lr / 2 * (1 + cos(pi (e - 1 - warmup) / E)).
    """
    if epoch <= train.warmup_epochs:
        return train.warmup_lr
    return train.lr / 2 * (1 + math.cos(math.pi * (epoch - 1 - train.warmup_epochs) / train.epochs))


def make_optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; weight decay on every parameter, prompts too."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parameters, train.lr, weight_decay=train.weight_decay)


def fit(
    method: Method,
    views: TrainingViews,
    validation: EvaluationSet | None,
    train: TrainConfig,
    topology: Topology,
    write_step: Callable[[dict[str, Any]], None],
    log_every: int,
) -> Trained:
    """Train a method in place; it ends with the parameters of the kept epoch.

    Args:
        validation: needed for `train.select == "best"`, which keeps the epoch of highest validation accuracy, the first of ties.
        write_step: takes {"epoch", "step", "lr", "loss"} every `log_every` steps, and {"epoch", "validation_accuracy"}.

    Raises:
        UserError: the loss is not finite, or "best" without validation samples.
    """
    if train.select == "best" and validation is None:
        raise UserError(
            "train.select: 'best' needs a validation split, and this dataset has none; "
            "use train.select=last, or prepare the data with one (the test set is never used to select)"
        )
    parameters = list(method.trainable().values())
    step_model, optimizer = topology.prepare(_Loss(method), make_optimizer(parameters, train))
    kept, kept_state, step = Trained(train.epochs, None), None, 0
    with Progress("train", train.epochs * views.steps_per_epoch, "steps") as progress:
        for epoch, batches in views.epochs(train.epochs):
            rate = learning_rate(epoch, train)
            for group in optimizer.param_groups:
                group["lr"] = rate
            step_model.train()
            for batch in batches:
                step += 1
                optimizer.zero_grad(set_to_none=True)
                loss = step_model(batch.inputs, batch.labels, batch.weights)
                topology.backward(loss)
                optimizer.step()
                if step % log_every == 0 or step % views.steps_per_epoch == 0:
                    mean_loss = _checked(topology.sum(loss) / topology.world, epoch, step)
                    write_step({"epoch": epoch, "step": step, "lr": rate, "loss": mean_loss})
                    progress.advance(0, note=f"epoch {epoch}/{train.epochs}, loss {mean_loss:.3f}")
                progress.advance()
            if train.select == "best" and validation is not None:
                accuracy = validation.predict(method).accuracy()
                write_step({"epoch": epoch, "step": step, "validation_accuracy": accuracy})
                if kept.validation_accuracy is None or accuracy > kept.validation_accuracy:
                    kept = Trained(epoch, accuracy)
                    kept_state = {name: tensor.detach().clone() for name, tensor in method.trainable().items()}
    if kept_state is not None:
        restore(method, kept_state)
    return kept


def restore(method: Method, tensors: dict[str, Tensor]) -> None:
    """Put learned tensors, by name, back into a method.

    Raises:
        UserError: names or shapes are not those of this method on this task.
    """
    own = method.trainable()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != given:
        raise UserError(f"prompts: the file holds {given}, but the method learns {shapes}; they must agree")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    method.eval()


class _Loss(nn.Module):
    """A batch's weighted loss as a forward pass, which is what wrappers for several processes see."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return (self.method.loss(inputs, labels) * weights).sum()


def _checked(loss: float, epoch: int, step: int) -> float:
    if not math.isfinite(loss):
        raise UserError(
            f"training: the loss is {loss} at epoch {epoch}, step {step}; try a lower train.lr or precision=fp32"
        )
    return loss
