"""The record of answers: nothing lost, nothing doubled, the same bytes out again."""

import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vipbench.harness.commands.cache import cache_app
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Answer, Identity, Request, Response

INSTRUCTION = {"role": "system", "content": "List what is seen."}
REQUEST = Request(
    "m", [INSTRUCTION, {"role": "user", "content": "melanoma"}], {"type": "object"}, {"temperature": 0.7, "seed": 1}, 0
)
RESPONSE = Response(
    '{"symptoms": ["dark"]}', "stop", {"prompt_tokens": 7, "completion_tokens": 5}, "2026-01-01T00:00:00+00:00"
)


def about(name: str, sample: int = 0) -> Request:
    return replace(REQUEST, messages=[INSTRUCTION, {"role": "user", "content": name}], sample=sample)


def put(cache: ResponseCache, request: Request, response: Response = RESPONSE, revision: str = "r") -> str:
    key = request.key(revision, "v")
    cache.put(key, request, revision, "v", response)
    return key


@pytest.fixture
def cache(tmp_path: Path) -> ResponseCache:
    return ResponseCache(tmp_path / "answers.sqlite")


def test_every_part_of_a_request_changes_its_key() -> None:
    variants = [
        replace(REQUEST, model="n"),
        replace(REQUEST, messages=[*REQUEST.messages, {"role": "user", "content": "more"}]),
        replace(REQUEST, schema=None),
        replace(REQUEST, sampling={"temperature": 0.8, "seed": 1}),
        replace(REQUEST, sample=1),
    ]
    keys = [request.key("r", "v") for request in [REQUEST, *variants]] + [REQUEST.key("s", "v"), REQUEST.key("r", "w")]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "94e9a4cff5e09604a09478b909faa91283357f07ec99c0f1c93fb8565566118e"  # as in records of old
    assert replace(REQUEST, sampling={"seed": 1, "temperature": 0.7}).key("r", "v") == keys[0]  # order is no difference


def test_samples_of_one_question_get_seeds_of_their_own() -> None:
    assert [replace(REQUEST, sample=sample).body()["seed"] for sample in (0, 1, 2)] == [1, 2, 3]
    assert "response_format" not in replace(REQUEST, schema=None).body()


@pytest.mark.parametrize("text", ["", "\x00\x1b[31m", "\ud800 lone", "עברית 漢字 🩺", "x" * 100_000])
def test_any_text_comes_back_as_it_was(cache: ResponseCache, text: str) -> None:
    response = replace(RESPONSE, text=text)
    key = put(cache, REQUEST, response)
    assert ResponseCache(cache.path).get(key) == response


def test_the_first_answer_stays(cache: ResponseCache) -> None:
    key = put(cache, REQUEST)
    second = ResponseCache(cache.path)  # as of another process
    assert second.put(key, REQUEST, "r", "v", replace(RESPONSE, text="later")) == RESPONSE
    assert len(cache) == 1
    assert cache.get("nothing") is None


def test_answers_recorded_together_are_as_if_recorded_one_by_one(cache: ResponseCache, tmp_path: Path) -> None:
    other = replace(REQUEST, schema=None)
    answers = [
        Answer(request.key(who.revision, "v"), who, request, replace(RESPONSE, text=str(number)))
        for number, request in enumerate([REQUEST, about("nevus"), other, about("nevus", 1), REQUEST])
        for who in (Identity("m", "r", "v"), Identity("m", "s", "v"))
    ]
    put(cache, about("nevus"), replace(RESPONSE, text="before"))
    recorded = cache.put_all(answers)
    assert [response.text for response in recorded] == ["0", "0", "before", "1", "2", "2", "3", "3", "0", "0"]
    with ResponseCache(tmp_path / "single.sqlite") as single:
        put(single, about("nevus"), replace(RESPONSE, text="before"))
        for key, who, request, response in answers:
            single.put(key, request, who.revision, who.server_version, response)
        assert list(single.answers()) == list(cache.answers())
    assert cache.verify() == 8 and cache.put_all([]) == []


def test_an_export_is_the_same_whatever_order_answers_came_in(tmp_path: Path) -> None:
    requests = [about(f"class {number}", sample) for number in range(20) for sample in range(2)]
    exports = []
    for index, ordered in enumerate([requests, requests[::-1]]):
        with ResponseCache(tmp_path / f"{index}.sqlite") as cache:
            for request in ordered:
                put(cache, request)
            assert cache.export(tmp_path / f"{index}.jsonl") == 40
            exports.append((tmp_path / f"{index}.jsonl").read_bytes())
    assert exports[0] == exports[1]
    with ResponseCache(tmp_path / "elsewhere.sqlite") as cache:
        assert cache.load(tmp_path / "0.jsonl") == (40, 0)
        assert cache.load(tmp_path / "0.jsonl") == (0, 40)
        cache.export(tmp_path / "again.jsonl")
        assert cache.verify() == 40
    assert (tmp_path / "again.jsonl").read_bytes() == exports[0]


