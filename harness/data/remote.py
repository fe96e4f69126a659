"""Shards at a URL (http, s3, gs: whatever fsspec opens), copied whole into a local cache of bounded size.

The cache is VIPBENCH_CACHE (default ~/.cache/vipbench/shards) of at most VIPBENCH_CACHE_GIB (default 50). Any number of processes
share it: one downloads a shard, the others wait for it; a copy appears under its name when its checksum is right. Copies used
longest ago make room. Only whole shards are kept: a two-level shuffle (`train.shuffle_block`) reads one after the other.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from filelock import FileLock, Timeout
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from vipbench.harness.data.names import SHA256_HEX
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import output_errors

CHUNK_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30  # of dataset.json and of an index
MAX_CACHE_GIB = 1e9
ATTEMPTS = 5
FINAL = (FileNotFoundError, PermissionError, ImportError, UserError, ValueError)  # asking again does not help
SECONDS_TO_LOOK_AGAIN = 0.05


class Stream(Protocol):
    """A file that is read from its start to its end."""

    def read(self, size: int) -> bytes:
        """The next bytes, none at the end."""


def is_url(path: str | Path) -> bool:
    """Return True for a URL that fsspec opens; file:// is one too."""
    return "://" in str(path)


def join(root: str | Path, name: str) -> str:
    """A name within a folder or URL; an absolute path or a URL stays itself."""
    if is_url(name) or os.path.isabs(name):
        return name
    return f"{str(root).rstrip('/')}/{name}"


@contextmanager
def open_binary(path: str | Path) -> Iterator[Stream]:
    """Open a file or URL to read from its start; where a connection breaks, reading goes on after it.

    Raises:
        UserError: it is not there or cannot be reached, or its protocol needs a package that is missing.
    """
    _refuse_others(path)
    file = _retrying(_opened, path)
    try:
        yield _Persistent(path, file)
    finally:
        file.close()


def _refuse_others(path: str | Path) -> None:
    """Raise UserError where a local path is a folder, or a pipe or device, which may wait or go on for ever."""
    if not is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot be read: it is not a file")


class _Persistent:
    def __init__(self, path: str | Path, file: IO[bytes]) -> None:
        self.path, self.file, self.position = path, file, 0

    def read(self, size: int) -> bytes:
        data: bytes = _retrying(self._read, self.path, size)
        self.position += len(data)
        return data

    def _read(self, path: str | Path, size: int) -> bytes:
        self.file.seek(self.position)
        return self.file.read(size)


def matching(pattern: str) -> list[str]:
    """URLs that a URL with * or ? stands for, sorted. Raises UserError as `open_binary` does."""
    return sorted(_retrying(_matching, pattern))


def _matching(pattern: str) -> list[str]:
    import fsspec

    file_system, path = fsspec.core.url_to_fs(pattern)
    return [file_system.unstrip_protocol(match) for match in file_system.glob(path)]


def _opened(path: str | Path) -> Any:
    import fsspec

    return fsspec.open(str(path), "rb").open()


def read_bytes(path: str | Path) -> bytes:
    """All of a file or URL; connections that break are tried again.

    Raises:
        UserError: as `open_binary` does, and where there are more than `MAX_FILE_BYTES`.
    """
    if is_url(path):
        data = bytes(_retrying(_read_bytes, path))
    else:
        _refuse_others(path)
        try:
            with Path(path).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{path}: it has more than {MAX_FILE_BYTES} bytes")
    return data


def _read_bytes(path: str | Path) -> bytes:
    with _opened(path) as file:
        return bytes(file.read(MAX_FILE_BYTES + 1))


