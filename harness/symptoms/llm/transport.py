"""HTTP to a server that is not trusted: one deadline for a whole request, a bound on its answer's size, Retry-After.

A server may drip a byte a second, answer without an end, or ask to be left alone until tomorrow; none of it takes more
time or memory here than stated. Requests go through aiohttp, which takes a fifth of httpx's time for each.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx
from yarl import URL

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import parse_json

MOST_BYTES = 16 << 20  # of an answer
CONNECT_SECONDS = 5.0
# Idle connections go before the 5 s of vLLM's HTTP server are over, so that no request meets one that was just closed.
IDLE_SECONDS = 3.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIKE = "it looks like http://127.0.0.1:8000"


class NoAnswer(Exception):
    """A failure to get a whole answer: the connection broke, or what came is no HTTP."""


class Unreachable(NoAnswer):
    """A failure to connect."""


class TooLate(NoAnswer):
    """An answer that was not whole in time."""


class TooLarge(NoAnswer):
    """An answer of more than `MOST_BYTES`."""


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
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


def retry_after(headers: Mapping[str, str]) -> float:
    """Parse Retry-After in seconds: a number or an HTTP date (against the server's own clock); 0 without one."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        until, now = _date(text), _date(headers.get("date", "")) or datetime.now(UTC)
        seconds = (until - now).total_seconds() if until else 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def connect(url: httpx.URL, api_key: str | None) -> aiohttp.ClientSession:
    """Open connections for the event loop that runs. To this machine itself no proxy from the environment is used.

    A compressed answer is not asked for, since it may be much larger than what is counted. The key is put into each request and
    is in none of the session's fields.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        middlewares=[_with_key(api_key)] if api_key else [],
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        proxy=_proxy(url),
    )


async def fetch(http: aiohttp.ClientSession, url: str, seconds: float, body: Any = None) -> Reply:
    """Send a GET, or a POST with a JSON body. Redirects are not followed, as they would take the key along.

    Args:
        seconds: for all of it, from the connection to the last byte.

    Raises:
        NoAnswer: no connection (Unreachable), no whole answer in time (TooLate), or one that is too large (TooLarge).
    """
    content = bytearray()
    method = "GET" if body is None else "POST"
    limits = aiohttp.ClientTimeout(total=seconds, connect=CONNECT_SECONDS)
    try:
        async with http.request(
            method, URL(url, encoded=True), json=body, timeout=limits, allow_redirects=False
        ) as answer:
            async for chunk in answer.content.iter_any():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise TooLarge(f"an answer of more than {MOST_BYTES >> 20} MiB")
    except aiohttp.ConnectionTimeoutError as error:
        raise Unreachable("no connection in time") from error
    except aiohttp.ClientConnectorError as error:
        raise Unreachable(shown(error.strerror or error, 100)) from error
    except TimeoutError as error:
        raise TooLate(f"no whole answer within {seconds:g} s") from error
    except (aiohttp.ClientError, ValueError) as error:  # ValueError: a URL or a proxy's that aiohttp cannot use
        raise NoAnswer(shown(f"{type(error).__name__}: {error}", 200)) from error
    return Reply(answer.status, answer.headers, bytes(content))


def _with_key(api_key: str) -> aiohttp.ClientMiddlewareType:
    async def send(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers["Authorization"] = f"Bearer {api_key}"
        return await handler(request)

    return send


def _proxy(url: httpx.URL) -> str | None:
    """Find the proxy that the environment names for a server."""
    if url.host in LOOPBACK or proxy_bypass(url.host):
        return None
    proxies = getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
