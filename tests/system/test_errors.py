"""A user's error is one line of printable characters, whatever is in it."""

import pickle

import pytest

from vipbench.harness.data.reader import DamagedSample
from vipbench.harness.errors import UserError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a\nb\r\n\tc", r"a\nb\r\n\tc"),
        ("\x1b[31mred\0", r"\x1b[31mred\x00"),
        ("\ud800 \u202e \u2028", r"\ud800 \u202e \u2028"),
        ("größe 漢字  two", "größe 漢字  two"),
    ],
)
def test_what_cannot_be_printed_is_escaped(message: str, shown: str) -> None:
    assert str(UserError(message)) == shown
    damaged = pickle.loads(pickle.dumps(DamagedSample(message, "s.tar", 7, "x")))  # noqa: S301 - as from another process
    assert shown in str(damaged)


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    text = str(UserError(f"where: {'x' * 100_000}; what would be right"))
    assert text.startswith("where: xxx") and text.endswith("xxx; what would be right") and len(text) == 1200
