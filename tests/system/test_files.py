"""Files that others wrote: read, or refused in one line."""

import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vipbench.harness.data import images
from vipbench.harness.data.images import BadImage, ImageFile
from vipbench.harness.data.importers import csv
from vipbench.harness.data.names import listed_classes
from vipbench.harness.errors import UserError
from vipbench.harness.features.cache import FeatureBank, list_banks
from vipbench.harness.symptoms.llm.batch import read_batch
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.keys import read_key
from vipbench.harness.symptoms.llm.record import Identity
from vipbench.harness.symptoms.plans import read_classes
from vipbench.harness.system.files import (
    MOST_FILE_BYTES,
    MOST_LINE,
    MOST_NESTED,
    lines_of,
    parse_json,
    read_json,
    read_whole,
    write_text,
)
from vipbench.sweeps.units import last_line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_text('{"naïve": [1, 2]}', encoding=encoding)
    assert read_json(tmp_path / "a.json") == {"naïve": [1, 2]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON: Expecting"),
        (b"", "not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not JSON: the key 'c' occurs twice"),
        (b"[" * 3000 + b"]" * 3000, "nested more than 100 deep"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested more than 100 deep"),
        (b"[" * MOST_NESTED + b"1" + b"]" * MOST_NESTED, "nested more than 100 deep"),
        (b"9" * 10_000, "not JSON"),  # more digits than Python turns into a number
        (b'{"a": "\xff"}', "not JSON"),
        (b"\x00", "not JSON"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_nesting_that_files_have_is_fine() -> None:
    text = "[" * (MOST_NESTED - 1) + "1" + "]" * (MOST_NESTED - 1)
    assert json.dumps(parse_json(text)) == text
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}  # as JSON has it, where nobody asks


def test_a_link_to_a_file_is_kept_when_the_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "set.json", tmp_path / "set.json"
    write_text(target, "old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["set.json"]


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "JSON": lambda file, folder: read_json(file),
    "classes": lambda file, folder: listed_classes(None, file),
    "classes and groups": lambda file, folder: read_classes("t", None, file, None, None),
    "a key": lambda file, folder: read_key(file),
    "a manifest": lambda file, folder: csv.read(file),
    "an export": lambda file, folder: ResponseCache(folder / "cache").load(file),
    "a batch": lambda file, folder: read_batch(file, [], ResponseCache(folder / "cache"), Identity("m", "r", "v")),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.slow
def test_no_more_is_read_of_a_file_than_it_may_hold(tmp_path: Path, read: Callable[[Path, Path], Any]) -> None:
    file = tmp_path / "huge"
    file.touch()
    os.truncate(file, MOST_FILE_BYTES + MOST_LINE)
    with pytest.raises(UserError, match=r"huge.*(larger than \d+ MiB|a line is longer than 32 Mi characters)"):
        read(file, tmp_path)


def test_a_huge_image_log_or_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse, of 64 GiB, which would not fit into memory."""
    bank = FeatureBank(tmp_path / "bank", {"precision": "fp32"}, samples=3, dim=4)
    files = [tmp_path / "a.jpg", tmp_path / "log", bank.folder / "view-000000.bin"]
    for file in files:
        file.touch()
        os.truncate(file, 64 << 30)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(BadImage, match="cannot be read: larger than 1 MiB"):
        ImageFile(files[0]).read()
    with files[1].open("ab") as log:
        log.write(b"\nerror: no luck\n")
    assert last_line(files[1]) == "error: no luck"
    (found,) = list_banks(tmp_path / "bank")
    assert (found.records, found.damaged, found.short) == (0, 0, ())


def test_lines_are_those_of_the_file() -> None:
    text = "a\nb\n\nc"
    assert list(lines_of(io.StringIO(text))) == list(io.StringIO(text))
    with pytest.raises(OSError, match="a line is longer"):
        list(lines_of(io.BytesIO(b"a\n" + bytes(9)), most=8))


def test_a_file_of_just_the_size_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345678")
    assert read_whole(tmp_path / "a", most=8) == b"12345678"
    with pytest.raises(OSError, match="larger than"):
        read_whole(tmp_path / "a", most=7)


def test_read_whole_reads_what_has_no_size(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"x" * 100_000,))
    writer.start()
    assert read_whole(pipe) == b"x" * 100_000
    writer.join()
    (tmp_path / "file").write_bytes(b"12345")
    assert read_whole(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than"):
        read_whole(tmp_path / "file", 4)
