"""API keys come from a file or the environment, and are in no argument, record, log or error."""

import logging
import pickle
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.symptoms.fake_endpoint import FakeEndpoint, Reply, completion
from vipbench.harness.cli import app
from vipbench.harness.commands.generate import Source
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.keys import read_key
from vipbench.sweeps.executors.profile import Profile
from vipbench.sweeps.units import Unit

SECRET = "sk-very-secret"


def generate(tmp_path: Path, *options: str) -> Result:
    words = ["--task", "skin", "--classes", "melanoma", "--modality", "dermoscopy", "--rounds", "1"]
    words += ["--samples", "1", "--cache", str(tmp_path / "answers.sqlite"), "--out", str(tmp_path / "sets")]
    return CliRunner().invoke(app, ["symptoms", "generate", *words, *options])


@pytest.mark.parametrize("option", [["--api-key", SECRET], [f"--api-key={SECRET}"]])
@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_a_key_on_the_command_line_is_refused(tmp_path: Path, verb: str, option: list[str]) -> None:
    if verb == "serve":
        result = CliRunner().invoke(app, ["serve", str(tmp_path), *option])
    else:
        result = generate(tmp_path, "--url", "http://127.0.0.1:1", *option)
    assert isinstance(result.exception, UserError), result.output
    assert "give --api-key-file FILE, or set VIPBENCH_API_KEY" in str(result.exception)
    assert SECRET not in str(result.exception) and "\n" not in str(result.exception)
    assert "--api-key " not in CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output


@pytest.mark.parametrize("from_file", [True, False])
def test_a_key_is_sent_and_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, from_file: bool
) -> None:
    async def reply(body: dict[str, object], number: int) -> Reply:
        return 200, completion('{"features": ["Dark spots."], "symptoms": ["dark spots", "jagged edge"]}')

    caplog.set_level(logging.DEBUG)
    options = []
    if from_file:
        (tmp_path / "key").write_text(f"\ufeff{SECRET}\n", encoding="utf-8")
        options = ["--api-key-file", str(tmp_path / "key")]
    else:
        monkeypatch.setenv("VIPBENCH_API_KEY", SECRET)
    with FakeEndpoint(version=None) as endpoint:
        endpoint.reply = reply
        result = generate(tmp_path, "--url", endpoint.url, *options)
    assert f"authorization: bearer {SECRET}" in endpoint.headers.lower()
    written = list((tmp_path / "sets").rglob("*.json"))
    assert written, result.output
    with sqlite3.connect(tmp_path / "answers.sqlite") as connection:
        record = "\n".join(connection.iterdump())
    for text in (result.output, caplog.text, record, *(path.read_text() for path in written)):
        assert SECRET not in text
    assert f"unknown at {endpoint.url}/v1" in record and f"unknown at {endpoint.url}/v1" in written[0].read_text()


def test_a_jobs_command_and_pickle_hold_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []

    def submit(folder: Path, units: list[Unit], profile: Profile) -> str:
        submitted.append(pickle.dumps((units, profile)))
        return "7"

    (tmp_path / "key").write_text(SECRET)
    monkeypatch.setattr("vipbench.sweeps.executors.slurm.submit", submit)
    result = generate(tmp_path, "--serve", "m", "--executor", "slurm", "--api-key-file", str(tmp_path / "key"))
    assert result.exit_code == 0 and "job 7 is in the queue" in result.output, result.exception
    (job,) = submitted
    assert b"--api-key-file" in job and SECRET.encode() not in job


def test_a_key_is_not_shown_where_its_holder_is() -> None:
    source = Source([], None, None, None, None, Path("a"), SECRET, 1, None, 1)
    assert source.api_key == SECRET and SECRET not in repr(source)


def test_a_password_in_a_url_goes_nowhere(tmp_path: Path) -> None:
    result = generate(tmp_path, "--url", f"http://user:{SECRET}@127.0.0.1:1/v1")
    assert isinstance(result.exception, UserError) and "no user name, password" in str(result.exception)
    assert SECRET not in str(result.exception) + result.output
    assert not list((tmp_path / "sets").rglob("*"))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"two\nlines", "schlüssel".encode(), b"\xff\xfe", b"a\x07"]
)
def test_a_file_that_holds_no_key_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match=r"holds no API key|cannot be read as text") as error:
        read_key(tmp_path / "key")
    assert "two" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_key(tmp_path / "none")


def test_without_a_key_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIPBENCH_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("VIPBENCH_API_KEY", "")
    assert read_key(None) is None
