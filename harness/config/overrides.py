"""Apply `key.subkey=value` to a nested mapping, as it stands on a command line or in a grid."""

from collections.abc import Sequence
from typing import Any

from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.files import parse_yaml


def override(mapping: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `key.subkey=value` (the value is YAML) to a nested mapping; returns a new one."""
    result: dict[str, Any] = {key: longhand(key, value) for key, value in mapping.items()}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise UserError(f"override {shortened(assignment)!r}: write key=value, such as data.shots=4")
        set_key(result, dotted, parse_yaml(text, f"override {shortened(assignment)!r}"))
    return result


def set_key(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in a nested mapping in place; mappings on the way are copied, so that others' are not changed."""
    *path, last = dotted.split(".")
    for key in path:
        inner = mapping.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{dotted}: {key} is a value, not a section")
        mapping[key] = dict(inner or {})
        mapping = mapping[key]
    mapping[last] = longhand(dotted, value)


def longhand(key: str, value: Any) -> Any:
    return {"name": value} if key in ("method", "backbone") and isinstance(value, str) else value
