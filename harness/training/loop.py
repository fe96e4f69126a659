"""The one training loop: batches to steps, one learning rate per step, the best or the last epoch kept.

It goes on from any step. What a step computes depends on what was learned before it and on its number: order, views and all that
a method draws are keyed by it, so there is no random state to carry on.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from vipbench.harness.config.schema import TrainConfig
from vipbench.harness.config.validation import parse
from vipbench.harness.data.stateless_random import keyed_number
from vipbench.harness.distributed.engines.engine import Engine, make_engine
from vipbench.harness.distributed.engines.zero import gathered_parameters
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import Diverged, UserError
from vipbench.harness.evaluation.predict import EvaluationSet
from vipbench.harness.methods.base import Drawing, Method, Output
from vipbench.harness.models.backbone import READ_IN_PIECES
from vipbench.harness.system.devices import to_host
from vipbench.harness.system.progress import Progress
from vipbench.harness.system.signals import Stopped
from vipbench.harness.training.batches import Batch, TrainingBatches
from vipbench.harness.training.checkpoint import Checkpoints
from vipbench.harness.training.cost import Cost, Meter
from vipbench.harness.training.optimizer import make_optimizer, set_rate
from vipbench.harness.training.schedule import step_rate

log = logging.getLogger(__name__)

LEARNED, KEPT = "learned/", "kept/"  # in front of the names of tensors in a checkpoint


@dataclass(frozen=True)
class BestEpoch:
    """The epoch that is kept: the best one so far, or the last one.

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


class Facts(BaseModel):
    """The facts of a checkpoint, as `Training.state` gives them."""

    model_config = ConfigDict(allow_inf_nan=False)

    kept: BestEpoch
    to_select: bool = False
    cost: Cost = Cost()


