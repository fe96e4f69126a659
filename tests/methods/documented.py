"""Code that the documentation shows."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def code_blocks(name: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text(), flags=re.M | re.S)


def write_plugin(folder: Path) -> Path:
    """The plugin that docs/methods.md shows, as a file."""
    (block,) = code_blocks("methods.md")
    path = folder / "my_kgcoop.py"
    path.write_text(block)
    return path
