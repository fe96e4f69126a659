"""A real vLLM serves a tiny random Llama: an adversary, which emits control characters, any script and cut-off JSON."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.integration.test_symptoms_record import job, on_record
from tests.integration.tiny_llm import make_tiny_llm
from tests.integration.vllm_server import ROOT, group_of, served, vllm_interpreter
from tests.symptoms.job import PATTERN, structured_requests
from vipbench.harness.demo.benchmark import CLASSES
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Request
from vipbench.harness.symptoms.llm.server import _free_port, identify
from vipbench.harness.symptoms.sets import SymptomSet

pytestmark = pytest.mark.integration


class Running:
    """The server under test, which a test may end and start again on its port."""

    def __init__(self, model: Path) -> None:
        self.model, self.port, self.stack = model, _free_port(), ExitStack()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = self.stack.enter_context(served(self.model, self.port))

    def answered(self) -> float:
        """Count the requests it has answered since its start."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(map(float, re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    vllm_interpreter()  # skips
    running = Running(make_tiny_llm(tmp_path_factory.mktemp("models") / "tiny-llm"))
    with running.stack:
        running.start()
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> ResponseCache:
    return ResponseCache(tmp_path / "answers.sqlite")


def test_structured_answers_are_what_the_schema_says(server: Running, cache: ResponseCache) -> None:
    client = Client([server.url], None, cache)
    assert client.identity[:2] == identify(str(server.model), None)[:2]
    assert re.match(r"\d+\.\d+", client.identity.server_version)
    answers = [response for _, response in client.complete(structured_requests("tiny-llm", 60))]
    whole = [json.loads(answer.text) for answer in answers if answer.finish_reason == "stop"]
    assert len(whole) > 10
    for answer in whole:
        assert 1 <= len(answer["symptoms"]) <= 3
        assert all(re.match(PATTERN, symptom) for symptom in answer["symptoms"])
    assert client.stats.prefix_hit_rate and client.stats.prefix_hit_rate > 0.5  # the shared instruction comes first
    assert client.stats.completion_tokens == cache.stats()[0].completion_tokens > 0


def test_nonsense_is_recorded_as_it_is(server: Running, cache: ResponseCache, tmp_path: Path) -> None:
    free = [replace(request, schema=None) for request in structured_requests("tiny-llm", 40)]
    answers = dict(zip(range(40), Client([server.url], None, cache).complete(free), strict=True))
    assert any(re.search(r"[\x00-\x08\x80-\x9f\ufffd]", response.text) for _, response in answers.values())
    assert any(response.finish_reason == "length" for _, response in answers.values())
    cache.export(tmp_path / "export.jsonl")
    with ResponseCache(tmp_path / "elsewhere.sqlite") as other:
        assert other.load(tmp_path / "export.jsonl") == (40, 0)
        offline = list(Client([], None, other).complete(free))
    assert [response for _, response in sorted(answers.values(), key=_order)] == [
        response for _, response in sorted(offline, key=_order)
    ]


def _order(pair: tuple[Request, object]) -> str:
    return pair[0].key("", "")


def test_the_servers_own_words_are_passed_on(server: Running, cache: ResponseCache) -> None:
    with pytest.raises(UserError, match="does not serve gpt-4; it serves tiny-llm"):
        Client([server.url], "gpt-4", cache)
    (request,) = structured_requests("tiny-llm", 1)
    with pytest.raises(UserError, match=r"refused a request \(status 400\): .*max_model_len"):
        list(Client([server.url], None, cache).complete([replace(request, sampling={"max_tokens": 100_000})]))


def generate(*options: str) -> subprocess.CompletedProcess[str]:
    words = [
        "--task",
        "demo",
        "--classes",
        ",".join(CLASSES),
        "--modality",
        "dermoscopy",
        "--max-tokens",
        "200",
        *options,
    ]
    command = [sys.executable, "-c", "from vipbench.harness.cli import main; main()", "symptoms", "generate", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_nonsense_becomes_a_set_for_the_demo_task_that_is_valid(server: Running, tmp_path: Path) -> None:
    """Check that only valid symptoms pass, missing ones are reported, and the record gives the same bytes without a server."""
    options = ["--cache", str(tmp_path / "answers.sqlite"), "--rounds", "2", "--keep-jargon", "--consensus", "1"]
    result = generate("--url", server.url, "--out", str(tmp_path / "first"), *options)
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr
    written = tmp_path / "first" / "demo" / "tiny-llm.json"
    symptoms = SymptomSet.load(written)
    missing = symptoms.provenance.model_dump()["missing"]
    assert [entry.name for entry in symptoms.classes] == list(CLASSES)
    for entry in symptoms.classes:
        assert len(entry.symptoms) + missing.get(entry.name, 0) == 4
        assert all(re.fullmatch(r"[\w ,'()-]+", symptom.text, re.ASCII) for symptom in entry.symptoms)
    assert ("missing after 2 rounds" in result.stdout) == bool(missing)
    assert (result.returncode == 1) == any(not entry.symptoms for entry in symptoms.classes)

    answered = server.answered()
    offline = generate("--offline", "--out", str(tmp_path / "second"), *options)
    assert offline.returncode == result.returncode, offline.stderr
    assert (tmp_path / "second" / "demo" / "tiny-llm.json").read_bytes() == written.read_bytes()
    assert server.answered() == answered

    # Without --keep-jargon words that do not exist are taken for jargon: hardly anything is left, and that is reported.
    strict = generate("--offline", "--out", str(tmp_path / "strict"), *options[:2], "--rounds", "1")
    assert strict.returncode in (1, 2) and "Traceback" not in strict.stderr
    said = strict.stdout + strict.stderr
    assert (
        "have no symptom at all" in said or "missing after 1 rounds" in said or "no class of demo got a symptom" in said
    )


def test_a_killed_job_asks_nothing_twice(server: Running, tmp_path: Path) -> None:
    path, count, before = tmp_path / "answers.sqlite", 400, server.answered()
    process = job(server.url, path, count)
    while server.answered() - before < 40:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    recorded = on_record(path)
    assert 0 < len(recorded) < count
    assert job(server.url, path, count).wait(120) == 0
    after = on_record(path)
    assert len(after) == count and recorded.items() <= after.items()
    assert server.answered() - before <= count + 16  # what was under way at the kill is asked anew


def test_a_job_outlives_its_server(server: Running, cache: ResponseCache) -> None:
    """The process that holds the server is killed in the middle of a job; vLLM goes with it, and is started again."""
    client = Client([server.url], None, cache, concurrency=8, patience=300)
    answers = client.complete(structured_requests("tiny-llm", 400))
    first = [next(answers) for _ in range(50)]
    members = group_of(server.port)
    assert len(members) >= 2
    server.process.kill()
    deadline = time.monotonic() + 30
    while group_of(server.port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_of(server.port)
    again = threading.Thread(target=server.start)
    again.start()
    rest = list(answers)
    again.join()
    assert len(first) + len(rest) == len(cache) == cache.verify() == 400
    assert server.answered() < 350  # those of the first server are not asked again
