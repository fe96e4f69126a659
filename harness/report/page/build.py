"""Build the page: everything is rendered here, escaped, into one file whose policy forbids any request."""

import gzip
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from vipbench.harness import __version__
from vipbench.harness.report.page.charts import training_chart
from vipbench.harness.report.page.entries import DONE, Entry, log_tail, read_entries, to_frame
from vipbench.harness.report.page.evidence import symptom_sets
from vipbench.harness.report.page.summary import METRICS, summary_tables
from vipbench.harness.report.sources import GROUP, open_sources
from vipbench.harness.report.tables.values import NO_VALUE, PLAIN, figure, show
from vipbench.harness.runs.directory import STEPS
from vipbench.harness.system.files import parse_json, read_whole
from vipbench.harness.system.plain_values import is_number

FOLDER = Path(__file__).parent
DETAILED = 300  # runs up to which predictions, curves and logs are read
INLINE_BYTES = 1_500_000  # of runs in detail that stand in the page as they are; more are packed, and opened by page.js
CHUNK = 200  # runs that are packed together
HARDEST = 30  # samples in the list of those that most runs mistake
MOST_STEP_BYTES = 16 << 20
TOO_MANY = (
    f"More than {DETAILED} runs: samples, curves and logs are left out, and intervals of cells of several runs, which need "
    "predictions. A page of fewer runs has them."
)
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'"
)
ENVIRONMENT = ("versions", "git", "hardware", "seeds", "training_samples", "kept_epoch", "selection", "cost", "started")


@dataclass(frozen=True)
class Options:
    """Parts of a page besides its runs.

    Attributes:
        images: thumbnails of test images. image_bytes: of all of them together, at most.
        cards: diagnosis cards, at most. scores: files of symptoms' scores.
    """

    images: bool = True
    image_bytes: int = 2_000_000
    cards: int = 12
    scores: Sequence[Path] = ()
    title: str = "Runs of vipbench"


def build_page(places: Sequence[Path], options: Options) -> str:
    """The page of all runs in directories and bundles, as HTML.

    Raises:
        UserError: a place holds no run, or is a bundle that is damaged.
    """
    with open_sources(places) as sources:
        entries = read_entries(sources)
        return _render(entries, options)


@dataclass
class Evidence:
    """Parts of a page of few runs that derive from predictions, and sentences on what is missing."""

    samples: dict[str, Any] = field(default_factory=dict)
    hardest: list[dict[str, Any]] = field(default_factory=list)
    confusions: dict[int, Any] = field(default_factory=dict)
    conformal: dict[int, Sequence[Any]] = field(default_factory=dict)
    images: list[dict[str, str]] = field(default_factory=list)
    cards: Sequence[Any] = ()
    notes: list[str] = field(default_factory=list)


def _evidence(entries: Sequence[Entry], options: Options) -> Evidence:
    from vipbench.harness.report.page.cards import diagnosis_cards  # these need PyTorch, which takes seconds to import
    from vipbench.harness.report.page.samples import confusion, errors_by_sample, read_samples, thumbnails

    predicted = read_samples(entries)
    found = Evidence(predicted.to_json(), errors_by_sample(predicted, HARDEST))
    found.confusions = {number: confusion(predicted, number) for number in predicted.runs}
    found.conformal = dict(predicted.conformal)
    if options.images:
        found.images, found.notes = thumbnails(predicted, options.image_bytes)
    found.cards, missing = diagnosis_cards(entries, predicted, options.cards, options.images)
    found.notes += missing
    return found


