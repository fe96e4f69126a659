"""Verification: probabilities of yes from log-probabilities or votes, control questions, what becomes of a set, its record."""

import json
import math
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.symptoms.fake_endpoint import FakeEndpoint, completion
from tests.symptoms.test_generate import SAMPLING, SEEN, WHO, Model, command, invoke, plan_for, write_cache
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.generate import generate, pending
from vipbench.harness.symptoms.llm.answers import parse_completion
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Request, Response
from vipbench.harness.symptoms.prompting import Templates, find_preset
from vipbench.harness.symptoms.sets import SymptomSet
from vipbench.harness.symptoms.verify import (
    CONTROLS,
    EXAMPLES,
    VOTES,
    Belief,
    Claim,
    Question,
    Verifier,
    probability_of_yes,
    verify,
)

NO_LOGPROBS: Any = None


def said(answer: str, logprobs: list[list[tuple[str, float]]] | None = None) -> Response:
    return Response(f'{{"answer": "{answer}"}}', "stop", {}, "2026-01-01T00:00:00+00:00", logprobs)


def test_probability_of_yes() -> None:
    likeliest = [("yes", math.log(0.6)), ("no", math.log(0.1)), ("Yes", math.log(0.1)), ("perhaps", math.log(0.2))]
    in_json = [[('{"', -0.1)], [("answer", 0.0)], [('": "', 0.0)], likeliest, [('"}', 0.0)]]
    assert probability_of_yes(said("yes", in_json)) == pytest.approx(0.7 / 0.8)
    assert probability_of_yes(said("no", [[(" no", math.log(0.5)), (" yes", math.log(0.25))]])) == pytest.approx(1 / 3)
    assert probability_of_yes(said("yes")) == 1.0 and probability_of_yes(said("no")) == 0.0
    assert probability_of_yes(said("perhaps")) is None
    for far in (-9999.0, 9999.0):  # as e to that power is no number
        assert probability_of_yes(said("yes", [[("yes", far), ("no", far)]])) == 0.5
    assert probability_of_yes(said("yes", [[("y", -0.1)], [("es", -0.1)]])) == 1.0  # another division into tokens
    thought = '<think>"answer": "no"? No. "yes"?</think> Yes, it can.'
    assert probability_of_yes(Response(thought, "stop", {}, "")) == 1.0


