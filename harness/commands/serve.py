"""`vipbench serve`: a local LLM behind an OpenAI-compatible URL."""

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from vipbench.harness.commands.options import ApiKey, ApiKeyFile
from vipbench.harness.symptoms.llm.keys import read_key


def serve(
    model: Annotated[str, typer.Argument(help="a directory with weights, or a model's name on the hub")],
    arguments: Annotated[list[str] | None, typer.Argument(help="further options of vLLM, after --")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="their number; by default the product of the next two")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that one copy of the model is spread over")] = 1,
    data_parallel: Annotated[int | None, typer.Option(min=1, help="copies of the model")] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen on; beyond this machine's loopback it takes an API key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the port to listen on")] = 8000,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a model on the hub")] = None,
    api_key_file: ApiKeyFile = None,
    api_key: ApiKey = None,
    python: Annotated[
        Path | None, typer.Option(envvar="VIPBENCH_SERVE_PYTHON", help="the interpreter of vLLM's environment")
    ] = None,
) -> None:
    """Serve an LLM with vLLM until Ctrl-C."""
    from vipbench.harness.symptoms.llm.server import Server

    signal.signal(signal.SIGTERM, _leave)
    server = Server(
        model,
        python=python,
        host=host,
        port=port,
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        revision=revision,
        api_key=read_key(api_key_file),
        arguments=arguments or (),
    )
    with server:
        typer.echo(f"{server.name} (revision {server.revision}) is served on {server.url}; Ctrl-C ends it")
        server.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
