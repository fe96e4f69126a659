"""The look of all figures: print sizes, colours that colour-blind readers can tell apart, one look per method.

Colours are those of Okabe and Ito ("Color Universal Design", 2008) but for yellow, which white paper swallows, and black, which
is for text.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vipbench.harness.system.files import read_yaml

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, DARK = "#E69F00", "#56B4E9", "#404040"
PALETTE = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, DARK)
BLACK, GREY, LIGHT_GREY = "#000000", "#6B6B6B", "#D9D9D9"
MARKERS, DASHES = ("o", "s", "^", "D", "v"), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
SETTLED = tuple(read_yaml(Path(__file__).with_name("looks.yaml"))["methods"])  # names of methods
COLUMN, PAGE = 3.5, 7.2  # inches: one column of a paper, and its whole width
NOTE_SIZE = 6.5
RC: Any = {
    "font.family": ["DejaVu Sans"],  # matplotlib brings it along
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: searchable, small
    "svg.hashsalt": "vipbench",  # the same figure gives the same bytes
    "text.parse_math": False,  # a symptom may hold a dollar sign
}


class Look(NamedTuple):
    """The look of a method: colour, marker and dashes of its lines."""

    color: str
    marker: str
    dashes: Any


def look(label: str, variant: int = 0) -> Look:
    """The look of a method, the same in every chart.

    Args:
        label: its name, with options behind it or not: "vip (merge=mean)".
        variant: counts the variants of one method in a chart, which share its colour.
    """
    method = label.partition(" ")[0]
    place = SETTLED.index(method) if method in SETTLED else zlib.crc32(method.encode())
    dashes = DASHES[(place // len(PALETTE) + variant) % len(DASHES)]
    return Look(PALETTE[place % len(PALETTE)], MARKERS[(place + variant) % len(MARKERS)], dashes)


def looks(labels: list[str]) -> list[Look]:
    """The looks of the methods of a chart, the variants of one method told apart by marker and dashes."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        method = label.partition(" ")[0]
        found.append(look(label, seen.get(method, 0)))
        seen[method] = seen.get(method, 0) + 1
    return found


def looks_by_label(labels: Iterable[str]) -> dict[str, Look]:
    """The look of each label of a chart, the same in all its panels."""
    distinct = list(dict.fromkeys(labels))
    return dict(zip(distinct, looks(distinct), strict=True))


def class_color(place: int) -> str:
    """The colour of a class by its place in the dataset's order."""
    return PALETTE[(place + 1) % len(PALETTE)]


def shortened_text(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
