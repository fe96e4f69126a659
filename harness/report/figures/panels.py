"""Panels of a figure, one for each value of the config values that name one, and legends below them."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vipbench.harness.errors import UserError
from vipbench.harness.report.figures.data import Group, shown
from vipbench.harness.report.figures.style import COLUMN, PAGE
from vipbench.harness.report.tables.values import sort_key

MOST_PANELS, MOST_IN_A_ROW = 12, 3
LEGEND_ROW = 0.14  # inches
MOST_IN_A_LINE = 36  # letters of an entry below one of several panels


def make_panels(
    names: Sequence[str], found: Sequence[Group], height: float = 2.5, *, wide: bool = False, width: int | None = None
) -> tuple[Figure, dict[tuple[Any, ...], Axes]]:
    """A figure with a panel for each value of the first `width` values of the groups' columns, titled by what varies.

    Args:
        names: of the values. height: of a panel, inches. wide: one panel takes the whole page.
        width: None: all values of a column count.

    Raises:
        UserError: they would be more than 12.
    """
    columns = list(dict.fromkeys(group.column[:width] for group in found))
    columns.sort(key=lambda column: [*map(sort_key, column)])
    if len(columns) > MOST_PANELS:
        raise UserError(
            f"{len(columns)} panels are too many for one figure; narrow the runs down, as with dataset=NAME"
        )
    across = min(MOST_IN_A_ROW, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(PAGE if wide or len(columns) > 1 else COLUMN, height * down))
    axes = [figure.add_subplot(down, across, place + 1) for place in range(len(columns))]
    differing = varying(columns)
    for column, ax in zip(columns, axes, strict=True):
        ax.set_title(", ".join(title_part(names[place], column[place]) for place in differing))
    return figure, dict(zip(columns, axes, strict=True))


def varying(columns: Sequence[Sequence[Any]]) -> list[int]:
    """The places of columns at which their values differ."""
    return [place for place, values in enumerate(zip(*columns, strict=True)) if len(set(values)) > 1]


def free_figure(width: float, height: float) -> Figure:
    """A figure of so many inches whose axes have places of their own."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")
    return figure


def title_part(name: str, value: Any) -> str:
    """A value as it stands in a title: "16 shots", "ViT-B-16"."""
    return f"{shown(value)} {'shot' if value == 1 else name}" if name == "shots" else shown(value)


def place_note(names: Sequence[str], found: Sequence[Group], width: int | None = None) -> str:
    """A sentence with the values that all groups share."""
    columns = [group.column[:width] for group in found]
    differing = varying(columns)
    shared = [title_part(names[place], value) for place, value in enumerate(columns[0]) if place not in differing]
    return f"{', '.join(shared)}; " if shared else ""


def legends_of_panels(figure: Figure, axes: Sequence[Axes]) -> None:
    """A legend below each panel, since the entries of each have numbers of their own; long ones in two lines."""
    if len(axes) == 1:
        legend_below(figure, axes)
        return
    most = 0
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        labels = [label.replace(": ", ":\n", 1) if len(label) > MOST_IN_A_LINE else label for label in labels]
        most = max(most, sum(1 + label.count("\n") for label in labels))
        below = (0.5, -0.5 / ax.bbox.height * figure.dpi)
        ax.legend(handles, labels, loc="upper center", bbox_to_anchor=below, fontsize=5.5, handlelength=1.2)
    down = -(-len(axes) // MOST_IN_A_ROW)
    figure.set_figheight(figure.get_figheight() + down * LEGEND_ROW * most)


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend of all axes below the panels."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        longest = max(map(len, entries))
        columns = max(1, min(len(entries), int(figure.get_figwidth() * 17 / (longest + 6))))
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(entries) // columns))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
