"""Symptom sets, the record of answers, what generating a set reads, and a server's answers."""

import json
import shutil
from pathlib import Path
from random import Random

import httpx
import pytest
import yaml
from tenacity import wait_none

from tests.conftest import SYMPTOMS
from tests.fuzz.kind import Kind, Sound, each, verb
from tests.symptoms.fake_endpoint import completion
from tests.symptoms.test_client import requests
from tests.symptoms.test_response_cache import about, put
from vipbench.harness.symptoms.llm import client, endpoint
from vipbench.harness.symptoms.llm.answers import parse, tidy
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.prompting import FOLDER
from vipbench.harness.symptoms.sets import SymptomSet
from vipbench.harness.system.files import write_json


def _make_sets(sound: Sound, folder: Path) -> None:
    shutil.copy(sound.symptoms, folder / "set.json")
    write_json(folder / "plain.json", SYMPTOMS)
    rows = [
        {"name": name, "text": text, "auroc": 0.6, "redundancy": 0.1} for name, own in SYMPTOMS.items() for text in own
    ]
    digests = {"symptoms": SymptomSet.load(sound.symptoms).digest(), "data": "0" * 64, "backbone": "0" * 64}
    figures = {"images": 9, "coverage": dict.fromkeys(SYMPTOMS, 0.5), "accuracy": 0.5, "balanced_accuracy": 0.5}
    write_json(folder / "scores.json", {**digests, **figures, "scores": rows})


def _use_sets(sound: Sound, folder: Path, rng: Random) -> None:
    file = folder / "set.json"
    each(
        lambda: verb("symptoms", "show", file),
        lambda: verb("symptoms", "check", file, "--data", sound.dataset),
        lambda: verb("symptoms", "diff", file, sound.symptoms),
        lambda: verb("symptoms", "import", folder / "plain.json", "--task", "t", "--out", folder / "imported.json"),
        lambda: verb(
            "symptoms", "prune", file, folder / "scores.json", "--below", "0.7", "--out", folder / "pruned.json"
        ),
    )


def _make_answers(sound: Sound, folder: Path) -> None:
    """A record of answers, its export, and what else generating a set reads; all answers of the first step are there."""
    (folder / "classes.txt").write_text("melanoma\tdark\nnevus\tdark\npsoriasis\tred\n")
    write_json(folder / "synonyms.json", {"nevus": ["mole"], "melanoma": ["black cancer"]})
    preset = {"picture": "a photo", "look_at": ["colours", "border"], "aliases": ["photo"], "plainly": {"a": "b"}}
    (folder / "presets.yaml").write_text(yaml.safe_dump({"snapshot": preset}))
    shutil.copytree(FOLDER / "v2", folder / "templates")
    with ResponseCache(folder / "answers.sqlite") as cache:
        for number in range(4):
            put(cache, about(f"class {number}"))
        cache.export(folder / "export.jsonl")
    _generate(folder, "--batch-file", folder / "asked.jsonl")
    answers = []
    for line in (folder / "asked.jsonl").read_text().splitlines():
        body = completion(json.dumps({"features": ["dark brown spots all over", "an uneven border"]}))
        answers.append({"custom_id": json.loads(line)["custom_id"], "response": {"status_code": 200, "body": body}})
    (folder / "batch.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def _generate(folder: Path, *more: object) -> None:
    own = ["--classes-file", folder / "classes.txt", "--task", "t", "--modality", "snapshot", "--model", "m"]
    own += ["--synonyms", folder / "synonyms.json", "--presets", folder / "presets.yaml"]
    own += ["--templates", folder / "templates", "--cache", folder / "generated.sqlite", "--out", folder / "sets"]
    verb("symptoms", "generate", *own, *more)


def _use_answers(sound: Sound, folder: Path, rng: Random) -> None:
    cache, out = folder / "answers.sqlite", folder / "out.jsonl"
    batch = ["--from-batch", folder / "batch.jsonl", "--batch-file", folder / "asked-again.jsonl"]
    each(
        *(lambda word=word: verb("symptoms", "cache", word, cache) for word in ("stats", "verify")),
        lambda: verb("symptoms", "cache", "export", cache, out),
        lambda: verb("symptoms", "cache", "import", folder / "new.sqlite", folder / "export.jsonl"),
        lambda: verb("symptoms", "cache", "prune", cache, "--model", "m"),
        lambda: _generate(folder, *batch),
    )


def _make_server(sound: Sound, folder: Path) -> None:
    text = "<think>hm</think> ```json\n" + json.dumps({"symptoms": ["1. dark", {"text": "red"}]}) + "```"
    write_json(folder / "completions.json", completion(text))
    write_json(folder / "models.json", {"data": [{"id": "fake"}, {"id": "fake@r1"}]})
    write_json(folder / "version.json", {"version": "0.9"})
    lines = ["num_requests_waiting 3", 'prefix_cache_hits_total{a="b"} 7', "prefix_cache_queries_total 1e3"]
    (folder / "metrics.txt").write_text("".join(f"vllm:{line}\n" for line in lines))
    write_json(folder / "headers.json", {"retry-after": "1", "date": "Fri, 27 Nov 2026 15:00:00 GMT"})
    refusal = {"message": "seed and max_tokens are not supported", "param": "seed"}
    write_json(folder / "refusal.json", {"error": refusal, "detail": [{"loc": ["seed"], "msg": "no"}]})


def _use_server(sound: Sound, folder: Path, rng: Random) -> None:
    content = {path.stem: path.open("rb").read(64 << 20) if path.is_file() else b"" for path in folder.glob("*.*")}
    try:
        headers = httpx.Headers(json.loads(content.get("headers", b"")))
    except (ValueError, TypeError, AttributeError, RecursionError):  # what HTTP itself cannot carry
        headers = httpx.Headers({"retry-after": content.get("headers", b"").hex()[:200]})
    headers.pop("content-encoding", None)
    bad = rng.choice([400, 401, 404, 408, 422, 429, 500, 503, 302, 204, 102])

    def answer(request: httpx.Request) -> httpx.Response:
        status = bad if rng.random() < 0.3 else 200
        part = "refusal" if status in (400, 422) else request.url.path.rpartition("/")[2]
        return httpx.Response(status, headers=headers, content=content.get(part, b""))

    def connect(*_: object) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer))

    with pytest.MonkeyPatch.context() as patch, ResponseCache(folder / "cache.sqlite") as cache:
        patch.setattr(endpoint, "connect", connect)
        patch.setattr(client, "BACKOFF", wait_none())
        patch.setattr(client, "WATCH_SECONDS", 0.02)
        asker = Client(["http://127.0.0.1:9"], None, cache, concurrency=4, timeout=2, retries=2, patience=0.5)
        for _, response in asker.complete(requests(3)):
            for item in parse(response.text, "symptoms") or []:
                tidy(item)
        asker.stats.note()
        verb("symptoms", "cache", "verify", folder / "cache.sqlite")


KINDS = {
    "sets": Kind(_make_sets, ("*",), _use_sets),
    "answers": Kind(_make_answers, ("*", "templates/*"), _use_answers),
    "server": Kind(_make_server, ("*",), _use_server),
}
