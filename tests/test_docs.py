"""Every path and every name of our code that the documents and docstrings mention is there."""

import ast
import re
from pathlib import Path

from tests.test_architecture import LEVELS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("symptoms_cache/*.md"),
    ROOT / "harness" / "demo" / "model" / "README.md",
]
TOPS = ("harness", "baselines", "sweeps", "tests", "benchmarks", "docs")
CODE = sorted(path for top in TOPS for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".yaml"))
PLACE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(TOPS)})/[\w./-]*\w/?")
NAME = re.compile(r"(?<![\w/.-])(?:vipbench\.)?(?:harness|baselines|sweeps)(?:\.[A-Za-z_]\w*)+")


def prose(path: Path) -> str:
    """The text of a document, or the docstrings and comments of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = ast.walk(ast.parse(text))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return "\n".join([*docstrings, *re.findall(r"#.*", text)])


def exists(name: str) -> bool:
    """Return True for a module, or a name that one defines or imports."""
    module = ROOT
    for position, part in enumerate(parts := name.split(".")):
        if (module / part).is_dir():
            module /= part
            continue
        file = module / f"{part}.py"
        rest = parts[position + 1 :] if file.is_file() else parts[position:]
        text = (file if file.is_file() else module / "__init__.py").read_text(encoding="utf-8")
        return all(re.search(rf"\b{re.escape(attribute)}\b", text) for attribute in rest)
    return True


def mentions(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """All that a pattern finds in documents and docstrings, each with its file."""
    return [
        (str(path.relative_to(ROOT)), found) for path in [*DOCUMENTS, *CODE] for found in pattern.findall(prose(path))
    ]


def test_paths_that_are_mentioned_exist() -> None:
    found = mentions(PLACE)
    assert len(found) > 40
    assert not [(file, place) for file, place in found if not (ROOT / place).exists()]


def test_names_that_are_mentioned_exist() -> None:
    found = mentions(NAME)
    assert len(found) > 20
    assert not [(file, name) for file, name in found if not name.startswith("vipbench.") or not exists(name)]


def test_the_tree_in_the_readme_is_that_of_the_code() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where everything is")[2].partition("\n## ")[0]
    shown = {"baselines", "harness", "sweeps"} & set(re.findall(r"^    (\w+)/ ", tree, re.MULTILINE))
    assert shown == {"baselines", "harness", "sweeps"}
    packages = {path.name for path in (ROOT / "harness").iterdir() if path.is_dir() and path.name != "__pycache__"}
    listed = re.findall(r"^      (\w+)/ ", tree, re.MULTILINE)
    assert set(listed) == packages
    order = [name.removeprefix("harness.") for name in LEVELS]
    assert [name for name in listed if name in order] == [name for name in order if name in listed], (
        "as imports may run"
    )
