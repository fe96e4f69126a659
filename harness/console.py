"""What a person sees of us: our own messages on standard error, and their mistakes as one line each."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harness.errors import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a user's error as one line and exit with status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def setup_logging(is_main: bool = True) -> None:
    """Our own messages from rank 0, nobody's chatter."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    for name in ("harness", "baselines", "sweeps"):
        logging.getLogger(name).setLevel(logging.INFO if is_main else logging.ERROR)
