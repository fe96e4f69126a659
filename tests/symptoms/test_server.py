"""Starting and ending a server, with a stub in vLLM's place that starts a stubborn child and may fail to come up.

The real one is in tests/integration/test_vllm_server.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm import server as server_module
from vipbench.harness.symptoms.llm.server import Server, identify, interpreter

STUB = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
options = sys.argv[1:]
if "--fail" in options:
    print("loading weights"); print("torch.OutOfMemoryError: no room"); sys.exit(3)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key, children = os.environ.get("VLLM_API_KEY"), [os.getpid(), child.pid]
        needs = [os.environ.get(name) for name in ("VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE")]
        content = json.dumps({"options": options, "key": key, "children": children, "needs": needs})
        self.send_response(200); self.end_headers(); self.wfile.write(content.encode())
HTTPServer(("127.0.0.1", int(options[options.index("--port") + 1])), Handler).serve_forever()
"""
FAKE = """
import sys, time
from tests.symptoms.fake_endpoint import FakeEndpoint, completion
async def reply(body, number):
    name, = body["response_format"]["json_schema"]["schema"]["required"]
    return 200, completion('{"%s": ["round shape %s"]}' % (name, "abcdefghij"[number % 10] * 5))
name, revision = (sys.argv[sys.argv.index("--served-model-name") + place] for place in (1, 2))
endpoint = FakeEndpoint(models=[name, revision])
endpoint.port, endpoint.reply = int(sys.argv[sys.argv.index("--port") + 1]), reply
with endpoint:
    time.sleep(600)
"""
ROOT = Path(__file__).parents[2]
VIPBENCH = [sys.executable, "-c", "from vipbench.harness.cli import main; main()"]


