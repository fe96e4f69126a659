"""Count how often the host waits for the GPU, and where: in a training step and in a batch of evaluation of every method."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.gpu.kernels import synchronisations
from benchmarks.gpu.setting import Row, Setting, Workspace, workspace
from vipbench.harness.training.loop import Training

TRAIN = {
    "epochs": 2,
    "steps": None,
    "warmup_epochs": 0,
    "batch_size": 16,
    "select": "last",
    "schedule": None,
    "final_lr": None,
}
BATCH = 8  # of evaluation


def measure(setting: Setting, begin: Callable[[], None], precision: str) -> Iterator[Row]:
    """A row for each method."""
    with workspace(setting, precision, begin) as place:
        for name in setting.methods:
            yield place.attempt({"method": name, "precision": place.precision}, partial(_row, place, name, setting))


def train_counting(training: Training, waits: Counter[str]) -> int:
    """Train to the end; returns the steps after the first epoch, whose waits are left in `waits`.

    The first epoch prepares what the others use again.
    """
    engine, per_epoch = training.engine(), training.data.steps_per_epoch
    for batch in training.batches():
        training.advance(engine.step(training.parts(batch, None)))
        if training.step == per_epoch:
            waits.clear()
    return training.steps - per_epoch


def _row(place: Workspace, name: str, setting: Setting) -> Row:
    trains = name in setting.trained()
    job = place.job(name, run={"eval_batch_size": BATCH}, train=TRAIN if trains else {})
    found: Row = {"steps": None, "waits_a_step": None, "batches": None, "waits_a_batch": None, "where": ""}
    where: list[str] = []
    if training := job.training:
        with synchronisations() as waits:
            steps = train_counting(training, waits)
        found |= {"steps": steps, "waits_a_step": waits.total() / steps}
        where += [f"{line} {count}" for line, count in waits.most_common(3)]
    test = job.data.test_set()
    test.predict(job.method)  # encodes the images
    with synchronisations() as waits:
        test.predict(job.method)
    batches = -(-len(test.source.samples) // BATCH)
    where += [f"evaluation: {line} {count}" for line, count in waits.most_common(2)]
    return found | {"batches": batches, "waits_a_batch": waits.total() / batches, "where": "; ".join(where)}