class ShardCache:
    """Copies of shards in a folder that takes at most `bound` bytes."""

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound

    @classmethod
    def from_environment(cls) -> "ShardCache":
        """The cache that VIPBENCH_CACHE and VIPBENCH_CACHE_GIB name. Raises UserError for a bound that is no number."""
        folder = Path(os.environ.get("VIPBENCH_CACHE", Path.home() / ".cache" / "vipbench" / "shards"))
        gib = os.environ.get("VIPBENCH_CACHE_GIB", "50")
        try:
            number = float(gib)
        except ValueError:
            number = 0.0
        if not 0 < number <= MAX_CACHE_GIB:
            raise UserError(f"VIPBENCH_CACHE_GIB: {gib[:50]!r} is no number of GiB; the default is 50")
        return cls(folder, int(number * 2**30))

    def open(self, url: str, sha256: str) -> int:
        """A file descriptor of the local copy of a shard, which is downloaded where it is missing.

        The descriptor stays good when the copy leaves the cache.

        Raises:
            UserError: it is not there, cannot be reached, is not what `sha256` (hex) describes, or is larger than the bound.
        """
        if not re.fullmatch(SHA256_HEX, sha256):
            raise UserError(f"{url}: its checksum {sha256[:50]!r} is no SHA-256 of 64 hexadecimal digits")
        copy = self.folder / f"{sha256}.tar"
        while True:
            try:
                descriptor = os.open(copy, os.O_RDONLY)
                os.utime(copy)
                return descriptor
            except FileNotFoundError:  # never there, or made room for another one between two calls
                with output_errors(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / f"{sha256}.lock"):
                    if not copy.is_file():
                        _retrying(self._download, url, sha256, copy)

    def _download(self, url: str, sha256: str, copy: Path) -> None:
        import fsspec

        part = copy.with_suffix(".part")
        file_system, path = fsspec.core.url_to_fs(url)
        size = int(file_system.info(path).get("size") or 0)
        if size <= 0:
            raise UserError(f"{url}: it is empty, or the server does not say how large it is")
        try:
            with part.open("wb") as file, file_system.open(path, "rb") as source:
                self._make_room(url, size, file)
                digest = hashlib.sha256()
                while chunk := source.read(CHUNK_BYTES):
                    if file.tell() + len(chunk) > size:
                        raise UserError(f"{url}: it goes on after the {size} bytes that its server stated")
                    digest.update(chunk)
                    file.write(chunk)
                file.truncate()
                os.fsync(file.fileno())
            if digest.hexdigest() != sha256:
                raise OSError(
                    f"what came is not what the dataset lists (SHA-256 {digest.hexdigest()[:12]}, not {sha256[:12]})"
                )
            part.rename(copy)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, url: str, size: int, file: IO[bytes]) -> None:
        """Remove copies used longest ago, then claim `size` bytes; waits for downloads of others that have claimed theirs."""
        if size > self.bound:
            raise UserError(
                f"{url}: {size} bytes are more than the cache may take ({self.bound}); raise VIPBENCH_CACHE_GIB"
            )
        while not self._claim(size, file):
            time.sleep(SECONDS_TO_LOOK_AGAIN)

    def _claim(self, size: int, file: IO[bytes]) -> bool:
        with FileLock(self.folder / "room.lock"):
            for part in self.folder.glob("*.part"):
                self._sweep(part)
            held = sorted(self._held())
            total = sum(size for _, size, _ in held)
            for _, length, path in held:
                if total + size > self.bound and path.suffix == ".tar":
                    path.unlink(missing_ok=True)
                    total -= length
            if total + size > self.bound:
                return False
            file.truncate(size)  # from now on it counts for others
            return True

    def _sweep(self, part: Path) -> None:
        """Remove the download of a process that died: the system then released its lock."""
        with suppress(Timeout), FileLock(part.with_suffix(".lock"), timeout=0):
            part.unlink(missing_ok=True)

    def _held(self) -> Iterator[tuple[float, int, Path]]:
        """(when it was last used, bytes, path) of copies and of downloads on their way."""
        for path in self.folder.iterdir():
            if path.suffix in (".tar", ".part"):
                with suppress(FileNotFoundError):  # it became a copy, or left
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path


def _retrying(function: Any, *arguments: Any) -> Any:
    """Call a function again when a connection breaks; at last one clear line."""
    path = arguments[0]

    def give_up(state: RetryCallState) -> Any:
        assert state.outcome is not None
        error = state.outcome.exception()
        raise UserError(
            f"{path}: cannot be read after {state.attempt_number} attempts: {' '.join(str(error).split())}"
        ) from error

    attempt = retry(
        retry=retry_if_exception(_worth_another_try),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(multiplier=0.2, max=10),
        retry_error_callback=give_up,
    )
    try:
        return attempt(function)(*arguments)
    except FINAL as error:
        raise _as_user_error(path, error) from error


def _worth_another_try(error: BaseException) -> bool:
    """Return whether a connection may be what failed. fsspec reports a server that cannot be reached as a missing file too."""
    return not isinstance(error, FINAL) or isinstance(error.__cause__, OSError)


def _as_user_error(path: str | Path, error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file")
    if isinstance(error, ImportError):
        return UserError(f"{path}: {error} (pip install 'vipbench[remote]' brings s3fs and gcsfs)")
    return UserError(f"{path}: cannot be read: {' '.join(str(error).split())}")
