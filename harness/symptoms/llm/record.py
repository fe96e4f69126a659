"""The entries of the record: requests, responses, and the identity of the server that answered."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from vipbench.harness.system.files import digest_json

MOST_NUMBER = 2**63 - 1  # in SQLite
Token = tuple[str, float]  # and its log-probability


@dataclass(frozen=True)
class Request:
    """One question to an LLM.

    Args:
        model: the model's name on the server.
        messages: chat messages, {"role", "content"} each; the instruction that classes share comes first (so that the
            server's prefix cache works), the one that names the class last.
        schema: the JSON schema that the answer must follow, or None for free text.
        sampling: temperature, top_p, max_tokens, seed and the like, under their OpenAI names.
        sample: number of this answer among the k that are drawn for the same question.
    """

    model: str
    messages: list[dict[str, str]]
    schema: dict[str, Any] | None
    sampling: dict[str, float | int]
    sample: int

    def key(self, revision: str, server_version: str) -> str:
        """Compute the SHA-256 (hex) of the request and of the server that answers."""
        return digest_json({**self.content(), "revision": revision, "server_version": server_version})

    def content(self) -> dict[str, Any]:
        """Return the fields as plain JSON (like `asdict`, without its deep copies)."""
        return {name: getattr(self, name) for name in ("model", "messages", "schema", "sampling", "sample")}

    def body(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Make the request body for chat/completions. `sample` is added to a seed, so that the k answers differ.

        Args:
            without: fields that the server refuses; max_tokens then goes under its newer name, and the system's message
                begins the user's first.
        """
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, **self.sampling}
        if "seed" in self.sampling:
            body["seed"] = self.sampling["seed"] + self.sample
        if self.schema is not None:
            wanted = {"name": "answer", "schema": self.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        if "max_tokens" in without and "max_tokens" in body:
            body["max_completion_tokens"] = body["max_tokens"]
        if "system" in without and self.messages[0]["role"] == "system":
            system, user, *others = self.messages
            joined = f"{system['content']}\n\n{user['content']}"
            body["messages"] = [{**user, "content": joined}, *others]
        return {name: value for name, value in body.items() if name not in without}


@dataclass(frozen=True)
class Response:
    """One answer: the raw text, the reason for its end ("stop", "length"), the server's token counts, UTC time.

    Attributes:
        logprobs: at each of its last tokens the likeliest tokens with their log-probabilities, that of the answer first; None
            where they were not asked for, or not given.
    """

    text: str
    finish_reason: str
    usage: dict[str, Any]
    created: str
    logprobs: list[list[Token]] | None = None

    def content(self) -> dict[str, Any]:
        """Return the fields as plain JSON, log-probabilities only where there are any."""
        fields = {name: getattr(self, name) for name in ("text", "finish_reason", "usage", "created")}
        return fields if self.logprobs is None else {**fields, "logprobs": self.logprobs}

    @classmethod
    def checked(cls, fields: Any) -> Self:
        """Check a mapping from a file. Raises ValueError where it is no answer."""
        kinds = {"text": str, "finish_reason": str, "usage": dict, "created": str}
        if not isinstance(fields, dict) or fields.keys() - {"logprobs"} != kinds.keys():
            raise ValueError(f"an answer has {', '.join(kinds)}")
        for name, kind in kinds.items():
            if not isinstance(fields[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        if not all(isinstance(count, int) and abs(count) <= MOST_NUMBER for count in fields["usage"].values()):
            raise ValueError("usage holds other values than numbers of tokens")
        if fields.get("logprobs") is not None:
            try:
                fields = {**fields, "logprobs": [list(map(_token, found)) for found in fields["logprobs"]]}
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError("logprobs holds other values than tokens and their log-probabilities") from error
        return cls(**fields)


def _token(pair: Any) -> Token:
    token, logarithm = pair
    if not isinstance(token, str) or not math.isfinite(logarithm):
        raise ValueError(f"{str(token)[:50]!r} has no log-probability")
    return token, float(logarithm)


Ask = Callable[[Iterable[Request]], Iterator[tuple[Request, Response]]]


class Identity(NamedTuple):
    """The model and the server of an answer.

    `server_version` is the server's version alone where both it and the revision are known; else it adds the server's URL,
    so that answers of unknown servers are not confused. It adds the fields that the server refused, too.
    """

    model: str
    revision: str
    server_version: str


class Answer(NamedTuple):
    """One row of the record."""

    key: str
    identity: Identity
    request: Request
    response: Response


class Totals(NamedTuple):
    """Counts of one model's answers; `cut_off`: those that ran into the length limit."""

    identity: Identity
    answers: int
    prompt_tokens: int
    completion_tokens: int
    cut_off: int
