"""Bounds of what a file may describe a model as, so that a damaged config ends in one line and not in a full memory."""

from pathlib import Path
from typing import Any

from vipbench.harness.errors import UserError, shortened

MOST_LAYERS, MOST_NUMBER = 1000, 1 << 24  # in a model's config


def check_numbers(path: Path, place: str, value: Any) -> None:
    """Refuse numbers that no model has; with a billion layers a model is never built to its end."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_numbers(path, f"{place}.{key}", inner)
    elif isinstance(value, int | float):
        most = MOST_LAYERS if "layers" in place else MOST_NUMBER
        if not -most <= value <= most:  # so for NaN
            raise UserError(f"{path}: {shortened(place)}: at most {most} is expected; found {shortened(value)}")


def mapping(path: Path, value: Any, kind: str = "open_clip model config") -> dict[str, Any]:
    """Return a value that must be a mapping. Raises UserError where it is something else."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: no {kind}: a mapping is expected; found {type(value).__name__}")
    return value