class Training:
    """One run's training, a step at a time: what it does next, what it has kept, and so all that a checkpoint must hold.

    Args:
        validation: needed for `train.select == "best"`, which keeps the epoch of highest validation accuracy; of equal
            ones the one of lowest validation loss, or the first, by `train.select_ties`.
        write_step: takes {"epoch", "step", "lr", "loss"} every `log_every` steps, and {"epoch", "step", "validation_accuracy",
            "validation_loss"} after each epoch.

    Attributes:
        step: optimiser steps done; everything else about the position in the data follows from it.
        best, best_tensors: the epoch to keep as far as is known, and what it had learned (None: what was learned last).
        to_select: whether an epoch has ended that is still to be validated, because a signal interrupted that.
        meter: of what the training costs.

    Raises:
        UserError: "best" without validation samples.
    """

    def __init__(
        self,
        method: Method,
        data: TrainingBatches,
        validation: EvaluationSet | None,
        train: TrainConfig,
        topology: Topology,
        write_step: Callable[[dict[str, Any]], None],
        log_every: int,
        meter: Meter | None = None,
    ) -> None:
        if train.select == "best" and validation is None:
            raise UserError(
                "train.select: 'best' needs a validation split, and this dataset has none; "
                "use train.select=last, or prepare the data with one (the test set is never used to select)"
            )
        self.method, self.data, self.validation, self.train = method, data, validation, train
        self.topology, self.write_step, self.log_every = topology, write_step, log_every
        self.loss = WeightedLoss(method)
        self.optimizer = make_optimizer(method.parameter_groups(), train)
        self.step, self.best, self.note = 0, BestEpoch(data.epochs), ""
        self.best_tensors: dict[str, Tensor] | None = None
        self.to_select = False
        self.meter = meter or Meter(topology)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.data.steps

    def engine(self, micro_batch: int | None = None, cuda_graph: bool = False) -> Engine:
        """The engine of this training, for `parts` of at most so many samples; after `resume`, and once.

        Raises:
            UserError: a CUDA graph is asked for where the passes of a step cannot be one.
        """
        batch = min(self.train.batch_size, len(self.data.samples))
        return make_engine(
            self.topology,
            self.loss,
            self.optimizer,
            self.train.max_grad_norm,
            READ_IN_PIECES,
            self.loss.combine if self.loss.combines else None,
            self.topology.passes(batch, micro_batch or batch),
            cuda_graph,
        )

    def batches(self) -> Iterator[Batch]:
        """Yield the batches that are still to be trained on, after setting the learning rate of each."""
        self._select_if_due()
        for batch in self.data.after(self.step):
            self.loss.train()
            set_rate(self.optimizer, self.rate(self.step + 1))
            key_randomness("step", self.data.seed, self.step, self.topology.rank)
            yield batch

    def parts(self, batch: Batch, micro_batch: int | None) -> list[tuple[Tensor, ...]]:
        """Inputs of `WeightedLoss` for a batch, in parts of at most so many samples, with the statistics of all of them."""
        parts = batch.parts(micro_batch)
        if type(self.method).statistics is Method.statistics:
            return parts
        with torch.no_grad(), self.topology.autocast():
            rows = torch.cat([self.method.statistics(inputs).float() for inputs, *_ in parts])
        gathered = self._global_batch(rows, batch.weights)
        return [(*part, gathered) for part in parts]

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 1."""
        return step_rate(step, self.train, len(self.data.samples))

    def advance(self, loss: Tensor) -> None:
        """Count a step that was taken with a loss (this rank's part, a scalar): log it, and at an epoch's end select.

        Raises:
            Diverged: the loss is not finite, or a parameter where it is about to be validated.
        """
        self.step += 1
        per_epoch = self.data.steps_per_epoch
        epoch, ended = -(-self.step // per_epoch), self.step % per_epoch == 0 or self.step == self.steps
        if ended or self.step % self.log_every == 0:
            mean = self.topology.all_reduce_sum(loss) / self.topology.world
            if not math.isfinite(mean):
                raise Diverged(
                    f"training: the loss is {mean} at epoch {epoch}, step {self.step}; "
                    "try a lower train.lr or precision=fp32"
                )
            self.write_step({"epoch": epoch, "step": self.step, "lr": self.rate(self.step), "loss": mean})
            self.note = f"epoch {epoch}/{self.data.epochs}, loss {mean:.3f}"
        if ended:
            with gathered_parameters(self.method.trainable().values(), write=True):
                self.method.end_of_epoch(epoch, self.data.epochs)
        self.to_select = ended and self.train.select == "best"
        self._select_if_due()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Collect what a checkpoint holds besides step and optimiser: facts in JSON types, and tensors on the CPU by name.

        All ranks call it together.
        """
        tensors = {LEARNED + name: tensor for name, tensor in self._learned().items()}
        tensors |= {KEPT + name: tensor for name, tensor in (self.best_tensors or {}).items()}
        facts = {"kept": asdict(self.best), "to_select": self.to_select, "cost": self.meter.state()}
        return facts, {name: to_host(tensor) for name, tensor in tensors.items()}

    def resume(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Be where another training was after a step, given its `state`; before an engine is made.

        Raises:
            UserError: the tensors are not those of this method on this task, or the facts are not those of such a training.
        """
        where = f"checkpoint of step {step}: damaged"
        found, kept = parse(Facts, facts, where), _under(KEPT, tensors)
        if not 0 <= step <= self.steps:
            raise UserError(f"{where}: the training has {self.steps} steps")
        if (found.kept.validation_accuracy is None) == bool(kept):
            raise UserError(
                f"{where}: it holds what an epoch had learned, or that epoch's validation accuracy, but not both"
            )
        if kept:
            self.method.load_learned(kept)  # checks them, before they are needed at the end
        self.method.load_learned(_under(LEARNED, tensors))
        self.step, self.best, self.best_tensors = step, found.kept, kept or None
        self.to_select = found.to_select
        self.meter.resume(found.cost)

    def finish(self) -> BestEpoch:
        """End with the parameters of the kept epoch."""
        if self.best_tensors is not None:
            with gathered_parameters(self.method.trainable().values(), write=True):
                self.method.load_learned(self.best_tensors)
        return self.best

    def check_finite(self) -> None:
        """Raise Diverged where a parameter is not finite; they are the same on all ranks."""
        parameters = self.method.trainable()
        with gathered_parameters(parameters.values()):
            bad = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
        if bad:
            raise Diverged(
                f"training: {bad[0]} is not finite after step {self.step}; try a lower train.lr or precision=fp32"
            )

    def _learned(self) -> dict[str, Tensor]:
        with gathered_parameters(self.method.trainable().values()):
            return {name: tensor.detach().clone() for name, tensor in self.method.learned().items()}

    def _global_batch(self, rows: Tensor, weights: Tensor) -> Tensor:
        """All ranks' rows [B, ...] of samples that count, in the order of the global batch, which is dealt out in turn."""
        weighted = torch.cat([rows.flatten(1), weights[:, None]], dim=1)
        by_rank = self.topology.all_gather_rows(weighted, -(-self.train.batch_size // self.topology.world))
        gathered = by_rank.transpose(0, 1).flatten(0, 1)
        gathered = gathered[gathered[:, -1] > 0]  # what fills up has no weight
        return gathered[:, :-1].view(-1, *rows.shape[1:])

    def _select_if_due(self) -> None:
        if self.to_select:
            self._select(-(-self.step // self.data.steps_per_epoch))
            self.to_select = False

    def _select(self, epoch: int) -> None:
        assert self.validation is not None
        self.check_finite()
        predictions = self.validation.predict(self.method)
        accuracy, loss = predictions.accuracy(), predictions.loss()
        row = {"epoch": epoch, "step": self.step, "validation_accuracy": accuracy, "validation_loss": loss}
        self.write_step(row)
        best = self.best
        if best.validation_accuracy is None or best.validation_loss is None:
            higher, better = False, True
        else:
            higher = accuracy > best.validation_accuracy
            tied = accuracy == best.validation_accuracy and self.train.select_ties == "lower_loss"
            better = higher or (tied and loss < best.validation_loss)
        if better:
            self.best = BestEpoch(epoch, accuracy, loss, best.improved or higher)
            self.best_tensors = self._learned()


def fit(
    training: Training, checkpoints: Checkpoints, micro_batch: int | None = None, cuda_graph: bool = False
) -> BestEpoch:
    """Train a method in place, from its newest checkpoint on; it ends with the parameters of the kept epoch.

    The last step leaves a checkpoint too, so that a run that dies while it tests does not train again.

    Args:
        micro_batch: how many samples of this rank go through the model at a time; the gradients of a batch are added up.
        cuda_graph: whether the passes of a step are replayed as a CUDA graph.

    Raises:
        UserError: the loss is not finite, the disk is full, or a step cannot be a CUDA graph.
        Stopped: a signal asked for an end, and a checkpoint is written.
    """
    optimizer_state = checkpoints.resume(training)
    engine = training.engine(micro_batch, cuda_graph)
    if optimizer_state:
        engine.load_optimizer_state(optimizer_state)
    schedule = checkpoints.schedule
    with training.meter.running(), Progress("train", training.steps - training.step, "steps") as progress:
        try:
            for batch in training.batches():
                training.advance(engine.step(training.parts(batch, micro_batch)))
                progress.advance(note=training.note)
                if schedule.due(ended=training.step == training.steps):
                    checkpoints.save(training, engine.optimizer_state())
        except Stopped:  # after a step, or while images were encoded or validated
            checkpoints.save(training, engine.optimizer_state())
            raise
    return training.finish()


def key_randomness(*key: int | str) -> None:
    """Start torch's random numbers anew, for a key alone to decide what a method draws (dropout, noise)."""
    seed = keyed_number(*key)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which costs 0.2 ms where there is no GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class WeightedLoss(nn.Module):
    """The weighted losses of a part of a batch as a forward pass, which is what wrappers for several processes see."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.combines = type(method).combine is not Method.combine
        self.names: Sequence[str] = ()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are optimised, by their names in here."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor,
        weights: Tensor,
        keys: Tensor,
        step_key: Tensor,
        gathered: Tensor | None = None,
    ) -> Tensor:
        """Scalar sum of the losses of [b] samples, each times its weight; one such sum per loss [K] if they are combined.

        A loss that is a scalar counts once in a global batch, of which this part holds the share of its weights.
        """
        self.method.drawing = Drawing(step_key, keys)
        output = self.method(inputs)
        self.method.drawing = None
        if gathered is not None:
            output = Output(output.logits, {**output.extras, "batch": gathered})
        losses = self.method.losses(output, labels)
        share = weights.sum()
        sums = [(loss * weights).sum() if loss.ndim else loss * share for loss in losses.values()]
        self.names = tuple(losses)
        if self.combines:
            return torch.stack(sums)
        total = sums[0]
        for other in sums[1:]:
            total = total + other
        return total

    def combine(self, gradients: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """One gradient of the gradients of each loss, as the method makes it, by the names of parameters in here."""
        prefix = "method."
        own = [{name.removeprefix(prefix): value for name, value in found.items()} for found in gradients]
        combined = self.method.combine(dict(zip(self.names, own, strict=True)))
        return {prefix + name: value for name, value in combined.items()}
