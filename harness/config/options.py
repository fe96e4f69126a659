"""Options of a config: names, allowed values, defaults, and the comments beside them in the source.

`vipbench config --explain` and `vipbench methods NAME` print them; docs/config.md is written from them.
"""

import ast
import inspect
import io
import math
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from vipbench.harness.config.validation import Section

MACHINE_LIMIT = 1e6  # bounds from here on are those of number types, and left out of the words


@dataclass(frozen=True)
class Option:
    """An option: its values in words, its default (None where it must be given), and the comment beside it in the source."""

    name: str
    values: str
    default: Any
    comment: str


def describe_options(section: type[Section], settled: Section | None = None) -> list[Option]:
    """Describe the options of a section of a config.

    Args:
        settled: a section with all defaults filled in, some of which depend on others; None takes those of the class.
    """
    comments, schema = read_comments(section), section.model_json_schema()
    defaults = settled.model_dump(mode="json") if settled else {}
    return [
        Option(
            name,
            values_in_words(part, schema.get("$defs", {})),
            defaults.get(name, part.get("default")),
            comments.get(name, ""),
        )
        for name, part in schema["properties"].items()
    ]


def values_in_words(schema: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Describe the values that a JSON schema allows. `parts`: the schemas that it refers to."""
    if "$ref" in schema:
        return values_in_words(parts[schema["$ref"].rpartition("/")[2]], parts)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(values_in_words(part, parts) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "any")
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        inner = ", ".join(dict.fromkeys(values_in_words(item, parts) for item in items))
        return f"{len(items)} of {inner}" if "prefixItems" in schema else f"list of {inner}"
    words = {
        "number": "number",
        "integer": "whole number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "object": "mapping",
    }
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {schema[key]:g}" for key, sign in signs.items() if abs(schema.get(key, math.inf)) < MACHINE_LIMIT
    ]
    return " ".join([words.get(kind, str(kind)), ", ".join(bounds)]).strip()


def read_comments(section: type[BaseModel]) -> dict[str, str]:
    """Read the comment of each option from the source of its class: at the ends of its lines, or on whole lines above."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if not issubclass(cls, Section) or cls is Section:
            continue
        source = inspect.cleandoc("\n" + inspect.getsource(cls))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        (tree,) = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in comments and comments[first - 1].line.lstrip().startswith("#"):
                    first -= 1
                lines = range(first, (node.end_lineno or first) + 1)
                texts = [comments[line].string for line in lines if line in comments]
                found[node.target.id] = " ".join(text.lstrip("# ") for text in texts)
    return found
