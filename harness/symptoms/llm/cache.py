"""The response cache: all answers of LLMs, from which a symptom set is rebuilt offline, byte for byte.

An LLM server's output is not deterministic across batches even at temperature 0, so the cache is the record. The key of an
answer is a hash of its request and server: model, revision, server version, messages, schema, sampling and sample number.
One SQLite file (write-ahead log, on a local disk): an answer is committed as it arrives, several processes may share the file.

    vipbench symptoms cache stats|export|import|prune|verify
"""

import json
import sqlite3
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_random

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.record import MOST_NUMBER, Answer, Identity, Request, Response, Totals
from vipbench.harness.system.files import atomic_path, digest_json, lines_of, parse_json

SCHEMA_VERSION = 1
TABLES = """
    CREATE TABLE IF NOT EXISTS shared (
        id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL, revision TEXT NOT NULL, server_version TEXT NOT NULL, content TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS answers (
        key TEXT PRIMARY KEY, shared INTEGER NOT NULL REFERENCES shared (id),
        message TEXT NOT NULL, sample INTEGER NOT NULL, response TEXT NOT NULL
    );
"""
BUSY_SECONDS = 60.0
PAGE = 1000  # answers held at a time when all are read
LOCKED = Retrying(  # when two processes open a new file at once, SQLite does not wait for the lock
    retry=retry_if_exception_message(match="database is locked"),
    wait=wait_random(0.01, 0.1),
    stop=stop_after_delay(BUSY_SECONDS),
    reraise=True,
)