def test_log_probabilities_are_read_kept_and_checked(tmp_path: Path) -> None:
    top = [{"token": "yes", "logprob": -0.25, "bytes": [1]}, {"token": "no", "logprob": -9999.0}]
    body = completion('{"answer": "yes"}')
    body["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    response = parse_completion(body, datetime.now(UTC))
    assert response.logprobs == [[("yes", -0.25), ("no", -9999.0)]]
    huge = {"content": [{"token": "yes", "logprob": 10**400}]}
    odd: Any
    for odd in (
        None,
        {},
        {"content": None},
        {"content": [{"token": "x"}]},
        {"content": [3]},
        [],
        {"content": []},
        huge,
    ):
        body["choices"][0]["logprobs"] = odd
        assert parse_completion(body, datetime.now(UTC)).logprobs is None
    request = Request("fake", [{"role": "user", "content": "?"}], None, {"logprobs": True, "top_logprobs": 20}, 0)
    with ResponseCache(tmp_path / "a.sqlite") as cache, ResponseCache(tmp_path / "b.sqlite") as other:
        cache.put(request.key(*WHO[1:]), request, *WHO[1:], response)
        cache.export(tmp_path / "a.jsonl")
        assert other.load(tmp_path / "a.jsonl") == (1, 0)
        assert other.get(request.key(*WHO[1:])) == response
    fields = response.content()
    assert "logprobs" not in said("yes").content(), "records without them are what they were"
    for odd in ([[["yes", "x"]]], [[["yes", 10**400]]], [[["yes", math.nan]]], [[3]], [3], 3):
        with pytest.raises(ValueError, match="logprobs holds other values"):
            Response.checked({**fields, "logprobs": odd})


class Judge:
    """A scripted verifier: yes to what `believed` holds, and to control questions as they are right (or the other way round)."""

    def __init__(self, believed: Iterable[str], *, right: bool = True, logprobs: bool = True) -> None:
        self.believed, self.right, self.logprobs = set(believed), right, logprobs
        self.asked: list[Request] = []

    def answer(self, request: Request) -> Response:
        self.asked.append(request)
        lines = request.messages[-1]["content"].splitlines()
        text = lines[1].removeprefix("Phrase: ")
        controls = {question.text: answer for question, answer in CONTROLS.items()}
        yes = controls[text] == self.right if text in controls else text in self.believed
        word, other = ("yes", "no") if yes else ("no", "yes")
        return said(word, [[(word, math.log(0.75)), (other, math.log(0.25))]] if self.logprobs else None)

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        yield from reversed([(request, self.answer(request)) for request in requests])


PRESET = find_preset("dermoscopy")[1]


def test_claims_are_asked_about_with_worked_examples_of_other_fields() -> None:
    judge = Judge(["dark spot"])
    claims = [Claim("nevus", ("melanoma", "wart"), "dark spot"), Claim("wart", (), "sad song")]
    assert verify(claims, judge.ask, Templates(), PRESET, "m", SAMPLING) == [Belief(0.75, 0.75), Belief(0.25, None)]
    assert len(judge.asked) == 3, "without others there is nothing to compare with"
    for request in judge.asked:
        assert request.sampling == {**SAMPLING, "logprobs": True, "top_logprobs": 20} and request.schema
        roles = [message["role"] for message in request.messages]
        assert roles == ["system", *["user", "assistant"] * (len(EXAMPLES) // 2), "user"]
        answers = [json.loads(message["content"])["answer"] for message in request.messages[2::2]]
        assert sorted(answers) == ["no", "no", "yes", "yes"]
        assert not any("skin" in m["content"].replace("smooth skin", "") for m in request.messages[:-1])
    (truer,) = (request for request in judge.asked if "truer" in request.messages[-1]["content"])
    assert truer.messages[-1]["content"].endswith("Is this truer of nevus than of melanoma, wart?")
    assert PRESET.picture in truer.messages[-1]["content"]


def test_without_log_probabilities_the_share_of_yes_counts() -> None:
    answers = iter(["yes", "no", "yes"])

    def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        for request in requests:
            asked.append(request.sample)
            yield request, said(next(answers))

    asked: list[int] = []
    assert verify([Claim("a", (), "dark")], ask, Templates(), PRESET, "m", SAMPLING) == [Belief(0.667, None)]
    assert asked == list(range(VOTES))


def test_belief_is_for_and_not_against() -> None:
    assert Belief(0.5, 0.5).verified and Belief(0.9).verified and not Belief().verified
    assert not Belief(0.9, 0.49).verified and not Belief(0.2, 0.9).verified


def test_examples_and_controls_are_balanced_and_apart() -> None:
    for questions in (EXAMPLES, CONTROLS):
        for others in (False, True):
            answers = [answer for question, answer in questions.items() if bool(question.others) == others]
            assert answers.count(True) == answers.count(False) > 1
    assert not {question.text for question in EXAMPLES} & {question.text for question in CONTROLS}
    assert all(isinstance(question, Question) for question in (*EXAMPLES, *CONTROLS))


def test_what_is_not_believed_makes_place_for_the_next() -> None:
    judge = Judge({*SEEN["melanoma"][1:4], *SEEN["nevus"]})
    symptoms = generate(plan_for(verify=True), WHO, Model().ask, verifier=Verifier(judge.ask, lambda: WHO))
    assert symptoms.texts(list(SEEN)) == [SEEN["melanoma"][1:3], SEEN["nevus"][:2]]
    assert [(one.seen, one.truer) for one in symptoms.classes[0].symptoms] == [(0.75, 0.75)] * 2
    details = symptoms.provenance.model_dump()
    assert details["removed"]["not verified"] == 1 and details["verdict"]["verified"] == 0.8  # 4 of 5
    used = details["verification"]
    assert used["controls"] == 1.0 and used["used"] and used["model"] == "fake"
    assert used["answers"] == len(judge.asked) == len(CONTROLS) + 2 * 5 and details["answers"] == 12
    plain = generate(plan_for(), WHO, Model().ask)
    assert plain.texts(["melanoma"]) == [SEEN["melanoma"][:2]] and "verification" not in plain.provenance.model_dump()


def test_a_verifier_that_fails_on_known_answers_is_not_believed() -> None:
    judge = Judge([], right=False)
    symptoms = generate(plan_for(verify=True), WHO, Model().ask, verifier=Verifier(judge.ask, lambda: WHO))
    assert symptoms.texts(["melanoma"]) == [SEEN["melanoma"][:2]], "nothing is removed"
    assert len(judge.asked) == len(CONTROLS), "nothing else is asked"
    details = symptoms.provenance.model_dump()
    assert (details["verification"]["controls"], details["verification"]["used"]) == (0.0, False)
    assert details["verdict"]["verified"] is None


class Both(Model):
    """One LLM that writes and verifies; `judge` answers the questions of yes or no."""

    judge = Judge(SEEN["melanoma"] + SEEN["nevus"][1:])

    def answer(self, request: Request) -> Response:
        return self.judge.answer(request) if "answer" in (request.schema or {})["required"] else super().answer(request)


def test_batches_wait_for_the_verification_as_well(tmp_path: Path) -> None:
    plan, model = plan_for(verify=True), Both()
    cache = ResponseCache(tmp_path / "answers.sqlite")
    steps = []
    while waiting := list(pending(plan, WHO, cache)):
        steps.append(len(waiting))
        write_cache(cache.path, waiting, model)
    # elicit, refine, controls, what is chosen, what took the place of one
    assert steps == [6, 6, len(CONTROLS), 8, 2]

    def recorded(requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        for request in requests:
            answer = cache.get(request.key(*WHO[1:]))
            assert answer
            yield request, answer

    assert generate(plan, WHO, recorded).texts(["nevus"]) == [SEEN["nevus"][1:3]]


@pytest.fixture
def server() -> Iterator[FakeEndpoint]:
    model = Both()
    with FakeEndpoint() as endpoint:

        async def reply(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any] | bytes]:
            if "logprobs" in body and NO_LOGPROBS:
                return 400, {"error": {"message": "You are not allowed to request logprobs from this model"}}
            schema = body["response_format"]["json_schema"]["schema"]
            request = Request(body["model"], body["messages"], schema, {}, body["seed"])
            return 200, completion(model.answer(request).text)

        endpoint.reply = reply
        yield endpoint


def test_a_verified_set_is_rebuilt_byte_for_byte_even_where_logprobs_were_refused(
    tmp_path: Path, server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave log-probabilities out of the server's identity, since they change what is reported and not the answer."""
    monkeypatch.setattr(f"{__name__}.NO_LOGPROBS", True)
    made = []
    for source in (["--url", server.url], ["--offline"]):
        result = invoke(command(tmp_path, "--verify", "--name", "llm", "--overwrite", *source))
        assert result.exit_code == 0, result.exception
        made.append((tmp_path / "sets" / "skin" / "llm.json").read_bytes())
    assert made[0] == made[1] and "verdict: usable" in result.output
    provenance = json.loads(made[0])["provenance"]
    assert provenance["server_version"] == provenance["verification"]["server_version"] == "1.0"
    assert provenance["verdict"]["verified"] == 0.889 and provenance["removed"]["not verified"] == 1
    asked = [body for body in server.asked if "Phrase: " in body["messages"][-1]["content"] and "logprobs" not in body]
    assert len(asked) == VOTES * (len(CONTROLS) + 2 * 9)
    seen = SymptomSet.load(tmp_path / "sets" / "skin" / "llm.json").classes[0].symptoms[0].seen
    assert seen == 1.0


def test_another_llm_verifies(tmp_path: Path, server: FakeEndpoint) -> None:
    with FakeEndpoint(models=["judge"], version=None) as other:
        other.reply = server.reply
        (tmp_path / "key").write_text("secret")
        words = ["--url", server.url, "--api-key-file", str(tmp_path / "key"), "--name", "llm"]
        result = invoke(command(tmp_path, *words, "--verify-url", other.url))
        assert result.exit_code == 0, result.exception
        assert "secret" in server.headers and "secret" not in other.headers, "a key goes to its own server only"
        assert all("Phrase: " in body["messages"][-1]["content"] for body in other.asked) and other.asked
        assert not any("Phrase: " in body["messages"][-1]["content"] for body in server.asked)
    described = json.loads((tmp_path / "sets" / "skin" / "llm.json").read_text())["provenance"]
    assert (described["model"], described["verification"]["model"]) == ("fake", "judge")
    first = (tmp_path / "sets" / "skin" / "llm.json").read_bytes()
    again = command(tmp_path, "--offline", "--model", "fake", "--verify-model", "judge", "--name", "llm", "--overwrite")
    assert invoke(again).exit_code == 0
    assert (tmp_path / "sets" / "skin" / "llm.json").read_bytes() == first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--verify", "--knowledge", "description", "--dry-run"], "--verify is for symptoms"),
        (["--consensus", "5", "--dry-run"], "--consensus 5 of 2 samples"),
        (["--batch-file", "x", "--model", "m", "--verify-model", "judge"], "a batch file is for one model"),
        (["--serve", "m", "--verify-model", "judge"], "--verify-url"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: list[str], words: str) -> None:
    failed = invoke(command(tmp_path, *options))
    assert isinstance(failed.exception, UserError) and words in str(failed.exception)
