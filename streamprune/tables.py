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
    from streamprune.inspection import Inspection
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
    """One line a linear, and a line of totals."""
    rows = [
        [
            n.name, n.dtype, "x".join(map(str, n.shape)), f"{100 * n.sparsity:.2f} %",
            str(n.min_row_zeros) if n.min_row_zeros == n.max_row_zeros else f"{n.min_row_zeros}-{n.max_row_zeros}",
            n.pattern or "-", _faults(n.negative_zeros, n.nans, n.infs),
        ]
        for n in found.linears
    ]  # fmt: skip
    t = found.totals
    patterns = ", ".join(f"{p} in {c}" for p, c in t.patterns.items()) or "none"
    total = (
        f"{t.linears} linears, {t.weights} weights, {100 * t.sparsity:.2f} % zero; patterns: {patterns}; "
        f"faults: {_faults(t.negative_zeros, t.nans, t.infs)}"
    )
    verdict = [] if found.ok is None else [f"expected {found.expect}: {'yes' if found.ok else 'NO'}"]
    head = ["linear", "dtype", "shape", "zeros", "zeros/row", "pattern", "faults"]
    return "\n".join([table(head, rows), "", total, *verdict])


def _faults(negative_zeros: int, nans: int, infs: int) -> str:
    found = [f"{count} {what}" for count, what in ((negative_zeros, "-0.0"), (nans, "NaN"), (infs, "Inf")) if count]
    return ", ".join(found) or "none"


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
