"""The structure of the code, drawn from its imports: arrows one way, no circle, and no file both a program and a library."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package imports from its own line and those above it; `cli` stands for every file of verbs, wherever it lies.
LEVELS = (
    ("__init__", "errors"),
    ("system",),
    ("config",),
    ("data", "distributed", "models"),
    ("methods", "features", "symptoms", "baselines"),
    ("evaluation",),
    ("training",),
    ("runs",),
    ("report", "sweeps", "demo"),
    ("cli",),
    ("__main__", "run", "pack"),
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}


def modules(*tops: str) -> dict[str, Path]:
    """All modules below folders, by dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for top in tops
        for path in sorted((ROOT / top).rglob("*.py"))
    }


CODE = modules("harness", "baselines", "sweeps")


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports from among the known ones, at its start or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:  # a class or function of a module
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {""}


def package(module: str) -> str:
    """The name of a module's place in LEVELS."""
    parts = module.split(".")
    if parts[-1] == "cli" or parts[-1].endswith("_cli"):
        return "cli"
    return ("__init__" if len(parts) == 1 else parts[1]) if parts[0] == "harness" else parts[0]


def test_arrows_point_one_way() -> None:
    upwards = [
        f"{module} -> {other}"
        for module, path in CODE.items()
        for other in imports(path, CODE)
        if LEVEL[package(other)] > LEVEL[package(module)]
    ]
    assert not upwards


def test_no_import_circle() -> None:
    graph = {module: imports(path, CODE) - {module} for module, path in CODE.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_no_file_is_both_a_program_and_a_library() -> None:
    known = modules("harness", "baselines", "sweeps", "benchmarks")
    programs = {module for module, path in CODE.items() if "__name__ ==" in path.read_text("utf-8")}
    programs.discard("sweeps.ranks")
    assert {"harness.run", "harness.__main__", "harness.demo.train_clip"} <= programs
    used = [f"{module} -> {other}" for module, path in known.items() for other in imports(path, known) & programs]
    assert not used