class ResponseCache:
    """The answers in one SQLite file, made when missing. Safe to use from several threads and processes.

    Raises:
        UserError: (from any method) the disk is full, the file cannot be written or is no response cache.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.lock = threading.RLock()
        if self.path.is_dir():
            raise UserError(
                f"{self.path} is a directory; the response cache is one file, such as {self.path}/answers.sqlite"
            )
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            LOCKED(self._prepare)

    def _prepare(self) -> None:
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise UserError(f"{self.path}: a response cache of version {version}, this program reads {SCHEMA_VERSION}")
        self.connection.execute("PRAGMA journal_mode = WAL")
        # A killed process loses nothing; a power cut may take the last moments.
        self.connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            tables = self.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            if set(tables) - {("shared",), ("answers",)}:
                raise UserError(f"{self.path} is another program's database, not a response cache")
            self.connection.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def __len__(self) -> int:
        with self._errors():
            return int(self.connection.execute("SELECT count(*) FROM answers").fetchone()[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it."""
        with self._errors():
            self.connection.close()

    def get(self, key: str) -> Response | None:
        """Look up the answer on record under `key`."""
        with self._errors():
            row = self.connection.execute("SELECT response FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else _response(row[0], f"{self.path}: the answer {key}")

    def put(self, key: str, request: Request, revision: str, server_version: str, response: Response) -> Response:
        """Record an answer and return the one on record: the first, where another process was quicker."""
        *before, last = request.messages
        content = {"messages": before, "schema": request.schema, "sampling": request.sampling}
        identity = Identity(request.model, revision, server_version)
        digest = digest_json([*identity, content])
        # JSON, since a model may answer with what SQLite cannot hold as text (a lone surrogate)
        row = (key, json.dumps(last), request.sample, json.dumps(response.content()), digest)
        with self._transaction():
            self.connection.execute(
                "INSERT OR IGNORE INTO shared (digest, model, revision, server_version, content) VALUES (?, ?, ?, ?, ?)",
                (digest, *identity, json.dumps(content, sort_keys=True)),
            )
            added = self.connection.execute(
                "INSERT OR IGNORE INTO answers (key, shared, message, sample, response)"
                " SELECT ?, id, ?, ?, ? FROM shared WHERE digest = ?",
                row,
            )
            recorded = response if added.rowcount else self.get(key)
        assert recorded is not None, "an answer that was not added is on record"
        return recorded

    def answers(self, identities: Collection[Identity] | None = None) -> Iterator[Answer]:
        """Yield all answers (None), or those of some servers, in the order of their keys."""
        query = (
            "SELECT key, model, revision, server_version, content, message, sample, response"
            " FROM answers JOIN shared ON shared.id = answers.shared WHERE key > ? ORDER BY key LIMIT ?"
        )
        key = ""
        while True:
            with self._errors():
                rows = self.connection.execute(query, (key, PAGE)).fetchall()
            if not rows:
                return
            for key, model, revision, server_version, content, message, sample, response in rows:
                who = Identity(model, revision, server_version)
                if identities is None or who in identities:
                    yield _answer(self.path, key, who, content, message, sample, response)

    def matching(
        self, model: str | None = None, revision: str | None = None, server_version: str | None = None
    ) -> list[Identity]:
        """List the identities with answers on record, sorted; None stands for any."""
        wanted = (model, revision, server_version)
        return [
            totals.identity
            for totals in self.stats()
            if all(want in (None, have) for want, have in zip(wanted, totals.identity, strict=True))
        ]

    def stats(self) -> list[Totals]:
        """Count answers by model, revision and server version, sorted by these."""
        query = (
            "SELECT model, revision, server_version, count(*), total(json_extract(response, '$.usage.prompt_tokens')),"
            " total(json_extract(response, '$.usage.completion_tokens')),"
            " total(json_extract(response, '$.finish_reason') = 'length')"
            " FROM answers JOIN shared ON shared.id = answers.shared GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        with self._errors():
            rows = self.connection.execute(query).fetchall()
        return [Totals(Identity(*row[:3]), *(int(number) for number in row[3:])) for row in rows]

    def export(self, path: Path, identities: Collection[Identity] | None = None) -> int:
        """Write all answers (None), or those of some servers, as JSON lines in the order of their keys; returns their number.

        The same answers give the same bytes, in whatever order they came.
        """
        count = 0
        with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
            for answer in self.answers(identities):
                line = {
                    "key": answer.key,
                    **answer.request.content(),
                    "revision": answer.identity.revision,
                    "server_version": answer.identity.server_version,
                    "response": answer.response.content(),
                }
                file.write(json.dumps(line, sort_keys=True) + "\n")
                count += 1
        return count

    def load(self, path: Path) -> tuple[int, int]:
        """Read an export; returns the number of answers that were added, and of those that were on record already.

        Raises:
            UserError: a line is no exported answer, or its key does not match its content (names file and line).
        """
        before, lines = len(self), 0
        try:
            with path.open(encoding="utf-8-sig") as file:
                for lines, line in enumerate(lines_of(file), start=1):
                    key, request, revision, server_version, response = _parse(line, f"{path}, line {lines}")
                    self.put(key, request, revision, server_version, response)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not an export of a response cache: {error}") from error
        added = len(self) - before
        return added, lines - added

    def prune(self, identities: Collection[Identity]) -> int:
        """Remove the answers of some servers; returns their number."""
        removed = 0
        with self._transaction():
            for identity in identities:
                which = "(SELECT id FROM shared WHERE (model, revision, server_version) = (?, ?, ?))"
                removed += self.connection.execute(f"DELETE FROM answers WHERE shared IN {which}", identity).rowcount
                self.connection.execute(f"DELETE FROM shared WHERE id IN {which}", identity)
        with self._errors():
            self.connection.execute("VACUUM")
        return removed

    def verify(self) -> int:
        """Check the file's structure and every answer's key against its request; returns the number of answers.

        Raises:
            UserError: something is damaged (names it).
        """
        with self._errors():
            (verdict,) = self.connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise UserError(f"{self.path}: damaged: {verdict}; import an export into a new file")
        count = 0
        for answer in self.answers():
            if answer.key != answer.request.key(answer.identity.revision, answer.identity.server_version):
                raise UserError(
                    f"{self.path}: the answer {answer.key} is not the one to what is recorded as its request"
                )
            count += 1
        if count != len(self):
            raise UserError(f"{self.path}: {len(self) - count} answers have lost their request")
        return count

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            finally:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Hold the lock; turn errors of the disk or the file into user errors."""
        try:
            with self.lock:
                yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # ours
        except sqlite3.DatabaseError as error:
            advice = "it is not a response cache, or damaged" if "not a database" in str(error) else ""
            if "full" in str(error) or "disk I/O" in str(error):
                advice = "what was answered before is on record; free some space and start the same command again"
            raise UserError(f"{self.path}: {error}{'; ' if advice else ''}{advice}") from error
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; the response cache needs a place that can be written"
            ) from error


def _answer(path: Path, key: str, who: Identity, content: str, message: str, sample: int, response: str) -> Answer:
    where = f"{path}: the answer {key}"
    try:
        shared = parse_json(content)
        messages = [*shared["messages"], parse_json(message)]
        request = Request(who.model, messages, shared["schema"], shared["sampling"], sample)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged: {error}") from error
    return Answer(key, who, request, _response(response, where))


def _response(text: str, where: str) -> Response:
    try:
        return Response.checked(parse_json(text))
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error


def _check(request: Request, *words: str) -> None:
    """Raise ValueError for fields that make no request, or one that SQLite cannot hold."""
    kinds: list[tuple[object, type]] = [(request.model, str), (request.messages, list), (request.sampling, dict)]
    if not all(isinstance(value, kind) for value, kind in kinds) or not request.messages:
        raise ValueError("model, messages or sampling are of the wrong kind")
    if not isinstance(request.sample, int) or not 0 <= request.sample <= MOST_NUMBER:
        raise ValueError("sample is no number of an answer")
    for word in (request.model, *words):
        word.encode()  # not so with a lone surrogate


def _parse(line: str, where: str) -> tuple[str, Request, str, str, Response]:
    try:
        content = parse_json(line)
        key, revision, server_version = (str(content.pop(name)) for name in ("key", "revision", "server_version"))
        response = Response.checked(content.pop("response"))
        request = Request(**content)
        _check(request, revision, server_version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not an exported answer: {error}") from error
    if request.key(revision, server_version) != key:
        raise UserError(f"{where}: the key is not the hash of what was asked; the line was changed")
    return key, request, revision, server_version, response
