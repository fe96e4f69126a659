"""Answers of models: thoughts, talk around JSON, lists in other forms, typographic signs; and completions in other forms."""

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from vipbench.harness.symptoms.llm.answers import parse, parse_completion, tidy
from vipbench.harness.symptoms.prompting import KNOWLEDGE

LISTED = '{"symptoms": ["a", "b"]}'


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ('{"symptoms": ["a", 1, null]}', ["a", 1, None]),
        ('Sure!\n```json\n{"symptoms": ["a"]}\n``` Hope it helps', ["a"]),
        ('{"symptoms": ["a\x07b"]}', ["a\x07b"]),
        ('{"symptoms": ["a", "b', None),
        ('{"symptoms": "a"}', None),
        ('{"other": ["a"]}', None),
        ("", None),
        ("}{", None),
        ("{" * 100_000 + "}", None),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, None),
        ("[" * 3000 + "]" * 3000, None),
        ('{"symptoms": [' + "9" * 10_000 + "]}", None),
        ('{"symptoms": ["\ud800"]}', ["\ud800"]),
        # thoughts
        (f'<think>Is it {{"symptoms": ["no"]}}? No.</think>\n{LISTED}', ["a", "b"]),
        (f'so {{"symptoms": ["no"]}} perhaps</think>{LISTED}', ["a", "b"]),  # the template wrote the opening tag
        (f"<think>x</think>{LISTED}<think>y</think>", ["a", "b"]),
        (f"{LISTED}<think>was that right? [no]", ["a", "b"]),
        ('<think>perhaps {"symptoms": ["no"]} or', None),  # cut off while it thought
        (f'[THINK]{{"symptoms": ["no"]}}[/THINK]{LISTED}', ["a", "b"]),
        (f'<Thinking>{{"symptoms": ["no"]}}</Thinking>\n{LISTED}', ["a", "b"]),
        (f'{{"symptoms": ["no"]}}</reasoning>{LISTED}', ["a", "b"]),
        # talk, fences, several objects
        (f"Here [as asked] they are: {LISTED} and {{that}} was all}}", ["a", "b"]),
        ('{"symptoms": ["a"]}\n{"symptoms": ["b"]}', ["a", "b"]),
        ('```\n{"symptoms": ["a"]}\n```\n```json\n{"symptoms": ["b"]}```', ["a", "b"]),
        ('{"classes": ["x"], "symptoms": ["a", "b"]}', ["a", "b"]),
        ('{"answer": {"symptoms": ["a", "b"]}}', ["a", "b"]),
        ('[{"symptoms": ["a"]}, {"symptoms": ["b"]}]', ["a", "b"]),
        # lists that stand alone
        ('["a", "b"]', ["a", "b"]),
        ('See [1]: ["a", "b"]', ["a", "b"]),
        ('[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ('{"symptoms": [{"text": "a"}]}', [{"text": "a"}]),
        ('{"classes": ["x"], "symptoms": ["a", "b', None),  # cut off: the list that is whole is another one
        ("[1, 2] and [[]] and {}", None),
    ],
)
def test_parsing_an_answer(text: str, items: list[Any] | None) -> None:
    assert parse(text, "symptoms") == items


@pytest.mark.parametrize("text", ["{" * 10**6, "<think>" * 10**6, "</think>" * 10**6, '["' * 10**6, "{[" * 10**6])
def test_parsing_takes_no_longer_than_the_text_is_worth(text: str) -> None:
    began = time.monotonic()
    assert parse(text, "symptoms") is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("  Dark \n dots. ", "Dark dots"),
        (7, ""),
        (["x"], ""),
        ("blue\u2011white veil", "blue-white veil"),
        ("blue\u2013white\u00a0veil", "blue-white veil"),
        ("moth\u2019s eaten edge", "moth's eaten edge"),
        ("\u201cground glass\u201d haze", "ground glass haze"),
        ('"ground glass"', "ground glass"),
        ("\u2018milky\u2019 spots\u200b", "milky spots"),
        ("so\u00adft edge", "soft edge"),
        ("1. jagged edge", "jagged edge"),
        ("12) jagged edge", "jagged edge"),
        ("(3) jagged edge", "jagged edge"),
        ("a) jagged edge", "jagged edge"),
        ("- jagged edge", "jagged edge"),
        ("\u2022 jagged edge", "jagged edge"),
        ("\u2013 1. **jagged** edge", "jagged edge"),
        ("1.5 mm wide dots", "1.5 mm wide dots"),  # a measure is no numbering
        ("2-3 dots", "2-3 dots"),
        ({"text": "jagged edge."}, "jagged edge"),
        ({"symptom": "jagged edge", "rank": 1}, "jagged edge"),
        ({"name": "edge", "value": "jagged"}, ""),  # which of the two?
        ({"text": 5}, ""),
        ({}, ""),
    ],
)
def test_an_item_becomes_plain_text(item: object, text: str) -> None:
    assert tidy(item) == text
    assert KNOWLEDGE["symptoms"].steps[-1].accepts(text) or not text[:1].isalpha()


def test_a_completion_in_any_of_its_forms() -> None:
    def read(message: Any, finish_reason: Any = "stop", **others: Any) -> Any:
        choice = {"message": message, "finish_reason": finish_reason}
        return parse_completion({"choices": [choice], **others}, datetime(2026, 1, 1, tzinfo=UTC))

    assert read({"content": "x", "reasoning_content": "hm"}).text == "x"
    assert read({"content": None, "reasoning_content": LISTED}).text == LISTED  # a parser of thoughts took it all
    assert read({"content": "", "reasoning": LISTED}).text == LISTED
    assert read({"content": None, "reasoning_content": LISTED}, "length").text == ""  # still thinking
    parts = [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "x"}]
    assert read({"content": parts}).text == "x"
    assert read({"content": None}, None).text == read({"content": None}, None).finish_reason == ""
    usage = {"prompt_tokens": 7, "completion_tokens": -1, "total": 10**30, "cached": True, "more": {"a": 1}, "x": "y"}
    assert read({"content": "x"}, usage=usage).usage == {"prompt_tokens": 7}
    bad: list[tuple[Any, Any]] = [({}, "stop"), (None, "stop"), ({"content": 5}, "stop"), ({"content": "x"}, [1])]
    for message, finish_reason in [*bad, ({"content": ["x"]}, "stop"), ({"content": [{"type": "text"}]}, "stop")]:
        with pytest.raises(ValueError, match="chat completion"):
            read(message, finish_reason)
    contents: list[Any] = [None, [], {}, {"choices": {}}, {"choices": [5]}, {"choices": [[]]}]
    for content in contents:
        with pytest.raises(ValueError, match="no chat completion"):
            parse_completion(content, datetime.now(UTC))
