"""The runs of a page, finished or not, from their small files; predictions are not read."""

import hashlib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from vipbench.harness.errors import UserError
from vipbench.harness.report.rows import planned, run_folder, unfinished
from vipbench.harness.report.sources import Source, add_groups, missing_places
from vipbench.harness.runs.collect import make_row
from vipbench.harness.runs.directory import (
    AGAIN,
    CONFIG,
    FILES,
    INTERVALS,
    METRICS,
    PARTIAL,
    PREDICTIONS,
    PROVENANCE,
    is_finished,
    log_file,
    read_config,
    read_digests,
    read_metrics,
    read_provenance,
)
from vipbench.harness.system.files import parse_json, parse_yaml, read_whole

DONE, DAMAGED = "done", "damaged"
TAIL_LINES, TAIL_BYTES, LINE_LENGTH = 20, 8192, 500
SECTION = re.compile(r"^(?=[A-Za-z_][A-Za-z0-9_]*:(?: |$))", re.MULTILINE)


@dataclass
class Entry:
    """A run of the page.

    Attributes:
        number: its place on the page.
        path: as it is shown. folder: where its files lie.
        state: "done", "damaged" or one of `unfinished`; reason: of a failure or damage.
        row: as `read_runs` has it. metrics, intervals, provenance: contents of its files, empty where it is not finished.
    """

    number: int
    source: Source
    folder: Path
    state: str
    reason: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    intervals: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.folder.name

    @property
    def path(self) -> str:
        """The run directory, in a bundle with the name of that in front."""
        return self.source.shown(self.folder)

    @property
    def command(self) -> str:
        """The command that makes the run again, beside what is there."""
        config = self.folder / CONFIG
        if not self.config:
            return ""
        if not self.source.bundle:
            place = config if config.is_file() else self._planned()
            return shlex.join(["vipbench", "run", str(place), "run.out=reproduced"])
        member = f"runs/{self.name}/{CONFIG}"
        places = [f"{name}=PLACE" for name in missing_places(self.row)]
        unzip = shlex.join(["unzip", "-o", str(self.source.given), member])
        return f"{unzip} && {shlex.join(['vipbench', 'run', member, *places, 'run.out=reproduced'])}"

    def _planned(self) -> Path:
        """The config of a run that is not finished: of its partial directory, or of its sweep's plan."""
        partial = self.folder.with_name(self.name + PARTIAL) / CONFIG
        return partial if partial.is_file() else self.source.folder / "configs" / f"{self.name}.yaml"


def read_entries(sources: Sequence[Source]) -> list[Entry]:
    """The runs of all sources, each in the order of its plan.

    Raises:
        UserError: a source holds no run.
    """
    entries: list[Entry] = []
    for source in sources:
        found = _read_source(source)
        if not found:
            raise UserError(f"{source.given}: no run here, finished or not")
        entries += found
    for number, entry in enumerate(entries):
        entry.number = number
    return entries


def _read_source(source: Source) -> list[Entry]:
    if not source.folder.is_dir():
        raise UserError(f"{source.given}: no such directory of runs")
    if is_finished(source.folder):
        return [_read_run(source, source.folder)]
    folder = run_folder(source.folder)
    found = [_read_run(source, path) for path in sorted(folder.iterdir()) if path.is_dir() and is_finished(path)]
    for row in unfinished(source.folder, pd.DataFrame([entry.row for entry in found if entry.state == DONE])):
        entry = Entry(0, source, Path(row.pop("run")), row.pop("state"), row.pop("reason") or "", row)
        found.append(entry)
        if "method.name" in row:
            entry.config = _text(entry._planned())
    order = {name: place for place, name in enumerate(planned(source.folder))}
    return sorted(found, key=lambda entry: order.get(entry.name, len(order)))


def _read_run(source: Source, run: Path) -> Entry:
    """Read the small files of a finished run, each once; a damaged one is a row too."""
    try:
        there = set(os.listdir(run))
        digests = read_digests(run) if FILES in there else {}
        text = _content(run, CONFIG, digests).decode("utf-8-sig")
        config = read_config(run, parse_config(text, str(run / CONFIG)))
        metrics = read_metrics(run, parse_json(_content(run, METRICS, digests)))
        if not isinstance(metrics.get("samples"), int):
            raise UserError(f"{run / METRICS}: damaged: it does not count the samples; {AGAIN}")
        provenance = read_provenance(run, parse_json(_content(run, PROVENANCE, digests)))
        intervals = parse_json(_content(run, INTERVALS, digests)) if INTERVALS in {*digests, *there} else {}
        if not isinstance(intervals, dict):
            raise UserError(f"{run / INTERVALS}: damaged: it holds no intervals")
        if PREDICTIONS not in there:
            raise UserError(f"{run / PREDICTIONS}: missing; {AGAIN}")
        row = make_row(run, config, provenance, metrics) | {"directory": str(source.folder)}
    except (UserError, OSError, ValueError) as error:
        return Entry(0, source, run, DAMAGED, source.shown(str(error)), {"run": str(run)})
    return Entry(0, source, run, DONE, "", row, text, metrics, intervals, provenance)


def _content(run: Path, name: str, digests: Mapping[str, Any]) -> bytes:
    content = read_whole(run / name)
    if digests and hashlib.sha256(content).hexdigest() != digests.get(name):
        raise UserError(f"{run / name}: damaged: it is not what the run wrote ({FILES}); {AGAIN}")
    return content


def parse_config(text: str, where: str) -> dict[str, Any]:
    """Parse a config as `parse_yaml` does, each different section of many configs once.

    Raises:
        UserError: it is no mapping in YAML.
    """
    first, *sections = SECTION.split(text)
    config: dict[str, Any] = {}
    try:
        if first.strip():
            raise UserError("text before the first section")
        for section in sections:
            parsed = _section(section)
            if not isinstance(parsed, dict) or set(parsed) & set(config):
                raise UserError("no section, or twice")
            config |= parsed
    except UserError:  # a section that is not whole by itself: the whole text decides
        parsed = parse_yaml(text, where)
        if not isinstance(parsed, dict):
            raise UserError(f"{where}: should be a mapping") from None
        return parsed
    return config


@lru_cache(maxsize=20_000)
def _section(text: str) -> Any:
    return parse_yaml(text, "section")


def to_frame(entries: Sequence[Entry]) -> pd.DataFrame:
    """The finished runs as `load_runs` gives them, with the group that they are of where there are bundles of several."""
    frame = pd.DataFrame([entry.row for entry in entries if entry.state == DONE])
    missing = [
        {**entry.row, "run": str(entry.folder), "state": entry.state, "reason": entry.reason}
        for entry in entries
        if entry.state not in (DONE, DAMAGED)
    ]
    frame.attrs = {"damaged": sum(entry.state == DAMAGED for entry in entries), "missing": missing}
    sources = list({id(entry.source): entry.source for entry in entries}.values())
    return frame if frame.empty else add_groups(frame, sources)


def log_tail(entry: Entry) -> str:
    """The last lines of the log of rank 0, or, of a run that has none, of its process."""
    partial = entry.folder.with_name(entry.name + PARTIAL)
    for file in (log_file(entry.folder, 0), log_file(partial, 0), entry.source.folder / "logs" / f"{entry.name}.log"):
        if file.is_file():
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - TAIL_BYTES))
                lines = opened.read().decode("utf-8", "replace").splitlines()
            return "\n".join(line[:LINE_LENGTH] for line in lines[-TAIL_LINES:])
    return ""


def _text(file: Path) -> str:
    return read_whole(file).decode("utf-8-sig", "replace") if file.is_file() else ""
