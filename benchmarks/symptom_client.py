"""The symptom client at the size of ICD-10 (70,000 classes), against load generators that keep no record.

    python -m benchmarks symptom_client

The generators send the same bodies to the same server with as many requests in flight, and parse the answers: aiohttp, which
the client sends through too, and httpx as it comes. They look up nothing, check nothing and write nothing, and what fails
ends them. Each sends for a time (`SECONDS`), not a number of requests, so that a slow one does not take longer; the whole job
of the client alone comes last. The server is a process of its own (`benchmarks.instant_server`): one that answers at once, so
that the client is what is measured, and one that spends 1 ms on each request before, which is little for a server of an LLM.
"""

import asyncio
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import httpx
import psutil

from benchmarks.measure import Result
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Request

CLASSES, IN_FLIGHT = 70_000, 256
SECONDS = {"httpx": 3.0, "aiohttp": 1.5, "ours": 1.5}  # in a turn; httpx opens its connections for most of it
TURNS = {"httpx": 1, "aiohttp": 3, "ours": 3}  # whose median counts
SERVERS = {"at once": 0.0, "1 ms": 0.001}  # seconds of CPU for each request
INSTRUCTION = (
    "List what a person can see in a picture of the class, in short plain words of colour, shape and place. " * 8
)
SCHEMA = {"type": "object", "properties": {"symptoms": {"type": "array", "items": {"type": "string"}}}}


def requests(seconds: float = math.inf) -> Iterator[Request]:
    """Yield the request of each class, made as it is taken, until the time is over."""
    end = time.perf_counter() + seconds
    for number in itertools.takewhile(lambda _: time.perf_counter() < end, range(CLASSES)):
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"Class: disease {number:06d}"},
        ]
        yield Request("fake", messages, SCHEMA, {"temperature": 0.7, "max_tokens": 256, "seed": 1}, 0)


async def _send_all(seconds: float, send: Callable[[Request], Awaitable[object]]) -> int:
    waiting, answered = requests(seconds), 0

    async def worker() -> None:
        nonlocal answered
        for request in waiting:
            await send(request)
            answered += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(worker())
    return answered


async def with_aiohttp(url: str, seconds: float) -> int:
    """Send requests through aiohttp, without a record; returns the number of answers, as all generators do."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), raise_for_status=True) as http:

        async def send(request: Request) -> object:
            async with http.post(f"{url}/v1/chat/completions", json=request.body()) as answer:
                return json.loads(await answer.read())

        return await _send_all(seconds, send)


async def with_httpx(url: str, seconds: float) -> int:
    """Send requests through httpx, without a record."""
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=IN_FLIGHT), timeout=300.0) as http:

        async def send(request: Request) -> object:
            answer = await http.post(f"{url}/v1/chat/completions", json=request.body())
            return answer.raise_for_status().json()

        return await _send_all(seconds, send)


def with_client(url: str, seconds: float) -> int:
    """Send requests through the client, into a new record."""
    with tempfile.TemporaryDirectory() as folder, ResponseCache(Path(folder) / "answers.sqlite") as cache:
        client = Client([url], "fake", cache, concurrency=IN_FLIGHT)
        answered = sum(1 for _ in client.complete(requests(seconds)))
        assert answered == client.stats.asked == len(cache)
        return answered


GENERATORS: dict[str, Callable[[str, float], int]] = {
    "httpx": lambda url, seconds: asyncio.run(with_httpx(url, seconds)),
    "aiohttp": lambda url, seconds: asyncio.run(with_aiohttp(url, seconds)),
    "ours": with_client,
}


@contextmanager
def serving(seconds: float) -> Iterator[str]:
    """Run a server in a process of its own, which spends so much CPU on a request; yields its URL."""
    command = [sys.executable, "-m", "benchmarks.instant_server", str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


def measure() -> Result:
    """Requests a second and CPU time of a request, by server and generator; memory over the whole job."""
    rows = []
    for server, seconds in SERVERS.items():
        with serving(seconds) as url:
            rows += _rows(server, url)
    return Result(f"The symptom client, {IN_FLIGHT} requests in flight", rows, _whole_job())


def _rows(server: str, url: str) -> list[dict[str, object]]:
    """Measure all generators in turn."""
    rates: dict[str, list[float]] = {name: [] for name in GENERATORS}
    cpu: dict[str, list[float]] = {name: [] for name in GENERATORS}
    for turn in range(max(TURNS.values())):
        for name in (name for name in GENERATORS if turn < TURNS[name]):
            began, began_cpu = time.perf_counter(), time.process_time()
            answered = GENERATORS[name](url, SECONDS[name])
            rates[name].append(answered / (time.perf_counter() - began))
            cpu[name].append((time.process_time() - began_cpu) / answered * 1e6)
    return [
        {
            "server": server,
            "generator": name,
            "requests_per_s": statistics.median(rates[name]),
            "cpu_us": statistics.median(cpu[name]),
            "ours_over_it": statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=False)),
            "ours_over_it_by_cpu": statistics.median(b / a for a, b in zip(cpu["ours"], cpu[name], strict=False)),
        }
        for name in GENERATORS
    ]


def _whole_job() -> list[str]:
    """Ask for all classes, then again from the record."""
    resident = psutil.Process().memory_info
    with (
        serving(SERVERS["at once"]) as url,
        tempfile.TemporaryDirectory() as folder,
        ResponseCache(Path(folder) / "answers.sqlite") as cache,
    ):
        client = Client([url], "fake", cache, concurrency=IN_FLIGHT)
        sizes = []
        began = time.perf_counter()
        for number, _ in enumerate(client.complete(requests()), start=1):
            if number % (CLASSES // 10) == 0:
                sizes.append(resident().rss / 2**20)
        asked = time.perf_counter()
        assert sum(1 for _ in client.complete(requests())) == client.stats.cached == CLASSES
        again = time.perf_counter()
        size = cache.path.stat().st_size / 1e6
    return [
        f"{CLASSES:,} classes: {CLASSES / (asked - began):,.0f} requests/s, from the record {CLASSES / (again - asked):,.0f}",
        f"memory after each tenth of them, MiB: {', '.join(f'{size:.0f}' for size in sizes)}; the record {size:.0f} MB",
    ]
