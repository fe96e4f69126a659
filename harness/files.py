"""Files that are never half there: written under a temporary name, flushed, then renamed; and digests of content."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from harness.errors import UserError

CHUNK_BYTES = 1 << 20
SECONDS_TO_LOCK = 60.0  # that a new temporary directory is given before it counts as left behind
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")


# libyaml's parser, which PyYAML's wheels hold, is ten times as fast; a table of a large sweep reads thousands of configs.
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which 4:00:00 is what is written there: YAML 1.1 would count it in base 60, as 14400."""


Loader.yaml_implicit_resolvers = {
    character: [("tag:yaml.org,2002:str", SIXTIES), *resolvers] if character in "+-0123456789" else resolvers
    for character, resolvers in Loader.yaml_implicit_resolvers.items()
}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success the file written there replaces `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private; these are as public as the user's others
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it becomes `path`, on failure it is removed.

    A link at `path` stays, and what it points to is replaced. What calls left that were killed is put right first: their
    temporary directories are removed, and a directory that they had moved aside comes back where none took its place.

    Raises:
        UserError: `path` exists and `overwrite` is false, or nothing can be written there.
    """
    target = Path(os.path.realpath(path) if path.is_symlink() else os.path.abspath(path))
    workspace = _Workspace(target)
    with output_errors(path):
        _recover(target)
        if target.exists() and not overwrite:
            raise UserError(f"{path} exists; give --overwrite to replace it, or another place")
        workspace.open()
    try:
        with disk_errors(path):
            yield workspace.content
        with output_errors(path):
            workspace.publish()
    finally:
        workspace.close()


class _Workspace:
    """A temporary directory beside a target: `content` will be the target, `aside` is what was there before, and `held` is
    locked as long as the process that made it lives."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def open(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".tmp", dir=self.target.parent))
        self.lock = FileLock(self.path / "held")
        self.lock.acquire()
        self.content = self.path / "content"
        self.content.mkdir()

    def publish(self) -> None:
        """Rename what was there aside, then the new content in."""
        if self.target.exists():
            self.target.rename(self.path / "aside")
        self.content.rename(self.target)

    def close(self) -> None:
        """Remove what is left, but for a target that could not be replaced."""
        _put_back(self.path, self.target)
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()


def _put_back(workspace: Path, target: Path) -> None:
    aside = workspace / "aside"
    if aside.exists() and not target.exists():
        aside.rename(target)


def _recover(target: Path) -> None:
    """Put right what killed calls left beside a target. A workspace without a lock file may be one that is being made."""
    for workspace in target.parent.glob(f".{glob.escape(target.name)}.{'[a-z0-9_]' * 8}.tmp"):  # as mkdtemp names them
        held = workspace / "held"
        with suppress(Timeout, FileNotFoundError, PermissionError):  # in use, finished meanwhile, or another user's
            if workspace.is_dir() and (held.is_file() or time.time() - workspace.stat().st_mtime > SECONDS_TO_LOCK):
                with FileLock(held, timeout=0):
                    _put_back(workspace, target)
                    shutil.rmtree(workspace, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given, non-ASCII as it is, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON (names the file and the line).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds something else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: should be a mapping of keys; found {type(content).__name__}")
    return content


def digest_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Raises UserError, in one line, where a disk is full, broken or may not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"{error.filename or where}: {error.strerror}; what was written before is whole") from error


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raises UserError, in one line, where an output cannot be made: a file where a folder should be, no right to write."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
        raise UserError(f"{path}: cannot be written: {error.strerror}{where}") from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
