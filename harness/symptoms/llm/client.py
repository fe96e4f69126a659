"""Send requests to one LLM server or several, through the response cache: recorded answers are not asked for again.

`Client.complete` is synchronous; below it, requests run concurrently in an event loop of their own thread, a fixed number at a
time at each server, and each answer is recorded the moment it arrives. A server that goes away, or that refuses requests as too
many, is waited for; when it stays so, the job ends with one clear line and all answers on record. A field that the servers
refuse (a seed, for example) is left out for the rest of the job, and recorded with the answers.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import anyio
import httpx
from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.endpoint import REPORTED, UNKNOWN, Busy, Endpoint, Refused, TryAgain
from vipbench.harness.symptoms.llm.record import Identity, Request, Response

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0  # between two checks of a server
BACKOFF = wait_exponential(multiplier=0.5, max=30.0) + wait_random(0, 0.5)
ON_RECORD = "what was answered is on record; start the same command again to go on"


@dataclass
class Stats:
    """Counts of a client's work. `prefix_hit_rate`: the share of prompt tokens in the servers' prefix caches, if reported."""

    asked: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    prefix_hit_rate: float | None = None

    def note(self) -> str:
        """Format the end of a progress line."""
        seconds = max(self.seconds, 1e-9)
        tokens = (self.prompt_tokens + self.completion_tokens) / seconds
        share = self.cached / max(self.cached + self.asked, 1)
        rates = f"{self.asked / seconds:.1f} requests/s, {tokens:.0f} tokens/s, " if self.asked else ""
        prefix = "" if self.prefix_hit_rate is None else f", prefix cache {self.prefix_hit_rate:.0%}"
        retries = f", {self.retries} retries" if self.retries else ""
        return f"{rates}{share:.0%} from the cache{prefix}{retries}"


class Client:
    """Answers to requests, from the cache or from the servers at `urls`.

    Args:
        urls: OpenAI-compatible servers of the same model; an empty list means offline: the cache alone answers.
        model: its name on the servers; None takes the one they serve (or that the cache holds answers of).
        cache: the record.
        api_key: required by the servers, if any.
        concurrency: the most requests in flight at each server.
        timeout: seconds for one try of one request.
        retries: further tries after the first, on connection errors, time-outs, 5xx and answers that are garbage.
        patience: seconds to wait for servers that went away, or that refuse all requests as too many (429).
        revision: the model's revision, where the server does not report it; offline, of the answers to use.
        server_version: the same for the server's version.

    Attributes:
        identity: the server as it is recorded; it changes when the servers refuse a field (see `without`).
        without: fields of requests that the servers refused.

    Raises:
        UserError: a server is not there or serves another model; servers differ; offline, the cache holds answers of
            several or none.
    """

    def __init__(
        self,
        urls: list[str],
        model: str | None,
        cache: ResponseCache,
        *,
        api_key: str | None = None,
        concurrency: int = 256,
        timeout: float = 300.0,
        retries: int = 5,
        patience: float = 600.0,
        revision: str | None = None,
        server_version: str | None = None,
    ) -> None:
        self.cache, self.retries, self.patience = cache, retries, patience
        self.revision, self.server_version = revision, server_version
        self.endpoints = [Endpoint(url, concurrency, api_key, timeout, patience) for url in urls]
        self.without: frozenset[str] = frozenset()
        self.most = concurrency * len(urls)
        self.stats = Stats()
        if urls:
            with start_blocking_portal() as portal:
                self.served = portal.call(self._identify, model)
            self.identity = self._recorded()
        else:
            self.identity = _identity_on_record(cache, model, revision, server_version)

    async def _identify(self, model: str | None) -> Identity:
        found = []
        for endpoint in self.endpoints:
            async with endpoint.connect() as http:
                found.append(await self._identify_one(endpoint, http, model))
                await endpoint.observe(http)  # the counters before this job
        for endpoint, identity in zip(self.endpoints, found, strict=True):
            if identity != found[0]:
                raise UserError(
                    f"{endpoint.url} serves {_describe(identity)}, {self.endpoints[0].url} serves {_describe(found[0])}; "
                    "the servers of one job must be alike"
                )
        return found[0]

    async def _identify_one(self, endpoint: Endpoint, http: httpx.AsyncClient, model: str | None) -> Identity:
        while True:
            try:
                return await endpoint.identify(http, model, self.revision, self.server_version)
            except Busy as error:
                if endpoint.out_of_patience():
                    raise UserError(f"{error}, for {self.patience:.0f} s") from error
                await asyncio.sleep(max(0.0, endpoint.paused_until - time.monotonic()))
            except httpx.RequestError as error:
                reason, advice = str(error) or type(error).__name__, "start one with: vipbench serve MODEL"
                raise UserError(f"{endpoint.url}: no server answers ({reason}); {advice}") from error

    def leave_out(self, fields: frozenset[str]) -> None:
        """Send no request with these fields from now on; answers are recorded as given without them."""
        self.without |= fields
        self.identity = self._recorded()

    def _recorded(self) -> Identity:
        """Describe the server as it goes into the key of an answer: see record.Identity."""
        model, revision, version = self.served
        if UNKNOWN in (revision, version):
            version += f" at {', '.join(sorted({endpoint.url for endpoint in self.endpoints}))}"
        if refused := self.without - REPORTED:
            version += f" without {', '.join(sorted(refused))}"
        return Identity(model, revision, version)

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        """Answer requests, in any order; those on record come at once, equal ones are asked once.

        `requests` is consumed as answers are taken, no further ahead than requests can be in flight.

        Raises:
            UserError: a request was refused or failed too often, the servers stayed away, the disk is full, or (offline)
                an answer is missing. Requests in flight are finished and recorded first.
        """
        waiting: dict[str, list[Request]] = {}
        answers: SimpleQueue[tuple[str, Response | UserError]] = SimpleQueue()
        loop: _RequestLoop | None = None
        failure: UserError | None = None

        def take() -> Iterator[tuple[Request, Response]]:
            nonlocal failure
            key, answer = answers.get()
            if not key:
                assert loop is not None
                loop.future.result()  # raises the error that ended it
            asked = waiting.pop(key)
            if isinstance(answer, UserError):
                failure = failure or answer
            else:
                yield from ((request, answer) for request in asked)

        with ExitStack() as stack:
            for request in requests:
                key = request.key(self.identity.revision, self.identity.server_version)
                if key in waiting:
                    waiting[key].append(request)
                    continue
                recorded = self.cache.get(key)
                if recorded is not None:
                    self.stats.cached += 1
                    yield request, recorded
                    continue
                if not self.endpoints:
                    raise UserError(_missing(self.cache, self.identity, request))
                loop = loop or stack.enter_context(_RequestLoop(self, answers))
                waiting[key] = [request]
                loop.submit(key, request)
                while len(waiting) >= self.most or not answers.empty():
                    yield from take()
                if failure:
                    break
            while waiting:
                if failure and loop:
                    loop.stopping = True
                yield from take()
        if failure:
            raise failure


class _RequestLoop:
    """An event loop in a thread, for the requests of one call of `complete`; a context manager.

    Attributes:
        stopping: nothing is sent, and nothing tried again, from now on.
        given_up: the error that ends the job, since the servers stay away or are others.
    """

    def __init__(self, client: Client, answers: SimpleQueue[tuple[str, Response | UserError]]) -> None:
        self.client, self.answers = client, answers
        self.stopping = False
        self.given_up: UserError | None = None
        self.stack = ExitStack()
        self.pools: dict[Endpoint, httpx.AsyncClient] = {}
        self.slots: dict[Endpoint, anyio.CapacityLimiter] = {}

    def __enter__(self) -> Self:
        portal = self.stack.enter_context(start_blocking_portal())
        self.future, self.loop = portal.start_task(self._run)
        self.future.add_done_callback(lambda _: self.answers.put(("", UserError("ended"))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, None)
            self.future.result()
        self.stack.__exit__(kind, error, trace)  # cancels what still runs, if there is an error

    def submit(self, key: str, request: Request) -> None:
        """Hand over a request; its answer comes through `answers`."""
        self.loop.call_soon_threadsafe(self.inbox.put_nowait, (key, request))

    async def _run(self, *, task_status: TaskStatus[asyncio.AbstractEventLoop]) -> None:
        self.inbox: asyncio.Queue[tuple[str, Request] | None] = asyncio.Queue()
        self.began = time.monotonic() - self.client.stats.seconds
        async with AsyncExitStack() as stack:
            for endpoint in self.client.endpoints:
                self.pools[endpoint] = await stack.enter_async_context(endpoint.connect())
                self.slots[endpoint] = anyio.CapacityLimiter(endpoint.concurrency)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            watchers = [tasks.create_task(self._watch(endpoint)) for endpoint in self.pools]
            task_status.started(asyncio.get_running_loop())
            while (item := await self.inbox.get()) is not None:
                tasks.create_task(self._answer(*item))
            for watcher in watchers:
                watcher.cancel()
            for endpoint in self.pools:
                await self._check(endpoint)

    async def _answer(self, key: str, request: Request) -> None:
        tries = AsyncRetrying(
            stop=lambda state: self.stopping or state.attempt_number > self.client.retries,
            wait=BACKOFF,
            retry=retry_if_exception_type(TryAgain),
            before_sleep=self._count_retry,
            reraise=True,
        )
        try:
            self.answers.put((key, await tries(self._try, request)))
        except TryAgain as error:
            asked = request.messages[-1]["content"][-80:]
            reason = f"{error}, {self.client.retries + 1} tries; the request ended in {asked!r}; {ON_RECORD}"
            self.answers.put((key, UserError(reason)))
        except UserError as error:
            self.answers.put((key, error))

    async def _try(self, request: Request) -> Response:
        """Send a request once, but again after a busy server's pause, or without fields that the servers turn out to refuse."""
        client = self.client
        while True:
            async with self._slot() as endpoint:
                without, (_, revision, server_version) = client.without, client.identity
                key = request.key(revision, server_version)
                if without and (recorded := client.cache.get(key)):  # of an earlier job without the same fields
                    client.stats.cached += 1
                    return recorded
                try:
                    response = await endpoint.ask(self.pools[endpoint], request, without)
                except Busy as error:
                    client.stats.retries += 1
                    if all(other.out_of_patience() for other in client.endpoints):
                        self.given_up = UserError(f"{error}, for {client.patience:.0f} s; {ON_RECORD}")
                except Refused as error:
                    if client.without == without:  # else another request met the refusal first
                        if not error.fields - without:
                            raise
                        log.warning("%s; asking without %s from now on", error, ", ".join(sorted(error.fields)))
                        client.leave_out(error.fields)
                else:
                    if client.without == without:  # all answers of a job are given alike
                        self._count(response)
                        return client.cache.put(key, request, revision, server_version, response)

    def _count(self, response: Response) -> None:
        stats = self.client.stats
        stats.asked += 1
        stats.seconds = time.monotonic() - self.began
        stats.prompt_tokens += response.usage.get("prompt_tokens", 0)
        stats.completion_tokens += response.usage.get("completion_tokens", 0)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[Endpoint]:
        """Wait for a slot at a server, the least loaded one that is open, and hold it."""
        while not self.ending:
            wait = min(endpoint.seconds_closed() for endpoint in self.pools)
            if wait:
                await asyncio.sleep(min(wait, WATCH_SECONDS))
                continue
            endpoint = min((place for place in self.pools if not place.seconds_closed()), key=self._load)
            async with self.slots[endpoint]:
                if not endpoint.seconds_closed() and not self.ending:  # both may have changed meanwhile
                    yield endpoint
                    return
        raise self.given_up or UserError("not asked, since the job is ending")

    @property
    def ending(self) -> bool:
        return self.stopping or self.given_up is not None

    def _load(self, endpoint: Endpoint) -> int:
        slots = self.slots[endpoint].statistics()
        return slots.borrowed_tokens + slots.tasks_waiting

    def _count_retry(self, state: RetryCallState) -> None:
        self.client.stats.retries += 1

    async def _watch(self, endpoint: Endpoint) -> None:
        """Check a server regularly, log when it goes and comes back, and give up when all stay away."""
        was_down = False
        while True:
            await self._check(endpoint)
            if endpoint.down_since and not was_down:
                log.warning("%s does not answer; waiting up to %.0f s for it", endpoint.url, self.client.patience)
            elif was_down and not endpoint.down_since:
                log.warning("%s is back", endpoint.url)
            was_down = bool(endpoint.down_since)
            if all(place.down_since and place.out_of_patience() for place in self.pools):
                urls = ", ".join(place.url for place in self.pools)
                self.given_up = UserError(f"{urls}: gone for {self.client.patience:.0f} s; {ON_RECORD}")
            await asyncio.sleep(WATCH_SECONDS)

    async def _check(self, endpoint: Endpoint) -> None:
        client, http = self.client, self.pools[endpoint]
        if endpoint.down_since is None:
            await endpoint.observe(http)
            client.stats.prefix_hit_rate = _prefix_hit_rate(client.endpoints)
        elif await endpoint.healthy(http):
            try:
                identity = await endpoint.identify(http, client.served.model, client.revision, client.server_version)
            except (httpx.RequestError, Busy):
                return
            except UserError as error:
                self.given_up = error
                return
            if identity != client.served:
                self.given_up = UserError(
                    f"{endpoint.url} came back with {_describe(identity)}, the job began with {_describe(client.served)}"
                )
            endpoint.down_since = None


def _prefix_hit_rate(endpoints: list[Endpoint]) -> float | None:
    queries = sum(endpoint.prefix_queries for endpoint in endpoints)
    hits = sum(endpoint.prefix_hits for endpoint in endpoints)
    return hits / queries if 0 <= hits <= queries and queries else None


def _identity_on_record(cache: ResponseCache, *wanted: str | None) -> Identity:
    found = cache.matching(*wanted)
    if len(found) == 1:
        return found[0]
    there = "; ".join(_describe(who) for who in found or cache.matching()) or "no answers"
    problem = "holds answers of several" if found else f"holds no answers of {wanted[0] or 'any model'} as asked for"
    raise UserError(
        f"{cache.path} {problem}; without a server, model, revision and server version must mean one of: {there}"
    )


def _describe(who: Identity) -> str:
    return f"{who.model} (revision {who.revision}, server {who.server_version})"


def _missing(cache: ResponseCache, who: Identity, request: Request) -> str:
    asked = request.messages[-1]["content"][-80:]
    return (
        f"{cache.path} holds no answer of {_describe(who)} to the request that ends in {asked!r}, sample {request.sample}; "
        "import the record, or ask a server"
    )
