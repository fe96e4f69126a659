"""Start vLLM's OpenAI-compatible server in its own environment, wait for it, and end it with this process in any case.

    vipbench serve MODEL [--gpus N --tensor-parallel N --data-parallel N --port P] [-- further options of vLLM]

vLLM pins its own torch, so it runs under an interpreter of its own (see `interpreter`). What it needs on a CPU or a GPU
it is given (see needs.py), before the user's own options, which override it. It listens on this machine only,
unless told otherwise; then it takes an API key, which is on no command line.
"""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm import needs
from vipbench.harness.symptoms.llm.keys import KEY_ADVICE
from vipbench.harness.symptoms.llm.transport import LOOPBACK
from vipbench.harness.system.files import digest_file, digest_json
from vipbench.harness.system.progress import Progress

PYTHON_VARIABLE = "VIPBENCH_SERVE_PYTHON"
VLLM_KEY_VARIABLE = "VLLM_API_KEY"
# Options of vLLM for its address and its key, with our own in their place.
OURS = {
    "--host": "give --host before the --",
    "--port": "give --port before the --",
    "--api-key": KEY_ADVICE,
    "--uds": "it listens on a port",
    "--served-model-name": "the model goes by its own name",
}
OWN_ENVIRONMENT = Path(".venv-serve/bin/python")
TAIL_LINES = 15
LOOK_SECONDS = 1.0
WATCHER = Path(__file__).with_name("watch.py")
GRACE_SECONDS = 20.0  # between the request to end and the kill
NOT_INHERITED = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class Server:
    """A vLLM server as a context manager: up when entered, ended when left, also when this process is killed.

    Args:
        model: a directory with weights, or a model's name on the hub.
        python: the interpreter that has vLLM; None looks for one (see `interpreter`).
        host: the address to listen on; other than loopback it takes an API key.
        port: None takes a free one.
        gpus: their number; they are split into `data_parallel` copies of `tensor_parallel` GPUs each.
        tensor_parallel: GPUs that one copy of the model is spread over.
        data_parallel: copies of the model; None: as many as the GPUs hold (1 when `gpus` is None).
        revision: of a model on the hub (branch, tag or commit); None is its main branch.
        api_key: to be required; None: $VLLM_API_KEY, which vLLM reads itself, or none.
        arguments: further options for vLLM's own command line; not those for its address and its key.
        patience: seconds until the server must be up (weights may have to be downloaded first).

    Attributes:
        url: its address for this machine.
        api_key: the key that it requires, or None.
        name: the model's name in requests: the directory's, or the one on the hub.
        revision: commit on the hub, or a digest of the directory's files. It is served as NAME@REVISION, too.
        log: the file with its output; removed after a clean end.

    Raises:
        UserError: others would reach it without a key, no interpreter, no such model, GPUs that do not split so, port taken;
            the server ends or is not up in time.
    """

    def __init__(
        self,
        model: str,
        *,
        python: Path | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        gpus: int | None = None,
        tensor_parallel: int = 1,
        data_parallel: int | None = None,
        revision: str | None = None,
        api_key: str | None = None,
        arguments: Sequence[str] = (),
        patience: float = 3600.0,
    ) -> None:
        _check_arguments(arguments)
        self.api_key = api_key or os.environ.get(VLLM_KEY_VARIABLE) or None
        if host not in LOOPBACK and not self.api_key:
            raise UserError(f"--host {host}: others could use the server; {KEY_ADVICE}, or listen on 127.0.0.1")
        self.python, self.patience = interpreter(python), patience
        self.port = port or _free_port()
        self.url = f"http://{_reachable(host)}:{self.port}"
        copies = _data_parallel(gpus, tensor_parallel, data_parallel)
        self.name, self.revision, pinned = identify(model, revision)
        self.command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        self.command += ["--model", model, *pinned]
        self.command += ["--served-model-name", self.name, f"{self.name}@{self.revision}"]
        self.command += ["--tensor-parallel-size", str(tensor_parallel), "--data-parallel-size", str(copies)]
        # else a model's generation_config.json changes the sampling of requests
        self.command += ["--generation-config", "vllm"]
        on_cpu = needs.is_cpu_build(self.python)
        self.command += [*needs.options(_folder(model, pinned), on_cpu), *arguments]
        self.needs = needs.environment(on_cpu, on_disk=not pinned)
        # last, so that they override all before them and a file named by --config
        self.command += ["--port", str(self.port), "--host", host]

    def __enter__(self) -> Self:
        _check_free(self.url, self.port)
        handle, name = tempfile.mkstemp(prefix=f"vipbench-serve-{self.port}-", suffix=".log")
        self.log = Path(name)
        with os.fdopen(handle, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(WATCHER), str(GRACE_SECONDS), *self.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_environment(self.python, self.api_key), **self.needs},
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the server in order
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        died = self.process.poll() is not None
        self.stop()
        if not died:
            self.log.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server and all its processes."""
        assert self.process.stdin is not None
        self.process.stdin.close()  # the signal for the watcher
        try:
            self.process.wait(GRACE_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait(self) -> None:
        """Wait until it ends.

        Raises:
            UserError: it ended by itself; the end of its log is printed first.
        """
        status = self.process.wait()
        raise self._died(status)

    def _wait_until_healthy(self) -> None:
        began = time.monotonic()
        with Progress(f"start {self.name} on {self.url}", None, "seconds") as progress:
            while time.monotonic() - began < self.patience:
                if (status := self.process.poll()) is not None:
                    raise self._died(status)
                if _is_healthy(self.url):
                    return
                progress.advance(note=self._tail(1)[:100])
                time.sleep(LOOK_SECONDS)
        raise UserError(f"{self.name} was not up after {self.patience:.0f} s; the server's log: {self.log}")

    def _died(self, status: int) -> UserError:
        print(self._tail(TAIL_LINES), file=sys.stderr, flush=True)
        return UserError(
            f"the server of {self.name} ended (status {status}); its log, the end of which is above: {self.log}"
        )

    def _tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def interpreter(python: Path | None = None) -> Path:
    """Find the interpreter that has vLLM: the one given, $VIPBENCH_SERVE_PYTHON, .venv-serve here, or our own.

    Raises:
        UserError: there is none.
    """
    given = python or (Path(os.environ[PYTHON_VARIABLE]) if os.environ.get(PYTHON_VARIABLE) else None)
    if given and not given.is_file():
        raise UserError(
            f"{given}: no such interpreter; --python and ${PYTHON_VARIABLE} name that of vLLM's environment"
        )
    if given or OWN_ENVIRONMENT.is_file():
        return (given or OWN_ENVIRONMENT).absolute()
    if importlib.util.find_spec("vllm"):
        return Path(sys.executable)
    raise UserError(
        f"no vLLM here; install it in an environment of its own and name that one's interpreter with --python or "
        f"${PYTHON_VARIABLE} (without a GPU: make serve-env-cpu)"
    )


def identify(model: str, revision: str | None) -> tuple[str, str, list[str]]:
    """Determine a model's name in requests, its revision, and the options that pin vLLM to this revision.

    Raises:
        UserError: there is no such directory, nor such a model on the hub or in its local cache.
    """
    path = Path(model)
    if path.exists():
        if revision:
            raise UserError(f"{model} is a directory; a revision is for a model on the hub")
        return path.resolve().name, _digest(path), []
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise UserError(f"{model}: no such directory, nor the name of a model on the hub (ORGANISATION/NAME)")
    from huggingface_hub import hf_hub_download

    try:
        commit = Path(hf_hub_download(model, "config.json", revision=revision)).parent.name
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model}: no directory here, and not to be had from the hub or its cache: {reason}") from error
    return model, commit, ["--revision", commit, "--tokenizer-revision", commit]


def _folder(model: str, pinned: Sequence[str]) -> Path:
    """Find the folder of a model's config.json: its own, or that in the hub's local cache, where `identify` brought it."""
    if not pinned:
        return Path(model)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, "config.json", revision=pinned[1])).parent


def _digest(path: Path) -> str:
    """Hash the names and contents of the model's files to 40 hex digits."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    files = [file for file in files if not file.name.startswith(".") and file.suffix != ".md"]
    with Progress("digest the model's files", len(files), "files") as progress:
        digests = {}
        for file in files:
            digests[file.name] = digest_file(file)
            progress.advance()
    return digest_json(digests)[:40]


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse options that would undo ours, however they are written: --host=H, --ho H, --api_key K."""
    for argument in arguments:
        word = argument.partition("=")[0].replace("_", "-")
        own = next((option for option in OURS if len(word) > 3 and option.startswith(word)), None)
        if own:
            raise UserError(f"{own} cannot be given after --: {OURS[own]}")


def _data_parallel(gpus: int | None, tensor_parallel: int, data_parallel: int | None) -> int:
    copies = data_parallel or max(1, (gpus or tensor_parallel) // tensor_parallel)
    if gpus and copies * tensor_parallel != gpus:
        raise UserError(f"{gpus} GPUs are not {copies} (data parallel) x {tensor_parallel} (tensor parallel)")
    return copies


def _environment(python: Path, api_key: str | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["VLLM_NO_USAGE_STATS"] = "1"  # nothing leaves this machine
    if api_key:
        environment[VLLM_KEY_VARIABLE] = api_key  # not on the command line, which all users can read
    return environment


def _is_healthy(url: str) -> bool:
    try:
        with httpx.stream("GET", f"{url}/health", timeout=5.0, trust_env=False) as answer:  # whose body is not read
            return answer.status_code == 200
    except httpx.RequestError:
        return False


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_free(url: str, port: int) -> None:
    host = httpx.URL(url).host
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((host, port)) == 0:
            raise UserError(f"port {port} is taken; give another one with --port")
