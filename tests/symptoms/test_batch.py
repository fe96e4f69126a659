"""Batch lines out, batch answers in."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.symptoms.fake_endpoint import answer_to, completion
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.batch import read_batch, write_batch
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Identity, Request

IDENTITY = Identity("fake", "r1", "1.0")


def requests() -> list[Request]:
    return [
        Request("fake", [{"role": "user", "content": f"class {number}"}], {"type": "object"}, {"seed": 3}, sample)
        for number in range(5)
        for sample in range(2)
    ]


def run_batch(lines: list[dict[str, Any]], path: Path) -> None:
    """Answer as `vllm run-batch` does: a line for each, in any order; one is an error."""
    answers = []
    for number, line in enumerate(reversed(lines)):
        response = {"status_code": 200, "request_id": "x", "body": completion(answer_to(line["body"]))}
        error = None
        if number == 0:
            response, error = {"status_code": 400, "request_id": "x", "body": None}, {"message": "too long"}
        answers.append({"id": "y", "custom_id": line["custom_id"], "response": response, "error": error})
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def test_a_batch_goes_out_and_its_answers_come_in(tmp_path: Path) -> None:
    assert write_batch(tmp_path / "in.jsonl", [*requests(), *requests()]) == 10
    lines = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    assert lines[0]["url"] == "/v1/chat/completions"
    assert [line["body"]["seed"] for line in lines[:4]] == [3, 4, 3, 4]
    assert lines[0]["body"]["response_format"]["json_schema"]["schema"] == {"type": "object"}

    run_batch(lines[:8], tmp_path / "out.jsonl")
    with ResponseCache(tmp_path / "answers.sqlite") as cache:
        assert read_batch(tmp_path / "out.jsonl", requests(), cache, IDENTITY) == (7, 1, 2)
        answered = list(Client([], "fake", cache).complete(requests()[:7]))
        assert all(response.text == answer_to(request.body()) for request, response in answered)
        assert answered[0][1].created == "2023-11-14T22:13:20+00:00"  # when it was answered, not when it was read


def test_what_is_no_answer_to_these_is_refused(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "answers.sqlite")
    write_batch(tmp_path / "in.jsonl", requests()[:4])
    run_batch([json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()], tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="answers none of these requests"):
        read_batch(tmp_path / "out.jsonl", requests()[6:], cache, IDENTITY)
    (tmp_path / "garbage").write_text('{"custom_id": "a"}\n{"custom_')
    with pytest.raises(UserError, match="garbage, line 2: not an answer"):
        read_batch(tmp_path / "garbage", requests(), cache, IDENTITY)
    with pytest.raises(UserError, match="No such file"):
        read_batch(tmp_path / "missing", requests(), cache, IDENTITY)
