"""The one exception that a user is meant to see."""


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class FirstToFail(UserError):
    """A user error on the rank that failed first of all, which says it for all of them."""


class AnotherRankFailed(UserError):
    """This rank stops because another one failed; the text is that rank's reason, which it says itself."""


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
