"""Results as plain text tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from streamprune.spec import format_bytes

if TYPE_CHECKING:
    from streamprune.evaluation import Evaluation
    from streamprune.inspection.difference import Difference
    from streamprune.inspection.report import Inspection, LinearReport, Totals
    from streamprune.model.cost import Split
    from streamprune.planning import Plan


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(r) for r in rows)])


def evaluation_lines(found: Evaluation) -> str:
    """Perplexity; with a reference a second line, how far the predictions are from its own."""
    perplexity = (
        f"perplexity {found.perplexity:.3f}  ({found.tokens} tokens in {found.windows} windows of {found.seqlen}, "
        f"{found.seconds:.1f} s, peak {format_bytes(found.peak_rss_bytes)})"
    )
    if found.kl is None or found.top1_agreement is None:
        return perplexity
    error = f" ± {found.kl_stderr:.2g}" if found.kl_stderr is not None else ""
    return (
        f"{perplexity}\nreference {found.reference_perplexity:.3f}, KL {found.kl:.4g}{error} nats per token, "
        f"same most likely token {100 * found.top1_agreement:.2f} %"
    )


def inspection_table(found: Inspection) -> str:
    """One line a linear, then the totals; columns that hold nothing for any linear are left out.

    With a source: how far each linear is from it, in place of its bytes.
    """
    heads = ["linear", "dtype", "shape", "zeros", "zeros/row", "pattern"]
    heads += ["kept changed", "revived", "rel. error"] if found.against else ["scales", "stored", "packed"]
    rows = [_inspection_cells(n, found.totals.layout) for n in found.linears]
    optional = ("revived", "scales", "faults")
    shown = [h for h in [*heads, "faults"] if h not in optional or any(row[h] not in ("-", "0") for row in rows)]
    t = found.totals
    patterns = ", ".join(f"{p} in {c}" for p, c in t.patterns.items())
    lines = [
        table(shown, [[row[h] for h in shown] for row in rows]),
        "",
        f"{t.linears} linears, {t.weights} weights, {100 * t.sparsity:.2f} % zero; patterns: {patterns}; "
        f"faults: {'none' if _faults(t) == '-' else _faults(t)}",
        _stored(t),
    ]
    if found.against:
        lines += _difference_lines(found.against)
    if found.ok is not None:
        lines.append(f"expected {found.expect}: {'yes' if found.ok else 'NO'}")
    return "\n".join(lines)


def _inspection_cells(n: LinearReport, layout: str | None) -> dict[str, str]:
    d, scale = n.difference, n.scale
    few, many = n.min_row_zeros, n.max_row_zeros
    return {
        "linear": n.name,
        "dtype": n.dtype,
        "shape": "x".join(map(str, n.shape)),
        "zeros": f"{100 * n.sparsity:.2f} %",
        "zeros/row": str(few) if few == many else f"{few}-{many}",
        "pattern": n.pattern or "-",
        "scales": "-" if scale is None or scale.least is None else f"{scale.least:.2g}..{scale.largest:.2g}",
        "stored": format_bytes(n.nbytes),
        "packed": format_bytes(n.nbytes_packed(layout)),
        "kept changed": "-" if d is None or d.kept_changed is None else str(d.kept_changed),
        "revived": "-" if d is None or d.revived is None else str(d.revived),
        "rel. error": "-" if d is None or d.relative_error is None else f"{d.relative_error:.4g}",
        "faults": _faults(n),
    }


def _faults(found: LinearReport | Totals) -> str:
    kinds = {
        "-0.0": found.negative_zeros,
        "NaN": found.nans,
        "Inf": found.infs,
        "bad scales": found.bad_scales,
    }
    return ", ".join(f"{count} {what}" for what, count in kinds.items() if count) or "-"


def _stored(t: Totals) -> str:
    """Bytes of the linears, now and packed."""
    now = f"stored in {format_bytes(t.nbytes)}"
    if t.packed:
        return f"{now}, {t.packed} of {t.linears} linears packed; all dense: {format_bytes(t.nbytes_dense)}"
    if t.layout is None:
        return f"{now}; packing would save nothing"
    return f"{now}; packed as {t.layout}: {format_bytes(t.nbytes_packed)}"


def _difference_lines(d: Difference) -> list[str]:
    equal = sum(status == "equal" for status in d.tensors.values())
    changed = len(d.named("changed", linears=True))
    error = "" if d.relative_error is None else f", relative error of all linears {d.relative_error:.4g}"
    lines = [f"against {d.source}: of {len(d.tensors)} tensors {equal} equal, {changed} linears changed{error}"]
    for status in sorted({*d.amiss.values()}):
        names = [name for name, is_so in d.amiss.items() if is_so == status]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        what = "changed, but no linear" if status == "changed" else status
        lines.append(f"  {what}: {', '.join(names[:8])}{more}")
    return lines


def plan_table(found: Plan) -> str:
    """Stages (equal neighbours folded), then what the whole run takes."""
    rows = []
    for _, group in groupby(found.stages, key=lambda s: (s.name.split()[0], s.nbytes, s.linears, s.flops)):
        same = list(group)
        name = same[0].name if len(same) == 1 else f"{same[0].name} … {same[-1].name.split()[-1]}"
        rows.append([
            name, format_bytes(same[0].nbytes), str(same[0].linears), f"{same[0].flops / 1e9:.1f} GFLOP",
            f"{same[0].seconds:.2f} s",
        ])  # fmt: skip
    lines = [
        f"{found.model}: {found.architecture}, {found.parameters / 1e6:.1f} M parameters, "
        f"computed in {found.dtype} on {found.device}, {found.batch} windows a batch",
        "",
        table(["stage (each)", "weights", "linears", "arithmetic", "time"], rows),
        "",
        f"peak RAM    {format_bytes(found.peak_ram_bytes)}; least --max-ram {format_bytes(found.least_ram_bytes)}",
        *_vram(found),
        f"disk        {format_bytes(found.disk_bytes)} free: {format_bytes(found.output_bytes)} output, "
        f"{format_bytes(found.cache_bytes)} activations while running",
        f"arithmetic  {found.flops / 1e12:.2f} TFLOP",
        f"time        about {_duration(found.seconds)}: {_parts(found.split)}",
        textwrap.fill(f"({found.rests_on})", 118, initial_indent=" " * 12, subsequent_indent=" " * 12),
    ]
    return "\n".join(lines)


def _vram(found: Plan) -> list[str]:
    if not found.vram_bytes:
        return []
    least = format_bytes(found.least_vram_bytes)
    return [f"peak VRAM   {format_bytes(found.vram_bytes)} ({found.layout}); least --max-vram {least}"]


def _parts(split: Split) -> str:
    """What an estimated time goes to, the largest first."""
    parts = sorted(asdict(split).items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts if seconds > 0)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def demo_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The demo's models side by side."""
    cells = [
        [
            r["model"], f"{r['perplexity']:.2f}", f"{100 * r['sparsity']:.1f} %", r["pattern"] or "-",
            f"{r['prune_seconds']:.1f}" if r["prune_seconds"] is not None else "-", f"{r['eval_seconds']:.1f}",
            format_bytes(r["peak_rss_bytes"]),
        ]
        for r in rows
    ]  # fmt: skip
    return table(["model", "perplexity", "zeros", "pattern", "prune s", "eval s", "peak memory"], cells)
