"""One progress display for all long work: a bar with rate and ETA on a terminal, a plain line now and then elsewhere."""

import logging
import os
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Show how far `description` has come, on rank 0 only, on standard error.

    Args:
        description: what is being done, such as "encode test images".
        total: how many units there are, or None when that is not known.
        unit: the plural name of a unit, for the rate.
    """

    def __init__(self, description: str, total: int | None, unit: str = "items") -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note_text = 0, ""
        self.shown = int(os.environ.get("RANK", "0")) == 0
        self.bar: RichProgress | None = None
        if self.shown and sys.stderr.isatty():
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
            self.bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(description, total=total, rate="", note="")

    def __enter__(self) -> Self:
        self.started = self.last_line = time.monotonic()
        if self.bar:
            self.bar.start()
        return self

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` more as done; `note` (a loss, a count) replaces the text at the end of the line."""
        self.done += units
        self.note_text = self.note_text if note is None else note
        if self.bar:
            self.bar.update(self.task, advance=units, rate=self._rate(), note=self.note_text)
        elif self.shown and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        if kind is None:
            line = f"{self.description}: {self.done} {self.unit} in {time.monotonic() - self.started:.1f} s"
            log.debug(line)  # for the log files
            if self.shown:
                print(line, file=sys.stderr, flush=True)

    def _rate(self) -> str:
        return f"{self.done / max(time.monotonic() - self.started, 1e-9):.1f} {self.unit}/s"

    def _line(self) -> str:
        seconds = time.monotonic() - self.started
        of_total, eta = "", ""
        if self.total:
            of_total = f"/{self.total}"
            eta = f", {seconds / max(self.done, 1) * (self.total - self.done):.0f} s left"
        note = f", {self.note_text}" if self.note_text else ""
        return f"{self.description}: {self.done}{of_total} {self.unit}, {self._rate()}{eta}{note}"
