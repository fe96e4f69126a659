"""Docstrings begin with a verb or the term they define."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
COVERED = ("harness", "baselines", "sweeps", "benchmarks", "tests")
RIDDLES = re.compile(r"(What|Whether|How|Where|Who|Whose|Whom|Why|When|Which|From|That|As)\b")


def test_docstrings_begin_with_a_verb_or_a_term() -> None:
    riddles, read = [], 0
    for path in sorted(path for folder in COVERED for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                read += bool(text)
                if RIDDLES.match(text):
                    riddles.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert read > 200
    assert not riddles, "\n".join(["a docstring begins with a verb or the term it defines:", *riddles])
