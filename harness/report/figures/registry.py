"""The kinds of figures, each a function decorated with `@figure` in a file of this folder, and how a chart becomes a file."""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.report.figures.style import GREY, NOTE_SIZE, RC

FORMATS = ("svg", "png")
PNG_DPI = 300
# Of the files' metadata: nothing that changes from day to day.
METADATA = {"svg": {"Date": None, "Creator": "vipbench"}, "png": {"Software": None}}


@dataclass(frozen=True)
class Query:
    """The runs of a figure, and what is asked for of them.

    Attributes:
        runs: rows of runs.
        metric: a metric of metrics.json.
        rows: config values that name a line or bar. columns: those that name a panel; None: the kind's own.
        by: a column of the predictions that makes subgroups.
        image: the id of a test image. images: how many. data: where the dataset lies now.
    """

    runs: pd.DataFrame
    metric: str = "accuracy"
    rows: tuple[str, ...] = ("method",)
    columns: tuple[str, ...] | None = None
    by: str = "class"
    image: str | None = None
    images: int = 6
    data: str | None = None

    def panels(self, usual: Sequence[str]) -> tuple[str, ...]:
        """The config values that name a panel: those asked for, or the usual ones that do not name a line or bar."""
        return tuple(name for name in usual if name not in self.rows) if self.columns is None else self.columns


@dataclass(frozen=True)
class Chart:
    """A drawn figure, and the note below it, which has its n."""

    figure: Figure
    note: str


Draw = Callable[[Query], Chart]


@dataclass(frozen=True)
class Kind:
    """A kind of figure; `options` are the fields of `Query` that it reads beside its runs."""

    draw: Draw
    options: frozenset[str] = field(default_factory=frozenset)


KINDS: dict[str, Kind] = {}


def figure(name: str, *options: str) -> Callable[[Draw], Draw]:
    """Decorate the function that draws a kind of figure."""

    def register(draw: Draw) -> Draw:
        assert name not in KINDS, f"two figures are called {name}"
        KINDS[name] = Kind(draw, frozenset(options))
        return draw

    return register


def kinds() -> dict[str, Kind]:
    """All kinds by name."""
    package = Path(__file__).parent
    for module in iter_modules([str(package)]):
        import_module(f"{__package__}.{module.name}")
    return KINDS


def render(name: str, query: Query, format: str = "svg") -> bytes:
    """Draw a kind of figure as a file; the same runs give the same bytes.

    Raises:
        UserError: there is no such kind, or the runs cannot be drawn as one.
    """
    return rendered(draw(name, query), format)


def draw(name: str, query: Query) -> Chart:
    """Draw a kind of figure. Raises UserError as `render` does."""
    if name not in kinds():
        raise UserError(f"no kind of figure {name!r}; {did_you_mean(name, KINDS)}")
    return finished(lambda: KINDS[name].draw(query))


def finished(draw: Callable[[], Chart]) -> Chart:
    """Draw a chart in the style of all, and write the note below it."""
    with rc_context(RC):
        return _with_note(draw())


def _with_note(chart: Chart) -> Chart:
    assert "n = " in chart.note, "no chart without its n"
    drawn = chart.figure
    drawn.draw_without_rendering()  # settles where all else is, so that the note makes nothing smaller
    drawn.set_layout_engine("none")
    for legend in drawn.legends:  # which would stay at the lower edge of what is saved, over the note
        place = legend.get_window_extent().transformed(drawn.transFigure.inverted())
        legend.borderaxespad = 0
        legend.set_loc("lower left")
        legend.set_bbox_to_anchor((place.x0, place.y0), transform=drawn.transFigure)
    width = int(drawn.get_figwidth() * 72 / (0.53 * NOTE_SIZE))
    text = "\n".join(textwrap.wrap(chart.note, width))
    drawn.text(0.01, -0.02 / drawn.get_figheight(), text, va="top", fontsize=NOTE_SIZE, color=GREY)
    return chart


def rendered(chart: Chart, format: str) -> bytes:
    """A chart as a file, "svg" or "png"."""
    buffer = io.BytesIO()
    metadata: Any = METADATA[format]
    with rc_context(RC | {"figure.constrained_layout.use": False}):  # the layout is settled
        chart.figure.savefig(
            buffer, format=format, dpi=PNG_DPI, metadata=metadata, bbox_inches="tight", pad_inches=0.04
        )
    return buffer.getvalue()
