"""The one training loop: epochs of batches, one learning rate per epoch, the best or the last epoch kept.

It goes on from any step. What a step computes depends on what was learned before it and on its number: order, views and all that
a method draws are keyed by it, so there is no random state to carry on.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from harness.checkpoint import Checkpoints
from harness.config import TrainConfig
from harness.data.keyed import keyed_rank
from harness.devices import to_host
from harness.errors import UserError
from harness.evaluate import EvaluationSet
from harness.features import Batch, TrainingViews
from harness.method import Method
from harness.progress import Progress
from harness.signals import Stopped
from harness.topology import Topology

log = logging.getLogger(__name__)

LEARNED, KEPT = "learned/", "kept/"  # in front of the names of tensors in a checkpoint


@dataclass(frozen=True)
class Trained:
    """The epoch that is kept.

    Attributes:
        epoch: counted from 1.
        validation_accuracy, validation_loss: of that epoch (mean cross-entropy); None where nothing was validated.
        improved: whether any epoch had a higher validation accuracy than the first one.
    """

    epoch: int
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    improved: bool = False

    def warnings(self, train: TrainConfig) -> list[str]:
        """Reasons to doubt that the selection chose a trained model."""
        if self.validation_accuracy is None:
            return []
        found = []
        if self.epoch <= train.warmup_epochs:
            found.append(f"epoch {self.epoch} is kept, which is of the warm-up: hardly anything was learned by then")
        if not self.improved:
            found.append(f"validation accuracy never rose above that of epoch 1 ({self.validation_accuracy:.4f})")
        return found


def learning_rate(epoch: int, train: TrainConfig) -> float:
    """Rate of an epoch counted from 1: constant during warm-up, then half a cosine that never reaches 0.

    As Dassl's constant warm-up around torch's CosineAnnealingLR: lr / 2 * (1 + cos(pi (e - 1 - warmup) / E)).
    """
    if epoch <= train.warmup_epochs:
        assert train.warmup_lr is not None
        return train.warmup_lr
    return train.lr / 2 * (1 + math.cos(math.pi * (epoch - 1 - train.warmup_epochs) / train.epochs))


def make_optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; weight decay on every parameter, prompts too."""
    if train.optimizer == "sgd":
        assert train.momentum is not None
        return torch.optim.SGD(parameters, train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(parameters, train.lr, weight_decay=train.weight_decay)


class Training:
    """One run's training, a step at a time: what it does next, what it has kept, and so all that a checkpoint must hold.

    Args:
        validation: needed for `train.select == "best"`, which keeps the epoch of highest validation accuracy; of equal
            ones the one of lowest validation loss, or the first, as `train.select_ties` says.
        write_step: takes {"epoch", "step", "lr", "loss"} every `log_every` steps, and {"epoch", "step", "validation_accuracy",
            "validation_loss"} after each epoch.

    Attributes:
        step: optimiser steps done; everything else about the position in the data follows from it.
        kept, kept_tensors: the epoch to keep as far as is known, and what it had learned (None: what was learned last).
        to_select: whether an epoch has ended that is still to be validated, because a signal interrupted that.

    Raises:
        UserError: "best" without validation samples.
    """

    def __init__(
        self,
        method: Method,
        views: TrainingViews,
        validation: EvaluationSet | None,
        train: TrainConfig,
        topology: Topology,
        write_step: Callable[[dict[str, Any]], None],
        log_every: int,
    ) -> None:
        if train.select == "best" and validation is None:
            raise UserError(
                "train.select: 'best' needs a validation split, and this dataset has none; "
                "use train.select=last, or prepare the data with one (the test set is never used to select)"
            )
        self.method, self.views, self.validation, self.train = method, views, validation, train
        self.topology, self.write_step, self.log_every = topology, write_step, log_every
        self.loss = WeightedLoss(method)
        self.optimizer = make_optimizer(list(method.trainable().values()), train)
        self.step, self.kept, self.note = 0, Trained(train.epochs), ""
        self.kept_tensors: dict[str, Tensor] | None = None
        self.to_select = False

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.train.epochs * self.views.steps_per_epoch

    def batches(self) -> Iterator[Batch]:
        """This rank's batches that are still to be trained on; each epoch begins with its learning rate."""
        self._select_if_due()
        for epoch, batches in self.views.epochs(self.train.epochs, done=self.step):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(epoch, self.train)
            self.loss.train()
            for batch in batches:
                key_randomness("step", self.views.seed, self.step, self.topology.rank)
                yield batch

    def advance(self, loss: Tensor) -> None:
        """Count a step that was taken with a loss (this rank's part, a scalar): log it, and at an epoch's end select.

        Raises:
            UserError: the loss is not finite.
        """
        self.step += 1
        per_epoch = self.views.steps_per_epoch
        epoch, ended = -(-self.step // per_epoch), self.step % per_epoch == 0
        if ended or self.step % self.log_every == 0:
            mean = self.topology.sum(loss) / self.topology.world
            if not math.isfinite(mean):
                raise UserError(
                    f"training: the loss is {mean} at epoch {epoch}, step {self.step}; "
                    "try a lower train.lr or precision=fp32"
                )
            rate = learning_rate(epoch, self.train)
            self.write_step({"epoch": epoch, "step": self.step, "lr": rate, "loss": mean})
            self.note = f"epoch {epoch}/{self.train.epochs}, loss {mean:.3f}"
        self.to_select = ended and self.train.select == "best"
        self._select_if_due()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint holds besides the step and the optimiser: facts in JSON types, and tensors on the CPU by name.

        All ranks call it together.
        """
        with self.topology.whole(self.method.trainable().values()):
            tensors = {LEARNED + name: tensor.detach().clone() for name, tensor in self.method.trainable().items()}
        tensors |= {KEPT + name: tensor for name, tensor in (self.kept_tensors or {}).items()}
        facts = {"kept": asdict(self.kept), "to_select": self.to_select}
        return facts, {name: to_host(tensor) for name, tensor in tensors.items()}

    def resume(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Be where another training was after a step, given its `state`; before an engine is made.

        Raises:
            UserError: the tensors are not those of this method on this task, or the facts are none.
        """
        try:
            kept = TypeAdapter(Trained).validate_python(facts.get("kept"))
        except ValidationError as error:
            raise UserError(f"checkpoint of step {step}: damaged: it does not tell the epoch that is kept") from error
        restore(self.method, _under(LEARNED, tensors))
        self.step, self.kept, self.kept_tensors = step, kept, _under(KEPT, tensors) or None
        self.to_select = bool(facts.get("to_select"))

    def finish(self) -> Trained:
        """End with the parameters of the kept epoch."""
        if self.kept_tensors is not None:
            with self.topology.whole(self.method.trainable().values(), write=True):
                restore(self.method, self.kept_tensors)
        return self.kept

    def _select_if_due(self) -> None:
        if self.to_select:
            self._select(self.step // self.views.steps_per_epoch)
            self.to_select = False

    def _select(self, epoch: int) -> None:
        assert self.validation is not None
        predictions = self.validation.predict(self.method)
        accuracy, loss = predictions.accuracy(), predictions.loss()
        row = {"epoch": epoch, "step": self.step, "validation_accuracy": accuracy, "validation_loss": loss}
        self.write_step(row)
        best = self.kept
        if best.validation_accuracy is None or best.validation_loss is None:
            higher, better = False, True
        else:
            higher = accuracy > best.validation_accuracy
            tied = accuracy == best.validation_accuracy and self.train.select_ties == "lower_loss"
            better = higher or (tied and loss < best.validation_loss)
        if better:
            self.kept = Trained(epoch, accuracy, loss, best.improved or higher)
            with self.topology.whole(self.method.trainable().values()):
                self.kept_tensors = {name: tensor.detach().clone() for name, tensor in self.method.trainable().items()}


def fit(training: Training, checkpoints: Checkpoints, micro_batch: int | None = None) -> Trained:
    """Train a method in place, from its newest checkpoint on; it ends with the parameters of the kept epoch.

    The last step leaves a checkpoint too, so that a run that dies while it tests does not train again.

    Args:
        micro_batch: how many samples of this rank go through the model at a time; the gradients of a batch are added up.

    Raises:
        UserError: the loss is not finite, or the disk is full.
        Stopped: a signal asked for an end, and a checkpoint is written.
    """
    optimizer_state = checkpoints.resume(training)
    engine = training.topology.engine(training.loss, training.optimizer, training.train.max_grad_norm)
    if optimizer_state:
        engine.load_optimizer_state(optimizer_state)
    rhythm = checkpoints.rhythm
    with Progress("train", training.steps - training.step, "steps") as progress:
        try:
            for batch in training.batches():
                training.advance(engine.step(batch.parts(micro_batch)))
                progress.advance(note=training.note)
                if rhythm.due(ended=training.step == training.steps):
                    checkpoints.save(training, engine.optimizer_state())
        except Stopped:  # after a step, or while images were encoded or validated
            checkpoints.save(training, engine.optimizer_state())
            raise
    return training.finish()


def key_randomness(*key: int | str) -> None:
    """Start torch's random numbers anew, for a key alone to decide what a method draws (dropout, noise)."""
    seed = int.from_bytes(keyed_rank(*key)[:8], "little") >> 1
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which costs 0.2 ms where there is no GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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


class WeightedLoss(nn.Module):
    """A batch's weighted loss as a forward pass, which is what wrappers for several processes see."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is learned, by its name in here."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Scalar sum of the losses of [b] samples, each times its weight."""
        return (self.method.loss(inputs, labels) * weights).sum()
