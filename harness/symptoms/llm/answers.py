"""From what a server sent to the items that a model listed: chat completions, thoughts, JSON with talk around it, plain text.

Models do not always hold to what they are asked for; what they meant is taken where that is plain, and nothing else.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from harness.symptoms.llm.cache import Response

MOST_CHARACTERS = 200_000  # of an answer that are searched
MOST_STARTS = 200  # brackets in it at which JSON may begin
MOST_TOKENS = 1 << 40  # that a server may claim for one answer
BEGIN, END = "<think>", "</think>"
PLAIN_SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")  # hyphens, dashes, minus
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'")
    | dict.fromkeys('"`\u201c\u201d\u201e\u201f\u00ab\u00bb', None)
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", None)  # seen by nobody
)
QUOTE = re.compile(r"(?<!\w)'|'(?!\w)")  # no apostrophe
BRACKET = re.compile(r"[{\[]")
NUMBERING = re.compile(r"(?:[-*•‣◦▪·]\s*|\(?\d{1,3}[.):](?!\d)\s*|\(?[a-zA-Z]\)\s+)+")


def parse_completion(content: Any, created: datetime) -> Response:
    """Read a chat completion, as decoded from JSON.

    A server that takes thoughts out of the answer may by mistake take all of it; then these are the answer.

    Raises:
        ValueError: it is none.
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
        raise ValueError("a chat completion that ended for a reason that is no text")
    return Response(text, finish_reason, usage, created.astimezone(UTC).isoformat(timespec="seconds"))


def parse(text: str, key: str) -> list[Any] | None:
    """The items that an answer lists; None: it lists none.

    They are the lists under `key` in its JSON objects, or a list that stands alone. Thoughts, code fences and talk around
    them do not matter.
    """
    values = list(_json_values(_without_thoughts(text)[:MOST_CHARACTERS]))
    named = [items for value in values for items in _under(key, value)]
    alone = [value for value in values if isinstance(value, list) and any(map(tidy, value))]
    return [item for items in named for item in items] if named else next(iter(alone), None)


def tidy(item: object) -> str:
    """An item of an answer as one line with single spaces and no full stop; empty, where it is no text.

    Typographic hyphens and quotes become plain, numbering and bullets go; {"text": "..."} stands for its text.
    """
    if isinstance(item, dict):
        texts = [value for value in item.values() if isinstance(value, str)]
        item = item.get("text", texts[0] if len(texts) == 1 else None)
    if not isinstance(item, str):
        return ""
    plain = unicodedata.normalize("NFKC", item.translate(PLAIN_SIGNS)).replace("**", "")
    line = QUOTE.sub("", " ".join(plain.split()))
    numbering = NUMBERING.match(line)
    return line[numbering.end() if numbering else 0 :].strip("_ ").rstrip(" .")


def _text(content: Any) -> str:
    """The text of a message's content: a string, parts of which some are text, or nothing."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError("content that is no text")
    return content or ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS


def _without_thoughts(text: str) -> str:
    """An answer without <think>...</think>; where the opening tag is missing (a chat template wrote it), all before the end."""
    *thought, rest = text.split(END)
    spoken = [part.partition(BEGIN)[0] for part in thought if BEGIN in part]
    return "".join([*spoken, rest.partition(BEGIN)[0]])


def _json_values(text: str) -> Iterator[Any]:
    """The objects and lists in a text, one after the other; no lists out of an object that is cut off."""
    decoder = json.JSONDecoder(strict=False)
    place, cut_off = 0, False
    for _ in range(MOST_STARTS):
        start = BRACKET.search(text, place)
        if start is None:
            return
        try:
            value, place = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):  # no JSON begins here; RecursionError: brackets without end
            place, cut_off = start.end(), cut_off or start[0] == "{"
        else:
            if not (cut_off and isinstance(value, list)):
                yield value


def _under(key: str, value: Any) -> Iterator[list[Any]]:
    """The lists under `key` in an object, in the objects in it, or in those of a list."""
    if isinstance(value, dict) and key in value:
        if isinstance(value[key], list):
            yield value[key]
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, dict) and isinstance(inner.get(key), list):
                yield inner[key]
