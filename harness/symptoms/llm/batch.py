"""Write requests as OpenAI batch lines for `vllm run-batch -i IN -o OUT --model MODEL`; read its answers into the cache.

A line's custom_id is the digest of its request, so that answers are matched to requests that are made again.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.answers import parse_completion
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Identity, Request
from vipbench.harness.system.files import atomic_path, digest_json, lines_of, parse_json


class BatchResult(NamedTuple):
    """Counts of requests: answer recorded; answer an error or no chat completion; no line at all."""

    recorded: int
    failed: int
    missing: int


def write_batch(path: Path, requests: Iterable[Request]) -> int:
    """Write one line for each different request; returns their number."""
    written: set[str] = set()
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
        for request in requests:
            digest = digest_json(request.content())
            if digest not in written:
                written.add(digest)
                line = {"custom_id": digest, "method": "POST", "url": "/v1/chat/completions", "body": request.body()}
                file.write(json.dumps(line) + "\n")
    return len(written)


def read_batch(path: Path, requests: Iterable[Request], cache: ResponseCache, identity: Identity) -> BatchResult:
    """Record the answers in `path` to `requests` as given by `identity`.

    Raises:
        UserError: a line is no batch answer (names file and line); none is an answer to any of the requests.
    """
    counts = {"recorded": 0, "failed": 0, "missing": 0}
    offsets = dict(_offsets(path))
    with path.open("rb") as file:
        for request in requests:
            offset = offsets.get(digest_json(request.content()))
            if offset is None:
                counts["missing"] += 1
                continue
            file.seek(offset)
            counts[_record(parse_json(file.readline()), request, cache, identity)] += 1
    result = BatchResult(**counts)
    if offsets and not result.recorded + result.failed:
        raise UserError(f"{path}: answers none of these requests; it must come from the batch file of the same command")
    return result


def _record(line: dict[str, Any], request: Request, cache: ResponseCache, identity: Identity) -> str:
    try:
        body = line["response"]["body"]
        response = parse_completion(body, datetime.fromtimestamp(body["created"], UTC))
    except (KeyError, TypeError, ValueError, OverflowError, OSError):  # the last two: of a time that is none
        return "failed"
    key = request.key(identity.revision, identity.server_version)
    cache.put(key, request, identity.revision, identity.server_version, response)
    return "recorded"


def _offsets(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each custom_id with the offset of its line, so that not all answers are held at once."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(lines_of(file), start=1):
                try:
                    yield str(parse_json(line)["custom_id"]), offset
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: not an answer of an OpenAI batch: {error}") from error
                offset += len(line)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; --from-batch takes the file that `vllm run-batch -o` wrote"
        ) from error
