"""An OpenAI-compatible server that answers at once and the same to all: what it takes is little beside any client.

    python -m benchmarks.instant_server SECONDS

SECONDS of CPU are spent on each completion beyond that. It prints its URL and ends with its standard input.
"""

import asyncio
import json
import sys
import time

TEXT = json.dumps({"symptoms": ["dark round spot", "smooth pale border"]})
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
CHOICE = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
LENGTH = b"content-length:"


def reply(content: object, status: int = 200) -> bytes:
    """Write out an answer with its head."""
    body = json.dumps(content).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        len(body),
        body,
    )


ANSWER = reply({"object": "chat.completion", "created": 1_700_000_000, "choices": [CHOICE], "usage": USAGE})
PAGES = {b"/v1/models": reply({"data": [{"id": "fake"}, {"id": "fake@r1"}]}), b"/version": reply({"version": "1.0"})}
NO_PAGE = reply({}, 404)
SECONDS = 0.0


class Connection(asyncio.Protocol):
    """One client's requests, each answered when it is whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.rest = transport, b""

    def data_received(self, data: bytes) -> None:
        self.rest += data
        while (end := self.rest.find(b"\r\n\r\n") + 4) > 3:
            head = self.rest[:end].lower()
            at = head.find(LENGTH)
            end += int(head[at + len(LENGTH) : head.index(b"\r\n", at)]) if at > 0 else 0
            if len(self.rest) < end:
                return
            self.rest = self.rest[end:]
            if head.startswith(b"post"):
                work(SECONDS)
                self.transport.write(ANSWER)
            else:
                self.transport.write(PAGES.get(head.split(b" ")[1], NO_PAGE))


def work(seconds: float) -> None:
    """Spend CPU time."""
    until = time.process_time() + seconds
    while seconds and time.process_time() < until:
        pass


async def main() -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    SECONDS = float(sys.argv[1])
    asyncio.run(main())
