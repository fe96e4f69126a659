"""HTTP to a server that is not trusted: one deadline for a whole request, a bound on its answer's size, Retry-After.

A server may drip a byte a second, answer without an end, or ask to be left alone until tomorrow; none of it takes more
time or memory here than stated.
"""

import itertools
import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.request import getproxies

import anyio
import httpx

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import parse_json

MOST_BYTES = 16 << 20  # of an answer
POOL_CONNECTIONS = 8
# Idle connections go before the 5 s of vLLM's HTTP server are over, so that no request meets one that was just closed.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=3.0)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIKE = "it looks like http://127.0.0.1:8000"


class TooLarge(httpx.DecodingError):
    """An answer of more than `MOST_BYTES`."""


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    headers: httpx.Headers
    body: bytes

    def json(self) -> Any:
        """Parse the body as JSON. Raises ValueError where it is none."""
        return parse_json(self.body)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    @property
    def reason(self) -> str:
        """The server's own reason for a refusal, as one short line."""
        try:
            return shown(self.json()["error"]["message"], 300)
        except (ValueError, KeyError, TypeError):
            return shown(self.text, 200)


def base_url(url: str) -> httpx.URL:
    """Normalise a server's base URL: no slash at its end; one without a path gets /v1.

    Raises:
        UserError: it is no such URL, or holds a user name, a password or a query, which would end in records and logs
            (neither is shown).
    """
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL:
        raise UserError(f"{without_secrets(url)}: not a URL; {LIKE}") from None  # its message may quote a password
    if "@" in url or parsed.query or parsed.fragment:
        raise UserError(
            f"{without_secrets(url)}: a server's URL may hold no user name, password or query, since it is recorded; "
            "give a key with --api-key-file or in VIPBENCH_API_KEY"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{without_secrets(url)}: not the URL of a server; {LIKE}")
    return parsed.copy_with(path=parsed.path.rstrip("/") or "/v1")


def without_secrets(url: str) -> str:
    """Remove user name, password, query and fragment from a URL, even a malformed one; returns one short line."""
    front, secret, address = url.partition("?")[0].partition("#")[0].rpartition("@")
    scheme, slashes, _ = front.partition("//")
    return shown(f"{scheme}{slashes}{address}" if secret and slashes else address, 200)


def shown(value: object, most: int) -> str:
    """Shorten a text of a server or a file to one line of at most `most` printable characters."""
    text = " ".join(str(value)[: 10 * most].split())
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def retry_after(headers: httpx.Headers) -> float:
    """Parse Retry-After in seconds: a number or an HTTP date (against the server's own clock); 0 without one."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        until, now = _date(text), _date(headers.get("date", "")) or datetime.now(UTC)
        seconds = (until - now).total_seconds() if until else 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def connect(url: httpx.URL, api_key: str | None, most: int, timeout: httpx.Timeout) -> httpx.AsyncClient:
    """Open connections for one event loop, for `most` requests at a time.

    To this machine itself no proxy from the environment is used; redirects are not followed, as they would take the key along.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    if url.host not in LOOPBACK and getproxies():
        return httpx.AsyncClient(headers=headers, limits=LIMITS, timeout=timeout)
    spread = _Spread(math.ceil(most / POOL_CONNECTIONS))
    return httpx.AsyncClient(headers=headers, transport=spread, timeout=timeout)


async def fetch(http: httpx.AsyncClient, url: str, seconds: float, body: Any = None) -> Reply:
    """Send a GET, or a POST with a JSON body.

    Args:
        seconds: for all of it, from the connection to the last byte.

    Raises:
        httpx.RequestError: no connection, no whole answer in time (httpx.ReadTimeout), or one that is too large (TooLarge).
    """
    content = bytearray()
    method = "GET" if body is None else "POST"
    try:
        with anyio.fail_after(seconds):
            async with http.stream(method, url, json=body) as answer:
                async for chunk in answer.aiter_bytes():
                    content += chunk
                    if len(content) > MOST_BYTES:
                        raise TooLarge(f"an answer of more than {MOST_BYTES >> 20} MiB")
    except TimeoutError as error:
        raise httpx.ReadTimeout(f"no whole answer within {seconds:g} s") from error
    return Reply(answer.status_code, answer.headers, bytes(content))


class _Spread(httpx.AsyncBaseTransport):
    """Distributes requests over small pools in turn, since a pool checks each of its connections for each request."""

    def __init__(self, pools: int) -> None:
        context = httpx.create_ssl_context()
        self.pools = [httpx.AsyncHTTPTransport(verify=context, limits=LIMITS) for _ in range(pools)]
        self.turns = itertools.cycle(self.pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self.turns).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self.pools:
            await pool.aclose()


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
