"""One OpenAI-compatible server as the client sees it: who it is, how many requests it is given at a time, one try."""

import itertools
import math
import re
import time
from datetime import UTC, datetime
from typing import Any
from urllib.request import getproxies

import anyio
import httpx

from harness.errors import UserError
from harness.symptoms.cache import Identity, Request, Response

FIRST_WINDOW = 8  # requests under way at first
PROBE_SECONDS = 5.0  # for /health, /metrics and the like
POOL_CONNECTIONS = 8
# Idle connections go before the 5 s of vLLM's HTTP server are over, so that no request meets one that was just closed.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=3.0)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class TryAgain(Exception):
    """A try that failed in a way that may pass; `after` is the server's own wish in seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class Window:
    """How many requests one server is given at a time: more while it keeps up, fewer when they queue there.

    A server that tells its queue's length (vLLM) is followed by it. Another one is tried out: the window goes on growing, or
    shrinking, as long as that does not make the answers per second fewer, and turns round when it does.
    """

    def __init__(self, most: int) -> None:
        self.most, self.size = most, min(FIRST_WINDOW, most)
        self.has_queue = False
        self.growing, self.rate = True, 0.0
        self.latencies: list[float] = []
        self.last_cut = 0.0

    def queued(self, waiting: float, under_way: int) -> None:
        """Adapt to the number of requests that wait in the server."""
        self.has_queue = True
        if waiting > max(4, self.size / 4):
            self._resize(self.size - waiting / 2)
        elif waiting == 0 and under_way >= 0.8 * self.size:
            self._resize(self.size * 1.5 + 1)

    def answered(self, latency: float) -> None:
        """Adapt to an answer's latency in seconds, unless the server tells its queue."""
        if self.has_queue:
            return
        self.latencies.append(latency)
        if len(self.latencies) >= self.size:
            rate = self.size * len(self.latencies) / sum(self.latencies)  # Little's law
            self.latencies.clear()
            if rate < 0.95 * self.rate:
                self.growing = not self.growing
            self.rate = rate
            self._resize(self.size * 1.25 + 1 if self.growing else self.size * 0.8)

    def overloaded(self) -> None:
        """Halve it, once a second at most: the server refused (429, 503) or ran out of time."""
        if time.monotonic() - self.last_cut > 1.0:
            self.last_cut = time.monotonic()
            self._resize(self.size / 2)

    def _resize(self, size: float) -> None:
        self.size = max(1, min(self.most, int(size)))


class _Spread(httpx.AsyncBaseTransport):
    """Deals requests out to small pools in turn, since a pool looks at each of its connections for each request."""

    def __init__(self, pools: int) -> None:
        context = httpx.create_ssl_context()
        self.pools = [httpx.AsyncHTTPTransport(verify=context, limits=LIMITS) for _ in range(pools)]
        self.turns = itertools.cycle(self.pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self.turns).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self.pools:
            await pool.aclose()


