"""Values that JSON and YAML hold: checked as numbers, and laid flat."""

from collections.abc import Mapping
from typing import Any

MOST_NUMBER = 2**53  # up to which floats hold each integer


def is_number(value: Any, most: float = MOST_NUMBER) -> bool:
    """Check that a value is a number from -most to most: no bool, no NaN, none that no float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists, and what is in them, become tuples, so that rows can be compared and grouped."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _hashable(value)
    return flat


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = list(value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
