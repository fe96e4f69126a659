"""One OpenAI-compatible server as the client sees it: who it is, how many requests it is given at a time, one try."""

import logging
import math
import re
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import httpx

from harness.errors import UserError
from harness.symptoms.llm.answers import parse_completion
from harness.symptoms.llm.cache import Identity, Request, Response
from harness.symptoms.llm.transport import Reply, base_url, connect, fetch, retry_after, shown

log = logging.getLogger(__name__)

FIRST_WINDOW = 8  # requests under way at first
PROBE_SECONDS = 5.0  # for /health, /metrics and the like, from the first byte to the last
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds, doubled from one refusal to the next, where the server does not say
SAY_AGAIN_SECONDS = 30.0  # between two lines about pauses
BUSY = (429, 503, 529)
PASSING = (408, 409, 425)  # beside 5xx
MOST_WAITING = 1e6  # requests in a server's queue; more is nonsense
MOST_COUNTED = 1e18
MOST_SHOWN = 10  # models, in an error
MOST_CHARACTERS = 200  # of the name of a model that nobody named
MOST_WORDS = 10_000  # characters of a refusal that are searched
UNKNOWN = "unknown"
# Fields of a request that some servers refuse, and how their refusals name them.
OPTIONAL_FIELDS = {
    "response_format": re.compile(r"response_format|json_schema|json schema|structured.output|grammar", re.IGNORECASE),
    "max_tokens": re.compile(r"max_tokens", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
}
ITS_SIZE = re.compile(r"too (?:large|long|high|big|many)|exceed|maximum|at most|less than|model_len", re.IGNORECASE)


class TryAgain(Exception):
    """A try that failed in a way that may pass."""


class Busy(Exception):
    """The server is there and does not want the request now; it is left alone for a while."""


class Refused(UserError):
    """The server will not answer a request.

    Attributes:
        fields: of the request that the refusal names, though an answer may be had without them.
    """

    def __init__(self, message: str, fields: Collection[str] = ()) -> None:
        super().__init__(message)
        self.fields = frozenset(fields)


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


class Endpoint:
    """A server that is given at most `most` requests at a time.

    Args:
        url: its base URL; one without a path gets /v1.
        timeout: seconds for one try of one request.
        patience: seconds after which it need not be waited for.

    Attributes:
        url: the base URL, without anything secret.
        down_since: when it went away. refused_since: since when it has refused all requests as too many.
        paused_until: when it may be asked again.
    """

    def __init__(self, url: str, most: int, api_key: str | None, timeout: float, patience: float = 600.0) -> None:
        self.base = base_url(url)
        self.url = str(self.base)
        self.root = re.sub(r"/v\d[^/]*$", "", self.url)  # where vLLM has what is no part of OpenAI's API
        self.api_key, self.timeout, self.patience = api_key, timeout, patience
        self.window = Window(most)
        self.under_way = 0
        self.down_since: float | None = None
        self.refused_since: float | None = None
        self.paused_until = self.said_at = -math.inf
        self.refusals = 0
        self.has_metrics = True
        self.counters: dict[str, float] = {}
        self.prefix_hits = self.prefix_queries = 0.0

    def connect(self) -> httpx.AsyncClient:
        """Connections for one event loop."""
        timeout = httpx.Timeout(self.timeout, connect=PROBE_SECONDS)
        return connect(self.base, self.api_key, self.window.most, timeout)

    async def identify(
        self, http: httpx.AsyncClient, model: str | None, revision: str | None, version: str | None = None
    ) -> Identity:
        """Who serves `model` here (None: the first one served).

        A model that `vipbench serve` started also goes by the name MODEL@REVISION, which tells the revision. A server that
        does not list its models is taken at the user's word.

        Args:
            revision, version: what the user says they are; the server's own version comes first.

        Raises:
            UserError: it is no OpenAI-compatible server, wants another API key, or serves no such model (names those it does).
            Busy: it wants to be left alone for a while.
            httpx.RequestError: the connection failed.
        """
        listed = await fetch(http, f"{self.url}/models", PROBE_SECONDS)
        if listed.status in (401, 403):
            raise UserError(f"{self.url}: the server wants an API key, or another one (status {listed.status})")
        if listed.status in BUSY:
            raise self._pause(listed)
        if listed.status >= 500 and listed.status != 501:
            raise httpx.RequestError(f"status {listed.status}")
        served = _served(listed)
        if served is None and model is None:
            raise UserError(
                f"{self.url}: no list of models at /models (status {listed.status}); "
                "where it is an OpenAI-compatible server, name the model with --model"
            )
        told = _version(await fetch(http, f"{self.root}/version", PROBE_SECONDS))
        return _identity(self.url, served, model, revision, told or version or UNKNOWN)

    async def healthy(self, http: httpx.AsyncClient) -> bool:
        """Whether the server answers; one without /health (404) counts as well, one whose engine died (5xx) does not."""
        try:
            return (await fetch(http, f"{self.root}/health", PROBE_SECONDS)).status < 500
        except httpx.RequestError:
            return False

    async def observe(self, http: httpx.AsyncClient) -> None:
        """Read /metrics, where there is one: adapt to the queue, add up what the prefix cache did."""
        if not self.has_metrics:
            return
        try:
            answer = await fetch(http, f"{self.root}/metrics", PROBE_SECONDS)
        except httpx.ConnectError:
            self.lose()
            return
        except httpx.RequestError:
            return  # busy, perhaps
        self.has_metrics = answer.status < 400 or answer.status >= 500
        metrics = _metrics(answer.text) if answer.status == 200 else {}
        waiting = metrics.get("num_requests_waiting", MOST_COUNTED)
        if waiting <= MOST_WAITING:
            self.window.queued(waiting, self.under_way)
        else:
            self.window.has_queue = False
        self.prefix_hits += self._growth(metrics, "prefix_cache_hits_total")
        self.prefix_queries += self._growth(metrics, "prefix_cache_queries_total")

    def lose(self) -> None:
        """Take it for gone until it is healthy again."""
        self.down_since = self.down_since or time.monotonic()

    def takes_requests(self) -> bool:
        return not self.down_since and time.monotonic() >= self.paused_until and self.under_way < self.window.size

    def out_of_patience(self) -> bool:
        """Return True for a server that has been gone, or has refused everything, for longer than it is waited for."""
        since = self.down_since or self.refused_since
        return since is not None and time.monotonic() - since >= self.patience

    async def ask(self, http: httpx.AsyncClient, request: Request, without: Collection[str] = ()) -> Response:
        """Try one request once, `without` some of its fields.

        Raises:
            TryAgain: connection failed, time-out, 5xx, an answer that is no chat completion.
            Busy: 429, 503, or another failure that names the time after which to come back.
            Refused: any other status; the server's own words are in it.
        """
        started = time.monotonic()
        try:
            answer = await fetch(http, f"{self.url}/chat/completions", self.timeout, request.body(without))
        except httpx.ConnectTimeout as error:
            self.lose()
            raise TryAgain(f"{self.url}: no connection in time") from error
        except httpx.TimeoutException as error:
            self.window.overloaded()
            raise TryAgain(f"{self.url}: no answer within {self.timeout:g} s") from error
        except httpx.DecodingError as error:
            raise TryAgain(f"{self.url}: its answer cannot be decoded, or is too large") from error
        except httpx.RequestError as error:
            self.lose()
            raise TryAgain(f"{self.url}: connection failed ({type(error).__name__})") from error
        if answer.status in BUSY or (answer.status >= 500 and "retry-after" in answer.headers):
            self.window.overloaded()
            raise self._pause(answer)
        if answer.status >= 500 or answer.status in PASSING:
            if answer.status in (502, 504):
                self.lose()  # a gateway whose server is gone, perhaps; /health will tell
            reason = f" ({answer.reason})" if answer.body else ""
            raise TryAgain(f"{self.url}: status {answer.status}{reason}")
        if answer.status != 200:
            asked = request.messages[-1]["content"][-80:]
            raise Refused(
                f"{self.url} refused a request (status {answer.status}): {answer.reason}; it ended in {asked!r}",
                _refused_fields(answer, request.body(without)),
            )
        try:
            response = parse_completion(answer.json(), datetime.now(UTC))
        except ValueError as error:
            raise TryAgain(f"{self.url}: its answer is no chat completion ({answer.reason})") from error
        self.refused_since, self.refusals = None, 0
        self.window.answered(time.monotonic() - started)
        return response

    def _pause(self, answer: Reply) -> Busy:
        """Leave it alone for as long as it asks for, or longer from one refusal to the next; within the patience."""
        reason = f"busy (status {answer.status}: {shown(answer.reason, 100)})"
        now = time.monotonic()
        self.refused_since = self.refused_since or now
        if now >= self.paused_until:  # else a refusal of the same moment
            self.refusals += 1
        wanted = retry_after(answer.headers)
        wait = max(wanted, min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.refusals - 1, 10)))
        left = self.refused_since + self.patience - now
        wait = min(wait, left) if left > 0 else min(wait, LONGEST_PAUSE)
        self.paused_until = max(self.paused_until, now + wait)
        if now - self.said_at >= SAY_AGAIN_SECONDS:
            self.said_at = now
            asks = f" asks for {wanted:,.0f} s;" if wanted > wait else ""
            log.warning("%s: %s;%s waiting %.1f s, at most %.0f s in all", self.url, reason, asks, wait, self.patience)
        return Busy(f"{self.url}: {reason}")

    def _growth(self, metrics: dict[str, float], name: str) -> float:
        """How much a counter grew since the last look; the first look counts nothing, a restart begins at 0."""
        if name not in metrics:
            return 0.0
        now, before = metrics[name], self.counters.get(name, metrics[name])
        self.counters[name] = now
        return now - before if now >= before else now