class Endpoint:
    """A server at `url` (with or without /v1 at its end) that is given at most `most` requests at a time."""

    def __init__(self, url: str, most: int, api_key: str | None, timeout: float) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UserError(f"{url}: not a URL: {error}; it looks like http://127.0.0.1:8000") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"{url}: not the URL of a server; it looks like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.local = parsed.host in LOOPBACK
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = timeout
        self.window = Window(most)
        self.under_way = 0
        self.down_since: float | None = None
        self.has_metrics = True
        self.counters: dict[str, float] = {}
        self.prefix_hits = self.prefix_queries = 0.0

    def connect(self) -> httpx.AsyncClient:
        """Connections for one event loop. To this machine itself no proxy from the environment is used."""
        timeout = httpx.Timeout(self.timeout, connect=PROBE_SECONDS)
        if not self.local and getproxies():
            return httpx.AsyncClient(headers=self.headers, limits=LIMITS, timeout=timeout)
        spread = _Spread(math.ceil(self.window.most / POOL_CONNECTIONS))
        return httpx.AsyncClient(headers=self.headers, transport=spread, timeout=timeout)

    async def identify(self, http: httpx.AsyncClient, model: str | None, revision: str | None) -> Identity:
        """Who serves `model` here (None: the first one served).

        A model that `vipbench serve` started also goes by the name MODEL@REVISION, which tells the revision.

        Raises:
            UserError: it is no OpenAI-compatible server, wants another API key, or serves no such model (names those it does).
            httpx.RequestError: the connection failed.
        """
        answer = await http.get(f"{self.url}/v1/models", timeout=PROBE_SECONDS)
        if answer.status_code in (401, 403):
            raise UserError(f"{self.url}: the server wants an API key, or another one (status {answer.status_code})")
        try:
            served = [str(card["id"]) for card in answer.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.url}: no OpenAI-compatible server: /v1/models gives no list of models") from error
        version = await http.get(f"{self.url}/version", timeout=PROBE_SECONDS)
        return _identity(self.url, served, model, revision, _version(version))

    async def healthy(self, http: httpx.AsyncClient) -> bool:
        """Whether the server answers; one without /health (404) counts as well, one whose engine died (5xx) does not."""
        try:
            return (await http.get(f"{self.url}/health", timeout=PROBE_SECONDS)).status_code < 500
        except httpx.RequestError:
            return False

    async def observe(self, http: httpx.AsyncClient) -> None:
        """Read /metrics, where there is one: adapt to the queue, add up what the prefix cache did."""
        if not self.has_metrics:
            return
        try:
            answer = await http.get(f"{self.url}/metrics", timeout=PROBE_SECONDS)
        except httpx.ConnectError:
            self.lose()
            return
        except httpx.RequestError:
            return  # busy, perhaps
        self.has_metrics = answer.status_code < 400 or answer.status_code >= 500
        metrics = _metrics(answer.text) if answer.status_code == 200 else {}
        if "num_requests_waiting" in metrics:
            self.window.queued(metrics["num_requests_waiting"], self.under_way)
        self.prefix_hits += self._growth(metrics, "prefix_cache_hits_total")
        self.prefix_queries += self._growth(metrics, "prefix_cache_queries_total")

    def lose(self) -> None:
        """Take it for gone until it is healthy again."""
        self.down_since = self.down_since or time.monotonic()

    async def ask(self, http: httpx.AsyncClient, request: Request) -> Response:
        """Try one request once.

        Raises:
            TryAgain: connection failed, time-out, 429, 5xx, an answer that is no chat completion.
            UserError: any other status; the server's own words are in it.
        """
        started = time.monotonic()
        try:
            with anyio.fail_after(self.timeout):
                answer = await http.post(f"{self.url}/v1/chat/completions", json=request.body())
        except httpx.ConnectTimeout as error:
            self.lose()
            raise TryAgain(f"{self.url}: no connection in time") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            self.window.overloaded()
            raise TryAgain(f"{self.url}: no answer within {self.timeout:g} s") from error
        except httpx.DecodingError as error:
            raise TryAgain(f"{self.url}: its answer cannot be decoded") from error
        except httpx.RequestError as error:
            self.lose()
            raise TryAgain(f"{self.url}: connection failed ({_name(error)})") from error
        if answer.status_code == 429 or answer.status_code >= 500:
            if answer.status_code in (429, 503):
                self.window.overloaded()
            if answer.status_code in (502, 503, 504):
                self.lose()  # a gateway whose server is gone, perhaps; /health will tell
            after = answer.headers.get("retry-after", "")
            raise TryAgain(f"{self.url}: status {answer.status_code}", float(after) if after.isdecimal() else 0.0)
        if answer.status_code != 200:
            asked = request.messages[-1]["content"][-80:]
            raise UserError(
                f"{self.url} refused a request (status {answer.status_code}): {_reason(answer)}; it ended in {asked!r}"
            )
        try:
            response = parse_completion(answer.json(), datetime.now(UTC))
        except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
            raise TryAgain(f"{self.url}: its answer is no chat completion") from error
        self.window.answered(time.monotonic() - started)
        return response

    def _growth(self, metrics: dict[str, float], name: str) -> float:
        """How much a counter grew since the last look; the first look counts nothing, a restart begins at 0."""
        if name not in metrics:
            return 0.0
        now, before = metrics[name], self.counters.get(name, metrics[name])
        self.counters[name] = now
        return now - before if now >= before else now


def _identity(url: str, served: list[str], model: str | None, revision: str | None, version: str) -> Identity:
    model = model or next((name for name in served if "@" not in name), None)
    if model not in served:
        there = ", ".join(served) or "no model"
        raise UserError(f"{url} does not serve {model}; it serves {there}")
    named = [name.removeprefix(f"{model}@") for name in served if name.startswith(f"{model}@")]
    return Identity(model, revision or (named[0] if named else "unknown"), version)


def _version(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["version"])
    except (ValueError, KeyError, TypeError):
        return "unknown"  # not vLLM


def _metrics(text: str) -> dict[str, float]:
    """vLLM's counters and gauges by name (without "vllm:"), summed over their labels."""
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+)(?:\{.*\})? ([0-9.e+-]+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def parse_completion(content: Any, created: datetime) -> Response:
    """Read a chat completion, as decoded from JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        choice = content["choices"][0]
        text, finish_reason = choice["message"]["content"] or "", choice["finish_reason"] or ""
        usage = {name: value for name, value in (content.get("usage") or {}).items() if isinstance(value, int)}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion ({_name(error)})") from error
    if not isinstance(text, str) or not isinstance(finish_reason, str):
        raise ValueError("a chat completion whose content is no text")
    return Response(text, finish_reason, usage, created.astimezone(UTC).isoformat(timespec="seconds"))


def _reason(answer: httpx.Response) -> str:
    try:
        return " ".join(str(answer.json()["error"]["message"]).split())[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.text.split())[:100]


def _name(error: BaseException) -> str:
    return type(error).__name__
