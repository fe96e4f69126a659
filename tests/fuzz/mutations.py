"""Damage to files: of any file's bytes, and of the values inside of JSON, YAML, CSV, Parquet, tar, safetensors, ZIP and SQLite.

All choices are drawn from the random numbers that are given, so the same numbers give the same damage.
"""

import contextlib
import csv
import io
import json
import os
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import parse_yaml

SENTINEL = "sentinel"  # a folder beside the one that the program may use
HUGE = 5 << 30  # bytes, of a file that takes no room on the disk
UPWARDS = [f"../{SENTINEL}", f"../{SENTINEL}/kept", f"../../{SENTINEL}/kept.txt"]
PATHS = [*UPWARDS, "", ".", "..", "/", "~", "/dev/null/x", "/dev/zero"]
URLS = ["http://127.0.0.1:9/x", "file:///dev/zero", "simplecache::file:///dev/zero", "hf-hub:a/b"]
SIGNS = [*"\0 *-{é\ud800\"',", "a\nb", "a\tb", "\ufeffa", "\u202egnp", "\x1b[31m", "%s%n", "=1+1"]
LONG = ["x" * 70_000, "a/" * 3000, "9" * 400, "{{ 9 ** 9 ** 9 }}", "<think>"]
WORDS = [*PATHS, *URLS, *SIGNS, *LONG, "nan", "-1", "1e999", "0x10", "true", "null"]
INTEGERS = [-1, 0, 1, 7, 2**31, 2**53 + 1, 2**63, -(2**63), 2**64, 10**400]
VALUES: list[Any] = [
    None,
    True,
    False,
    *INTEGERS,
    0.5,
    -0.5,
    1e308,
    1e-320,
    [],
    {},
    [[]],
    [None],
    {"": None},
    ["a"] * 50,
]
# Text that stands for itself in JSON and YAML, whose libraries would not write it.
DEEP = ["[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000]
RAW = ["NaN", "-Infinity", "1e999", "9" * 5000, *DEEP, "'a'", "01", "{,}"]
RAW_YAML = ["2020-13-45", "!!set {a}", "&a [*a]", "*none", "{<<: 1}", "!!int soon", "4:00:00", ".inf", "? ", *DEEP]
NUMBERS = [struct.pack(form, number) for form in ("<q", ">q", "<i", ">i") for number in (-1, 2**31 - 1, 2**24)]


class _Twice(dict[str, Any]):
    """An object whose first key is written twice."""

    def items(self) -> Any:
        return [*super().items(), *list(super().items())[:1]]


def damage(path: Path, rng: Random) -> str:
    """Damage a file in place; returns a few words on how."""
    kind = rng.random()
    if kind < 0.06:
        path.unlink()
        form = rng.choice(["missing", "empty", "folder", "loop", "no link"] * 2 + ["huge"])
        if form in ("empty", "huge"):
            path.touch()
            os.truncate(path, HUGE if form == "huge" else 0)
        elif form == "folder":
            path.mkdir()
        elif form != "missing":
            path.symlink_to(path.name if form == "loop" else "nothing")
        return form
    content = path.read_bytes()
    structured = STRUCTURES.get(path.suffix)
    form = "bytes"
    if structured and kind < 0.75:
        with contextlib.suppress(
            UserError, ValueError, pa.ArrowException, OverflowError
        ):  # such a value cannot be written
            content, form = structured(content, rng), "values"
    path.chmod(0o644)
    path.write_bytes(damaged_bytes(content, rng) if form == "bytes" else content)
    return form


def damaged_bytes(data: bytes, rng: Random) -> bytes:
    """One to three changes of bytes."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        start = rng.randint(0, len(content))
        end = min(len(content), start + rng.choice([1, 2, 8, 100, 4000]))
        part = bytes(content[start:end])
        change = rng.randrange(9)
        if change == 0:
            content[start : start + 1] = bytes(byte ^ (1 << rng.randrange(8)) for byte in part[:1])
        elif change == 1:
            content[start:end] = bytes(len(part))
        elif change == 2:
            content[start:end] = b"\xff" * len(part)
        elif change == 3:
            del content[start:end]
        elif change == 4:
            del content[start:]
        elif change == 5:
            content[start:start] = part * rng.choice([1, 30])
        elif change == 6:
            content[start:start] = rng.choice(WORDS).encode("utf-8", "surrogatepass")[:5000]
        elif change == 7:
            content[start:start] = rng.randbytes(rng.choice([1, 8, 200]))
        else:
            number = rng.choice(NUMBERS)
            content[start : start + len(number)] = number
    return bytes(content)


def damaged_value(value: Any, rng: Random) -> Any:
    """A JSON value with one or two values in it replaced, dropped, doubled or moved."""
    root = [value]
    for _ in range(rng.randint(1, 2)):
        if places := list(_places(root)):
            _change(*rng.choice(places), rng)
    return root[0] if root else None


def _places(inside: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) in a value, outer ones first."""
    for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
        yield inside, key
        if isinstance(inside[key], dict | list):
            yield from _places(inside[key])


def _change(container: Any, key: Any, rng: Random) -> None:
    value, change = container[key], rng.randrange(9)
    if change == 0:
        del container[key]
    elif change == 1 and isinstance(value, dict):
        container[key] = _Twice(value) if rng.random() < 0.5 else {**value, rng.choice(WORDS): 1}
    elif change == 2 and isinstance(value, list) and value:
        value.append(value[rng.randrange(len(value))])
    elif change == 3 and isinstance(value, int | float) and not isinstance(value, bool):
        container[key] = rng.choice([-value, value + 1, str(value), float(value), value * 1000])
    elif change == 3 and isinstance(value, str):
        place = rng.randint(0, len(value))
        container[key] = value[:place] + rng.choice(WORDS) + value[place:]
    elif change == 4:
        container[key] = [value]
    elif change == 5:
        container[key] = f"@raw{rng.randrange(len(RAW + RAW_YAML))}@"
    elif change == 6:
        container[key] = rng.choice(WORDS)
    else:
        container[key] = rng.choice(VALUES)


def _json(value: Any, rng: Random, raw: Sequence[str] = RAW) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for number in range(len(RAW + RAW_YAML)):
        text = text.replace(f'"@raw{number}@"', raw[number % len(raw)])
    encoding = rng.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "latin-1"])
    return text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace")


