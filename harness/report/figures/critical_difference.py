"""Critical-difference diagram: average ranks of methods over datasets (Demsar, JMLR 2006, figure 1)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import LOWER_IS_BETTER
from vipbench.harness.evaluation.statistics.ranks import Ranks, average_ranks
from vipbench.harness.report.figures.data import damage_note, groups, metric_label, sample_note, shown
from vipbench.harness.report.figures.panels import free_figure
from vipbench.harness.report.figures.registry import Chart, Query, figure
from vipbench.harness.report.figures.style import BLACK, PAGE, look, shortened_text

BLOCKS = ("dataset", "backbone", "shots")
ROW = 0.17  # inches


@figure("critical_difference", "metric", "rows", "columns")
def critical_difference(query: Query) -> Chart:
    """Draw average ranks over datasets, backbones and shots; a bar joins methods that Nemenyi's test does not tell apart."""
    names = query.panels(BLOCKS)
    found = groups(query, names)
    means = {(group.column, group.label): group.mean(query.metric) for group in found}
    blocks, methods, left_out = complete([key for key, mean in means.items() if not np.isnan(mean)])
    if len(methods) < 2 or len(blocks) < 2:
        raise UserError(
            f"critical_difference needs two methods or more on two or more of {', '.join(names)}, and here are "
            f"{len(methods)} on {len(blocks)}"
        )
    scores = np.array([[means[block, method] for method in methods] for block in blocks])
    ranks = average_ranks(scores, methods, query.metric in LOWER_IS_BETTER)
    half = -(-len(methods) // 2)
    drawn = free_figure(PAGE, 0.9 + ROW * (half + len(ranks.groups)))
    ax = drawn.add_axes((0.24, 0.02, 0.52, 0.96))
    _diagram(ax, ranks, half)
    friedman = "" if ranks.friedman_p is None else f"Friedman's test: p = {ranks.friedman_p:.3g}. "
    kept = [group for group in found if group.column in blocks and group.label in methods]
    note = f"n = {len(blocks)} combinations of {', '.join(names)} ({'; '.join(map(_block, blocks))}); {sample_note(kept)}. Ranks "
    note += f"by {metric_label(query.metric).removesuffix(' (%)')}, 1 is best. {friedman}Critical difference (Nemenyi, 0.05): "
    note += f"{ranks.critical_difference:.2f}; methods under one bar are not told apart."
    note += f" Left out, not run everywhere: {', '.join(left_out)}." if left_out else ""
    return Chart(drawn, note + damage_note(query))


def complete(
    present: Sequence[tuple[tuple[object, ...], str]],
) -> tuple[list[tuple[object, ...]], list[str], list[str]]:
    """Blocks and methods of which every combination is there, and the names of those left out.

    Whatever lacks the largest share of its combinations goes first, a method before a block.
    """
    blocks = list(dict.fromkeys(block for block, _ in present))
    methods = list(dict.fromkeys(method for _, method in present))
    left_out = []
    while blocks and methods:
        of_method = {own: sum((block, own) not in present for block in blocks) / len(blocks) for own in methods}
        of_block = {own: sum((own, method) not in present for method in methods) / len(methods) for own in blocks}
        worst, worst_block = max(methods, key=of_method.__getitem__), max(blocks, key=of_block.__getitem__)
        if not of_method[worst] and not of_block[worst_block]:
            break
        if of_method[worst] >= of_block[worst_block]:
            methods.remove(worst)
            left_out.append(worst)
        else:
            blocks.remove(worst_block)
            left_out.append(_block(worst_block))
    return blocks, methods, left_out


def _block(block: Sequence[object]) -> str:
    return " / ".join(map(shown, block))


def _diagram(ax: Axes, ranks: Ranks, half: int) -> None:
    methods, bars = len(ranks.names), len(ranks.groups)
    depth = 1.2 + bars + half
    ax.set_xlim(1, methods)
    ax.set_ylim(depth, -2.6)
    ax.axis("off")
    ax.plot([1, methods], [0, 0], color=BLACK, linewidth=0.8)
    for rank in range(1, methods + 1):
        ax.plot([rank, rank], [0, -0.25], color=BLACK, linewidth=0.8)
        ax.text(rank, -0.4, str(rank), ha="center", va="bottom", fontsize=7)
    end = 1 + ranks.critical_difference
    ax.plot([1, end], [-1.8, -1.8], color=BLACK, linewidth=1.2, marker="|", markersize=5, clip_on=False)
    ax.text(
        min((1 + end) / 2, methods), -2.0, f"CD = {ranks.critical_difference:.2f}", ha="center", va="bottom", fontsize=7
    )
    for place, (first, last) in enumerate(ranks.groups):
        ends = [ranks.average[first] - 0.03, ranks.average[last] + 0.03]
        ax.plot(ends, [0.7 + place] * 2, color=BLACK, linewidth=2.6, solid_capstyle="butt", clip_on=False)
    for place, (name, rank) in enumerate(zip(ranks.names, ranks.average, strict=True)):
        left = place < half
        y = 0.9 + bars + (place if left else methods - 1 - place)
        edge = 1 - 0.02 * methods if left else methods + 0.02 * methods
        ax.plot([rank, rank, edge], [0, y, y], color=look(name).color, linewidth=0.9, clip_on=False)
        text = f"{shortened_text(name, 36)}  {rank:.2f}" if left else f"{rank:.2f}  {shortened_text(name, 36)}"
        ax.text(edge, y, f"{text} " if left else f" {text}", ha="right" if left else "left", va="center", fontsize=7)