def test_a_changed_export_is_refused(cache: ResponseCache, tmp_path: Path) -> None:
    put(cache, REQUEST)
    cache.export(tmp_path / "export.jsonl")
    (tmp_path / "changed.jsonl").write_text((tmp_path / "export.jsonl").read_text().replace("melanoma", "nevus"))
    with pytest.raises(UserError, match=r"changed\.jsonl, line 1: the key is not the hash"):
        ResponseCache(tmp_path / "other.sqlite").load(tmp_path / "changed.jsonl")
    (tmp_path / "garbage.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: not an exported answer"):
        cache.load(tmp_path / "garbage.jsonl")
    with pytest.raises(UserError, match="not an export"):
        cache.load(tmp_path / "missing.jsonl")


def test_verify_finds_a_changed_answer(cache: ResponseCache) -> None:
    for number in range(5):
        put(cache, about(str(number)))
    assert cache.verify() == 5
    with sqlite3.connect(cache.path) as connection:
        connection.execute("UPDATE answers SET sample = 9 WHERE key = (SELECT min(key) FROM answers)")
    with pytest.raises(UserError, match="is not the one to what is recorded"):
        cache.verify()


def test_stats_and_prune_go_by_who_answered(cache: ResponseCache) -> None:
    put(cache, REQUEST)
    put(cache, about("nevus"), replace(RESPONSE, finish_reason="length"))
    put(cache, REQUEST, revision="older")
    old, new = cache.stats()
    assert (old.identity, old.answers) == (Identity("m", "older", "v"), 1)
    assert new[1:] == (2, 14, 10, 1)
    assert cache.prune(cache.matching(revision="older")) == 1
    assert cache.matching() == [Identity("m", "r", "v")]
    assert cache.verify() == 2


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be taken for one" * 50, None, "other"])
def test_what_is_no_cache_is_refused_in_one_line(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "thing"
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE holidays (day)")
    with pytest.raises(UserError, match="thing") as caught:
        ResponseCache(path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(cache: ResponseCache) -> None:
    keys = [put(cache, about(str(number))) for number in range(10)]
    (pages,) = cache.connection.execute("PRAGMA page_count").fetchone()
    cache.connection.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite reports just as a full disk
    with pytest.raises(UserError, match="full; what was answered before is on record"):
        put(cache, about("huge"), replace(RESPONSE, text="x" * 100_000))
    who = Identity("m", "r", "v")
    together = [
        Answer(f"{number}", who, about(f"new {number}"), replace(RESPONSE, text="x" * 2000)) for number in range(50)
    ]
    with pytest.raises(UserError, match="full"):
        cache.put_all(together)
    assert all(cache.get(key) for key in keys) and len(cache) == 10  # all of them or none
    cache.connection.execute("PRAGMA max_page_count = 100000")
    put(cache, about("huge"))
    assert cache.verify() == 11


WRITER = """
import sys
from tests.symptoms.test_response_cache import *
cache = ResponseCache(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    print(put(cache, about(str(number))), flush=True)
"""


def writer(path: Path, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    """Start both at the same moment, without a file, with requests that overlap."""
    path = tmp_path / "answers.sqlite"
    writers = [writer(path, 0, 300), writer(path, 150, 450)]
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert ResponseCache(path).verify() == 450


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    process = writer(path, 0, 1_000_000)
    assert process.stdout
    acknowledged = [process.stdout.readline().strip() for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.wait()
    cache = ResponseCache(path)
    assert all(cache.get(key) for key in acknowledged)
    assert cache.verify() - len(acknowledged) in (0, 1)


def test_the_verbs(tmp_path: Path, cache: ResponseCache) -> None:
    def verb(*words: str) -> str:
        result = CliRunner().invoke(cache_app, list(words))
        assert result.exit_code == 0, result.output
        return result.output

    put(cache, REQUEST)
    file, out = str(cache.path), str(tmp_path / "out.jsonl")
    assert "1 answers, all sound" in verb("verify", file)
    assert "1 answers" in verb("export", file, out, "--model", "m")
    assert json.loads(Path(out).read_text())["model"] == "m"
    assert "1 answers added, 0 were there" in verb("import", str(tmp_path / "new.sqlite"), out)
    assert "older" not in verb("stats", file)
    assert "1 answers removed" in verb("prune", file, "--model", "m")
    for words in (["prune", file], ["stats", str(tmp_path / "none.sqlite")]):
        assert isinstance(CliRunner().invoke(cache_app, words).exception, UserError)
