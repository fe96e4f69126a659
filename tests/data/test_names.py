"""Names from outside: one rule for class names, clutter, and what may become a path."""

from pathlib import Path

import pytest

from vipbench.harness.data.names import (
    check_class_names,
    class_name,
    is_clutter,
    is_plain_url,
    is_safe_name,
    listed_classes,
)
from vipbench.harness.errors import UserError


def test_class_names_are_composed_and_have_single_spaces() -> None:
    assert class_name(" Mela\u0301nome\u00a0 malin\t") == "Mel\u00e1nome malin"


@pytest.mark.parametrize(
    "names", [["a", "a"], ["a", ""], ["a", " "], ["a\nb"], ["a\u200b"], ["a  b"], ["e\u0301"], ["x" * 201], []]
)
def test_unfit_class_names(names: list[str]) -> None:
    with pytest.raises(UserError, match=r"^here: "):
        check_class_names(names, "here")


def test_listed_classes(tmp_path: Path) -> None:
    assert listed_classes(None, None) is None
    assert listed_classes('nevus, "nevus, atypical",melanoma', None) == ["nevus", "nevus, atypical", "melanoma"]
    file = tmp_path / "classes.txt"
    file.write_bytes(b"\xef\xbb\xbfnevus, common\r\n\nmelanoma\n")
    assert listed_classes(None, file) == ["nevus, common", "melanoma"]


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        ("a,,b", None, "--classes: class 1 is ''"),
        ("", None, "--classes: no class"),
        ('"a', None, "--classes: .*CSV line"),
        ("a,a", None, "'a' is there twice"),
        (None, b"a\na\n", "classes.txt: the class 'a' is there twice"),
        (None, b"\xff\xfe", "classes.txt: cannot be read as text"),
        (None, b"\n", "classes.txt: no class"),
        ("a", b"a", "give one of them"),
    ],
)
def test_listed_classes_that_are_none(tmp_path: Path, names: str | None, content: bytes | None, message: str) -> None:
    file = tmp_path / "classes.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        listed_classes(names, file if content is not None else None)


def test_clutter() -> None:
    for path in ("._a.png", "x/.DS_Store", "__MACOSX/a.png", "a/Thumbs.db", "README.md", "x/LICENSE", "readme.txt"):
        assert is_clutter(path), path
    for path in ("a.png", "./a.png", "x/readme_1.png", "readme.png", "thumbs.png"):
        assert not is_clutter(path), path


def test_what_may_become_a_path() -> None:
    for name in ("train-000000.tar", "drawn lesions", "größe.tar", "a..b"):
        assert is_safe_name(name), name
    for name in ("", ".", "..", ".x", "a/b", "../x", "a\\b", "a\0", "a\n", " a", "x" * 256, "é" * 128):
        assert not is_safe_name(name), name
    assert is_plain_url("https://host/My Drive/a.tar")
    for url in ("a.tar", "simplecache::https://host/a", "https://host/a\n", "/a://b", "zip://x::file://y"):
        assert not is_plain_url(url), url
