"""Options and environment that vLLM needs on this machine, so that nobody has to look them up."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_json

PACKAGES = (
    "from importlib.metadata import distributions\nfor found in distributions(): print(found.name, found.version)"
)
PROBE_SECONDS = 60.0
# Tokens of a prompt and its answer: ours have few, and memory is set aside for the longest.
LONGEST_ON_CPU, LONGEST_ON_GPU = 8192, 32768
CACHE_VARIABLE, OFFLINE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"
GIB = 1 << 30
MOST_CACHE = 8  # GiB
# Without a compiler; and with whole prompts, since vLLM's CPU build dies of a prompt in chunks when the request has a seed
# (seen in 0.32: "CPU Generator does not use offset").
ON_CPU = ("--enforce-eager", "--no-enable-chunked-prefill")


def is_cpu_build(python: Path) -> bool:
    """Check whether the vLLM of an interpreter is a build for CPUs, by the versions of its packages (without an import).

    Raises:
        UserError: the interpreter does not run.
    """
    try:
        listed = subprocess.run(
            [str(python), "-c", PACKAGES], capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{python}: cannot list its packages: {type(error).__name__}; is it vLLM's Python?") from error
    packages = dict(line.lower().split(" ", 1) for line in listed.stdout.splitlines() if " " in line)
    return "vllm-cpu" in packages or any(packages.get(name, "").endswith("+cpu") for name in ("torch", "vllm"))


def options(folder: Path, on_cpu: bool) -> list[str]:
    """List the options for a model whose config.json is in `folder`."""
    most = LONGEST_ON_CPU if on_cpu else LONGEST_ON_GPU
    shortened = ["--max-model-len", str(most)] if min(_lengths(folder), default=0) > most else []
    return [*(ON_CPU if on_cpu else ()), *shortened]


def environment(on_cpu: bool, on_disk: bool) -> dict[str, str]:
    """Make the variables, without those that the user has set. `on_disk`: the model is, so that no hub has to be asked."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // GIB
    wanted = {OFFLINE_VARIABLE: "1"} if on_disk else {}
    if on_cpu:
        wanted[CACHE_VARIABLE] = str(max(1, min(MOST_CACHE, memory // 8)))  # GiB; else it takes most of the memory
    return {name: value for name, value in wanted.items() if not os.environ.get(name)}


def _lengths(folder: Path) -> Iterator[int]:
    """Yield the longest inputs of a model as its files give them, in tokens."""
    config, tokenizer = (_mapping(folder / name) for name in ("config.json", "tokenizer_config.json"))
    text = config.get("text_config")  # of a model that reads images, too
    inner = text if isinstance(text, dict) else {}
    name = "max_position_embeddings"
    for length in (config.get(name), inner.get(name), tokenizer.get("model_max_length")):
        if isinstance(length, int):
            yield length


def _mapping(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
