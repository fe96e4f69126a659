"""The one exception that a user is meant to see."""


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class FirstToFail(UserError):
    """A user error on the rank that failed first of all, which says it for all of them."""


class AnotherRankFailed(UserError):
    """This rank stops because another one failed; the text is that rank's reason, which it says itself."""