def _served(listed: Reply) -> list[str] | None:
    """The names of the models in the answer to /models; None: it is no such list."""
    try:
        content = listed.json()
        return [str(card["id"]) for card in (content if isinstance(content, list) else content["data"])]
    except (ValueError, KeyError, TypeError):
        return None


def _identity(url: str, served: list[str] | None, model: str | None, revision: str | None, version: str) -> Identity:
    fit = (name for name in served or () if "@" not in name and len(name) <= MOST_CHARACTERS and name.isprintable())
    model = model or next(fit, None)
    if model is None or (served is not None and model not in served):
        there = ", ".join(shown(name, 60) for name in (served or ())[:MOST_SHOWN]) or "no model"
        more = f" and {len(served) - MOST_SHOWN} more" if served and len(served) > MOST_SHOWN else ""
        raise UserError(f"{url} does not serve {model or 'a model'}; it serves {there}{more}")
    named = [name.removeprefix(f"{model}@") for name in served or () if name.startswith(f"{model}@")]
    return Identity(model, revision or shown(named[0] if named else UNKNOWN, 100), version)


def _version(answer: Reply) -> str | None:
    """vLLM's version; None: it is not vLLM."""
    try:
        version = answer.json()["version"]
    except (ValueError, KeyError, TypeError):
        return None
    return shown(version, 100) if isinstance(version, str) and version.strip() else None


