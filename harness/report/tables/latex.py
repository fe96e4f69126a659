"""A table as LaTeX, with booktabs."""

from vipbench.harness.report.tables.cells import Table
from vipbench.harness.report.tables.text import (
    ALIKE,
    DAGGER,
    DOUBLE_DAGGER,
    SET_APART,
    Signs,
    cell_text,
    column_title,
    notes,
    opened,
    reported_text,
    row_header,
    row_values,
    sources,
)

SIGNS = Signs(
    best=r"\textbf{{{}}}",
    second=r"\underline{{{}}}",
    no_run="--",
    plus_minus=r" $\pm$ ",
    dagger=r"$^\dagger$",
    double_dagger=r"$^\ddagger$",
    alike=r"$^\approx$",
)
SPECIAL = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$"}
    | {
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "×": r"$\times$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
    }
    | {DAGGER: r"$\dagger$", DOUBLE_DAGGER: r"$\ddagger$", ALIKE: r"$\approx$", "\n": " "}
)


def to_latex(table: Table, show_runs: bool = False) -> str:
    """A booktabs table, which needs \\usepackage{booktabs}: best bold, second underlined; with caption or label, a float.

    The note stands below a float, and in a comment otherwise; the runs of each cell are comments.
    """
    width = len(table.row_names) + len(table.columns)
    lines = [
        rf"\begin{{tabular}}{{{'l' * len(table.row_names)}{'r' * len(table.columns)}}}",
        r"\toprule",
        _line([*map(escape, row_header(table)), *(escape(column_title(table, column)) for column in table.columns)]),
        r"\midrule",
    ]
    for row in table.rows:
        cells = [cell_text(table, row, column, SIGNS) for column in table.columns]
        lines.append(_line([*map(escape, row_values(table, row)), *cells]))
    if table.reported:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{SET_APART}}}}} \\"]
    letters = sources(table)
    for reported in table.reported:
        first, *others = map(escape, row_values(table, reported.key))
        cells = [reported_text(reported, column, SIGNS) for column in table.columns]
        lines.append(_line([f"{first}$^\\mathrm{{{letters[reported.source]}}}$", *others, *cells]))
    lines += [r"\bottomrule", r"\end{tabular}"]
    note = escape(" ".join(notes(table, underlined=True)))
    if table.layout.caption or table.layout.label:
        lines = _float(table, lines, note)
    else:
        lines.append(_comment(note))
    for place, runs in opened(table) if show_runs else []:
        lines += [_comment(place), *(_comment(f"  {line}") for line in runs)]
    return "\n".join(lines) + "\n"


def _float(table: Table, tabular: list[str], note: str) -> list[str]:
    caption = [rf"\caption{{{escape(table.layout.caption)}}}"] if table.layout.caption else []
    label = [rf"\label{{{table.layout.label}}}"] if table.layout.label else []
    below = r"\par\smallskip\parbox{\linewidth}{\footnotesize " + note + "}"
    return [r"\begin{table}", r"\centering", *caption, *label, *tabular, below, r"\end{table}"]


def _line(cells: list[str]) -> str:
    """A row; a bracket at its start would be read as an argument of the row end before it."""
    text = " & ".join(cells)
    return ("{}" if text.lstrip().startswith(("[", "*")) else "") + text + r" \\"


def _comment(text: str) -> str:
    return "% " + " ".join(text.splitlines())


def escape(text: str) -> str:
    """Text as it is printed, whatever signs are in it."""
    return text.translate(SPECIAL)
