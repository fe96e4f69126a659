"""Files that others wrote: read, or refused in one line."""

import json
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.files import MOST_NESTED, parse_json, read_json, write_text


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
