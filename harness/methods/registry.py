"""The registry: methods by name, from harness/methods/, baselines/, plugin files and installed packages.

A plugin is a Python file, named in `run.plugins` or by --plugin, that registers methods. An installed package offers methods
as entry points of the group `vipbench.methods`, under their names; it is imported when one of them is chosen.
"""

import importlib
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple, TypeVar

from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.errors import UserError, did_you_mean, shortened
from vipbench.harness.methods.base import Method
from vipbench.harness.system.files import digest_file, digest_json

BUILT_IN = ("vipbench.harness.methods", "vipbench.baselines")  # packages
ENTRY_POINTS = "vipbench.methods"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
M = TypeVar("M", bound=Method)


class _Code(NamedTuple):
    """The file that defines a method, and its SHA-256."""

    file: Path
    digest: str


_methods: dict[str, type[Method]] = {}
_code: dict[type[Method], _Code] = {}  # of methods that are not vipbench's own
_plugins: dict[Path, str] = {}  # SHA-256 of those loaded


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: add a method to the registry under its name.

    Raises:
        UserError: the name is taken or cannot be that of a folder, or the class is no `Method` with a `Config`, or was not
            defined in a file.
    """

    def add(cls: type[M]) -> type[M]:
        if not NAME.fullmatch(name):
            raise UserError(
                f"method {shortened(name)!r}: a name has letters, digits, _ and - only, since folders are named so"
            )
        if name in _methods:
            raise UserError(f"method {name!r} is registered already, by {_origin(name)}; rename one")
        if not (issubclass(cls, Method) and issubclass(getattr(cls, "Config", object), MethodConfig)):
            raise UserError(f"method {name!r}: give a subclass of Method, whose Config is a subclass of MethodConfig")
        if cls.__module__.rpartition(".")[0] not in BUILT_IN:
            _code[cls] = _defined_in(name, cls)
        _methods[name] = cls
        return cls

    return add


def method_names() -> list[str]:
    """Names of all methods: vipbench's own, those of plugins that were loaded, and those that installed packages offer."""
    _import_built_in()
    return sorted({*_methods, *(entry.name for entry in _offered(tuple(sys.path)))})


def method_class(name: str | None) -> type[Method]:
    """The method of a name. Raises UserError where there is none, or two, or its package cannot be imported."""
    names = method_names()
    if name is None or name not in names:
        raise UserError(f"config: method.name: there is no method {name!r}; {did_you_mean(str(name), names)}")
    offers = [entry for entry in _offered(tuple(sys.path)) if entry.name == name]
    if name not in _methods:
        _import_offer(offers[0])
    for offer in offers:
        if _root(_methods[name].__module__) != _root(offer.module):
            raise UserError(
                f"method {name!r} is registered by {_origin(name)} and offered by {_distribution(offer)} "
                f"(entry point {offer.value}); rename one, or uninstall it"
            )
    return _methods[name]


def method_digest(name: str, files: Mapping[str, Path] | None = None) -> str | None:
    """SHA-256 of the file that defines a method, and of those that its options name; None where there is neither.

    vipbench's own methods are defined by its version, which is on record in another way.

    Args:
        files: by option, from `MethodConfig.files`.

    Raises:
        UserError: one of them cannot be read.
    """
    code = _code.get(method_class(name))
    digests: dict[str, str] = {}
    for option, path in (files or {}).items():
        try:
            digests[option] = digest_file(path)
        except OSError as error:
            raise UserError(f"method.{option}: {path}: cannot be read: {error.strerror}") from error
    if not digests:
        return code.digest if code else None
    return digest_json({"code": code.digest if code else None, "files": digests})


def load_plugins(paths: Sequence[Path]) -> None:
    """Load files that register methods; one that was loaded before is loaded again only where it has changed since.

    Raises:
        UserError: a file is missing, cannot be imported, or registers no method or one whose name is taken.
    """
    _import_built_in()
    for path in paths:
        if not os.path.isfile(path) or path.suffix != ".py":
            raise UserError(f"plugin {path}: no such Python file; give one that registers a method")
        path = path.resolve()
        try:
            digest = digest_file(path)
        except OSError as error:
            raise UserError(f"plugin {path}: cannot be read: {error.strerror}") from error
        if _plugins.get(path) != digest:
            with _all_or_nothing():
                _load_plugin(path)
            _plugins[path] = digest


def plugin_digests(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of plugins that were loaded, by path as given."""
    return {str(path): _plugins[path.resolve()] for path in paths}


def _load_plugin(path: Path) -> None:
    """Execute a file as a module of a name that nothing else has, in the place of what it registered before."""
    for name in [name for name, cls in _methods.items() if cls in _code and _code[cls].file == path]:
        del _methods[name]
    others = set(_methods)
    spec = spec_from_file_location(f"vipbench_plugin_{digest_json(str(path))[:16]}", path)
    assert spec
    module = sys.modules[spec.name] = module_from_spec(spec)
    with _one_line(f"plugin {path}", path):
        # Not by the loader, which may take a cached file of an earlier content, and would write one beside the user's.
        exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), module.__dict__)
    if not set(_methods) - others:
        raise UserError(f'plugin {path}: registers no method; put @register("NAME") on a subclass of Method')


def _import_offer(offer: EntryPoint) -> None:
    """Import the module of an entry point, which registers the method of its name."""
    where = f"method {offer.name!r}: {_distribution(offer)} offers it (entry point {offer.value})"
    with _all_or_nothing():
        with _one_line(where):
            offer.load()
        if offer.name not in _methods:
            raise UserError(f"{where}, but does not register a method of this name")


@cache
def _offered(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of packages that are found along `sys.path`."""
    return tuple(entry_points(group=ENTRY_POINTS))


def _import_built_in() -> None:
    for package in BUILT_IN:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")


def _origin(name: str) -> str:
    """The file or module that registered a method, for error messages."""
    cls = _methods[name]
    return str(_code[cls].file) if cls in _code else cls.__module__


def _defined_in(name: str, cls: type[Method]) -> _Code:
    """The file that defines a method. Raises UserError where there is none, as for a class of a notebook."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        raise UserError(
            f"method {name!r}: its code is part of what a run is, and must be a file; save it and name it in run.plugins"
        )
    return _Code(Path(file), digest_file(Path(file)))


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """Put the registry back to what it was where the code that registers methods fails."""
    before = dict(_methods)
    try:
        yield
    except BaseException:
        _methods.clear()
        _methods.update(before)
        raise


@contextmanager
def _one_line(where: str, file: Path | None = None) -> Iterator[None]:
    """Raise whatever goes wrong in somebody's code as a UserError, with the line of `file` where it did."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = frames[-1] if frames else getattr(error, "lineno", None)
        at = f", line {line}" if file and line else ""
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{where}{at}: {kind}{shortened(' '.join(str(error).split()), 300)}") from error


def _distribution(offer: EntryPoint) -> str:
    return f"the package {offer.dist.name}" if offer.dist else "an installed package"


def _root(module: str) -> str:
    return module.partition(".")[0]
