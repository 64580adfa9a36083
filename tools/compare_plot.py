"""A comparison's results as a plot, if there is matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compare_report import Cell, Results, amounts_of, methods_of, over_seeds

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
"""Okabe and Ito's, told apart by colour-blind eyes too; yellow, hard to see on white, is a brown."""
_MARKERS = "osD^vPX<"
_LOG_FROM = 4.0
"""Ratio of the greatest to the least perplexity from which the axis is logarithmic."""


def write_plot(results: Results, path: Path) -> bool:
    """Perplexity against sparsity as a PNG, patterns in a panel of their own; False without matplotlib.

    No plot is written, and True returned, when no cell has a perplexity. Only Agg is used, pyplot never: nothing
    global changes.
    """
    import io

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        return False
    from streamprune.disk import durable

    found = [cell for cell in over_seeds(results) if "perplexity" in cell]
    if not found:
        return True
    amounts = [a for a in amounts_of(results) if any(cell["amount"] == a for cell in found)]
    groups = [part for part in ([a for a in amounts if ":" not in a], [a for a in amounts if ":" in a]) if part]
    figure = Figure(figsize=(5.2 + 2.8 * len(groups), 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    widths = [3 if ":" not in part[0] else 1 + 0.5 * len(part) for part in groups]
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, part in zip(panels, groups, strict=True):
        _panel(panel, results, found, part)
    values = [cell["perplexity"] for cell in found] + ([results["dense"]["perplexity"]] if results["dense"] else [])
    if max(values) > _LOG_FROM * min(values):
        panels[0].set_yscale("log")
        if max(values) < 100 * min(values):
            panels[0].set_yticks(_ticks(min(values), max(values)))
            panels[0].yaxis.set_major_formatter(ScalarFormatter())
        panels[0].minorticks_off()
    panels[0].set_ylabel("perplexity" + (" (logarithmic)" if panels[0].get_yscale() == "log" else ""))
    figure.suptitle(f"{results['job']['model']['name']}: perplexity of {results['job']['text']['name']}", fontsize=11)
    lines: dict[str, Artist] = {}
    for panel in panels[::-1]:  # the first panel's have a line and a marker
        lines |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles=lines.values(), labels=lines.keys(), loc="outside right center", frameon=False)
    packed = io.BytesIO()
    figure.savefig(packed, format="png")
    durable.replace_file(path, packed.getvalue())
    return True


def _panel(panel: Axes, results: Results, found: Sequence[Cell], amounts: Sequence[str]) -> None:
    """Sparsities as a number line with a line a method, or patterns side by side with markers only."""
    patterns, methods = ":" in amounts[0], methods_of(results)
    if results["dense"]:
        panel.axhline(results["dense"]["perplexity"], color="0.45", linestyle="--", linewidth=1.2, label="dense")
    for position, method in enumerate(methods):
        cells = {cell["amount"]: cell["perplexity"] for cell in found if cell["method"] == method}
        shown = [a for a in amounts if a in cells]
        spread = 0.6 * ((position + 0.5) / len(methods) - 0.5)  # side by side, so that none hides another
        turn, place = divmod(position, len(_COLOURS))
        panel.plot(
            [amounts.index(a) + spread if patterns else 100 * float(a) for a in shown], [cells[a] for a in shown],
            color=_COLOURS[place], marker=_MARKERS[(place + turn) % len(_MARKERS)],
            linestyle="none" if patterns else ("-", "--", ":")[turn % 3],
            linewidth=1.6, markersize=7, markeredgecolor="white", markeredgewidth=0.6, label=method,
        )  # fmt: skip
    if patterns:
        panel.set_xticks(range(len(amounts)), list(amounts))
        panel.set_xlim(-0.6, len(amounts) - 0.4)
    else:
        panel.set_xticks([100 * float(a) for a in amounts])
    panel.set_xlabel("pattern (weights kept of each group)" if patterns else "sparsity, % of each row")
    panel.grid(axis="y", color="0.88", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers of a logarithmic axis, from below the least to above the most."""
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    every = [m * 10.0**d for d in decades for m in (1, 2, 3, 5, 7)]
    return [t for t in every if least / 1.15 <= t <= most * 1.15]
