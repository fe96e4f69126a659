"""Charts of the page as geometry: points in a view box, which the template draws as SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vipbench.harness.report.figures.style import DARK, looks
from vipbench.harness.report.tables.cells import Cell, Key, Table
from vipbench.harness.report.tables.text import row_values
from vipbench.harness.report.tables.values import figure, sample_words, show

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 36, 8, 10, 42
MOST_SERIES = 12  # rows in a chart, the best ones
SHAPES = {"o": "circle", "s": "square", "^": "triangle", "D": "diamond", "v": "wedge"}


@dataclass(frozen=True)
class Point:
    """A mean at (x, y), from `low` to `high` on the page, and its words."""

    x: float
    y: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Series:
    """The points of a row, with its look."""

    name: str
    color: str
    shape: str
    points: Sequence[Point]

    @property
    def line(self) -> str:
        """The points of the line."""
        return _points([(point.x, point.y) for point in self.points])

    @property
    def band(self) -> str:
        """The outline of the band about it."""
        upper = [(point.x, point.high) for point in self.points]
        return _points(upper + [(point.x, point.low) for point in reversed(self.points)])


@dataclass(frozen=True)
class Chart:
    """Series over places on the x axis, with ticks (position, label) of both axes."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    series: Sequence[Series]
    lines: bool
    note: str
    width: int = WIDTH
    height: int = HEIGHT


def chart_of(table: Table, columns: Sequence[Key], title: str, samples: Iterable[int]) -> Chart | None:
    """A chart of the columns of one metric: lines over numbers such as shots, else means side by side; None without a mean.

    Args:
        samples: counts of test samples of the runs in it, for its note.
    """
    metric = str(columns[0][0])
    rows = {
        row: {column: cell for column in columns if _defined(cell := table.cells.get((row, column)))}
        for row in table.rows
    }
    found = {row: cells for row, cells in rows.items() if cells}
    best = sorted(found, key=lambda row: -max(cell.mean for cell in found[row].values() if cell))[:MOST_SERIES]
    shown = [row for row in found if row in best]
    if not shown:
        return None
    ends = [end for row in shown for cell in found[row].values() if cell for end in _ends(cell)]
    ticks = _axis(min(ends), max(ends))
    low, high = ticks[0], ticks[-1]
    step = (WIDTH - LEFT - RIGHT) / len(columns)
    middle = {column: LEFT + step * (place + 0.5) for place, column in enumerate(columns)}
    lines = len(columns) > 1
    spread = 0.0 if lines else step * 0.8 / len(shown)
    series = []
    styles = looks([str(row[table.row_names.index("method")]) for row in shown])
    for place, (row, style) in enumerate(zip(shown, styles, strict=True)):
        name, color = " / ".join(row_values(table, row)), "currentColor" if style.color == DARK else style.color
        shift = spread * (place - (len(shown) - 1) / 2)
        points = []
        for column, cell in found[row].items():
            assert cell
            at, (down, up) = " / ".join(map(show, column[1:])), _ends(cell)
            spread_text = f"{figure(metric, down)} to {figure(metric, up)}"
            words = f"{name}{', ' if at else ''}{at}: {figure(metric, cell.mean)} ({spread_text}), {cell.count} runs"
            y, lower, upper = (_y(value, low, high) for value in (cell.mean, down, up))
            points.append(Point(middle[column] + shift, y, lower, upper, words))
        series.append(Series(name, color, SHAPES.get(style.marker, "circle"), points))
    left_out, drawn = len(found) - len(shown), [cell for row in shown for cell in found[row].values() if cell]
    note = f"{sample_words(samples, (cell.count for cell in drawn))}. {_spread_note(drawn)}"
    return Chart(
        title,
        ", ".join(table.column_names) if columns[0][1:] else "",
        metric.replace("_", " "),
        [(middle[column], " / ".join(map(show, column[1:]))) for column in columns],
        [(_y(value, low, high), f"{100 * value:.0f}") for value in ticks],
        series,
        lines,
        f"{note} {left_out} rows with lower means are not drawn." if left_out else note,
    )


def training_chart(steps: Sequence[tuple[float, float]]) -> str:
    """The points of a curve of (step, loss) pairs in a box of 320 by 80; "" for fewer than two finite ones."""
    finite = [(step, loss) for step, loss in steps if math.isfinite(step) and math.isfinite(loss)]
    if len(finite) < 2:
        return ""
    finite = finite[:: max(1, len(finite) // 160)]
    first, last = finite[0][0], finite[-1][0]
    top = max(loss for _, loss in finite) or 1.0
    return _points([(320 * (step - first) / ((last - first) or 1), 78 - 76 * loss / top) for step, loss in finite])


def _defined(cell: Cell | None) -> bool:
    return cell is not None and not math.isnan(cell.mean)


def _ends(cell: Cell) -> tuple[float, float]:
    """The ends of its interval, else one standard deviation about the mean, within the fractions."""
    if cell.interval:
        return cell.interval.low, cell.interval.high
    return max(0.0, cell.mean - (cell.deviation or 0)), min(1.0, cell.mean + (cell.deviation or 0))


def _spread_note(cells: Sequence[Cell]) -> str:
    if all(cell.interval for cell in cells):
        return "Bands and bars: 95% intervals."
    if any(cell.interval for cell in cells):
        return "Bands and bars: 95% intervals where there are some, else one standard deviation over seeds."
    return "Bands and bars: one standard deviation over seeds."


def _axis(low: float, high: float) -> list[float]:
    """Ticks at round numbers from below `low` to above `high`, at most seven."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 10.0, 1e9) if (high - low) / step <= 5)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [place * step for place in range(first, last + 1)]


def _y(value: float, low: float, high: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)
