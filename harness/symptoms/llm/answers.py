"""Parse chat completions, and in their text the items that a model listed: after thoughts, inside prose, as JSON.

Models do not always keep to the schema; items are taken where they are unmistakable, and nothing else.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from vipbench.harness.models.phrases import without_full_stop
from vipbench.harness.symptoms.llm.record import Response, Token

MOST_CHARACTERS = 200_000  # of an answer that are parsed
MOST_STARTS = 200  # brackets in it at which JSON may begin, and tags that may stand for <think>
MOST_TOKENS = 1 << 40  # in the usage that a server reports for one answer
MOST_POSITIONS = 512  # the last tokens of an answer whose log-probabilities are kept
BEGIN, END = "<think>", "</think>"
OTHER_TAGS = re.compile(r"\[(/?)think\]|<(/?)(?:thinking|thoughts?|reasoning)>", re.IGNORECASE)
PLAIN_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")  # hyphens, dashes, minus
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'")
    | dict.fromkeys('"`\u201c\u201d\u201e\u201f\u00ab\u00bb', None)
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", None)  # invisible
)
QUOTE = re.compile(r"(?<!\w)'|'(?!\w)")  # but no apostrophe
BRACKET = re.compile(r"[{\[]")
NUMBERING = re.compile(r"(?:[-*•‣◦▪·]\s*|\(?\d{1,3}[.):](?!\d)\s*|\(?[a-zA-Z]\)\s+)+")


def parse_completion(content: Any, created: datetime) -> Response:
    """Parse a chat completion, as decoded from JSON.

    A server that separates thoughts from the answer may take all of it for thoughts; then these are the answer.

    Raises:
        ValueError: `content` is no chat completion.
    """
    try:
        choice = content["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason") or ""
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        text = _text(message.get("content") if thoughts else message["content"])
        if not text and finish_reason != "length":
            text = _text(thoughts)
        usage = {name: value for name, value in (content.get("usage") or {}).items() if _is_count(value)}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion ({type(error).__name__})") from error
    if not isinstance(finish_reason, str):
        raise ValueError("a chat completion whose finish_reason is no text")
    time = created.astimezone(UTC).isoformat(timespec="seconds")
    return Response(text, finish_reason, usage, time, _logprobs(choice.get("logprobs")))


def parse(text: str, key: str) -> list[Any] | None:
    """Extract the items that an answer lists; None where it lists none.

    They are the lists under `key` in its JSON objects, or a list that stands alone; thoughts, code fences and prose around
    them are skipped.
    """
    values = list(_json_values(without_thoughts(text)[:MOST_CHARACTERS]))
    named = [items for value in values for items in _under(key, value)]
    alone = [value for value in values if isinstance(value, list) and any(map(tidy, value))]
    return [item for items in named for item in items] if named else next(iter(alone), None)


def tidy(item: object) -> str:
    """Normalise an item of an answer to one line with single spaces and no full stop; to "" where it is no text.

    Typographic hyphens and quotes become plain, numbering and bullets are removed; {"text": "..."} stands for its text.
    """
    if isinstance(item, dict):
        texts = [value for value in item.values() if isinstance(value, str)]
        item = item.get("text", texts[0] if len(texts) == 1 else None)
    if not isinstance(item, str):
        return ""
    plain = unicodedata.normalize("NFKC", item.translate(PLAIN_SIGNS)).replace("**", "")
    line = QUOTE.sub("", " ".join(plain.split()))
    numbering = NUMBERING.match(line)
    return without_full_stop(line[numbering.end() if numbering else 0 :].strip("_ "))


def _logprobs(reported: Any) -> list[list[Token]] | None:
    """Read the log-probabilities of the last tokens, see `Response.logprobs`; None where there are none, or in another form."""
    try:
        tokens = reported["content"][-MOST_POSITIONS:]
        found = [[token, *(token.get("top_logprobs") or ())] for token in tokens]
        read = [[(str(one["token"]), float(one["logprob"])) for one in alternatives] for alternatives in found]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    usual = all(math.isfinite(logarithm) for alternatives in read for _, logarithm in alternatives)
    return (
        [list(dict.fromkeys((token, round(log, 4)) for token, log in found)) for found in read]
        if read and usual
        else None
    )


def _text(content: Any) -> str:
    """Join the text of a message's content: a string, a list of parts, or nothing."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError("content that is no text")
    return content or ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS


def without_thoughts(text: str) -> str:
    """Remove <think>...</think> and its kin; all before a closing tag whose opening one is missing (a chat template wrote it)."""
    *thought, rest = OTHER_TAGS.sub(r"<\1\2think>", text, count=MOST_STARTS).split(END)
    answered = [part.partition(BEGIN)[0] for part in thought if BEGIN in part]
    return "".join([*answered, rest.partition(BEGIN)[0]])


def _json_values(text: str) -> Iterator[Any]:
    """Yield the objects and lists in a text in order, but no list out of an object that is cut off."""
    decoder = json.JSONDecoder(strict=False)
    position, cut_off = 0, False
    for _ in range(MOST_STARTS):
        start = BRACKET.search(text, position)
        if start is None:
            return
        try:
            value, position = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):  # no JSON begins here; RecursionError: brackets without end
            position, cut_off = start.end(), cut_off or start[0] == "{"
        else:
            if not (cut_off and isinstance(value, list)):
                yield value


def _under(key: str, value: Any) -> Iterator[list[Any]]:
    """Yield the lists under `key` in an object, in the objects in it, or in those of a list."""
    if isinstance(value, dict) and key in value:
        if isinstance(value[key], list):
            yield value[key]
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, dict) and isinstance(inner.get(key), list):
                yield inner[key]
