"""Apply `key.subkey=value`, or `@FILE` for a YAML file of such keys, to a nested mapping: a config, or the base of a grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.files import parse_yaml, read_yaml


def override(mapping: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply assignments, the last of a key counts, to a nested mapping; returns a new one."""
    result: dict[str, Any] = {key: longhand(key, value) for key, value in mapping.items()}
    for dotted, value in read_assignments(assignments):
        set_key(result, dotted, value)
    return result


def read_assignments(assignments: Sequence[str]) -> list[tuple[str, Any]]:
    """Read `key.subkey=value` (the value is YAML) and `@FILE` (a YAML mapping of dotted keys) as (dotted key, value), in order.

    Raises:
        UserError: an assignment of neither form, or a file that cannot be read as a mapping.
    """
    found: list[tuple[str, Any]] = []
    for assignment in assignments:
        if assignment.startswith("@"):
            found += read_yaml(Path(assignment[1:]).expanduser()).items()
            continue
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise UserError(
                f"override {shortened(assignment)!r}: write key=value, such as data.shots=4, or @FILE.yaml for several"
            )
        found.append((dotted, parse_yaml(text, f"override {shortened(assignment)!r}")))
    return found


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
