"""The structure of the house: imports run one way, and no file is both a program and a library."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up; a package imports from those above it in this list, and from itself.
LEVELS = [
    "harness.errors",
    "harness.system",
    "harness.config",
    "harness.data",
    "harness.distributed",
    "harness.models",
    "harness.methods",
    "harness.features",
    "harness.symptoms",
    "baselines",
    "harness.evaluation",
    "harness.training",
    "harness.runs",
    "harness.report",
    "sweeps",
    "harness.demo",
    "harness.commands",
    "harness.cli",
]
PROGRAMS = {"harness.run", "harness.pack"}  # they may import everything, and nothing imports them
LONGEST = 400  # lines


def modules() -> dict[str, Path]:
    """Files of the packages by the names of their modules."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for top in ("harness", "baselines", "sweeps")
        for path in sorted((ROOT / top).rglob("*.py"))
    }


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Our own modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in (name.removeprefix("vipbench.") for name in names):
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield name


def level(module: str) -> int:
    """The place of a module's package in `LEVELS`."""
    return next(place for place, package in enumerate(LEVELS) if f"{module}.".startswith(f"{package}."))


def is_program(path: Path) -> bool:
    return "\nif __name__ ==" in path.read_text(encoding="utf-8")


def test_no_import_circle() -> None:
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"import circle: {' -> '.join(error.args[1])}") from None


def test_imports_run_one_way() -> None:
    back = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        if name != "harness" and name not in PROGRAMS and not is_program(path)
        for other in imports(path)
        if other != "harness" and level(other) > level(name)
    ]
    assert not back


def test_no_file_is_a_program_and_a_library() -> None:
    programs = {name for name, path in MODULES.items() if is_program(path)}
    imported = {other for path in MODULES.values() for other in imports(path)}
    assert programs >= PROGRAMS
    assert not programs & imported


def test_files_are_short() -> None:
    long = {
        name: count for name, path in MODULES.items() if (count := len(path.read_text("utf-8").splitlines())) > LONGEST
    }
    assert not long