def interpreter_with(server: str, folder: Path) -> Path:
    """An interpreter for which vLLM's server is another program."""
    module = folder / "site" / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    (module / "api_server.py").write_text(server)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}:{folder / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter for which vLLM's server is the stub above."""
    monkeypatch.setattr(server_module, "LOOK_SECONDS", 0.05)
    return interpreter_with(STUB, tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def state(url: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(httpx.get(url).text)
    return content


def running(pid: int) -> bool:
    """Return True for a process that exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(children: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(running(child) for child in children)


def test_it_is_up_when_entered_and_gone_when_left(stub: Path, model: Path) -> None:
    with Server(str(model), python=stub, arguments=["--max-model-len", "512"]) as server:
        told = state(server.url)
        options = told["options"]
        assert options[options.index("--host") + 1] == "127.0.0.1"
        assert options[options.index("--served-model-name") + 1 :][:2] == ["tiny", f"tiny@{server.revision}"]
        assert options[-6:] == ["--max-model-len", "512", "--port", str(server.port), "--host", "127.0.0.1"]
        assert told["key"] is server.api_key is None
        assert all(running(child) for child in told["children"])
        log = server.log
        assert log.exists()
    assert gone(told["children"])
    assert not log.exists()


@pytest.mark.parametrize(
    ("packages", "length", "wanted", "cache"),
    [
        ("torch 2.13.0+cpu\nvllm-cpu 0.32.0", 4096, ["--enforce-eager", "--no-enable-chunked-prefill"], True),
        (
            "vllm 0.12.0+cpu\ntorch 2.9.0\nNone None",
            9000,
            ["--enforce-eager", "--no-enable-chunked-prefill", 8192],
            True,
        ),
        ("torch 2.13.0\nvllm 0.32.0", 9000, [], False),
        ("torch 2.13.0+cu130\nvllm 0.32.0", 131072, [32768], False),
    ],
)
def test_it_gets_what_a_cpu_or_a_gpu_needs(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    packages: str,
    length: int,
    wanted: list[str | int],
    cache: bool,
) -> None:
    python = interpreter_with(STUB, tmp_path)
    listed = tmp_path / "packages"
    listed.write_text(packages + "\n")
    python.write_text(python.read_text().replace("PYTHONPATH", f'[ "$1" = -c ] && exec cat {listed}\nPYTHONPATH', 1))
    monkeypatch.setattr(server_module, "LOOK_SECONDS", 0.05)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for content in ({"max_position_embeddings": length}, {"text_config": {"max_position_embeddings": length}}):
        (model / "config.json").write_text(json.dumps(content))
        with Server(str(model), python=python, arguments=["--max-num-seqs", "3"]) as server:
            told = state(server.url)
        options = told["options"]
        begin, end = options.index("--generation-config"), options.index("--max-num-seqs")
        lengths = [
            words for word in wanted for words in (["--max-model-len", str(word)] if isinstance(word, int) else [word])
        ]
        assert options[begin + 2 : end] == lengths
        assert (told["needs"][0] is not None and 1 <= int(told["needs"][0]) <= 8) == cache and told["needs"][1] == "1"
    (model / "tokenizer_config.json").write_text('{"model_max_length": 512}')  # vLLM refuses to go beyond it
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with Server(str(model), python=python) as server:
        told = state(server.url)
    assert "--max-model-len" not in told["options"] and told["needs"] == ["40", "0"]


def test_an_interpreter_that_does_not_run_is_one_line(tmp_path: Path, model: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match="cannot list its packages: CalledProcessError"):
        Server(str(model), python=python)


def test_it_is_gone_after_an_error(stub: Path, model: Path) -> None:
    server = Server(str(model), python=stub)
    children: list[int] = []

    def fail() -> None:
        with server:
            children.extend(state(server.url)["children"])
            raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        fail()
    assert gone(children)


def test_a_server_that_dies_shows_the_end_of_its_log(
    stub: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(UserError, match=r"the server of tiny ended \(status 3\); its log") as caught,
        Server(str(model), python=stub, arguments=["--fail"]),
    ):
        pass
    assert "torch.OutOfMemoryError: no room" in capsys.readouterr().err
    Path(str(caught.value).split()[-1]).unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
def test_no_orphan_however_the_command_ends(stub: Path, model: Path, number: signal.Signals) -> None:
    """Ctrl-C goes to the whole foreground group, as from a terminal; the child of the server ignores SIGTERM."""
    command = [*VIPBENCH, "serve", str(model), "--python", str(stub), "--port", str(server_module._free_port())]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in a shell's background ignores
    )
    assert process.stdout
    line = process.stdout.readline()
    assert "is served on http://127.0.0.1:" in line, process.communicate()
    children = state(line.split("is served on ")[1].split(";")[0])["children"]
    assert all(running(child) for child in children)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert gone(children)
    assert "Traceback" not in errors
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends a process with its parent on Linux only")
def test_the_server_goes_when_its_watcher_is_killed(stub: Path, model: Path) -> None:
    with Server(str(model), python=stub) as server:
        leader, child = state(server.url)["children"]
        server.process.kill()
        assert gone([leader])
    server.log.unlink()
    os.kill(child, signal.SIGKILL)  # deaf, and out of reach; vLLM's own end with their leader


def test_beyond_this_machine_it_takes_a_key_which_is_on_no_command_line(
    stub: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("0.0.0.0", "::", "", "192.0.2.1"):
        with pytest.raises(UserError, match=r"others could use the server; give --api-key-file FILE, or set VIPBENCH"):
            Server(str(model), python=stub, host=host)
    server = Server(str(model), python=stub, host="0.0.0.0", api_key="secret-key")
    assert server.url.startswith("http://127.0.0.1:")
    with server:
        assert state(server.url)["key"] == "secret-key"
        processes = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(model) in processes and "secret-key" not in processes
    monkeypatch.setenv("VLLM_API_KEY", "of-vllm")  # which vLLM would require, so that it counts, and is sent
    assert Server(str(model), python=stub, host="0.0.0.0").api_key == "of-vllm"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "0.0.0.0"],
        ["--host=0.0.0.0"],
        ["--max-model-len", "512", "--ho", "::"],
        ["--uds", "/tmp/socket"],
        ["--uds=/tmp/socket"],
        ["--port", "9"],
        ["--api-key", "secret"],
        ["--api_key=secret"],
        ["--served_model_name=other"],
    ],
)
def test_options_of_vllm_that_would_undo_ours_are_refused(stub: Path, model: Path, arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"--[a-z-]+ cannot be given after --") as caught:
        Server(str(model), python=stub, arguments=arguments)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_serve_checks_what_is_given_after_the_dashes(stub: Path, model: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(model), "--python", str(stub), "--", "--host", "0.0.0.0"])
    assert isinstance(result.exception, UserError) and "--host cannot be given after --" in str(result.exception)


def test_gpus_are_split(stub: Path, model: Path) -> None:
    def sizes(**how: int) -> list[str]:
        command = Server(str(model), python=stub, **how).command  # type: ignore[arg-type]
        return [command[command.index(f"--{kind}-parallel-size") + 1] for kind in ("tensor", "data")]

    assert sizes() == ["1", "1"]
    assert sizes(gpus=8) == ["1", "8"]
    assert sizes(gpus=8, tensor_parallel=2) == ["2", "4"]
    assert sizes(tensor_parallel=4) == ["4", "1"]
    with pytest.raises(UserError, match=r"6 GPUs are not 1 \(data parallel\) x 4"):
        sizes(gpus=6, tensor_parallel=4)


def test_a_model_is_named_and_its_content_is_its_revision(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, revision, options = identify(str(model), None)
    assert (name, options) == ("tiny", [])
    (model / "README.md").write_text("no part of the model")
    assert identify(str(model), None)[1] == revision
    (model / "config.json").write_text('{"layers": 3}')
    assert identify(str(model), None)[1] != revision
    with pytest.raises(UserError, match="is for a model on the hub"):
        identify(str(model), "main")
    with pytest.raises(UserError, match="no such directory"):
        identify("./nowhere/tiny", None)


def test_a_model_of_the_hub_is_pinned_to_its_commit(tmp_path: Path) -> None:
    """Use the hub's local cache offline, in a process of its own, since the hub's settings are read once."""
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--org--llm" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    program = (
        "from vipbench.harness.symptoms.llm.server import identify\nprint(identify('org/llm', None))\n"
        "try: identify('org/other', None)\nexcept ValueError as error: print(error)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    first, second = result.stdout.splitlines()
    assert first == str(("org/llm", commit, ["--revision", commit, "--tokenizer-revision", commit]))
    assert second.startswith("org/other: no directory here, and not to be had from the hub")


@pytest.mark.integration
@pytest.mark.slow
def test_generate_serves_the_model_for_the_job_and_ends_it(model: Path, tmp_path: Path) -> None:
    words = ["--serve", str(model), "--task", "skin", "--classes", "melanoma,nevus", "--modality", "dermoscopy"]
    words += [
        "--rounds",
        "1",
        "--keep-jargon",
        "--consensus",
        "1",
        "--cache",
        str(tmp_path / "answers.sqlite"),
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "VIPBENCH_SERVE_PYTHON": str(interpreter_with(FAKE, tmp_path))}
    command = [*VIPBENCH, "symptoms", "generate", *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in result.stderr and (tmp_path / "skin" / "tiny.json").exists(), result.stderr
    provenance = json.loads((tmp_path / "skin" / "tiny.json").read_text())["provenance"]
    assert provenance["revision"] == identify(str(model), None)[1]
    processes = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(model) not in processes


def test_a_port_that_is_taken_is_named(stub: Path, model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken"), Server(str(model), python=stub, port=port):
            pass


def test_the_interpreter_is_looked_for(stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIPBENCH_SERVE_PYTHON", raising=False)
    with pytest.raises(UserError, match=r"no vLLM here; .* make serve-env-cpu"):
        interpreter()
    with pytest.raises(UserError, match="no such interpreter"):
        interpreter(tmp_path / "missing")
    own = tmp_path / ".venv-serve" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(stub)
    assert interpreter() == own
    monkeypatch.setenv("VIPBENCH_SERVE_PYTHON", str(stub))
    assert interpreter() == stub
