"""The client and the response cache at the size of ICD-10: 70,000 classes x 4 samples, with a server that costs nothing.

    python -m benchmarks.symptoms_cache [--classes 70000 --samples 4]

Prints the client's time per request (HTTP, retries and record, with a fake server in a process of its own), answers
from the cache per second, lookups per second, the size of the record and the most memory that this process took.
Targets: under 2 ms per request, at least 1,000 cached answers per second, memory that does not grow with the job.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Request
from vipbench.harness.system.progress import Progress

INSTRUCTION = (
    "List what a person can see in a picture of the class, in short plain words of colour, shape and place. " * 8
)
SCHEMA = {"type": "object", "properties": {"symptoms": {"type": "array", "items": {"type": "string"}}}}


def requests(classes: int, samples: int) -> Iterator[Request]:
    """Yield the requests of a generator, each made as it is taken."""
    for number in range(classes):
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"Class: disease {number:06d}"},
        ]
        for sample in range(samples):
            yield Request("fake", messages, SCHEMA, {"temperature": 0.7, "max_tokens": 256, "seed": 1}, sample)


def run(description: str, client: Client, classes: int, samples: int) -> tuple[float, float]:
    """Take all answers; returns seconds per answer, by the clock and of this process's CPU time."""
    began, began_cpu = time.perf_counter(), time.process_time()
    total = classes * samples
    with Progress(description, total, "requests") as progress:
        for _ in client.complete(requests(classes, samples)):
            progress.advance()
    return (time.perf_counter() - began) / total, (time.process_time() - began_cpu) / total


def megabytes() -> float:
    """The most memory this process has held (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=70_000)
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    command = [sys.executable, "-m", "tests.symptoms.fake_endpoint", "0"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
        ResponseCache(Path(folder) / "answers.sqlite") as cache,
    ):
        assert server.stdin and server.stdout
        client = Client([server.stdout.readline().strip()], "fake", cache)
        run("warm up", client, 100, 1)
        before = megabytes()
        asked, cpu = run("ask", client, options.classes, options.samples)
        cached, _ = run("ask again", client, options.classes, options.samples)
        began = time.perf_counter()
        keys = [answer.key for _, answer in zip(range(10_000), cache.answers(), strict=False)]
        listed = time.perf_counter()
        found = sum(cache.get(key) is not None for key in keys)
        lookups = found / (time.perf_counter() - listed)
        print(f"asked      {cpu * 1e3:8.2f} ms of CPU per request in the client (target < 2)")
        print(f"           {asked * 1e3:8.2f} ms by the clock, with the server on the other core")
        print(f"cached     {1 / cached:8.0f} answers/s through the client (target >= 1000)")
        print(f"lookups    {lookups:8.0f} /s in the cache alone; {len(keys) / (listed - began):.0f} /s read in order")
        print(f"record     {cache.path.stat().st_size / 1e6:8.1f} MB for {len(cache)} answers")
        print(f"memory     {before:8.0f} MiB after 100 requests, {megabytes():.0f} MiB at most")
        server.stdin.close()


if __name__ == "__main__":
    main()
