"""A job of the client as a process of its own, to be killed: python -m tests.symptoms.job URL CACHE REQUESTS

The answers are structured, so that both the fake endpoint and vLLM can be asked.
"""

import sys

from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Request
from vipbench.harness.system.console import setup_logging, user_errors

INSTRUCTION = (
    "List what a person can see in a picture, in short plain words of colour, shape, texture, border and place. "
)
PATTERN = "^[a-z ]{3,20}$"
SCHEMA = {
    "type": "object",
    "properties": {
        "symptoms": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "string", "pattern": PATTERN}}
    },
    "required": ["symptoms"],
    "additionalProperties": False,
}


def structured_requests(model: str, count: int) -> list[Request]:
    """`count` requests, two samples of each class."""
    system = {"role": "system", "content": INSTRUCTION * 4}
    sampling = {"temperature": 1.0, "max_tokens": 100, "seed": 1}
    return [
        Request(model, [system, {"role": "user", "content": f"disease {number // 2}"}], SCHEMA, sampling, number % 2)
        for number in range(count)
    ]


if __name__ == "__main__":
    setup_logging()
    with user_errors(), ResponseCache(sys.argv[2]) as cache:
        client = Client([sys.argv[1]], None, cache, concurrency=16, patience=120)
        print(sum(1 for _ in client.complete(structured_requests(client.identity.model, int(sys.argv[3])))))
