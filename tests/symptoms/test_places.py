"""Places that the verbs read and write: outputs that cannot be, datasets at URLs, devices that are missing."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vipbench.harness.commands.options import check_output
from vipbench.harness.commands.symptoms import app
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Request, Response
from vipbench.harness.system.devices import choose_device
from vipbench.harness.system.files import output_errors


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)))


def one_line(result: Result) -> str:
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def impossible(tmp_path: Path) -> dict[str, Path]:
    """Outputs that cannot be written, by what is in the way."""
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "folder.json").mkdir()
    return {"is a file, not a folder": tmp_path / "file" / "set.json", "is a folder": tmp_path / "folder.json"}


def test_an_impossible_output_is_one_line_before_any_work(
    tmp_path: Path, impossible: dict[str, Path], symptoms: Path, dataset: Path, model_folder: Path
) -> None:
    plain, record = tmp_path / "plain.json", tmp_path / "answers.sqlite"
    plain.write_text('{"nevus": ["round"]}')
    with ResponseCache(record) as cache:
        request = Request("m", [{"role": "user", "content": "x"}], None, {}, 0)
        cache.put(request.key("r", "v"), request, "r", "v", Response("", "stop", {}, ""))
    backbone = ["--backbone", model_folder / "vit.json", "--device", "cpu"]
    for words, out in impossible.items():
        for verb in (
            ["import", plain, "--task", "t", "--overwrite", "--out", out],
            ["prune", symptoms, "no-scores.json", "--overwrite", "--out", out],
            ["score", symptoms, "--data", dataset, *backbone, "--json", out],
            ["cache", "export", record, out],
            generate_words("--model", "m", "--cache", record, "--batch-file", out),
        ):
            assert words in one_line(invoke(*verb)), verb
    for verb in (
        generate_words("--knowledge", "class-name", "--out", tmp_path / "file"),
        generate_words("--offline", "--cache", record, "--out", tmp_path / "file"),
        generate_words("--offline", "--cache", tmp_path / "file" / "a.sqlite"),
    ):
        assert str(tmp_path / "file") in one_line(invoke(*verb)), verb
    assert (tmp_path / "file").read_text() == "somebody's"


def generate_words(*options: object) -> list[object]:
    return ["generate", "--task", "t", "--classes", "a,b", "--modality", "dermoscopy", *options]


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # permissions do not bind root
    with pytest.raises(UserError, match=rf"cannot be written: {tmp_path} is read-only"):
        check_output(tmp_path / "new" / "set.json")
    with pytest.raises(UserError, match="cannot be written: Read-only file system"), output_errors(tmp_path):
        raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("verb", ["check", "score", "generate"])
def test_the_url_of_a_dataset_keeps_its_slashes(symptoms: Path, model_folder: Path, verb: str) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    words = ["generate"] if verb == "generate" else [verb, symptoms, "--backbone", model_folder / "vit.json"]
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/sets/a"
        assert place in one_line(invoke(*words, "--data", place))
        server.shutdown()
    assert set(asked) == {"/sets/a/dataset.json"}


def test_a_gpu_that_is_not_there_is_one_line(
    symptoms: Path, dataset: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["score", symptoms, "--data", dataset, "--backbone", model_folder / "vit.json", "--device"]
    assert one_line(invoke(*words, "cuda")) == "--device: no CUDA device is visible here; use --device cpu"
    assert one_line(invoke(*words, "gpu")) == "--device: no device 'gpu'; choose from auto, cpu, cuda"
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"run\.device: no CUDA device is visible here; use run\.device=cpu"):
        choose_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]


BAD_JSON = {
    "[" * 3000 + "]" * 3000: "nested more than",
    '{"a": ["x"], "a": ["y"]}': "the key 'a' occurs twice",
    "9" * 9000: "not JSON",
}


@pytest.mark.parametrize("content", BAD_JSON)
def test_hostile_json_is_one_line_wherever_it_is_read(tmp_path: Path, symptoms: Path, content: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    for verb in (
        ["show", bad],
        ["check", bad],
        ["diff", symptoms, bad],
        ["import", bad, "--task", "t", "--out", tmp_path / "o.json"],
        ["prune", symptoms, bad, "--out", tmp_path / "o.json"],
        generate_words("--dry-run", "--synonyms", bad),
    ):
        assert BAD_JSON[content] in one_line(invoke(*verb)), verb


@pytest.mark.parametrize(
    "line",
    [
        "[" * 3000 + "]" * 3000,
        "9" * 9000,
        "[]",
        "null",
        json.dumps({"key": "k", "revision": "r", "server_version": "v", "response": [1]}),
        json.dumps({"custom_id": "k", "response": {"body": {"created": 10**30, "choices": [[]]}}, "model": "\ud800"}),
    ],
)
def test_hostile_lines_are_one_line(tmp_path: Path, line: str) -> None:
    bad, record = tmp_path / "bad.jsonl", tmp_path / "answers.sqlite"
    bad.write_text(line + "\n")
    assert f"{bad}, line 1: not an exported answer" in one_line(invoke("cache", "import", record, bad))
    words = generate_words("--model", "m", "--cache", record, "--from-batch", bad)
    assert str(bad) in one_line(invoke(*words))


FIELDS: dict[str, object] = {
    "model": "m",
    "messages": [{"role": "user", "content": "x"}],
    "schema": None,
    "sampling": {},
    "sample": 0,
}
ANSWER = {"text": "x", "finish_reason": "stop", "usage": {}, "created": "2026-01-01"}


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"sample": 2**70}, {}),
        ({"sample": -1}, {}),
        ({"sample": "0"}, {}),
        ({"messages": []}, {}),
        ({"messages": 5}, {}),
        ({"sampling": [1]}, {}),
        ({"model": "\ud800"}, {}),
        ({}, {"text": 5}),
        ({}, {"usage": {"prompt_tokens": "7"}}),
        ({}, {"usage": {"prompt_tokens": 10**400}}),
        ({}, {"more": 1}),
    ],
)
def test_an_export_with_a_right_key_and_odd_values_is_refused(
    tmp_path: Path, fields: dict[str, object], answer: dict[str, object]
) -> None:
    content = FIELDS | fields
    key = Request(**content).key("r", "v")  # type: ignore[arg-type]
    line = {"key": key, **content, "revision": "r", "server_version": "v", "response": ANSWER | answer}
    (tmp_path / "bad.jsonl").write_text(json.dumps(line) + "\n")
    error = one_line(invoke("cache", "import", tmp_path / "answers.sqlite", tmp_path / "bad.jsonl"))
    assert "line 1: not an exported answer" in error


def test_byte_order_marks_are_read(tmp_path: Path) -> None:
    plain, classes, out = tmp_path / "plain.json", tmp_path / "classes.txt", tmp_path / "set.json"
    plain.write_text('{"nevus": ["round"]}', encoding="utf-8-sig")
    assert invoke("import", plain, "--task", "t", "--out", out).exit_code == 0
    out.write_text(out.read_text(), encoding="utf-8-sig")
    assert "nevus" in invoke("show", out).output
    classes.write_text("nevus\nmelanoma\n", encoding="utf-8-sig")
    words = ["generate", "--task", "t", "--knowledge", "class-name", "--out", tmp_path, "--classes-file", classes]
    assert invoke(*words).exit_code == 0
    assert json.loads((tmp_path / "t" / "class-name.json").read_text())["classes"][0]["name"] == "nevus"


@pytest.mark.parametrize(
    "body",
    [
        "{{ 1 / 0 }}",
        "{{ 1 + name }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ name.x.y }}",
        "{{ {{ name }} }}",
        "{{ '%d' % name }}",
    ],
)
def test_a_template_whose_braces_cannot_be_filled_is_one_line(tmp_path: Path, body: str) -> None:
    (tmp_path / "elicit.jinja2").write_text(
        f"{{% block instruction %}}{body}{{% endblock %}}{{% block question %}}{{{{ name }}}}{{% endblock %}}"
    )
    assert "template elicit.jinja2: " in one_line(invoke(*generate_words("--dry-run", "--templates", tmp_path)))


@pytest.mark.parametrize("name", ["{{ x }}", "{name}", "{% x %}", "{#", "%s {0}"])
def test_braces_in_a_class_name_are_text(name: str) -> None:
    result = invoke("generate", "--task", "t", "--classes", name, "--modality", "dermoscopy", "--dry-run")
    assert result.exit_code == 0 and f"Class: {name}" in result.output


@pytest.mark.parametrize("content", ["hello", "[1, 2]", "a: b", "a: {picture: x}", "\x00"])
def test_a_file_that_holds_no_presets_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "presets.yaml").write_text(content)
    assert str(tmp_path / "presets.yaml") in one_line(
        invoke(*generate_words("--dry-run", "--presets", tmp_path / "presets.yaml"))
    )
