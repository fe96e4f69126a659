"""Files that are never half there: written under a temporary name, flushed, then renamed; and digests of content."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, AnyStr

from filelock import FileLock, Timeout

from vipbench.harness.errors import UserError
from vipbench.harness.system.plain_yaml import parse_yaml as parse_yaml

CHUNK_BYTES = 1 << 20
SECONDS_TO_LOCK = 60.0  # that a new temporary directory is given before it counts as left behind
MOST_NESTED = 100  # lists and objects of JSON in each other
TOO_DEEP = f"nested more than {MOST_NESTED} deep"
MOST_FILE_BYTES, MOST_YAML_BYTES = 256 << 20, 16 << 20
MOST_LINE = 32 << 20  # characters or bytes
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
NO_PLACE = (errno.ENAMETOOLONG, errno.ELOOP)
WRONG_KIND = {
    errno.EEXIST: "there is a file where a folder is needed; move it away, or give another place",
    errno.ENOTDIR: "there is a file where a folder is needed; move it away, or give another place",
    errno.EISDIR: "there is a folder where a file is needed; move it away, or give another place",
}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success the file written there replaces `path`, on failure it is removed.

    A link at `path` stays, and what it points to is replaced.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
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

    A link at `path` stays, and what it points to is replaced. Remains of killed calls are put right first: their
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
        """Rename an earlier target aside, then the new content into its place."""
        if self.target.exists():
            self.target.rename(self.path / "aside")
        self.content.rename(self.target)

    def close(self) -> None:
        """Remove the rest, but for a target that could not be replaced."""
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


def is_locked(path: Path) -> bool:
    """Check for a process that holds the lock of a file: on this machine, or on any where the file system shares locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that those who ask do not see each other
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given, non-ASCII as it is, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_whole(path: Path, most: int = MOST_FILE_BYTES) -> bytes:
    """All of a file, which anybody may have written.

    Raises:
        OSError: it cannot be read; errno.EFBIG where it holds more than `most` bytes.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(most, size) + 1)  # Python reserves as many bytes as it is asked for
        if len(content) > size:  # it grew, or is no regular file
            content += file.read(most + 1 - len(content))
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
    return content


def lines_of(file: IO[AnyStr], most: int = MOST_LINE) -> Iterator[AnyStr]:
    """The lines of an open file. Raises OSError (errno.EFBIG) where one has more than `most` characters or bytes."""
    while line := file.readline(most + 1):
        if len(line) > most:
            raise OSError(errno.EFBIG, f"a line is longer than {most >> 20} Mi characters")
        yield line


def read_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Raises:
        UserError: the file cannot be read, is not JSON, is nested too deeply, or gives a key twice (names the file and,
            where it is not JSON, the line).
    """
    try:
        return parse_json(read_whole(path), unique_keys=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """Read JSON that somebody else wrote; `unique_keys` refuses an object that gives a key twice.

    Raises:
        ValueError: it is not JSON, or nested more than `MOST_NESTED` deep, so that whatever walks it later can do so.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    level = [value]
    for _ in range(MOST_NESTED):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        ((twin, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twin[:80]!r} occurs twice")
    return mapping


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises UserError as `read_any_yaml` does, or where it holds something else."""
    mapping = read_any_yaml(path)
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: should be a mapping of keys; found {type(mapping).__name__}")
    return mapping


def read_any_yaml(path: Path, most: int = MOST_YAML_BYTES) -> Any:
    """Read a YAML file as `parse_yaml` does.

    Raises:
        UserError: the file cannot be read, is larger than `most` bytes, or is not such YAML.
    """
    try:
        text = read_whole(path, most).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    return parse_yaml(text, str(path))


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
    """Raise UserError, in one line, where a disk is full, broken or may not be written, or a path is of the wrong kind."""
    try:
        yield
    except OSError as error:
        if error.errno in WRONG_KIND:
            place = Path(error.filename or where)
            found = next((path for path in (place, *place.parents) if path.is_file()), place)
            raise UserError(f"{found}: {WRONG_KIND[error.errno]}") from error
        if error.errno not in NO_DISK + NO_PLACE:
            raise
        raise UserError(f"{error.filename or where}: {error.strerror}; what was written before is whole") from error


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raise UserError, in one line, where an output cannot be made: a file where a folder should be, no right to write."""
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
