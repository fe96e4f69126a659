"""Collect the wheels that a GPU machine without a network lacks, at the versions of constraints.txt, to be carried there.

    python -m benchmarks.gpu.wheels --out gpu-wheels [--have FREEZE] [--python 3.12]        (make gpu-wheels)

FREEZE is what `pip freeze` prints there; without it a usual image with PyTorch and transformers is assumed. There:

    python3 -m pip install --no-index --no-deps --target SITE gpu-wheels/*.whl
    make gpu-check gpu-bench GPU_PYTHON=python3 SITE=SITE
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from importlib.metadata import requires
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MOST_MIB = 60
# wordfreq's tables alone are 54 MiB, and symptoms alone are judged by it, which no GPU is needed for.
LEFT_OUT = ("wordfreq",)
FROM_SOURCE = ("deepspeed",)  # published as source alone; the wheel built of it here holds no compiled code
USUAL = (
    *("accelerate", "ninja", "numpy", "pandas", "pillow", "pyarrow", "pytest", "pytest-xdist", "scikit-learn", "scipy"),
    *(
        "timm",
        "torch",
        "torchvision",
        "transformers",
        "certifi",
        "click",
        "cloudpickle",
        "einops",
        "filelock",
        "fsspec",
    ),
    *(
        "h11",
        "hf-xet",
        "httpcore",
        "huggingface-hub",
        "idna",
        "jinja2",
        "markdown-it-py",
        "markupsafe",
        "mdurl",
        "msgpack",
    ),
    *("packaging", "psutil", "pygments", "pyyaml", "regex", "safetensors", "shellingham", "tqdm"),
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def main(
    out: Annotated[Path, typer.Option(help="folder for the wheels")] = Path("gpu-wheels"),
    have: Annotated[Path | None, typer.Option(help="what `pip freeze` prints on the GPU machine")] = None,
    python: Annotated[str, typer.Option(help="its version of Python")] = "3.12",
    architecture: Annotated[str, typer.Option(help="its processor's")] = "x86_64",
) -> None:
    """Download; fails where the wheels are too large to be carried."""
    present = USUAL if have is None else names_of(have.read_text(encoding="utf-8"))
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    wanted = [f"{name}=={pins[name]}" if name in pins else name for name in missing(present)]
    platforms = [f"--platform={name}_{architecture}" for name in PLATFORMS]
    target = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    built = [word for word in wanted if word.partition("==")[0] in FROM_SOURCE]
    _pip("download", "--quiet", *target, f"--dest={out}", *(word for word in wanted if word not in built))
    if built:
        _pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={out}", *built)
    size = sum(path.stat().st_size for path in out.glob("*.whl")) / 2**20
    typer.echo(f"{out}: {len(wanted)} wheels, {size:.1f} MiB; without {', '.join(LEFT_OUT)}")
    if size > MOST_MIB:
        typer.echo(f"more than {MOST_MIB} MiB: name what is there with --have", err=True)
        raise typer.Exit(1)


def _pip(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode:
        raise typer.Exit(1)  # pip has printed why


def missing(present: Collection[str]) -> list[str]:
    """Names of all that vipbench and DeepSpeed need but what is present, and what that needs, by the packages installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    todo = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["deepspeed"]]
    found: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name in present or name in LEFT_OUT:
            continue
        found.add(name)
        for line in requires(name) or []:
            other = Requirement(line)
            if other.marker is None or any(
                other.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                todo.append(other)
    return sorted(found)


def names_of(freeze: str) -> set[str]:
    """The names in what `pip freeze` prints: of lines such as "torch==2.11.0" or "timm @ file:///...", and of no others."""
    return {canonicalize_name(name) for name in re.findall(r"^([A-Za-z0-9][\w.-]*) ?(?:==|@)", freeze, re.MULTILINE)}


if __name__ == "__main__":
    typer.run(main)
