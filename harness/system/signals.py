"""Signals that ask a run to end: noted when they come, and acted on by all ranks together at places where nothing is lost.

Slurm sends SIGTERM, sweeps/executors/slurm_job.py SIGUSR1; what has not ended half a minute later is killed.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_BETWEEN_EXCHANGES = 1.0


Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


@contextmanager
def handled(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Handle signals in this way while it is open; then as before. Only in the main thread."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Stopped(SystemExit):
    """The end of a run that a signal asked for; the process leaves with status 128 + the signal's number."""


class PeriodicExchange:
    """Collects a value of every rank about once a second, after the same number of calls on all ranks.

    Between exchanges a call costs nothing, so it may stand in a loop of short steps.

    Args:
        gather: gives all ranks' items on every rank, in rank order.
    """

    def __init__(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        self.gather = gather
        self.count = self.exchanged_at = self.next_due = 0
        self.exchanged = time.monotonic()

    def restart(self) -> None:
        """Make the next call exchange, and forget how fast calls came: those of other work may be slower."""
        self.exchanged, self.exchanged_at, self.next_due = time.monotonic(), self.count, self.count

    def due(self) -> bool:
        """Count a call, which all ranks make together; returns True when an exchange is due."""
        self.count += 1
        return self.count >= self.next_due

    def gather_values(self, value: Any) -> list[Any]:
        """Values of all ranks, in rank order. Rank 0's clock decides after how many calls the next exchange is due."""
        now = time.monotonic()
        calls, seconds = self.count - self.exchanged_at, max(now - self.exchanged, 1e-6)
        ahead = max(1, min(2 * calls, int(calls / seconds * SECONDS_BETWEEN_EXCHANGES)))
        answers = self.gather([(value, ahead)])
        self.exchanged, self.exchanged_at, self.next_due = now, self.count, self.count + answers[0][1]
        return [answer for answer, _ in answers]


class StopSignals:
    """The signals that reached this rank, and the end that they ask all ranks for.

    Attributes:
        received: numbers of the signals that reached this rank, in order.
    """

    def __init__(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        self.exchange, self.received = PeriodicExchange(gather), list[int]()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM and SIGUSR1 rather than die of them while it is open; a second one of a kind has its usual effect."""

        def note(number: int, frame: FrameType | None) -> None:
            self.received.append(number)
            signal.signal(number, signal.SIG_DFL)

        with handled(SIGNALS, note):
            yield

    def stop_if_asked(self) -> None:
        """Leave when a signal has asked for it. All ranks call it equally often, between two parts of long work.

        Raises:
            Stopped: on all ranks.
        """
        if self.exchange.due():
            leave_for(self.exchange.gather_values(self.received))


def leave_for(received: list[list[int]]) -> None:
    """Raise Stopped for the first signal that any rank has received, in rank order; return when there is none."""
    asked = [number for own in received for number in own]
    if asked:
        log.warning("%s: the run stops here; the same command goes on", signal.Signals(asked[0]).name)
        raise Stopped(128 + asked[0])
