"""A comparison's results as Markdown tables. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

MISSING = "–"

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
