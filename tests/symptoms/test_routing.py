"""The choice of a server: groups stay together, loads stay even, and no slot is empty while a request waits."""

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.symptoms.fake_endpoint import FakeEndpoint, Reply, completion
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.endpoint import Endpoint
from vipbench.harness.symptoms.llm.record import Request
from vipbench.harness.symptoms.llm.routing import Router


def requests(groups: int, classes: int) -> list[Request]:
    """Make the requests of groups of classes, one group after the other as `generate` asks."""
    return [
        Request(
            "fake",
            [{"role": "system", "content": f"group {group}"}, {"role": "user", "content": str(name)}],
            None,
            {},
            0,
        )
        for group in range(groups)
        for name in range(classes)
    ]


def router(servers: int, concurrency: int) -> Router:
    return Router([Endpoint(f"http://h{number}", concurrency, None, 1.0) for number in range(servers)], lambda: None)


def prefixes(endpoint: FakeEndpoint) -> Counter[str]:
    return Counter(body["messages"][0]["content"] for body in endpoint.asked)


def test_classes_of_a_group_go_to_the_server_that_has_their_prefix(tmp_path: Path) -> None:
    """Sent to whichever server has a free slot, each group would meet 2.6 servers: 209 prefixes where 80 are needed."""
    groups, classes = 80, 5
    with contextlib.ExitStack() as stack, ResponseCache(tmp_path / "answers.sqlite") as cache:
        servers = [stack.enter_context(FakeEndpoint(delay=0.005)) for _ in range(3)]
        client = Client([server.url for server in servers], None, cache, concurrency=16)
        assert len(list(client.complete(requests(groups, classes)))) == groups * classes
    found = [prefixes(server) for server in servers]
    assert sum(map(len, found)) <= 1.4 * groups
    assert min(sum(counts.values()) for counts in found) >= 0.25 * groups * classes
    assert all(server.most_at_once <= 16 for server in servers)


@pytest.mark.parametrize("count", [30, 600])  # of which all, or a part, can be in flight at once
def test_a_single_group_is_spread_over_all_servers(tmp_path: Path, count: int) -> None:
    with contextlib.ExitStack() as stack, ResponseCache(tmp_path / "answers.sqlite") as cache:
        servers = [stack.enter_context(FakeEndpoint(delay=0.02)) for _ in range(3)]
        client = Client([server.url for server in servers], None, cache, concurrency=32)
        assert len(list(client.complete(requests(1, count)))) == count
    assert min(len(server.asked) for server in servers) >= 0.1 * count
    assert max(len(server.asked) for server in servers) <= 1.3 * count / 3


def test_a_slow_server_keeps_only_what_it_can_do(tmp_path: Path) -> None:
    """Its groups are taken over by the quick one, which would have nothing to do otherwise."""

    async def slowly(body: dict[str, Any], number: int) -> Reply:
        await asyncio.sleep(0.2)
        return 200, completion("late")

    with FakeEndpoint(delay=0.005) as quick, FakeEndpoint() as slow, ResponseCache(tmp_path / "a.sqlite") as cache:
        slow.reply = slowly
        client = Client([quick.url, slow.url], None, cache, concurrency=8)
        assert len(list(client.complete(requests(20, 20)))) == 400
    assert len(quick.asked) > 3 * len(slow.asked) >= 3 * 8


def test_one_prefix_fills_servers_in_one_order_up_to_their_share() -> None:
    async def take(count: int) -> list[Endpoint]:
        return [await routes.acquire(request) for request in requests(1, count)]

    routes = router(4, concurrency=100)
    preferred = routes.ranking(requests(1, 1)[0])
    assert asyncio.run(take(1)) == [preferred[0]]
    asyncio.run(take(99))
    assert max(routes.taken.values()) <= 1.25 * 25 + 1
    loads = [routes.taken[place] for place in preferred]
    assert loads == sorted(loads, reverse=True) and loads[-1] > 0


def test_prefixes_are_divided_evenly_and_move_little_when_a_server_is_added() -> None:
    small, large = router(3, 8), router(4, 8)
    moved, first = 0, Counter[str]()
    for request in requests(3000, 1):
        before, after = small.ranking(request)[0].url, large.ranking(request)[0].url
        first[before] += 1
        moved += before != after
        assert after in (before, "http://h3/v1")
    assert all(900 <= count <= 1100 for count in first.values())
    assert 650 <= moved <= 850


def test_a_free_slot_goes_to_who_waits_for_that_server_and_else_to_the_longest_queue() -> None:
    async def scene() -> None:
        routes = router(2, concurrency=1)
        ours = [request for request in requests(40, 1) if routes.ranking(request)[0] is routes.endpoints[0]]
        theirs = [request for request in requests(40, 1) if routes.ranking(request)[0] is routes.endpoints[1]]
        here, there = await routes.acquire(ours[0]), await routes.acquire(theirs[0])
        waiting = [asyncio.create_task(routes.acquire(request)) for request in (ours[1], ours[2], theirs[1])]
        await asyncio.sleep(0)
        routes.release(there)
        routes.release(here)
        await asyncio.sleep(0)
        assert [task.done() and task.result() for task in waiting] == [here, False, there]
        routes.release(there)  # none is left that prefers it
        assert await waiting[1] is there

    asyncio.run(scene())


def test_who_waits_for_a_server_that_closes_is_sent_elsewhere_or_told_the_end() -> None:
    async def scene() -> None:
        error: list[UserError] = []
        routes = router(2, concurrency=1)
        routes.stopped = lambda: error[0] if error else None
        (request,) = requests(1, 1)
        first, second = [await routes.acquire(request) for _ in range(2)]
        waiting = [asyncio.create_task(routes.acquire(request)) for _ in range(3)]
        await asyncio.sleep(0)
        first.lose()
        routes.release(first)
        routes.release(second)
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [False, False, True] and waiting[2].result() is second
        first.down_since = None
        routes.dispatch()  # as after the check that found it back
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [True, False, True] and waiting[0].result() is first
        error.append(UserError("the end"))
        routes.dispatch()
        with pytest.raises(UserError, match="the end"):
            await waiting[1]

    asyncio.run(scene())
