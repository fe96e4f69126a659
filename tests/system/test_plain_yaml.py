"""YAML of settings: dates and times stay text, each key once, no tags, bounded; mistakes are one line that names the place."""

import time
from pathlib import Path
from typing import Any

import pytest

from vipbench.harness.config.overrides import override
from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.files import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-02", "2024-01-02"),
        ("2024-13-45", "2024-13-45"),
        ("2024-01-02 03:04:05", "2024-01-02 03:04:05"),
        ("4:00:00", "4:00:00"),
        ("=", "="),
        ("1e-3", "1e-3"),
        ("0.5", 0.5),
        ("17", 17),
        ("true", True),
        ("null", None),
        ("", None),
        ("!!str 5", "5"),
        ("{a: &x {b: 1, c: 2}, d: {<<: *x, c: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("{<<: [{a: 1}, {a: 2, b: 3}]}", {"a": 1, "b": 3}),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
    ],
)
def test_values(text: str, value: Any) -> None:
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml: line 3: the key a stands here twice; keep one"),
        ("train:\n  lr: 1\n  lr: 2", "f.yaml: line 3: train: the key lr stands here twice; keep one"),
        ("{16: x}", "f.yaml: line 1: the key 16 is no text; put it in quotes"),
        ("a: {on: x}", "f.yaml: line 1: a: the key on is no text; put it in quotes"),
        ("? [1, 2]\n: 3", "f.yaml: line 1: the key a sequence is no text; put it in quotes"),
        ("a: {b: !!python/object:os.system x}", "f.yaml: line 1: a.b: the tag !!python/object:os.system is not for"),
        ("a: [1, !!set {x}]", "f.yaml: line 1: a.1: the tag !!set is not for settings; write the value without it"),
        ("a: !!timestamp 2024-13-45", "f.yaml: line 1: a: the tag !!timestamp is not for settings"),
        ("a: !!int soon", "f.yaml: line 1: a: soon is no int; put text in quotes"),
        ("a: !!bool perhaps", "f.yaml: line 1: a: perhaps is no bool; put text in quotes"),
        ("a: 0b_", "f.yaml: line 1: a: 0b_ is no int; put text in quotes"),
        ("a: " + "1" * 5000, f"f.yaml: line 1: a: {'1' * 77}... is no int; put text in quotes"),
        ("<<: 3", "f.yaml: line 1: << takes a mapping, or a list of them"),
        ("a: &x [*x]", "nested deeper than 50; does it hold itself?"),
        ("a: &x {<<: *x}", "nested deeper than 50; does it hold itself?"),
        ("{a: " * 60 + "1" + "}" * 60, "nested deeper than 50; does it hold itself?"),
        ("[" * 3000 + "]" * 3000, "f.yaml: not YAML: line 1: "),
        ("a: [1", "f.yaml: not YAML: line 2: did not find expected ',' or ']'"),
        ("--- a\n--- b", "f.yaml: not YAML: line 2: but found another document"),
        ("a: \0", "f.yaml: not YAML: "),
        ("a: \ud800", "f.yaml: not YAML: "),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("f.yaml: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_aliases_that_repeat_each_other_are_bounded(kind: str) -> None:
    """Ten levels of nine aliases each, which are 3.5 billion values."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for level in range(1, 11):
        repeated = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"[{repeated}]" if kind == "list" else f"{{<<: [{repeated}]}}"))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"more than 100000 values; do its aliases repeat each other\?"):
        parse_yaml("\n".join(lines), "f.yaml")
    assert time.monotonic() - started < 10


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("a: {b: 2024-01-02}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"b": "2024-01-02"}}
    for content, message in (
        (b"a: \xff", "not YAML: 'utf-8' codec can't decode"),
        (b"", "should be a mapping of keys; found NoneType"),
        (b"- 1", "should be a mapping of keys; found list"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_yaml(path)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


def test_a_file_without_an_end_is_not_read_to_its_end() -> None:
    with pytest.raises(UserError, match="/dev/zero: cannot be read: larger than 16 MiB"):
        read_yaml(Path("/dev/zero"))


def test_overrides_are_read_in_the_same_way() -> None:
    assert override({}, ["run.out=2024-01-02", "run.tracking_project=4:00:00"])["run"] == {
        "out": "2024-01-02",
        "tracking_project": "4:00:00",
    }
    with pytest.raises(UserError, match=r"override 'train=\{lr: 1, lr: 2\}': line 1: the key lr stands here twice"):
        override({}, ["train={lr: 1, lr: 2}"])


def test_long_values_are_shown_in_part() -> None:
    assert shortened("x" * 81) == "x" * 77 + "..."
    assert shortened([1, 2]) == "[1, 2]"