def _render(entries: Sequence[Entry], options: Options) -> str:
    detailed = len(entries) <= DETAILED
    evidence = _evidence(entries, options) if detailed else Evidence(notes=[TOO_MANY])
    numbers = {str(entry.folder): entry.number for entry in entries}
    recorded = None if detailed else {str(entry.folder): entry.intervals for entry in entries}
    tables, problems = summary_tables(to_frame(entries), numbers, recorded)
    environment = _environment()
    details = _details(environment.get_template("run.html.jinja2"), entries, evidence, detailed)
    inline = sum(map(len, details)) <= INLINE_BYTES
    css, script = (FOLDER / "page.css").read_text("utf-8"), (FOLDER / "page.js").read_text("utf-8")
    settings, metrics = _columns(entries)
    return environment.get_template("page.html.jinja2").render(
        title=options.title,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, vipbench {__version__}",
        policy=POLICY.format(script=_hash(script), style=_hash(css)),
        css=Markup(css),
        script=Markup(script),
        states=Counter(entry.state for entry in entries),
        tables=tables,
        notes=[*problems, *evidence.notes],
        settings=[name for name, _ in settings],
        metrics=metrics,
        rows=[_row(entry, [column for _, column in settings], metrics) for entry in entries],
        unfinished=[entry for entry in entries if entry.state != DONE],
        sets=symptom_sets(entries, options.scores),
        hardest=evidence.hardest,
        cards=evidence.cards,
        details=[Markup(text) for text in details] if inline else [],
        packed=[] if inline else [_packed(details[first : first + CHUNK]) for first in range(0, len(details), CHUNK)],
        chunk=CHUNK,
        samples=_packed(evidence.samples) if evidence.samples else "",
        images=_packed(evidence.images) if any(evidence.images) else "",
    )


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _columns(entries: Sequence[Entry]) -> tuple[list[tuple[str, str]], list[str]]:
    """The settings (name, column) and the metrics in the list of runs."""
    settings = [
        ("method", "method.name"),
        ("dataset", "dataset"),
        ("backbone", "backbone.name"),
        ("shots", "data.shots"),
    ]
    several = [("group", GROUP)] if len({entry.source.name for entry in entries}) > 1 else []
    always = {"method", "shots"}
    kept = [
        (name, column)
        for name, column in settings
        if name in always or len({show(entry.row[column]) for entry in entries if column in entry.row}) > 1
    ]
    return [*several, *kept, ("seed", "seed")], [
        name for name in METRICS if any(isinstance(entry.metrics.get(name), int | float) for entry in entries)
    ]


def _row(entry: Entry, settings: Sequence[str], metrics: Sequence[str]) -> tuple[Entry, list[str], list[str]]:
    """A line of the list of runs: its settings and its metrics."""
    row = entry.row | {GROUP: entry.source.name}
    values = [show(row[name]) if name in row else NO_VALUE for name in settings]
    return entry, values, [_figure(name, entry.metrics.get(name)) for name in metrics]


def _figure(metric: str, value: Any) -> str:
    number = _number(value)
    return NO_VALUE if number is None else figure(metric, number)


def _number(value: Any) -> float | None:
    """A number that a file gives, None for anything else: what comes in a bundle may be any JSON."""
    return round(float(value), 6) if is_number(value) else None


def _details(template: Template, entries: Sequence[Entry], evidence: Evidence, detailed: bool) -> list[str]:
    """Each run in detail, as HTML."""
    found = []
    for entry in entries:
        steps = _steps(entry) if detailed else []
        found.append(
            template.render(
                run=entry,
                metrics=[
                    (name, figure(name, value), _interval(name, entry.intervals.get(name)))
                    for name, value in entry.metrics.items()
                    if name != "samples" and _number(value) is not None
                ],
                by_class=_by_class(entry),
                environment=[
                    (name, _plain(entry.provenance[name])) for name in ENVIRONMENT if name in entry.provenance
                ],
                steps=len(steps),
                curve=training_chart(steps),
                log=log_tail(entry) if detailed or entry.state != DONE else "",
                confusion=evidence.confusions.get(entry.number),
                conformal=evidence.conformal.get(entry.number, ()),
            )
        )
    return found


def _by_class(entry: Entry) -> list[tuple[str, list[tuple[str, str]]]]:
    """Metrics of single classes, by class."""
    named = {name: value for name, value in entry.metrics.items() if isinstance(value, Mapping) and name not in PLAIN}
    labels = list(dict.fromkeys(label for value in named.values() for label in value))
    return [(label, [(name, _figure(name, own.get(label))) for name, own in named.items()]) for label in labels]


def _interval(name: str, found: Any) -> tuple[str, str] | None:
    """The ends and the method of an interval as intervals.json has it; None where there is none."""
    if not isinstance(found, Mapping) or not {"low", "high", "method"} <= set(found):
        return None
    low, high = _number(found["low"]), _number(found["high"])
    if low is None or high is None:
        return None
    return f"{figure(name, low)} to {figure(name, high)}", str(found["method"])


def _plain(value: Any) -> str:
    """A fact of the provenance in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return show(value)


def _steps(entry: Entry) -> list[tuple[float, float]]:
    """Steps and losses of a run's log of steps, of the lines that have both."""
    path = entry.folder / STEPS
    if not path.is_file():
        return []
    found = []
    for line in read_whole(path, MOST_STEP_BYTES).splitlines():
        try:
            row = parse_json(line)
        except ValueError:  # a line that was being written
            continue
        if isinstance(row, dict) and all(_number(row.get(name)) is not None for name in ("step", "loss")):
            found.append((float(row["step"]), float(row["loss"])))
    return found


def _packed(value: Any) -> str:
    """A value as JSON, compressed, in base64."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return b64encode(gzip.compress(text, 6, mtime=0)).decode()


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
