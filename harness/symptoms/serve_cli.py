"""`vipbench serve`: a local LLM behind an OpenAI-compatible URL."""

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="a directory with weights, or a model's name on the hub")],
    arguments: Annotated[list[str] | None, typer.Argument(help="further options of vLLM, after --")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="how many; by default what the two next ones say")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that one copy of the model is spread over")] = 1,
    data_parallel: Annotated[int | None, typer.Option(min=1, help="copies of the model")] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen on; beyond loopback an API key is required")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the port to listen on")] = 8000,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a model on the hub")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VIPBENCH_API_KEY", help="require this key")] = None,
    python: Annotated[
        Path | None, typer.Option(envvar="VIPBENCH_SERVE_PYTHON", help="the interpreter of vLLM's environment")
    ] = None,
) -> None:
    """Serve an LLM with vLLM until Ctrl-C."""
    from harness.symptoms.server import Server

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
        api_key=api_key,
        arguments=arguments or (),
    )
    with server:
        typer.echo(f"{server.name} (revision {server.revision}) is served on {server.url}; Ctrl-C ends it")
        if server.api_key and not api_key:
            typer.echo(f"it wants this API key: export VIPBENCH_API_KEY={server.api_key}")
        server.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
