"""Save and load checkpoints of an unfinished run, so that it goes on wherever it died.

    <run>.partial/checkpoints/
        step-00000120.safetensors     what is learned, what was kept by selection, the optimiser's state
        step-00000120.json            the step, the epoch kept, and checksums of both files: written last

The step is the position in the data, in the schedule and in every random stream, since all of these are keyed by it. So nothing
here depends on the number of processes, and a run goes on with another number of them. No pickle.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vipbench.harness.config.schema import RunConfig
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.files import atomic_path, digest_file, digest_json, read_json, write_json
from vipbench.harness.system.signals import PeriodicExchange, leave_for

log = logging.getLogger(__name__)

FORMAT = "vipbench-checkpoint/1"
OPTIMIZER = "optimizer/"  # in front of the names of the optimiser's tensors


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` steps: `facts` are JSON values, `tensors` lie on the CPU, by name."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write it so that it is found only when it is whole.

        Raises:
            UserError: a tensor is not finite, so that nothing good could go on from it.
        """
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"training: {name} is not finite after step {self.step}, which is not saved; "
                    "try a lower train.lr or precision=fp32"
                )
        path = _path(folder, self.step)
        with atomic_path(path.with_suffix(".safetensors")) as temporary:
            temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in self.tensors.items()}))
        content = {
            "format": FORMAT,
            "step": self.step,
            **self.facts,
            "tensors": digest_file(path.with_suffix(".safetensors")),
        }
        write_json(path, {**content, "sha256": digest_json(content)})

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read one by its JSON file.

        Raises:
            UserError: it is damaged, or not whole.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("sha256", None) != digest_json(content):
            raise UserError(f"{path}: damaged (checksum)")
        if content.pop("format", None) != FORMAT:
            raise UserError(f"{path}: a checkpoint of another version; this one reads {FORMAT}")
        file = path.with_suffix(".safetensors")
        if not file.is_file() or content.pop("tensors", None) != digest_file(file):
            raise UserError(f"{file}: missing or damaged (checksum)")
        step = content.pop("step", None)
        if not isinstance(step, int) or _path(path.parent, step) != path:
            raise UserError(f"{path}: damaged: it is of step {shortened(step)}")
        try:
            return cls(step, content, load_file(file))
        except SafetensorError as error:
            raise UserError(f"{file}: damaged: {error}") from error


def latest(folder: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint of a folder. One that is damaged is passed over, with a warning in the log."""
    for path in sorted(folder.glob("step-*.json"), reverse=True):
        try:
            return Checkpoint.read(path)
        except (UserError, OSError) as error:
            log.warning("checkpoint passed over: %s", error)
    return None


def prune(folder: Path, keep: int, upto: int) -> None:
    """Remove all but the newest `keep` checkpoints, all of steps after `upto`, and what interrupted writing left."""
    steps = [path for path in sorted(folder.glob("step-*.json")) if path <= _path(folder, upto)]
    kept = {path.stem for path in steps[-keep:]}
    for path in sorted(folder.glob("*")):  # a JSON file before its tensors
        if path.stem not in kept:
            path.unlink()


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.json"


class Resumable(Protocol):
    """A training that a checkpoint can hold; see `vipbench.harness.training.loop.Training`."""

    step: int

    @property
    def steps(self) -> int:
        """Steps of the whole training."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Facts in JSON types, and tensors on the CPU by name."""

    def resume(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Be where another training was after a step, given its `state`."""


class StepLog(Protocol):
    """The log of steps in a run directory; see `vipbench.harness.runs.directory.RunDirectory`."""

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""

    def rewind(self, step: int) -> None:
        """Cut the log after a step."""

    def flush_steps(self) -> None:
        """Have the log on the disk."""


class Checkpoints:
    """The checkpoints of one run. All ranks call these methods together; the one that has the directory reads and writes.

    Attributes:
        schedule: when one is due.
        resumed_after: the step from which the run goes on; 0 where it starts.
    """

    def __init__(self, directory: StepLog | None, topology: Topology, config: RunConfig) -> None:
        self.directory, self.topology, self.keep = directory, topology, config.keep_checkpoints
        self.folder = directory.checkpoints if directory else None
        self.schedule = CheckpointSchedule(topology, config.checkpoint_steps, config.checkpoint_minutes)
        self.resumed_after = 0

    def resume(self, training: Resumable) -> dict[str, Tensor]:
        """Bring a training to where its newest checkpoint was, and the log of steps too; returns the optimiser's state.

        Empty where there is no checkpoint, or the optimiser has no state.
        """
        found = None
        if self.directory and self.folder:
            found = latest(self.folder)
            step = found.step if found else 0
            self.directory.rewind(step)
            prune(self.folder, self.keep, step)
        checkpoint = self.topology.broadcast(found)
        if checkpoint is None:
            return {}
        own, state = dict(checkpoint.tensors), {}
        for name in checkpoint.tensors:
            if name.startswith(OPTIMIZER):
                state[name.removeprefix(OPTIMIZER)] = own.pop(name)
        training.resume(checkpoint.step, checkpoint.facts, own)
        self.resumed_after = checkpoint.step
        log.info("training goes on after step %d of %d", training.step, training.steps)
        return state

    def save(self, training: Resumable, optimizer_state: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, then remove those that are too many.

        Raises:
            UserError: a tensor is not finite; the newest checkpoint is then the last good one.
        """
        facts, own = training.state()
        state = {OPTIMIZER + name: tensor for name, tensor in optimizer_state.items()}
        if self.directory and self.folder:
            self.directory.flush_steps()
            Checkpoint(training.step, facts, {**own, **state}).write(self.folder)
            prune(self.folder, self.keep, training.step)
            log.debug("checkpoint after step %d", training.step)


class CheckpointSchedule:
    """Decides when a checkpoint is due, and when to stop: the same on all ranks at the same steps.

    The ranks exchange signals and rank 0's clock about once a second, not at every step.

    Args:
        steps, minutes: between checkpoints, whichever comes first; None: not by this measure.
    """

    def __init__(self, topology: Topology, steps: int | None, minutes: float | None) -> None:
        self.signals, self.exchange, self.steps = topology.signals, PeriodicExchange(topology.all_gather_objects), steps
        self.seconds = minutes * 60 if minutes else float("inf")
        self.saved = time.monotonic()

    def due(self, ended: bool = False) -> bool:
        """Count a step; returns True when a checkpoint is due after it.

        Args:
            ended: it was the last step, after which one always is.

        Raises:
            Stopped: a signal asked for an end; a checkpoint is due then, too.
        """
        due = self.exchange.due()
        save = ended or (self.steps is not None and self.exchange.count % self.steps == 0)
        if save or due:
            answers = self.exchange.gather_values(
                (self.signals.received, time.monotonic() - self.saved >= self.seconds)
            )
            save |= answers[0][1]
            leave_for([received for received, _ in answers])
        if save:
            self.saved = time.monotonic()
        return save
