"""The GPU benchmarks by name, in the order in which they run: what matters most first, in case the time is up."""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """A module of benchmarks/gpu, what its `measure` is given, its table's title, and the seconds after which it is ended."""

    module: str
    arguments: tuple[str, ...]
    title: str
    seconds: float = 45


STEP = "A training step of every method"
SUITE = {
    "tower": Benchmark("tower", (), "The image tower, which fills the bank"),
    "steps_fp32": Benchmark("steps", ("fp32",), f"{STEP}, fp32", 55),
    "steps_bf16": Benchmark("steps", ("bf16",), f"{STEP}, bf16", 55),
    "filling": Benchmark("filling", ("bf16",), "Filling the bank from shards", 35),
    "memory": Benchmark("memory", ("fp16",), "Peak memory and time of a forward and a backward pass", 35),
    "compiled": Benchmark("compiled", ("bf16",), "torch.compile, block by block", 60),
    "packed": Benchmark("packed", ("fp32",), "A step of several runs, apart and packed"),
    "steps_fp16": Benchmark("steps", ("fp16",), f"{STEP}, fp16", 55),
    "waits": Benchmark("waits", ("bf16",), "How often the host waits for the GPU"),
}
