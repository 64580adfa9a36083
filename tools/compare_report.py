"""A comparison's results as Markdown tables and as a plot. Pure but for the PNG that write_plot writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MISSING = "–"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
"""Okabe and Ito's, told apart by colour-blind eyes too; yellow, hard to see on white, is a brown."""
_MARKERS = "osD^vPX<"
_LOG_FROM = 4.0
"""Ratio of the greatest to the least perplexity from which the axis is logarithmic."""

Cell = Mapping[str, Any]
Results = Mapping[str, Any]


def amount_label(amount: str) -> str:
    """ "60 %" or "2:4"."""
    return amount if ":" in amount else f"{100 * float(amount):.6g} %"


def number(perplexity: float) -> str:
    """Two decimals, fewer where they say nothing."""
    if perplexity >= 1e6:
        return f"{perplexity:.2g}"
    return f"{perplexity:.0f}" if perplexity >= 1000 else f"{perplexity:.2f}"


def amounts_of(results: Results) -> list[str]:
    """Sparsities in rising order, then patterns by their group's size."""
    found = {cell["amount"] for cell in results["cells"]}
    patterns = [amount for amount in found if ":" in amount]
    by_group = sorted(patterns, key=lambda amount: [int(n) for n in reversed(amount.split(":"))])
    return sorted(found - set(patterns), key=float) + by_group


_MEASURED = ("perplexity", "nll", "kl", "kl_stderr", "top1_agreement", "prune_seconds", "peak_rss_bytes")


def over_seeds(results: Results) -> list[Cell]:
    """A cell for each method and amount: means over seeds, and in `spread` their standard deviations if there are any.

    `window_nll` is the mean of each window; `error` is that of a seed that failed.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in results["cells"]:
        groups.setdefault((cell["method"], cell["amount"]), []).append(cell)
    found = []
    for (method, amount), cells in groups.items():
        joined: dict[str, Any] = {"method": method, "amount": amount, "calibration": cells[0]["calibration"]}
        joined |= {"seeds": [cell["seed"] for cell in cells], "spread": {}}
        for key in _MEASURED:
            values = [cell[key] for cell in cells if cell.get(key) is not None]
            if values:
                joined[key] = mean(values)
            if len(values) > 1:
                joined["spread"][key] = stdev(values)
        if all("window_nll" in cell for cell in cells):
            joined["window_nll"] = [mean(nats) for nats in zip(*(cell["window_nll"] for cell in cells), strict=True)]
        if errors := [cell["error"] for cell in cells if "error" in cell]:
            joined["error"] = errors[0]
        found.append(joined)
    return found


def methods_of(results: Results) -> list[str]:
    """In the order in which they came."""
    return list(dict.fromkeys(cell["method"] for cell in results["cells"]))


# ---- Markdown


def markdown(results: Results) -> str:
    """The whole report: what was compared, the tables, what failed, how to run it again."""
    notes: list[str] = []
    for cell in results["cells"]:
        if "error" in cell and cell["error"] not in notes:
            notes.append(cell["error"])
    parts = [f"# Pruning methods on {results['job']['model']['name']}", _setting(results)]
    if results["cells"]:
        parts += [
            _section(_about_perplexity(results), results, notes, {"perplexity": number}, dense=True),
            _section(_about_kl(results), results, notes, {"kl": _kl, "top1_agreement": _share}),
            _section(_about_cost(results), results, notes, {"prune_seconds": _seconds, "peak_rss_bytes": _memory}),
        ]
        parts += [_differences(results)] if any("window_nll" in cell for cell in results["cells"]) else []
    parts += ["\n".join(f"[{n}] {note}  " for n, note in enumerate(notes, 1))] if notes else []
    if changed := [f"{c['method']} {amount_label(c['amount'])}" for c in results["cells"] if c.get("source_changed")]:
        parts.append(f"The package's files were changed before these were finished: {', '.join(changed)}.")
    return "\n\n".join([*parts, _origin(results)])


def _section(
    about: str, results: Results, notes: Sequence[str], shown: Mapping[str, Callable[[float], str]], dense: bool = False
) -> str:
    """A table under a sentence: methods down, amounts across, in each cell the figures of `shown`."""
    joined = over_seeds(results)
    amounts, cells = amounts_of(results), {(c["method"], c["amount"]): c for c in joined}
    best = {
        (key, amount): _best([c[key] for c in joined if c["amount"] == amount and key in c], key, form)
        for key, form in shown.items()
        for amount in amounts
    }

    def text(method: str, amount: str) -> str:
        cell = cells.get((method, amount))
        if cell is None:
            return ""
        note = f" [{notes.index(cell['error']) + 1}]" if "error" in cell else ""
        if not any(key in cell for key in shown):
            return MISSING + note
        words = [form(cell[key]) if key in cell else MISSING for key, form in shown.items()]
        marked = [f"**{w}**" if w == best[key, amount] else w for w, key in zip(words, shown, strict=True)]
        for i, (key, form) in enumerate(shown.items()):
            if key in cell["spread"] and key not in ("prune_seconds", "peak_rss_bytes"):
                marked[i] += f" ± {form(cell['spread'][key])}"
        return " / ".join(marked) + note

    lines = [["", *map(amount_label, amounts)], ["---", *["---:"] * len(amounts)]]
    if dense and results["dense"]:
        lines.append(["dense", *[number(results["dense"]["perplexity"])] * len(amounts)])
    own = {c["method"] for c in results["cells"] if c["calibration"] == "own"} if "prune_seconds" in shown else ()
    lines += [[f"`{m}`{' †' * (m in own)}", *(text(m, a) for a in amounts)] for m in methods_of(results)]
    return about + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _differences(results: Results) -> str:
    """How many nats each method loses to the best of its column, with standard errors over the text's windows."""
    joined = [cell for cell in over_seeds(results) if "window_nll" in cell]
    amounts = [amount for amount in amounts_of(results) if any(cell["amount"] == amount for cell in joined)]
    best = {a: min((c for c in joined if c["amount"] == a), key=lambda c: c["nll"]) for a in amounts}

    def text(method: str, amount: str) -> str:
        cell = next((c for c in joined if (c["method"], c["amount"]) == (method, amount)), None)
        if cell is None:
            return ""
        if cell is best[amount]:
            return "best"
        apart = [a - b for a, b in zip(cell["window_nll"], best[amount]["window_nll"], strict=True)]
        error = f" ± {stdev(apart) / math.sqrt(len(apart)):.4f}" if len(apart) > 1 else ""
        return f"{mean(apart):+.4f}{error}"

    lines = [["", *map(amount_label, amounts)], ["---", *["---:"] * len(amounts)]]
    lines += [[f"`{method}`", *(text(method, amount) for amount in amounts)] for method in methods_of(results)]
    about = (
        "**Nats per token lost to the best method of the column**, window by window of the same text (means over "
        "seeds), ± the standard error of their mean. What is below two standard errors may be noise."
    )
    return about + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _best(values: Sequence[float], key: str, form: Callable[[float], str]) -> str | None:
    """The best figure as it is shown, so that equals look equal; None where none is the better for it."""
    if not values or key in ("prune_seconds", "peak_rss_bytes"):
        return None
    return form(max(values) if key == "top1_agreement" else min(values))