def _damage_json(content: bytes, rng: Random) -> bytes:
    return _json(damaged_value(json.loads(content), rng), rng)


def _damage_lines(content: bytes, rng: Random) -> bytes:
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = _damage_json(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def _damage_yaml(content: bytes, rng: Random) -> bytes:
    return _json(damaged_value(parse_yaml(content.decode(), "original"), rng), rng, RAW_YAML)


def _damage_csv(content: bytes, rng: Random) -> bytes:
    rows: Any = damaged_value(list(csv.reader(io.StringIO(content.decode()))), rng)
    if not isinstance(rows, list):
        rows = [[rows]]
    text = io.StringIO()
    csv.writer(text).writerows(row if isinstance(row, list) else [row] for row in rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _damage_parquet(content: bytes, rng: Random) -> bytes:
    table = pq.read_table(io.BytesIO(content))
    place = rng.randrange(table.num_columns)
    name, change = table.column_names[place], rng.randrange(6)
    if change == 0:
        table = table.drop_columns([name])
    elif change == 1:
        table = table.append_column(rng.choice([name, *WORDS]), table.column(place))
    elif change == 2:
        table = rng.choice([table[:0], table[1:], pa.concat_tables([table] * 3)])
    else:
        values: Any = damaged_value(table.column(place).to_pylist(), rng)
        values = [values] * table.num_rows if not isinstance(values, list) else [*values, None][: table.num_rows]
        kind = table.schema.types[place] if rng.random() < 0.5 else None
        table = table.set_column(place, name, pa.array(values, kind))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _damage_tar(content: bytes, rng: Random) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    place = rng.randrange(len(members))
    member, data = members[place]
    change = rng.randrange(6)
    if change == 0:
        member.name = rng.choice([rng.choice(WORDS), f"{rng.choice(WORDS)}.jpg", f"../{SENTINEL}/{member.name}"])
    elif change == 1:
        member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"S", b"?"])
        member.linkname = rng.choice(WORDS)
    elif change == 2:
        del members[place]
    elif change == 3:
        members.insert(rng.randrange(len(members)), (member, data))
    else:
        structured = STRUCTURES.get(Path(member.name).suffix, damaged_bytes)
        members[place] = (member, structured(data, rng))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _damage_safetensors(content: bytes, rng: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.5:
        header = _damage_json(header, rng)
    else:
        start = rng.randrange(len(data) - 3) // 4 * 4
        data = data[:start] + struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e30])) + data[start + 4 :]
    return len(header).to_bytes(8, "little") + header + data


def _damage_zip(content: bytes, rng: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    described = next(number for number, (info, _) in enumerate(members) if info.filename.endswith("data.pkl"))
    place = described if rng.random() < 0.6 else rng.randrange(len(members))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, (info, data) in enumerate(members):
            if number == place:
                data = damaged_bytes(data, rng)
                info.filename = rng.choice([info.filename] * 4 + [f"../{SENTINEL}/x"])
            archive.writestr(info, data)
    return buffer.getvalue()


def _damage_sqlite(content: bytes, rng: Random) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.sqlite"
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            _damage_table(connection, rng)
        return path.read_bytes()


def _damage_table(connection: sqlite3.Connection, rng: Random) -> None:
    table = rng.choice(["shared", "answers"])
    names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    name = rng.choice(names)
    rows = connection.execute(f"SELECT rowid, {name} FROM {table}").fetchall()
    row, value = rng.choice(rows or [(0, "")])
    new: Any = rng.choice([*VALUES[:15], *WORDS, b"\xff\xfe", -1.5])
    if isinstance(value, str) and value.startswith("{") and rng.random() < 0.7:
        new = _damage_json(value.encode(), rng).decode("utf-8", "replace")
    with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
        if rng.random() < 0.15:
            connection.execute(rng.choice([f"DROP TABLE {table}", "PRAGMA user_version = 9", f"DELETE FROM {table}"]))
        else:
            connection.execute(f"UPDATE {table} SET {name} = ? WHERE rowid = ?", (new, row))
    connection.commit()


STRUCTURES: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _damage_json,
    ".jsonl": _damage_lines,
    ".yaml": _damage_yaml,
    ".csv": _damage_csv,
    ".parquet": _damage_parquet,
    ".tar": _damage_tar,
    ".safetensors": _damage_safetensors,
    ".pt": _damage_zip,
    ".sqlite": _damage_sqlite,
}
