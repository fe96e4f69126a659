"""The one exception that a user is meant to see, and what its messages are made of."""

import difflib
from collections.abc import Iterable

MOST_CHARACTERS, KEPT_OF_THE_END = 1200, 400  # of a message


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2. Whatever words of a file or a server are in it, as
    text it is of printable characters, at most `MOST_CHARACTERS` of them.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > MOST_CHARACTERS:
            text = f"{text[: MOST_CHARACTERS - KEPT_OF_THE_END - 5]} ... {text[-KEPT_OF_THE_END:]}"
        return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class Diverged(UserError):
    """A training whose numbers are no longer finite; found on all ranks at the same step."""


class FirstToFail(UserError):
    """A user error on the rank that failed first of all, which prints it for all of them."""


class AnotherRankFailed(UserError):
    """This rank stops because another one failed; the text is that rank's reason, which it prints itself."""


class LostContact(Exception):
    """Another process of a run was silent, or gone, when this one did something together with it.

    Attributes:
        silent: it did not answer in time; otherwise its connection was closed.
    """

    def __init__(self, silent: bool) -> None:
        super().__init__("another process did not answer" if silent else "another process ended")
        self.silent = silent


def shortened(value: object, most: int = 80) -> str:
    """A value for an error message: text as it is, anything else as its repr, at most `most` characters of it."""
    if isinstance(value, int) and value.bit_length() > 1000:  # which Python may refuse to write out
        return "a number too long to show"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(word: str, choices: Iterable[str], otherwise: str | None = None, most: int = 1) -> str:
    """A hint for an error message: the `most` nearest words, whatever their case; where none is near, `otherwise` or all."""
    names = sorted(choices)
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), folded, n=most, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(folded[name]) for name in close)}?"
    return f"choose from {', '.join(names)}" if otherwise is None else otherwise