def _kl(nats: float) -> str:
    return f"{nats:.4f}" if nats < 1 else f"{nats:.3f}"


def _share(part: float) -> str:
    return f"{100 * part:.1f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.1f} s"


def _memory(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MiB" if nbytes < 10 * 2**30 else f"{nbytes / 2**30:.1f} GiB"


def _text(named: Mapping[str, str]) -> str:
    return f"`{named['name']}` (xxh3 {named['xxh3_128'][:12]})"


def _setting(results: Results) -> str:
    job, dense = results["job"], results["dense"]
    length = job["seqlen"] or (dense or {}).get("seqlen", "default")
    computed = "".join(f", `--{key} {job[key]}`" for key in ("device", "dtype") if job[key])
    return (
        f"Calibrated on {job['samples']} × {length} tokens of {_text(job['calib'])}, {_seeds(results)}; "
        f"perplexity of {_text(job['text'])} in windows of {length} tokens{computed}."
    )


def _seeds(results: Results) -> str:
    seeds = sorted({cell["seed"] for cell in results["cells"]})
    if len(seeds) < 2:
        return f"seed {seeds[0] if seeds else 0}"
    return f"means of seeds {', '.join(map(str, seeds))} ± their standard deviation"


def _about_perplexity(results: Results) -> str:
    dense = results["dense"]
    of = f" of all {dense['tokens']} predicted tokens in {dense['windows']} windows" if dense else ""
    return f"**Perplexity**{of}; lower is better, the best of each column in bold."


def _about_kl(results: Results) -> str:
    kl = results["job"]["kl"]
    measured = next((c for c in results["cells"] if "kl" in c), None)
    where = f"on {_text(kl['text'])}" if "text" in kl else "on the whole text"
    if measured is not None and results["dense"]:
        if "text" not in kl and measured["kl_windows"] < results["dense"]["windows"]:
            where = "on the text's first windows only"
        where += f": {measured['kl_tokens']} tokens in {measured['kl_windows']} windows"
    errors = [c["kl_stderr"] / c["kl"] for c in results["cells"] if c.get("kl_stderr") and c["kl"] > 0]
    spread = f"; standard error of KL at most {100 * max(errors):.1f} % of it" if errors else ""
    return f"**KL divergence to the dense model** in nats per token / **top-1 agreement** with it, {where}{spread}."


def _about_cost(results: Results) -> str:
    shared = results["calibration"]
    found = "**Seconds of the prune / its peak memory**, start of the program not counted."
    if shared:
        seconds, peak = (mean(of[key] for of in shared.values()) for key in ("seconds", "peak_rss_bytes"))
        found += (
            f" Mask-only methods use statistics that were gathered once a seed in {_seconds(seconds)} "
            f"({_memory(peak)}), not counted here either."
        )
    own = any(cell["calibration"] == "own" for cell in results["cells"])
    return found + (" †: with a calibration of its own." if own else "")


def _origin(results: Results) -> str:
    runs, job = results["runs"], results["job"]
    lines = []
    if runs:
        here = runs[-1]["machine"]
        ram = f", {here['ram_bytes'] / 2**30:.0f} GiB RAM" if here["ram_bytes"] else ""
        gpu = f", {here['gpu']}" if here["gpu"] else ""
        lines += [f"{here['processor']}, {job['machine']['cores']} cores{ram}{gpu}; commit {here['commit']}, "
                  + ", ".join(f"{name} {found}" for name, found in job["versions"].items() if name != "source")
                  + f"; {runs[0]['date'][:10]}. Made by", "", "```"]  # fmt: skip
        lines += [*dict.fromkeys(run["command"] for run in runs), "```"]
    return "\n".join(lines)


# ---- the plot


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