def _metrics(text: str) -> dict[str, float]:
    """vLLM's counters and gauges by name (without "vllm:"), summed over their labels; without those that are nonsense."""
    sums: dict[str, float] = {}
    for name, number in re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + _number(number)
    return {name: value for name, value in sums.items() if 0 <= value <= MOST_COUNTED}  # not so for NaN


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _refusal(answer: Reply) -> str:
    """The words of a refusal, without what it may repeat of the request: OpenAI's form, FastAPI's form, or all of it."""
    try:
        content = answer.json()
        if isinstance(content.get("detail"), list):
            return " ".join(f"{problem.get('loc')} {problem.get('msg')}" for problem in content["detail"])[:MOST_WORDS]
        return f"{content['error']['message']} {content['error'].get('param')}"[:MOST_WORDS]
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer.text[:MOST_WORDS]


def _refused_fields(answer: Reply, body: dict[str, Any]) -> list[str]:
    """The optional fields of a request that a refusal (400, 422) names, unless it is about the size of max_tokens."""
    if answer.status not in (400, 422):
        return []
    words = _refusal(answer)
    named = [name for name, pattern in OPTIONAL_FIELDS.items() if name in body and pattern.search(words)]
    if "max_tokens" in named and ITS_SIZE.search(words) and "max_completion_tokens" not in words:
        named.remove("max_tokens")
    return named
