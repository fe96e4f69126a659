"""Messages to people: our own and their mistakes, in one line each, on standard error; and a log file per rank."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType

from vipbench.harness.errors import AnotherRankFailed, FirstToFail, UserError
from vipbench.harness.system.processes import end_with_parent

OURS = ("vipbench",)
INTERRUPTED = 128 + signal.SIGINT  # exit status
RUNNER = "VIPBENCH_RUNNER"  # in the environment of a run that a sweep starts: the process with which it ends
_only: ContextVar[Path | None] = ContextVar("the one log file that takes messages", default=None)
SECONDS_FOR_THE_FIRST = (
    3.0  # after which a mistake is printed although the first process of this machine did not print it
)


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a user's error as one line and exit with status 2; Ctrl-C as one line too, with status 130.

    Of several processes the one with the error prints it. A mistake that all make is printed by each machine's first: the
    launcher ends the others meanwhile.
    """
    try:
        with interruptions():
            yield
    except AnotherRankFailed:
        raise SystemExit(1) from None
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, FirstToFail):
            time.sleep(SECONDS_FOR_THE_FIRST)
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


@contextmanager
def interruptions() -> Iterator[None]:
    """Exit with one line and status 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        _say_interrupted()
        raise SystemExit(INTERRUPTED) from None


def interruptions_from_here_on() -> None:
    """Handle Ctrl-C as `interruptions` does for the rest of this process: a program still imports, for seconds with torch."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        _say_interrupted()
        sys.exit(INTERRUPTED)

    sys.excepthook = hook


def _say_interrupted() -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("interrupted; the same command goes on from what is done", file=sys.stderr, flush=True)


def end_with_runner() -> None:
    """End this run, at a checkpoint, when the sweep runner that started it has died."""
    runner = os.environ.pop(RUNNER, None)
    if runner:
        end_with_parent(int(runner), by=signal.SIGTERM)


def setup_logging(is_main: bool = True) -> None:
    """Our own messages from rank 0 on standard error, nobody's chatter."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.INFO if is_main else logging.ERROR)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append our messages to a file as well, each with its time, details and tracebacks included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in OURS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in OURS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()


@contextmanager
def log_only_to(path: Path) -> Iterator[None]:
    """While it is open, of all files that `log_to` opened only this one takes our messages."""
    token = _only.set(path)
    try:
        yield
    finally:
        _only.reset(token)


class _LogFile(logging.FileHandler):
    """A log file that is given up where it cannot be written, with one line on the screen; the run decides whether it goes on."""

    def filter(self, record: logging.LogRecord) -> bool:
        chosen = _only.get()
        return (chosen is None or self.baseFilename == os.path.abspath(chosen)) and bool(super().filter(record))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            print(f"{self.baseFilename}: nothing more is logged there: {error.strerror}", file=sys.stderr, flush=True)
            self.setLevel(logging.CRITICAL + 1)
        else:
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # lines that could not be written, which has been reported
            super().close()
