"""An OpenAI-compatible server without a model: quick, deterministic, and as ill-behaved as a test wants it.

As a process of its own: python -m tests.symptoms.fake_endpoint PORT
"""

import asyncio
import hashlib
import json
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Self

Reply = tuple[int, dict[str, Any] | bytes]
Raw = Callable[[asyncio.StreamWriter], Awaitable[None]]


def completion(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    """A chat completion with this text."""
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120, "prompt_tokens_details": None}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"object": "chat.completion", "created": 1_700_000_000, "choices": [choice], "usage": usage}


def answer_to(body: dict[str, Any]) -> str:
    """The text that the fake model answers: a function of the request alone."""
    return "answer " + hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


class FakeEndpoint:
    """A server in a thread of its own, as a context manager; it can be stopped and started again on the same port.

    `reply(body, number)` (number: how many requests came before) makes the answer to a chat completion; `asked` holds
    the bodies in the order of their coming (unless `keep` is off), `headers` the last request's head, `most_at_once` the
    most that were under way. `base` is the path of its API, `raw` holds what writes the answers to some paths by hand,
    `retry_after` goes with each 429.
    """

    def __init__(self, *, delay: float = 0.0, models: list[str] | None = None, version: str | None = "1.0") -> None:
        self.delay, self.models, self.version = delay, ["fake", "fake@r1"] if models is None else models, version
        self.base, self.raw, self.retry_after = "/v1", dict[str, Raw](), "1"
        self.metrics: str | None = None
        self.reply: Callable[[dict[str, Any], int], Awaitable[Reply]] = self._usual
        self.keep = True
        self.asked: list[dict[str, Any]] = []
        self.count = 0
        self.headers = ""
        self.under_way = self.most_at_once = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run(started)), daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join(10)

    async def run(self, started: threading.Event) -> None:
        self.loop, self.ended = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            connections.add(task)
            try:
                await self._serve(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                pass  # the other side has gone, or we are to end
            finally:
                connections.discard(task)
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self.ended.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next((line[15:] for line in head.lower().split("\r\n") if line.startswith("content-length:")), "0")
            body, path = await reader.readexactly(int(length)), head.split()[1]
            if path in self.raw:
                await self.raw[path](writer)
                return
            status, payload = await self._route(head, body)
            content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            extra = f"retry-after: {self.retry_after}\r\n" if status == 429 and self.retry_after else ""
            writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n{extra}\r\n".encode() + content)
            await writer.drain()

    async def _route(self, head: str, content: bytes) -> Reply:
        path = head.split()[1]
        if path == "/health":
            return 200, b""
        if path == f"{self.base}/models" and self.models:
            return 200, {"data": [{"id": name} for name in self.models]}
        if path == "/version" and self.version:
            return 200, {"version": self.version}
        if path == "/metrics" and self.metrics is not None:
            return 200, self.metrics.encode()
        if path != f"{self.base}/chat/completions":
            return 404, b"not found"
        body = json.loads(content)
        number = self.count
        self.count += 1
        if self.keep:
            self.asked.append(body)
        self.headers = head
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            return await self.reply(body, number)
        finally:
            self.under_way -= 1

    async def _usual(self, body: dict[str, Any], number: int) -> Reply:
        if self.delay:
            await asyncio.sleep(self.delay)
        return 200, completion(answer_to(body))


if __name__ == "__main__":
    endpoint = FakeEndpoint()
    endpoint.port, endpoint.keep = int(sys.argv[1]), False
    with endpoint:
        print(endpoint.url, flush=True)
        sys.stdin.read()  # until our starter is gone
