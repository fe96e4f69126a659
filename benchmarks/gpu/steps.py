"""A training step of every method in one precision: time, kernels, memory, and the same with its passes as a CUDA graph.

ViT-B-16 with random weights, seven classes of four symptoms, the method's own recipe and batch size, through the engine that runs
use. Features come from a bank, but where a method trains inside the image tower. A step whose time is that of issuing it is
launch-bound, and a graph launches all of its kernels at once (`run.cuda_graph`).
"""

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.gpu.kernels import count_kernels, issue_seconds, peak_mib
from benchmarks.gpu.setting import Row, Setting, Workspace, workspace
from benchmarks.measure import median_seconds
from vipbench.harness.errors import UserError


def measure(setting: Setting, begin: Callable[[], None], precision: str) -> Iterator[Row]:
    """A row for each method."""
    with workspace(setting, precision, begin) as place:
        for name in setting.trained():
            yield place.attempt({"method": name, "precision": place.precision}, partial(_row, place, setting, name))


def _row(place: Workspace, setting: Setting, name: str) -> Row:
    training = place.job(name).training
    assert training is not None
    engine, batch = training.engine(), next(training.batches())
    parts, repeats = training.parts(batch, None), setting.repeats

    def step() -> None:
        engine.step(parts)

    found: Row = {"batch": len(batch.labels), "step_ms": 1e3 * median_seconds(step, repeats)}
    found |= {
        "issue_ms": 1e3 * issue_seconds(step, repeats),
        "peak_mib": peak_mib(step),
        "kernels": count_kernels(step),
    }
    graphed = place.job(name).training
    assert graphed is not None
    try:
        engine = graphed.engine(cuda_graph=True)
        seconds = median_seconds(step, repeats)
    except UserError as error:
        return found | {"graph_ms": None, "ratio": None, "no_graph": str(error)[:120]}
    return found | {"graph_ms": 1e3 * seconds, "ratio": found["step_ms"] / (1e3 * seconds), "no_graph": ""}
