"""The registry: methods by name, those in harness/methods/ and in every file of baselines/."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from harness.errors import UserError, did_you_mean
from harness.methods.base import Method

M = TypeVar("M", bound=Method)
_methods: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: make a method known by its name."""

    def add(cls: type[M]) -> type[M]:
        assert name not in _methods, f"two methods are called {name}"
        _methods[name] = cls
        return cls

    return add


def method_names() -> list[str]:
    """Names of all methods: those in harness/methods/vip.py and in every file of baselines/."""
    import baselines

    importlib.import_module("harness.methods.vip")
    for module in pkgutil.iter_modules(baselines.__path__):
        importlib.import_module(f"baselines.{module.name}")
    return sorted(_methods)


def method_class(name: str | None) -> type[Method]:
    """The method of a name.

    Raises:
        UserError: no such method (names the nearest one).
    """
    names = method_names()
    if name not in names:
        raise UserError(f"config: method.name: there is no method {name!r}; {did_you_mean(str(name), names)}")
    return _methods[str(name)]
