"""One OpenAI-compatible server: its identity, its state (gone, busy), one try of a request."""

import logging
import math
import re
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.answers import parse_completion
from vipbench.harness.symptoms.llm.record import Identity, Request, Response
from vipbench.harness.symptoms.llm.transport import Reply, base_url, connect, fetch, retry_after, shown

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0  # for /health, /metrics and the like, from the first byte to the last
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds, doubled from one refusal to the next, where the server names no time
LOG_AGAIN_SECONDS = 30.0  # between two lines about pauses
BUSY = (429, 503, 529)
PASSING = (408, 409, 425)  # beside 5xx
HITS, QUERIES = COUNTERS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
MOST_COUNTED = 1e18
MOST_LINES, MOST_LINE = 1000, 1000  # of metrics, and characters in one
MOST_SHOWN = 10  # models, in an error
MOST_CHARACTERS = 200  # of the name of a model that the user did not choose
MOST_WORDS = 10_000  # characters of a refusal that are searched
UNKNOWN = "unknown"
# Fields of a request that some servers refuse, and patterns for them in the refusals.
OPTIONAL_FIELDS = {
    "response_format": re.compile(r"response_format|json_schema|json schema|structured.output|grammar", re.IGNORECASE),
    "max_tokens": re.compile(r"max_tokens", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
    "logprobs": re.compile(r"\blogprobs\b|\blog.?probabilit", re.IGNORECASE),
    "top_logprobs": re.compile(r"logprobs\b|\blog.?probabilit", re.IGNORECASE),
}
REPORTED = {"logprobs", "top_logprobs"}  # those that change what a server reports with an answer, and not the answer
SIZE_PROBLEM = re.compile(r"too (?:large|long|high|big|many)|exceed|maximum|at most|less than|model_len", re.IGNORECASE)


class TryAgain(Exception):
    """A failed try that may succeed when repeated."""


class Busy(Exception):
    """A refusal of the request for now; the server is sent nothing for a while."""


class Refused(UserError):
    """A final refusal of a request.

    Attributes:
        fields: optional fields of the request that the refusal names; the request may be accepted without them.
    """

    def __init__(self, message: str, fields: Collection[str] = ()) -> None:
        super().__init__(message)
        self.fields = frozenset(fields)


class Endpoint:
    """A server that is sent at most `concurrency` requests at a time.

    Args:
        url: its base URL; one without a path gets /v1.
        timeout: seconds for one try of one request.
        patience: seconds to wait for it when it is gone or busy.

    Attributes:
        url: the base URL, without anything secret.
        down_since: the moment when it was found gone. refused_since: that of the first refusal since the last answer.
        paused_until: the end of the pause that it asked for.
    """

    def __init__(
        self, url: str, concurrency: int, api_key: str | None, timeout: float, patience: float = 600.0
    ) -> None:
        self.base = base_url(url)
        self.url = str(self.base)
        self.root = re.sub(r"/v\d[^/]*$", "", self.url)  # of the paths that are vLLM's own
        self.concurrency, self.api_key, self.timeout, self.patience = concurrency, api_key, timeout, patience
        self.down_since: float | None = None
        self.refused_since: float | None = None
        self.paused_until = self.logged_at = -math.inf
        self.refusals = 0
        self.has_metrics = True
        self.counters: dict[str, float] = {}
        self.prefix_hits = self.prefix_queries = 0.0

    def connect(self) -> httpx.AsyncClient:
        """Open connections for one event loop."""
        timeout = httpx.Timeout(self.timeout, connect=PROBE_SECONDS)
        return connect(self.base, self.api_key, self.concurrency, timeout)

    async def identify(
        self, http: httpx.AsyncClient, model: str | None, revision: str | None, version: str | None = None
    ) -> Identity:
        """Find the identity of the server of `model` (None: of the first model it serves).

        `vipbench serve` serves a model under the name MODEL@REVISION as well, from which the revision is read. A server
        that does not list its models is trusted to serve `model`.

        Args:
            revision, version: by the user's word; the server's own version comes first.

        Raises:
            UserError: it is no OpenAI-compatible server, wants another API key, or serves no such model (names those it does).
            Busy: it refuses requests for now.
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
        own_version = _version(await fetch(http, f"{self.root}/version", PROBE_SECONDS))
        return _identity(self.url, served, model, revision, own_version or version or UNKNOWN)

    async def healthy(self, http: httpx.AsyncClient) -> bool:
        """Check that the server answers; one without /health (404) counts as well, one whose engine died (5xx) does not."""
        try:
            return (await fetch(http, f"{self.root}/health", PROBE_SECONDS)).status < 500
        except httpx.RequestError:
            return False

    async def observe(self, http: httpx.AsyncClient) -> None:
        """Read /metrics, where there is one, and add up the hits and queries of the prefix cache."""
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
        counters = _counters(answer.text) if answer.status == 200 else {}
        self.prefix_hits += self._growth(counters, HITS)
        self.prefix_queries += self._growth(counters, QUERIES)

    def lose(self) -> None:
        """Regard it as gone until it is healthy again."""
        self.down_since = self.down_since or time.monotonic()

    def seconds_closed(self) -> float:
        """Return the seconds until it may be sent a request: 0 for now, infinity while it is gone."""
        return math.inf if self.down_since else max(0.0, self.paused_until - time.monotonic())

    def out_of_patience(self) -> bool:
        """Return True for a server that has been gone, or has refused everything, for longer than `patience`."""
        since = self.down_since or self.refused_since
        return since is not None and time.monotonic() - since >= self.patience

    async def ask(self, http: httpx.AsyncClient, request: Request, without: Collection[str] = ()) -> Response:
        """Try one request once, `without` some of its fields.

        Raises:
            TryAgain: connection failed, time-out, 5xx, an answer that is no chat completion.
            Busy: 429, 503, or another failure with a Retry-After.
            Refused: any other status; the server's own message is quoted.
        """
        try:
            answer = await fetch(http, f"{self.url}/chat/completions", self.timeout, request.body(without))
        except httpx.ConnectTimeout as error:
            self.lose()
            raise TryAgain(f"{self.url}: no connection in time") from error
        except httpx.TimeoutException as error:
            late = f"{self.url}: no answer within {self.timeout:g} s (a lower --concurrency gives it fewer at a time)"
            raise TryAgain(late) from error
        except httpx.DecodingError as error:
            raise TryAgain(f"{self.url}: its answer cannot be decoded, or is too large") from error
        except httpx.RequestError as error:
            self.lose()
            raise TryAgain(f"{self.url}: connection failed ({type(error).__name__})") from error
        if answer.status in BUSY or (answer.status >= 500 and "retry-after" in answer.headers):
            raise self._pause(answer)
        if answer.status >= 500 or answer.status in PASSING:
            if answer.status in (502, 504):
                self.lose()  # of a gateway whose server may be gone; /health shows
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
        return response

    def _pause(self, answer: Reply) -> Busy:
        """Pause for the time that it asks for, or longer from one refusal to the next; within the patience."""
        reason = f"busy (status {answer.status}: {shown(answer.reason, 100)})"
        now = time.monotonic()
        self.refused_since = self.refused_since or now
        if now >= self.paused_until:  # else it belongs to the same burst of refusals
            self.refusals += 1
        wanted = retry_after(answer.headers)
        wait = max(wanted, min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.refusals - 1, 10)))
        left = self.refused_since + self.patience - now
        wait = min(wait, left) if left > 0 else min(wait, LONGEST_PAUSE)
        self.paused_until = max(self.paused_until, now + wait)
        if now - self.logged_at >= LOG_AGAIN_SECONDS:
            self.logged_at = now
            asks = f" asks for {wanted:,.0f} s;" if wanted > wait else ""
            log.warning("%s: %s;%s waiting %.1f s, at most %.0f s in all", self.url, reason, asks, wait, self.patience)
        return Busy(f"{self.url}: {reason}")

    def _growth(self, counters: dict[str, float], name: str) -> float:
        """Compute a counter's growth since the last reading; the first one counts nothing, a restart begins at 0."""
        if name not in counters:
            return 0.0
        now, before = counters[name], self.counters.get(name, counters[name])
        self.counters[name] = now
        return now - before if now >= before else now


def _served(listed: Reply) -> list[str] | None:
    """Read the names of the models from the answer to /models; None where it is no such list."""
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
    """Read vLLM's version; None from other servers."""
    try:
        version = answer.json()["version"]
    except (ValueError, KeyError, TypeError):
        return None
    return shown(version, 100) if isinstance(version, str) and version.strip() else None


def _counters(text: str) -> dict[str, float]:
    """Parse the counters of vLLM's prefix cache in a page of metrics, summed over their labels; without absurd values."""
    lines = [line for line in text.splitlines() if line.startswith(COUNTERS) and len(line) <= MOST_LINE][:MOST_LINES]
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines)):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except (ValueError, IndexError, OverflowError):  # damaged, a label without a name, a number of many digits
        return {}
    return {name: value for name, value in sums.items() if 0 <= value <= MOST_COUNTED}  # not so for NaN


def _refusal(answer: Reply) -> str:
    """Extract the message of a refusal, without parts of the request that it may repeat: in OpenAI's form, FastAPI's, or all."""
    try:
        content = answer.json()
        if isinstance(content.get("detail"), list):
            return " ".join(f"{problem.get('loc')} {problem.get('msg')}" for problem in content["detail"])[:MOST_WORDS]
        return f"{content['error']['message']} {content['error'].get('param')}"[:MOST_WORDS]
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer.text[:MOST_WORDS]


def _refused_fields(answer: Reply, body: dict[str, Any]) -> list[str]:
    """List the optional fields of a request that a refusal (400, 422) names, unless it is about the size of max_tokens."""
    if answer.status not in (400, 422):
        return []
    words = _refusal(answer)
    named = [name for name, pattern in OPTIONAL_FIELDS.items() if name in body and pattern.search(words)]
    if "max_tokens" in named and SIZE_PROBLEM.search(words) and "max_completion_tokens" not in words:
        named.remove("max_tokens")
    return named
