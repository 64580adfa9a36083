"""What a page says of one OUT: what was done, linears by layer and kind, stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from streamprune.process.memory import format_bytes
from streamprune.pruning.command import command_of
from streamprune.reporting.facts import Facts, Spread, number, plain
from streamprune.reporting.figures import MOST_KINDS, Line, bar_figure, heat_map, labels_of, line_figure, short
from streamprune.reporting.markup import Html, element, figure, folded, joined, table

METRICS = {
    "sparsity": ("sparsity", "share of the weights that were pruned"),
    "removed_score": ("score removed", "share of the recipe's score that the pruned weights had"),
    "error_mask": ("error of the mask", "on the calibration, if weights that stay kept their values"),
    "error": ("error", "on the calibration, with new values"),
    "held_out_error_mask": ("held-out error of the mask", "on tokens kept out, if weights that stay kept their values"),
    "held_out_error": ("held-out error", "on tokens kept out, with new values"),
    "damping": ("damping", "of the refit, relative to each feature's power unless asked otherwise"),
    "error_fp8": ("error in FP8", "on the calibration, of all that was done"),
    "scale": ("FP8 scale", "what codes are multiplied with, of all rows (output channels)"),
    "rounding_error": ("rounding error", "what rounding to FP8 alone lost of the output, by the inputs' powers"),
}
"""Short and long name. Errors are ‖(W − Ŵ)X‖² / ‖WX‖²."""

TUNE = ("held_out_error_before", "held_out_error")
"""Of a layer that was tuned: relative errors of its outputs on windows that were held out."""

_PAIRS = (("held_out_error_mask", "held_out_error"), ("error_mask", "error"))
_PERCENT = {"sparsity", "removed_score"}
_LOGARITHMIC = METRICS.keys() - _PERCENT


def section(facts: Facts, place: str) -> Html:
    """All of one OUT; `place` is what links call it."""
    return element(
        "section", element("h2", facts.name, id=place), _done(facts), element("h3", "Linears by layer and kind"),
        *_quality(facts), element("h3", "Time and memory by stage"), *_stages(facts),
    )  # fmt: skip


# ---- what was done


def _done(facts: Facts) -> Html:
    calibration = facts.report.get("calibration")
    given = calibration if isinstance(calibration, dict) else {}
    command = command_of(facts.job, plain(given["text"]) if "text" in given else None, "MODEL", facts.name)
    versions = facts.report.get("versions")
    told = versions.items() if isinstance(versions, dict) else ()
    parts = [
        table("What was done", (), list(_rows(facts, given)), prose=(1,)),
        element("p", "The same again, with MODEL as it was then:"),
        element("pre", element("code", plain(command, 10_000)), tabindex="0"),
        element("p", ", ".join(f"{plain(name)} {plain(version)}" for name, version in told), class_="quiet"),
    ]
    if facts.notes:
        parts.append(element("ul", *(element("li", sentence(note)) for note in facts.notes)))
    return joined(parts)


def _rows(facts: Facts, calibration: dict[str, object]) -> Iterator[tuple[str, str]]:
    job = facts.job
    yield "recipe", facts.recipe
    parts = ("score", "selector", "refit", "tune", "quantize", "allocate", "fp8_scale", "fp8_rounding")
    if made := [f"{part.replace('_', ' ')} {plain(job[part])}" for part in parts if job.get(part) is not None]:
        yield "made of", ", ".join(made)
    yield "asked for", facts.amount
    linears, weights = (sum(getattr(c, what) for c in facts.cells.values()) for what in ("linears", "weights"))
    yield "reached", f"{_percent(facts.sparsity)} of {weights:,} weights in {linears:,} linears"
    for what in ("only", "skip"):
        if job.get(what) is not None:
            yield what, plain(job[what])
    samples, seqlen = number(calibration.get("samples")), number(calibration.get("seqlen"))
    if samples is not None and seqlen is not None:
        share = number(calibration.get("replace_tokens"))
        random = f", {_percent(share)} of the tokens of every second one random" if share else ""
        yield "calibrated on", f"{plain(calibration.get('text'))}: {samples:.0f} windows of {seqlen:.0f} tokens{random}"
    if calibration.get("propagate") is not None:
        yield "propagated", plain(calibration["propagate"])
    resolved = facts.report.get("resolved")
    if isinstance(resolved, dict):
        yield "computed in", ", ".join(plain(resolved[k]) for k in ("dtype", "device") if k in resolved)
    if facts.report.get("base_model") is not None:
        yield "made from", plain(facts.report["base_model"])
    yield "time", f"{seconds(facts.seconds)}, and {seconds(_startup(facts))} to start"
    yield "memory", f"{format_bytes(facts.peak)} resident at most"


def _startup(facts: Facts) -> float:
    return number(facts.report.get("startup_seconds")) or 0.0


# ---- quality


def _quality(facts: Facts) -> Iterator[Html]:
    if not facts.cells:
        yield element("p", "No linear was pruned.")
        return
    shown = [metric for metric in METRICS if facts.has(metric)]
    pair = next((pair for pair in _PAIRS if facts.has(pair[1])), None)
    maps = [m for m in (*(pair or ("removed_score",)), "damping", "error_fp8", "rounding_error", "scale") if m in shown]
    sparsities = [spread for cell in facts.cells.values() if (spread := cell.spreads.get("sparsity"))]
    low, high = min((s.least for s in sparsities), default=0.0), max((s.most for s in sparsities), default=0.0)
    if high - low > 1e-3:
        maps.insert(0, "sparsity")
    else:
        yield element("p", f"Every linear lost {_percent(low)} of its weights.")
    if any(cell.linears > 1 for cell in facts.cells.values()):
        yield element("p", "A layer's experts share a cell, which has their median; bands and tables show their range.")
    yield _by_kind(facts, shown)
    kinds = facts.kinds[:MOST_KINDS]
    if len(kinds) < len(facts.kinds):
        yield element("p", f"Figures show the first {MOST_KINDS} of {len(facts.kinds)} kinds; the table has all.")
    labels = labels_of(facts.kinds)
    if facts.layers:
        both = [value for metric in pair or () for value in facts.values(metric).values()]
        yield element("div", *(
            _map(facts, metric, {kind: labels[kind] for kind in kinds}, both if pair and metric in pair else ())
            for metric in maps
        ), class_="figures")  # fmt: skip
        drawn = [m for m in (*(pair or ("removed_score",)), "error_fp8") if m in shown]
        if drawn:
            yield element("div", *_panels(facts, drawn, kinds), class_="figures")
        if any(stage.tune for stage in facts.stages):
            yield element("div", _tuned(facts), class_="figures")
    yield folded("Every layer and kind as a table", _by_cell(facts, shown))


def _by_kind(facts: Facts, shown: Sequence[str]) -> Html:
    rows = []
    for kind in facts.kinds:
        cells = [cell for (_, other), cell in facts.cells.items() if other == kind]
        row = [kind, f"{sum(c.linears for c in cells):,}", f"{sum(c.weights for c in cells):,}"]
        for metric in shown:
            spreads = [c.spreads[metric] for c in cells if metric in c.spreads]
            whole = Spread.of([s.median for s in spreads])
            if whole is not None:
                whole = Spread(min(s.least for s in spreads), whole.median, max(s.most for s in spreads), len(spreads))
            row.append(_spread(metric, whole))
        rows.append(row)
    caption = "By kind: the median over layers (the least – the most)"
    return table(caption, ("kind", "linears", "weights", *(METRICS[m][0] for m in shown)), rows)


def _by_cell(facts: Facts, shown: Sequence[str]) -> Html:
    order = {kind: i for i, kind in enumerate(facts.kinds)}
    places = sorted(facts.cells, key=lambda p: (p[0] is None, p[0] or 0, order[p[1]]))
    rows = [
        ["–" if place[0] is None else str(place[0]), place[1], f"{cell.linears:,}",
         *(_spread(metric, cell.spreads.get(metric)) for metric in shown)]
        for place in places for cell in (facts.cells[place],)
    ]  # fmt: skip
    return table(
        "Every layer and kind: the median over experts (the least – the most)",
        ("layer", "kind", "linears", *(METRICS[m][0] for m in shown)), rows,
    )  # fmt: skip


def _map(facts: Facts, metric: str, kinds: dict[str, str], span: Sequence[float]) -> Html:
    title, about = METRICS[metric]
    values = facts.values(metric)
    log = metric in _LOGARITHMIC and any(value > 0 for value in values.values())
    where = f"{title} by layer (rows) and kind (columns)"
    shown = {place: value * times(metric) for place, value in values.items()}
    unit = "%" if metric in _PERCENT else ""
    code = heat_map(where, _where(metric, values), shown, facts.layers, kinds, unit=unit, log=log, span=span)
    return figure(code, title[:1].upper() + title[1:], sentence(about) + " ", _where(metric, values))


def _where(metric: str, values: dict[tuple[int, str], float]) -> str:
    if not values:
        return "No linear has one."
    (low, least), (high, most) = (choose(values.items(), key=lambda item: item[1]) for choose in (min, max))
    if least == most:
        return f"{_value(metric, least)} everywhere."
    return (
        f"Least {_value(metric, least)} (layer {low[0]}, {low[1]}), most {_value(metric, most)} (layer {high[0]}, "
        f"{high[1]})."
    )


def _panels(facts: Facts, drawn: Sequence[str], kinds: Sequence[str]) -> Iterator[Html]:
    """For each kind lines over layers, all with the same axis."""
    span = [value * times(metric) for metric in drawn for value in facts.values(metric).values()]
    log = all(metric in _LOGARITHMIC for metric in drawn) and any(value > 0 for value in span)
    for kind in kinds:
        lines = [_line(metric, found) for metric in drawn if (found := facts.spreads(metric, kind))]
        if lines:
            title = f"{kind}: {', '.join(line.label for line in lines)} by layer"
            code = line_figure(title, _ends(lines), lines, x="layer", y=axis(drawn[0]), log=log, span=span)
            yield figure(code, kind, _ends(lines))


def _line(metric: str, found: Mapping[int, Spread]) -> Line:
    by = times(metric)
    low, middle, high = ([by * getattr(s, end) for s in found.values()] for end in ("least", "median", "most"))
    return Line(METRICS[metric][0], list(found), middle, (low, high) if low != high else None)


def _ends(lines: Sequence[Line]) -> str:
    told = []
    for line in lines:
        first, last, most = short(line.ys[0]), short(line.ys[-1]), short(max(line.ys))
        where = f"{first} in layer {line.xs[0]:.0f}, {last} in layer {line.xs[-1]:.0f}, {most} at most."
        told.append(sentence(f"{line.label}: {where}"))
    return " ".join(told)


def _tuned(facts: Facts) -> Html:
    layers = [stage for stage in facts.stages if all(key in stage.tune for key in TUNE)]
    numbers = [int(digits) for stage in layers if (digits := stage.name.rpartition(" ")[2]).isdecimal()]
    places = numbers if len(numbers) == len(layers) else list(range(len(layers)))
    labels = ("before tuning", "tuned")
    lines = [Line(label, places, [s.tune[key] for s in layers]) for label, key in zip(labels, TUNE, strict=True)]
    title = "Layers as a whole, tuned"
    about = "Relative error of a layer's outputs on windows that were held out. "
    if not layers:
        return figure("", title, "No layer had windows that were held out.")
    log = any(value > 0 for line in lines for value in line.ys)
    code = line_figure(title, about + _ends(lines), lines, x="layer", y="relative error", log=log)
    return figure(code, title, about, _ends(lines))


# ---- stages


def _stages(facts: Facts) -> Iterator[Html]:
    if not facts.stages:
        return
    slowest = max(facts.stages, key=lambda stage: stage.seconds)
    highest = max(stage.peak for stage in facts.stages)
    first = next(stage for stage in facts.stages if stage.peak == highest)
    peaked = f"It peaked in stage {first.name}, at {format_bytes(highest)}"
    peaked += f"; finishing took it to {format_bytes(facts.peak)}." if facts.peak > highest else "."
    names = [stage.name for stage in facts.stages]
    took = sentence(f"{slowest.name} took longest, {seconds(slowest.seconds)}")
    about = f"{len(facts.stages)} stages in the order of work. "
    memory = [Line("resident", list(range(len(names))), [stage.peak / 2**30 for stage in facts.stages])]
    spent = [stage.seconds for stage in facts.stages]
    time = bar_figure("Seconds by stage", about + took, spent, x="stage", y="seconds", names=names)
    peak = line_figure("Memory by stage", about + peaked, memory, x="stage", y="GiB", names=names)
    so_far = "The most that was resident so far, at the end of each stage. "
    drawn = figure(time, "Time", about, took), figure(peak, "Memory", so_far, peaked)
    yield element("div", *drawn, class_="figures")
    yield folded("Every stage as a table", _by_stage(facts))


def _by_stage(facts: Facts) -> Html:
    head = ["stage", "seconds", "resident at most so far", "experts pooled", "Gram passes", "before tuning", "tuned",
            "best epoch"]  # fmt: skip
    rows = [
        [
            s.name, f"{s.seconds:.1f}", format_bytes(s.peak), *(str(n) if n else "" for n in (s.pooled, s.gram_passes)),
            *(short(s.tune[key]) if key in s.tune else "" for key in (*TUNE, "best_epoch")),
        ]
        for s in facts.stages
    ]  # fmt: skip
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return table("Every stage", [head[i] for i in kept], [[row[i] or "–" for i in kept] for row in rows])


# ---- words and numbers


def times(metric: str) -> int:
    """What a metric is multiplied with to be drawn: some are shares, and shown as percentages."""
    return 100 if metric in _PERCENT else 1


def axis(metric: str) -> str:
    """What stands beside an axis."""
    return f"{METRICS[metric][0]}, %" if metric in _PERCENT else "relative error"


def sentence(words: str) -> str:
    """With a capital and a full stop."""
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


def seconds(value: float) -> str:
    """As people say it."""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _value(metric: str, value: float) -> str:
    return _percent(value) if metric in _PERCENT else short(value)


def _spread(metric: str, spread: Spread | None) -> str:
    if spread is None:
        return "–"
    middle = _value(metric, spread.median)
    ends = [_value(metric, value) for value in (spread.least, spread.most)]
    return middle if ends[0] == ends[1] == middle else f"{middle} ({ends[0]} – {ends[1]})"
