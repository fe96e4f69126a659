"""Servers that are busy, slow, of another make, hostile: waits, fields left out, bounds, errors of one line."""

import asyncio
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from tenacity import wait_none

from tests.symptoms.fake_endpoint import FakeEndpoint, Raw, Reply, answer_to, completion
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm import client as client_module
from vipbench.harness.symptoms.llm import endpoint as endpoint_module
from vipbench.harness.symptoms.llm import transport
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.endpoint import Endpoint
from vipbench.harness.symptoms.llm.record import Request
from vipbench.harness.symptoms.llm.transport import base_url, retry_after

SAMPLING: dict[str, float | int] = {"max_tokens": 9, "seed": 3}


def requests(count: int) -> list[Request]:
    return [
        Request("fake", [{"role": "user", "content": f"class {number}"}], {"type": "object"}, SAMPLING, 0)
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", wait_none())
    monkeypatch.setattr(client_module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ResponseCache]:
    with ResponseCache(tmp_path / "answers.sqlite") as cache:
        yield cache


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as endpoint:
        yield endpoint


def refuse(endpoint: FakeEndpoint, times: float, status: int = 429, **error: Any) -> None:
    async def reply(body: dict[str, Any], number: int) -> Reply:
        if number < times:
            return status, {"error": {"message": "quota\nexceeded", **error}}
        return 200, completion(answer_to(body))

    endpoint.reply = reply


# busy


def test_a_busy_server_is_waited_for_however_often_it_refuses(
    endpoint: FakeEndpoint, cache: ResponseCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Refuse more often than there are retries, without a Retry-After."""
    endpoint.retry_after = ""
    refuse(endpoint, times=20)
    client = Client([endpoint.url], None, cache, retries=2)
    assert len(list(client.complete(requests(3)))) == 3 == len(cache)
    assert client.stats.retries == 20
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{endpoint.url}/v1: busy (status 429: quota exceeded); waiting 0.0 s, at most 600 s in all")


def test_while_it_wants_to_be_left_alone_nothing_is_asked(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    endpoint.retry_after = "0.7"
    refuse(endpoint, times=1)
    began = time.monotonic()
    answers = Client([endpoint.url], None, cache, concurrency=1).complete(requests(5))
    next(answers)
    assert 0.7 <= time.monotonic() - began < 5
    assert len(endpoint.asked) in (2, 3)
    assert len(list(answers)) == 4


@pytest.mark.parametrize("wanted", ["86400", "1e6", ""])
def test_patience_bounds_the_wait_and_one_line_says_so(
    endpoint: FakeEndpoint, cache: ResponseCache, caplog: pytest.LogCaptureFixture, wanted: str
) -> None:
    endpoint.retry_after = wanted
    refuse(endpoint, times=float("inf"))
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"busy \(status 429: quota exceeded\), for 1 s; what was answered is on"
    ) as error:
        list(Client([endpoint.url], None, cache, patience=0.6).complete(requests(20)))
    assert 0.6 <= time.monotonic() - began < 5 and "\n" not in str(error.value)
    assert "waiting" in caplog.text and ("asks for 86,400 s; waiting 0.6 s" in caplog.text) == (wanted == "86400")


def test_after_the_patience_it_is_tried_once_more(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    endpoint.retry_after = "86400"
    refuse(endpoint, times=1)
    assert len(list(Client([endpoint.url], None, cache, patience=0.3).complete(requests(2)))) == 2


def test_another_server_takes_over_from_a_busy_one(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    endpoint.retry_after = "3600"
    refuse(endpoint, times=float("inf"))
    with FakeEndpoint() as second:
        client = Client([endpoint.url, second.url], None, cache, concurrency=8)
        assert len(list(client.complete(requests(50)))) == 50
        assert len(second.asked) == 50 and len(endpoint.asked) <= 8


def test_a_server_that_is_busy_from_the_beginning_is_waited_for(cache: ResponseCache) -> None:
    async def busy(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 X\r\ncontent-length: 0\r\nretry-after: 0.2\r\n\r\n")
        if len(times) > 1:
            endpoint.raw.clear()
        times.append(time.monotonic())

    times: list[float] = []
    with FakeEndpoint() as endpoint:
        endpoint.raw["/v1/models"] = busy
        assert Client([endpoint.url], None, cache).identity.model == "fake" and len(times) == 3
        endpoint.raw["/v1/models"] = busy
        times.clear()
        with pytest.raises(UserError, match="busy"):
            Client([endpoint.url], None, cache, patience=0.0)


NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        (" 1.5 ", 1.5),
        (format_datetime(NOON + timedelta(minutes=2), usegmt=True), 120),
        (format_datetime(NOON - timedelta(minutes=2), usegmt=True), 0),
        ("Fri, 01 May 2026 12:00:30 -0000", 30),
        *((value, 0) for value in ("", "soon", "-3", "nan", "inf", "-inf", "0x10", "Fri, 32 May 99999 12:00:00 GMT")),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str, seconds: float) -> None:
    headers = httpx.Headers({"retry-after": value, "date": format_datetime(NOON, usegmt=True)})
    assert retry_after(headers) == seconds


def test_a_date_is_against_our_clock_where_the_server_tells_no_time() -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < retry_after(httpx.Headers({"retry-after": until})) <= 100


# of another make


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h", "http://h/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        (" http://h/v1/ ", "http://h/v1"),
        ("https://h/v2", "https://h/v2"),
        ("https://h/api/v3", "https://h/api/v3"),
        ("https://h/openai/v1", "https://h/openai/v1"),
        ("https://h/openai/deployments/x/", "https://h/openai/deployments/x"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_a_url_with_a_path_is_used_as_it_is(url: str, base: str) -> None:
    assert str(base_url(url)) == base


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hidden@h/v1",
        "https://hidden@h",
        "https://user:hid/den@h/v1",
        "https://user:1/hidden@h/v1",
        "user:hidden@h",
        "http://user:hidden@[::1",
        "//user:hidden@h/v1",
        "https://h/v1?key=hidden",
        "https://h/v1#hidden",
    ],
)
def test_what_is_secret_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError) as error:
        base_url(url)
    assert "hid" not in str(error.value) and "den@" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("base", ["/v1", "/v2", "/api/v3", "/openai/v1", "/v1beta/openai", "/openai/deployments/x"])
def test_any_version_path_is_asked(cache: ResponseCache, base: str) -> None:
    with FakeEndpoint() as endpoint:
        endpoint.base = base
        client = Client([endpoint.url + base], None, cache)
        assert len(list(client.complete(requests(2)))) == 2


def test_a_server_without_a_list_of_models_works_where_one_is_named(cache: ResponseCache) -> None:
    with FakeEndpoint(models=[], version=None) as endpoint:
        with pytest.raises(UserError, match=r"no list of models at /models \(status 404\).* --model"):
            Client([endpoint.url], None, cache)
        client = Client([endpoint.url], "fake", cache)
        assert client.identity == ("fake", "unknown", f"unknown at {endpoint.url}/v1")
        assert len(list(client.complete(requests(2)))) == 2


def test_a_key_that_may_not_list_models_works_where_one_is_named(cache: ResponseCache) -> None:
    with FakeEndpoint(version=None) as endpoint:
        endpoint.raw["/v1/models"] = sending(head("content-length: 0", "403 Forbidden"))
        with pytest.raises(UserError, match=r"wants an API key, or another one \(status 403\)"):
            Client([endpoint.url], None, cache)
        assert len(list(Client([endpoint.url], "fake", cache).complete(requests(2)))) == 2
        endpoint.raw["/v1/models"] = sending(head("content-length: 0", "401 Unauthorized"))
        with pytest.raises(UserError, match=r"wants an API key, or another one \(status 401\)"):
            Client([endpoint.url], "fake", cache)


def test_a_server_of_unknown_version_does_not_answer_for_another(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    """Servers whose version and revision are known share their answers, under the keys of old records."""
    with FakeEndpoint() as other:
        for place, asked in ((endpoint, 3), (other, 0)):
            list(Client([place.url], None, cache).complete(requests(3)))
            assert len(place.asked) == asked
        assert all(cache.get(request.key("r1", "1.0")) for request in requests(3))
        for models, version in ((["fake"], "1.0"), (["fake", "fake@r1"], None), (["fake"], None)):
            for place in (endpoint, other):
                place.models, place.version = models, version
                place.asked.clear()
                list(Client([place.url], None, cache).complete(requests(3)))
                assert len(place.asked) == 3
        assert len(cache) == 3 + 3 * 2 * 3


def test_the_servers_words_are_in_the_error(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    for status, words in ((200, "is no chat completion"), (500, "status 500"), (408, "status 408")):
        refuse(endpoint, float("inf"), status, message="out of \x1bmemory")
        with pytest.raises(UserError, match=rf"{words} \(out of \?memory\), 2 tries; "):
            list(Client([endpoint.url], None, cache, retries=1).complete(requests(1)))


def test_a_proxy_of_the_environment_is_used_but_to_this_machine(
    endpoint: FakeEndpoint, cache: ResponseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def listing(writer: asyncio.StreamWriter) -> None:
        body = b'{"data": [{"id": "far"}]}'
        writer.write(b"HTTP/1.1 200 X\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    with FakeEndpoint() as proxy:
        proxy.raw["http://far.invalid/v1/models"] = listing
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert Client(["http://far.invalid"], None, cache).identity.model == "far"
        assert Client([endpoint.url], None, cache).identity.model == "fake"
        monkeypatch.setenv("no_proxy", "far.invalid")
        with pytest.raises(UserError, match="no server answers"):
            Client(["http://far.invalid"], None, cache)


def test_no_compressed_answer_is_asked_for(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    list(Client([endpoint.url], None, cache).complete(requests(1)))
    assert "accept-encoding: identity\r\n" in endpoint.headers.lower()


# fields that are refused

REFUSALS: dict[str, tuple[int, dict[str, Any]]] = {
    "response_format": (400, {"error": {"message": "This response_format type is unavailable now"}}),
    "max_tokens": (
        400,
        {
            "error": {
                "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead.",
                "param": "max_tokens",
                "code": "unsupported_parameter",
            }
        },
    ),
    "seed": (
        422,
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
    ),
}


def picky(endpoint: FakeEndpoint, *fields: str) -> None:
    async def reply(body: dict[str, Any], number: int) -> Reply:
        await asyncio.sleep(0.01)
        return next((REFUSALS[field] for field in fields if field in body), (200, completion(answer_to(body))))

    endpoint.reply = reply


@pytest.mark.parametrize(
    "fields", [("response_format",), ("max_tokens",), ("seed",), ("seed", "max_tokens", "response_format")]
)
def test_refused_fields_are_left_out_and_that_is_recorded(
    endpoint: FakeEndpoint, cache: ResponseCache, caplog: pytest.LogCaptureFixture, fields: tuple[str, ...]
) -> None:
    picky(endpoint, *fields)
    client = Client([endpoint.url], None, cache, concurrency=8)
    answered = dict(enumerate(client.complete(requests(100))))
    accepted = [body for body in endpoint.asked if not any(field in body for field in fields)]
    assert len(answered) == len(cache) == len(accepted) == 100
    assert len(endpoint.asked) <= 100 + 10 * len(fields)  # once for each server, but for what was under way
    assert ("max_completion_tokens" in accepted[0]) == ("max_tokens" in fields)
    assert caplog.text.count("from now on") == len(fields)
    version = f"1.0 without {', '.join(sorted(fields))}"
    assert client.identity == ("fake", "r1", version)
    assert all(cache.get(request.key("r1", version)) for request in requests(100))
    assert cache.verify() == 100

    endpoint.asked.clear()  # the next job finds out again, and finds all on record
    again = Client([endpoint.url], None, cache, concurrency=8)
    assert len(list(again.complete(requests(100)))) == 100 == len(cache)
    assert len(endpoint.asked) <= 10 * len(fields) and all(
        any(field in body for field in fields) for body in endpoint.asked
    )
    offline = Client([], "fake", cache)
    assert offline.identity.server_version == version and len(list(offline.complete(requests(100)))) == 100


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "max_tokens is too large: 9 exceeds max_model_len"),
        (400, "the prompt is unsafe"),
        (400, "presence_penalty must be between -2 and 2"),
        (422, "temperature must be non-negative, got -1"),
        (404, "no such model; seed"),
        (403, "response_format is for paying customers"),
        (402, "no money left"),
    ],
)
def test_other_refusals_end_the_job(endpoint: FakeEndpoint, cache: ResponseCache, status: int, message: str) -> None:
    refuse(endpoint, float("inf"), status, message=message)
    with pytest.raises(UserError, match=rf"refused a request \(status {status}\): {message}; it ended in 'class"):
        list(Client([endpoint.url], None, cache, concurrency=1).complete(requests(2)))
    assert len(endpoint.asked) == 1


def test_a_field_that_is_refused_again_though_it_was_left_out_ends_the_job(
    endpoint: FakeEndpoint, cache: ResponseCache
) -> None:
    refuse(endpoint, float("inf"), 400, message="seed and \x1b[31m response_format")
    with pytest.raises(UserError, match="refused a request") as error:
        list(Client([endpoint.url], None, cache, concurrency=1).complete(requests(2)))
    assert len(endpoint.asked) == 2 and str(error.value).isprintable()


def test_penalties_sampling_and_a_systems_message_are_left_out_where_they_are_refused(
    endpoint: FakeEndpoint, cache: ResponseCache
) -> None:
    """One after the other, as hosted services refuse them; the message of the system begins the user's first."""
    refusals = {
        "repetition_penalty": "Unrecognized request argument supplied: repetition_penalty",
        "presence_penalty": "Argument not supported on this model: presencePenalty",
        "frequency_penalty": "Unsupported parameter: 'frequency_penalty' is not supported with this model.",
        "temperature": "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) is",
        "top_p": "Unsupported parameter: 'top_p'",
        "system": "System role not supported",
    }

    async def reply(body: dict[str, Any], number: int) -> Reply:
        present = {*body, *(message["role"] for message in body["messages"])}
        words = next((refusals[name] for name in refusals if name in present), None)
        return (400, {"error": {"message": words}}) if words else (200, completion(answer_to(body)))

    endpoint.reply = reply
    sampling = {name: 0.5 for name in refusals if name != "system"}
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    request = Request("fake", messages, None, sampling, 0)
    client = Client([endpoint.url], None, cache)
    assert len(list(client.complete([request]))) == 1 and len(endpoint.asked) == len(refusals) + 1
    assert endpoint.asked[-1] == {"model": "fake", "messages": [{"role": "user", "content": "s\n\nu"}, *messages[2:]]}
    version = "1.0 without frequency_penalty, presence_penalty, repetition_penalty, system, temperature, top_p"
    assert client.identity.server_version == version and cache.get(request.key("r1", version))


# hostile


def head(length: str = "content-length: 9", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\n{length}\r\n\r\n".encode()


def sending(first: bytes, then: bytes = b"", pause: float = 0.0) -> Raw:
    """Make a handler that sends `first`, and then `then` for ever."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while then:
            await writer.drain()
            writer.write(then)
            await asyncio.sleep(pause)
        await writer.drain()

    return write


CHUNKED = head("transfer-encoding: chunked")
DRIPPING_HEAD, DRIPPING = sending(b"", b"H", 0.02), sending(head("content-length: 99999"), b"[", 0.02)
ENDLESS = sending(CHUNKED, b"10000\r\n" + b"[" * 65536 + b"\r\n")
HOSTILE: dict[str, Raw] = {
    "nothing": sending(b""),
    "no HTTP": sending(b"\x00\xff garbage\r\n\r\n"),
    "dripping head": DRIPPING_HEAD,
    "dripping body": DRIPPING,
    "endless head": sending(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 1000),
    "endless body": ENDLESS,
    "endless chunks of nothing": sending(CHUNKED, b"1\r\n \r\n", 0.001),
    "cut off": sending(head("content-length: 500") + b'{"data": ['),
    "3,000 brackets": sending(head("content-length: 6000") + b"[" * 3000 + b"]" * 3000),
    "a number of 9,000 digits": sending(head("content-length: 9000") + b"9" * 9000),
    "no UTF-8": sending(head() + b'{"\xff": 1}'[:9]),
    "bad gzip": sending(head("content-encoding: gzip\r\ncontent-length: 9") + b"not gzip!"),
    "a redirect to itself": sending(head("location: /v1/models\r\ncontent-length: 0", "307 X")),
    "a length below zero": sending(head("content-length: -1")),
    "text": sending(head() + b'"text me"'),
    "null": sending(head("content-length: 4") + b"null"),
    "a list of numbers": sending(head("content-length: 6") + b"[1, 2]"),
    "status 600": sending(head("content-length: 0", "600 X")),
    "status 204": sending(head("content-length: 0", "204 X")),
}


def job(url: str, cache: ResponseCache) -> int | UserError:
    """A small job's answers, or what ended it."""
    try:
        client = Client([url], "fake", cache, timeout=0.3, retries=1, patience=0.5)
        return len(list(client.complete(requests(4))))
    except UserError as error:
        return error


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/health", "/metrics", "/v1/chat/completions"])
@pytest.mark.parametrize("answer", HOSTILE)
@pytest.mark.slow
def test_a_hostile_answer_ends_well_or_in_one_line(
    cache: ResponseCache, monkeypatch: pytest.MonkeyPatch, path: str, answer: str
) -> None:
    monkeypatch.setattr(endpoint_module, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(transport, "MOST_BYTES", 1 << 20)
    began = time.monotonic()
    with FakeEndpoint() as endpoint:
        endpoint.raw[path] = HOSTILE[answer]
        ending = job(endpoint.url, cache)
    if isinstance(ending, UserError):
        assert len(str(ending)) < 600 and str(ending).isprintable()
        assert path in ("/v1/models", "/version", "/v1/chat/completions")
    else:
        assert ending == 4 and path != "/v1/chat/completions"
    assert time.monotonic() - began < 10


ODD_NUMBERS = ["NaN", "-5", "1e999", "1e17", "+Inf", "-Inf", "1.2.3", "--1", "", "x", "9" * 400, "0x10"]


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_odd_metrics_are_ignored(endpoint: FakeEndpoint, cache: ResponseCache, number: str) -> None:
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
    endpoint.metrics = "".join(f'vllm:{name}{{engine="0"}} {number}\n' for name in names)
    client = Client([endpoint.url], None, cache)
    assert len(list(client.complete(requests(100)))) == 100
    assert client.stats.prefix_hit_rate in (None, 0)
    assert client.stats.note().endswith("from the cache")


DAMAGED_METRICS = [
    'vllm:prefix_cache_hits_total{a="b", ="0"} 5',
    'vllm:prefix_cache_hits_total{engine="0} 5',
    "vllm:prefix_cache_hits_total",
    'vllm:prefix_cache_hits_total{engine="' + r"\"" * 10**5 + '"} 5',
    'vllm:prefix_cache_hits_total{engine="0"} 5\n' * 10**5,
]


@pytest.mark.parametrize("page", DAMAGED_METRICS, ids=[page[:45].strip() for page in DAMAGED_METRICS])
def test_damaged_metrics_are_ignored_and_take_no_time(page: str) -> None:
    began = time.monotonic()
    found = endpoint_module._counters(page)
    many = page.startswith('vllm:prefix_cache_hits_total{engine="0"} 5\n')  # good lines, of which so many are read
    assert found == ({"vllm:prefix_cache_hits_total": 5.0 * endpoint_module.MOST_LINES} if many else {})
    assert time.monotonic() - began < 1.0


def test_counters_are_summed_over_engines() -> None:
    page = """
    # HELP vllm:prefix_cache_hits_total Prefix cache hits, in tokens.
    # TYPE vllm:prefix_cache_hits_total counter
    vllm:prefix_cache_hits_total{engine="0",model_name="a {b} \\"c\\""} 3.0
    vllm:prefix_cache_hits_total{engine="1",model_name="a"} 4e0
    vllm:prefix_cache_hits_created{engine="1",model_name="a"} 1.7e9
    python_info{version="3.12"} nonsense
    """
    page = "\n".join(line.strip() for line in page.splitlines())
    assert endpoint_module._counters(page) == {"vllm:prefix_cache_hits_total": 7.0}


def test_more_hits_than_queries_are_no_rate(endpoint: FakeEndpoint, cache: ResponseCache) -> None:
    endpoint.metrics = "vllm:prefix_cache_queries_total 0\nvllm:prefix_cache_hits_total 0\n"
    client = Client([endpoint.url], None, cache)
    endpoint.metrics = "vllm:prefix_cache_queries_total 5\nvllm:prefix_cache_hits_total 50\n"
    list(client.complete(requests(1)))
    assert client.stats.prefix_hit_rate is None


def test_a_server_with_odd_names_is_shown_in_short(cache: ResponseCache) -> None:
    names = ["\x1b[31m" * 100, *(f"model {number} " * 20 for number in range(1000))]
    with FakeEndpoint(models=names, version="9" * 10**6) as endpoint:
        with pytest.raises(UserError, match="does not serve fake; it serves") as error:
            Client([endpoint.url], "fake", cache)
        assert len(str(error.value)) < 1000 and str(error.value).isprintable()
        endpoint.models = ["fake", "fake@" + "\n" * 10**6]
        assert all(len(word) < 200 for word in Client([endpoint.url], "fake", cache).identity)


@pytest.mark.parametrize(
    "url", ["http://" + "a" * 300, "http://" + "a." * 200, "http://\u2603:99", "http://h:99999", "http://"]
)
def test_a_url_that_leads_nowhere_is_one_line(cache: ResponseCache, url: str) -> None:
    with pytest.raises(UserError) as error:
        Client([url], "fake", cache)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_an_endpoint_repeats_no_key() -> None:
    endpoint = Endpoint("http://h", 1, "very-secret", 1.0)

    async def connections() -> str:
        async with endpoint.connect() as http:
            return f"{http} {http!r} {http.headers}"

    assert "very-secret" not in repr(endpoint) + endpoint.url + asyncio.run(connections())
