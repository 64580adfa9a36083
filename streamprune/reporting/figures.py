"""Figures as SVG that is part of a page: drawn by matplotlib, in the page's own colours, light or dark.

Inks are drawn in colours that nothing else has, and are then exchanged for the page's: text and axes become
`currentColor`, lines become variables of its style sheet. Text stays text. A figure is the same bytes every time.
"""

from __future__ import annotations

import html
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamprune.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#a0b0f0", "#a0b0f1"
SERIES = tuple(f"#a0b0c{i}" for i in range(8))
"""Of lines; the page says what they look like in light and dark (markup.py), and no two lines have the same dashes."""
_MARKERS, _DASHES = "osD^vPX*", ("-", "--", "-.", ":")
_INKS = {INK: "currentColor", GRID: "var(--grid)"} | {ink: f"var(--s{i})" for i, ink in enumerate(SERIES)}
_WIDTH = 4.6
"""Inches of 72 CSS pixels."""
_MARGIN = 0.82
"""Inches to the left of lines and bars, for numbers of six digits and what they are of."""
_HALF_LABEL = 22
"""Characters that half of a legend's line has room for."""
MOST_KINDS = 24
"""Columns that a heat map has room for."""


@dataclass(frozen=True)
class Line:
    """A line of a figure; `band` are the least and the most beside each of `ys`, where they differ."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None


@contextmanager
def drawing() -> Iterator[None]:
    """Around all figures: matplotlib with settings of ours, whatever the user's are.

    Raises:
        UsageError: matplotlib is not here.
    """
    try:
        with _hushed():
            import matplotlib
    except ImportError:
        raise UsageError("a report takes one more package: pip install 'streamprune[report]'") from None
    own: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "streamprune", "text.parse_math": False, "text.usetex": False,
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "font.size": 10,
        "axes.labelsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": False,
        "grid.color": GRID, "path.simplify": True, "axes.formatter.use_mathtext": False, "savefig.bbox": None,
    }  # fmt: skip
    whole: Any = matplotlib  # whose types list every setting
    with whole.rc_context(own), warnings.catch_warnings(), _hushed():
        warnings.simplefilter("ignore")  # a browser has letters that matplotlib's font lacks
        yield


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what matplotlib logs where there is no home folder, and while it looks for fonts for the first time."""
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def line_figure(
    title: str, description: str, lines: Sequence[Line], *, x: str, y: str, log: bool = False,
    span: Sequence[float] = (), names: Sequence[str] = (),
) -> str:  # fmt: skip
    """Lines over layers or stages. What is 0 has no place on a logarithmic axis and leaves a gap. The axis reaches over
    the numbers of `span`, too; `names` are those of the places 0, 1, 2 … on the other one."""
    height = 2.6
    figure, axes = _figure(height, left=_MARGIN, bottom=0.5, top=0.1)
    for i, line in enumerate(lines):
        ink, ys = SERIES[i % len(SERIES)], line.ys
        if log:
            ys = [value if value > 0 else math.nan for value in ys]
        few = len(line.xs) <= 40
        axes.plot(
            line.xs, ys, color=ink, linestyle=_DASHES[(i + i // len(SERIES)) % len(_DASHES)], linewidth=1.7,
            marker=_MARKERS[i % len(_MARKERS)] if few else "", markersize=4.5, label=_cut(line.label, 2 * _HALF_LABEL),
        )  # fmt: skip
        if line.band is not None:
            low, high = line.band
            places = [value > 0 or not log for value in low]
            axes.fill_between(line.xs, low, high, where=places, color=ink, alpha=0.25, linewidth=0)
    bands = [end for line in lines if line.band is not None for end in line.band]
    drawn = (*(line.ys for line in lines), *bands, span)
    seen = [value for values in drawn for value in values if value > 0 or not log]
    _scale(axes, seen, log)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", linewidth=0.8)
    _places(axes, names)
    if len(lines) > 1:
        columns = 2 if max(len(line.label) for line in lines) <= _HALF_LABEL else 1
        rows = math.ceil(len(lines) / columns)
        figure.set_figheight(height + 0.22 * rows)
        _place(figure, axes, left=_MARGIN, bottom=0.5, top=0.1 + 0.22 * rows)
        figure.legend(
            loc="upper left",
            ncols=columns,
            frameon=False,
            borderpad=0,
            handlelength=3,
            borderaxespad=0.2,
            columnspacing=1,
        )
    return _inline(figure, title, description)


def bar_figure(title: str, description: str, heights: Sequence[float], *, x: str, y: str, names: Sequence[str]) -> str:
    """One bar for each of `names`."""
    figure, axes = _figure(2.6, left=_MARGIN, bottom=0.5, top=0.1)
    axes.stairs(heights, [i - 0.5 for i in range(len(heights) + 1)], fill=True, color=SERIES[0])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", linewidth=0.8)
    _places(axes, names)
    return _inline(figure, title, description)


def heat_map(
    title: str, description: str, values: Mapping[tuple[int, str], float], layers: Sequence[int],
    kinds: Mapping[str, str], *, unit: str = "", log: bool = False, span: Sequence[float] = (),
) -> str:  # fmt: skip
    """A column a kind (name -> label) and a row a layer, the first on top; cells without a value are hatched.

    The colours reach over the numbers of `span`, too.
    """
    tall = min(0.25, max(0.055, 3.4 / max(1, len(layers)))) * len(layers)
    top = 0.12 + 0.083 * max((len(label) for label in kinds.values()), default=0)
    figure, axes = _figure(top + tall + 0.62, left=0.62, bottom=0.62, top=top)
    rows = [[values.get((layer, kind), math.nan) for kind in kinds] for layer in layers]
    found = [v for row in (*rows, span) for v in row if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    norm = _norm(low, high, log)
    axes.imshow(rows, cmap="cividis", norm=norm, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(kinds)), list(kinds.values()), rotation=90)
    axes.tick_params(axis="x", top=True, bottom=False, labeltop=True, labelbottom=False, length=2, pad=4)
    axes.patch.set(hatch="////", edgecolor=GRID, linewidth=0)
    step = max(1, math.ceil(len(layers) * 0.17 / tall)) if layers else 1
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")
    axes.spines[:].set_visible(False)
    width, height = figure.get_size_inches()
    bar = figure.add_axes((0.62 / width, 0.4 / height, (width - 0.82) / width, 0.12 / height))
    bar.imshow([[i / 63 for i in range(64)]], cmap="cividis", aspect="auto", interpolation="none", extent=(0, 1, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([0, 1], [short(low), short(high)])
    first, last = bar.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    bar.set_xlabel(f"{unit} logarithmic" if log else unit, labelpad=-9)
    bar.spines[:].set_visible(False)
    return _inline(figure, title, description)


def short(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}"


def labels_of(kinds: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted names that tell them apart."""
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        found[kind] = next((e for e in ends if sum(k == e or k.endswith(f".{e}") for k in kinds) == 1), kind)
    return found


# ---- how it is done


def _cut(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _figure(height: float, **margins: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    _place(figure, axes, **margins)
    return figure, axes


def _place(figure: Figure, axes: Axes, *, left: float, bottom: float, top: float) -> None:
    width, height = figure.get_size_inches()
    axes.set_position((left / width, bottom / height, (width - left - 0.2) / width, (height - bottom - top) / height))


def _places(axes: Axes, names: Sequence[str]) -> None:
    """Marks the horizontal axis: with whole numbers, or with some of these names."""
    from matplotlib.ticker import MaxNLocator

    if names:
        step = math.ceil(len(names) / 4)
        shown = list(range(0, len(names), step))
        if len(names) - 1 - shown[-1] > 0.6 * step:
            shown.append(len(names) - 1)
        axes.set_xticks(shown, [_cut(names[i], 12) for i in shown])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _norm(low: float, high: float, log: bool) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return LogNorm(low, high) if log else Normalize(low, high)


def _scale(axes: Axes, seen: Sequence[float], log: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if not seen:
        return
    low, high = min(seen), max(seen)
    if not log:
        axes.set_ylim(min(low, 0), 1.08 * high if high > 0 else 1)
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_major_locator(FixedLocator(_ticks(low / 1.3, high * 1.3)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers of a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(found) <= 8:
            return found if len(found) > 1 else [low, high]
    return found[:: math.ceil(len(found) / 8)]


def _inline(figure: Figure, title: str, description: str) -> str:
    """The figure as an element of a page, with nothing that could clash with another figure's."""
    packed = io.StringIO()
    figure.savefig(packed, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = packed.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style [^>]*>.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    for ink, shown in _INKS.items():
        body = body.replace(ink, shown)
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>{body}"
    )
