"""The choice of a server for each request: the one that has computed the request's beginning before, while loads stay even.

Requests that differ in their last message only prefer the same server, in whose prefix cache the rest then is: rendezvous
hashing (Thaler and Ravishankar 1998), with a bound on a server's share of the load (Mirrokni et al. 2018). Where all slots are
taken, a request waits for the server it prefers; a server with a free slot that none waits for takes the last of the longest
queue, so that no slot is empty while a request waits.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b

from vipbench.harness.symptoms.llm.endpoint import Endpoint
from vipbench.harness.symptoms.llm.record import Request

SLACK = 1.25  # times the mean number of requests at a server, up to which a server is preferred
MOST_PREFIXES = 1024  # whose order of servers is kept


class Router:
    """The slots of servers, `concurrency` each, and the requests that wait for one; used in one event loop.

    Args:
        stopped: returns the error that ends the job, or None while it goes on.
    """

    def __init__(self, endpoints: Sequence[Endpoint], stopped: Callable[[], Exception | None]) -> None:
        self.endpoints, self.stopped = endpoints, stopped
        self.taken = dict.fromkeys(endpoints, 0)
        self.waiting: dict[Endpoint, deque[asyncio.Future[Endpoint]]] = {place: deque() for place in endpoints}
        self.ranked = lru_cache(MOST_PREFIXES)(self._ranked)

    async def acquire(self, request: Request) -> Endpoint:
        """Wait for a slot and take it. Raises the error that ends the job."""
        ranking = self.ranking(request)
        while True:
            if error := self.stopped():
                raise error
            endpoint = self._free(ranking)
            if endpoint:
                self.taken[endpoint] += 1
            else:
                place = asyncio.get_running_loop().create_future()
                self.waiting[next(filter(_is_open, ranking), ranking[0])].append(place)
                endpoint = await place  # its slot is taken already
            if _is_open(endpoint) and not self.stopped():  # both may have changed meanwhile
                return endpoint
            self.release(endpoint)

    def release(self, endpoint: Endpoint) -> None:
        """Give back a slot, for the next request that waits."""
        self.taken[endpoint] -= 1
        seconds = endpoint.seconds_closed()
        if seconds:
            self.dispatch()
            if seconds < math.inf:
                asyncio.get_running_loop().call_later(seconds, self.dispatch)
        else:
            self._fill(endpoint)

    def dispatch(self) -> None:
        """Give free slots to requests that wait, after a server was opened or closed; end the waiting where the job ends."""
        if error := self.stopped():
            for queue in self.waiting.values():
                while queue:
                    _settle(queue.popleft(), error)
        for endpoint in filter(_is_open, self.endpoints):
            self._fill(endpoint)

    def ranking(self, request: Request) -> Sequence[Endpoint]:
        """Order the servers by their rank for a request, the preferred one first."""
        if len(self.endpoints) == 1:
            return self.endpoints
        return self.ranked("\n".join(message["content"] for message in request.messages[:-1]))

    def _ranked(self, prefix: str) -> list[Endpoint]:
        text = prefix.encode(errors="surrogatepass")
        return sorted(
            self.endpoints, key=lambda place: blake2b(text, key=blake2b(place.url.encode()).digest()).digest()
        )

    def _free(self, ranking: Sequence[Endpoint]) -> Endpoint | None:
        """Choose the first open server with a free slot and no more than its share of the load, if any has a free slot."""
        free = [place for place in ranking if self.taken[place] < place.concurrency and _is_open(place)]
        if len(free) < 2:
            return free[0] if free else None
        there = [self.taken[place] for place in ranking if _is_open(place)]
        bound = SLACK * (sum(there) + 1) / len(there)
        return next((place for place in free if self.taken[place] < bound), min(free, key=self.taken.__getitem__))

    def _fill(self, endpoint: Endpoint) -> None:
        while self.taken[endpoint] < endpoint.concurrency and (place := self._next(endpoint)):
            self.taken[endpoint] += 1
            _settle(place, endpoint)

    def _next(self, endpoint: Endpoint) -> asyncio.Future[Endpoint] | None:
        if self.waiting[endpoint]:
            return self.waiting[endpoint].popleft()
        longest = max(self.waiting.values(), key=len)
        return longest.pop() if longest else None


def _is_open(endpoint: Endpoint) -> bool:
    return not endpoint.seconds_closed()


def _settle(place: asyncio.Future[Endpoint], outcome: Endpoint | Exception) -> None:
    if place.done():  # cancelled, as the job is broken off
        return
    if isinstance(outcome, Exception):
        place.set_exception(outcome)
    else:
        place.set_result(outcome)
