"""The client against an ill-behaved server: what it asks again, what it gives up on, and that all answers are on record."""

import asyncio
import contextlib
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_none

from tests.symptoms.fake_endpoint import FakeEndpoint, Reply, answer_to, completion
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm import client as client_module
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Answer, Request, Response


def requests(count: int, samples: int = 1) -> list[Request]:
    instruction = {"role": "system", "content": "List what is seen."}
    return [
        Request("fake", [instruction, {"role": "user", "content": f"class {number}"}], None, {"max_tokens": 9}, sample)
        for number in range(count)
        for sample in range(samples)
    ]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", wait_none())
    monkeypatch.setattr(client_module, "WATCH_SECONDS", 0.05)


@pytest.fixture
def cache(tmp_path: Path) -> ResponseCache:
    return ResponseCache(tmp_path / "answers.sqlite")


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as endpoint:
        yield endpoint


def contents(endpoint: FakeEndpoint) -> list[str]:
    return [body["messages"][-1]["content"] for body in endpoint.asked]


def test_what_is_on_record_is_not_asked_again(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    client = Client([endpoint.url + "/v1/"], None, cache)
    assert client.identity == ("fake", "r1", "1.0")
    wanted = requests(30, samples=2)
    first = list(client.complete([*wanted, *wanted]))  # twice in one job, too
    assert len(endpoint.asked) == 60 and len(first) == 120
    assert all(response.text == answer_to(request.body()) for request, response in first)
    again = Client([endpoint.url], "fake", cache)
    second = list(again.complete(wanted))
    assert len(endpoint.asked) == 60
    assert {request.key("", ""): response for request, response in first} == {
        request.key("", ""): response for request, response in second
    }
    assert (client.stats.asked, client.stats.completion_tokens) == (60, 1200)
    assert (again.stats.asked, again.stats.cached, again.stats.note()) == (0, 60, "100% from the cache")


def test_requests_are_taken_no_further_ahead_than_needed(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    taken = 0

    def many() -> Iterator[Request]:
        nonlocal taken
        for request in requests(500):
            taken += 1
            yield request

    client = Client([endpoint.url], None, cache, concurrency=16)
    for number, _ in enumerate(client.complete(many()), start=1):
        assert taken <= number + 16
    assert taken == 500
    assert endpoint.most_at_once <= 16


def test_an_answer_is_handed_on_once_it_is_on_record_and_those_of_one_moment_are_recorded_together(
    endpoint: FakeEndpoint, cache: ResponseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def put_all(answers: list[Answer]) -> list[Response]:
        sizes.append(len(answers))
        return ResponseCache.put_all(cache, answers)

    monkeypatch.setattr(cache, "put_all", put_all)
    gate = asyncio.Event()

    async def reply(body: dict[str, Any], number: int) -> Reply:
        if number == 49:  # the last of those in flight
            gate.set()
        await gate.wait()
        return 200, completion("fine")

    endpoint.reply = reply
    reader = ResponseCache(cache.path)  # as of another process
    for request, response in Client([endpoint.url], None, cache, concurrency=50).complete(requests(500)):
        assert reader.get(request.key("r1", "1.0")) == response
    assert sum(sizes) == 500 and len(sizes) <= 250


def test_memory_does_not_grow_with_the_job(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    endpoint.keep = False
    many = (
        Request("fake", [{"role": "user", "content": f"{number} {'x' * 20_000}"}], None, {}, 0) for number in range(300)
    )
    held = []
    tracemalloc.start()
    try:
        for number, _ in enumerate(Client([endpoint.url], None, cache, concurrency=16).complete(many), start=1):
            if number % 100 == 0:
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[0] < 1_500_000  # the requests between them hold 4 MB


@pytest.mark.parametrize(
    "bad", [(500, b"boom"), (503, b""), (200, b"<html>"), (200, {"choices": []}), (200, b"[" * 99_999)]
)
def test_a_passing_failure_is_tried_again(endpoint: FakeEndpoint, cache: ResponseCache, bad: Reply) -> None:
    async def reply(body: dict[str, Any], number: int) -> Reply:
        return bad if number % 3 == 0 else (200, completion(answer_to(body)))

    endpoint.reply = reply
    client = Client([endpoint.url], None, cache, retries=20)
    assert len(list(client.complete(requests(20)))) == 20
    assert client.stats.retries == len(endpoint.asked) - 20 > 0
    assert len(cache) == 20


def test_429_waits_as_long_as_the_server_asks(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    async def reply(body: dict[str, Any], number: int) -> Reply:
        return (429, b"") if number == 0 else (200, completion(""))

    endpoint.reply = reply
    began = time.monotonic()
    assert len(list(Client([endpoint.url], None, cache).complete(requests(1)))) == 1
    assert time.monotonic() - began >= 1.0


def test_a_refused_request_is_not_tried_again(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    async def reply(body: dict[str, Any], number: int) -> Reply:
        if body["messages"][-1]["content"] == "class 3":
            return 400, {"error": {"message": "max_tokens is\ntoo large"}}
        await asyncio.sleep(0.05)
        return 200, completion("fine")

    endpoint.reply = reply
    answered = []
    with pytest.raises(UserError, match=r"status 400\): max_tokens is too large; it ended in 'class 3'"):
        answered += list(Client([endpoint.url], None, cache, concurrency=8).complete(requests(100)))
    assert contents(endpoint).count("class 3") == 1
    assert len(cache) == len(endpoint.asked) - 1 < 100  # what was under way was finished and recorded


def test_lasting_failure_ends_in_one_line_with_the_rest_on_record(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    async def reply(body: dict[str, Any], number: int) -> Reply:
        return (500, b"") if body["messages"][-1]["content"] == "class 9" else (200, completion("fine"))

    endpoint.reply = reply
    with pytest.raises(UserError, match=r"status 500, 3 tries; .*'class 9'; what was answered is on record"):
        list(Client([endpoint.url], None, cache, retries=2).complete(requests(10)))
    assert contents(endpoint).count("class 9") == 3
    assert len(cache) == 9


def test_a_hanging_request_runs_out_of_time(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    async def reply(body: dict[str, Any], number: int) -> Reply:
        await asyncio.sleep(0 if number else 60)
        return 200, completion("at last")

    endpoint.reply = reply
    client = Client([endpoint.url], None, cache, timeout=0.3)
    assert len(list(client.complete(requests(3)))) == 3
    assert client.stats.retries == 1


def test_who_is_asked_is_checked_first(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    with pytest.raises(UserError, match="does not serve other; it serves fake, fake@r1"):
        Client([endpoint.url], "other", cache)
    with pytest.raises(UserError, match="no server answers"):
        Client(["http://127.0.0.1:9"], "fake", cache)
    with pytest.raises(UserError, match="not the URL of a server"):
        Client(["127.0.0.1:8000"], "fake", cache)
    with FakeEndpoint(models=["fake", "fake@r2"]) as other, pytest.raises(UserError, match="must be alike"):
        Client([endpoint.url, other.url], "fake", cache)
    with FakeEndpoint(models=["gpt"], version=None) as foreign:
        where = f"unknown at {foreign.url}/v1"
        assert Client([foreign.url], None, cache).identity == ("gpt", "unknown", where)
        assert Client([foreign.url], None, cache, revision="2026").identity == ("gpt", "2026", where)
        known = Client([foreign.url], None, cache, revision="2026", server_version="7")
        assert known.identity == ("gpt", "2026", "7")


def test_the_key_is_sent(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    list(Client([endpoint.url], None, cache, api_key="secret").complete(requests(1)))
    assert "authorization: bearer secret" in endpoint.headers.lower()


def test_several_servers_share_the_load_and_one_may_go(cache: ResponseCache) -> None:
    with FakeEndpoint(delay=0.01) as first, contextlib.ExitStack() as stack:
        second = stack.enter_context(FakeEndpoint(delay=0.01))
        client = Client([first.url, second.url], None, cache, concurrency=8)
        for number, _ in enumerate(client.complete(requests(300))):
            if number == 100:
                assert min(len(first.asked), len(second.asked)) > 20
                stack.close()
        assert number == 299
        assert 2 <= second.most_at_once <= 8 and 2 <= first.most_at_once <= 8, "no more than the bound at either"
    assert len(cache) == 300


def test_a_job_waits_for_its_server_to_come_back(cache: ResponseCache) -> None:
    endpoint = FakeEndpoint(delay=0.01)
    with contextlib.ExitStack() as stack:
        stack.enter_context(endpoint)
        client = Client([endpoint.url], None, cache, concurrency=8)
        answers = client.complete(requests(200))
        for _ in range(50):
            next(answers)
        stack.close()
        back = threading.Timer(1.0, stack.enter_context, (endpoint,))
        back.start()
        assert len(list(answers)) == 150
        back.join()
    assert len(cache) == 200
    assert len(endpoint.asked) - 200 <= client.most  # again only what was under way when it went


def test_a_server_that_stays_away_ends_the_job(cache: ResponseCache) -> None:
    with FakeEndpoint(delay=0.01) as endpoint:
        answers = Client([endpoint.url], None, cache, patience=0.5, concurrency=8).complete(requests(200))
        for _ in range(50):
            next(answers)
    with pytest.raises(UserError, match=r"gone for .* s; what was answered is on record"):
        list(answers)
    assert 50 <= len(cache) < 200
    recorded = len(cache)
    with endpoint:
        endpoint.asked.clear()
        assert len(list(Client([endpoint.url], None, cache).complete(requests(200)))) == 200
        assert len(endpoint.asked) == 200 - recorded


def test_another_server_version_does_not_carry_on_the_job(cache: ResponseCache) -> None:
    async def answer_once(body: dict[str, Any], number: int) -> Reply:
        await asyncio.sleep(5 if number else 0)  # so that requests are in flight when it goes
        return 200, completion("fine")

    with FakeEndpoint() as endpoint:
        endpoint.reply = answer_once
        answers = Client([endpoint.url], None, cache).complete(requests(200))
        next(answers)
    endpoint.version = "2.0"
    with endpoint, pytest.raises(UserError, match=r"came back with fake \(revision r1, server 2.0\)"):
        list(answers)


def test_leaving_early_leaves_nothing_behind(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    endpoint.delay = 0.05
    threads = threading.active_count()
    for _ in zip(range(3), Client([endpoint.url], None, cache).complete(requests(100)), strict=False):
        pass

    def broken() -> Iterator[Request]:
        yield from requests(20)
        raise KeyError("the caller's own fault")

    with pytest.raises(KeyError, match="own fault"):
        list(Client([endpoint.url], None, cache).complete(broken()))
    assert threading.active_count() == threads


def test_offline_the_record_answers(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    online = dict(Client([endpoint.url], None, cache).complete([]))
    assert not online
    with pytest.raises(UserError, match="holds no answers of any model"):
        Client([], None, cache)
    answered = list(Client([endpoint.url], None, cache).complete(requests(5)))
    offline = Client([], "fake", cache)
    assert list(offline.complete(requests(5))) == sorted(answered, key=lambda pair: pair[0].messages[-1]["content"])
    with pytest.raises(UserError, match=r"holds no answer of fake .* ends in 'class 5', sample 0"):
        list(offline.complete(requests(6)))
    endpoint.models = ["fake", "fake@r2"]
    list(Client([endpoint.url], None, cache).complete(requests(1)))
    with pytest.raises(UserError, match="holds answers of several"):
        Client([], "fake", cache)
    assert Client([], "fake", cache, revision="r2").identity.revision == "r2"
    endpoint.version = "2.0"
    list(Client([endpoint.url], None, cache).complete(requests(1)))
    assert Client([], None, cache, revision="r2", server_version="2.0").identity == ("fake", "r2", "2.0")


def test_the_prefix_cache_is_reported(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    def metrics(queries: int, hits: int) -> str:
        labels = 'engine="0",model_name="fake"'
        return (
            f"# HELP x\nvllm:num_requests_waiting{{{labels}}} 0.0\n"
            f"vllm:prefix_cache_queries_total{{{labels}}} {queries}.0\nvllm:prefix_cache_hits_total{{{labels}}} {hits}.0\n"
        )

    endpoint.metrics = metrics(1000, 0)
    client = Client([endpoint.url], None, cache)
    endpoint.metrics = metrics(2000, 800)
    list(client.complete(requests(2)))
    assert client.stats.prefix_hit_rate == pytest.approx(0.8)
    assert "prefix cache 80%" in client.stats.note()
