"""Results as plain text tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from streamprune.process.memory import format_bytes
from streamprune.progress import format_duration

if TYPE_CHECKING:
    from streamprune.evaluation.result import Evaluation
    from streamprune.evaluation.tasks import TaskEvaluation
    from streamprune.inspection.difference import Difference
    from streamprune.inspection.report import Inspection, LinearReport, Totals
    from streamprune.planning.plan import Plan

NOTICED = 0.1
"""Share of the processors from which other programs are mentioned."""

_EXPERT = re.compile(r"\.experts\.\d+\.")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: the first column is left-aligned, the others are right-aligned."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(r) for r in rows)])


def evaluation_lines(found: Evaluation) -> str:
    """Perplexity, and in a second line, with a reference, how much the predictions differ from it."""
    windows = f"{found.windows} windows of {found.seqlen}{' after a BOS token' if found.bos else ''}"
    perplexity = (
        f"perplexity {found.perplexity:.3f}  ({found.tokens} tokens in {windows}, "
        f"{found.seconds:.1f} s, peak {format_bytes(found.peak_rss_bytes)})"
    )
    if found.replaced:
        perplexity += f"\n{found.replaced} bytes of the text are invalid and were replaced by U+FFFD"
    if found.kl is None or found.top1_agreement is None:
        return perplexity
    error = f" ± {found.kl_stderr:.2g}" if found.kl_stderr is not None else ""
    return (
        f"{perplexity}\nreference {found.reference_perplexity:.3f}, KL {found.kl:.4g}{error} nats per token, "
        f"same most likely token {100 * found.top1_agreement:.2f} %"
    )


def task_table(found: TaskEvaluation) -> str:
    """A line for each task's metric, with its standard error; with a reference, its score and the difference."""
    compares = any(s.reference is not None for s in found.scores)
    rows = []
    for s in found.scores:
        metric = s.metric if s.filter == "none" else f"{s.metric} ({s.filter})"
        cells = [s.task, metric, _with_error(s.value, s.stderr)]
        if compares:
            cells += [_with_error(s.reference, s.reference_stderr), _with_error(s.difference, s.difference_stderr, "+")]
        rows.append([*cells, str(s.documents)])
    head = ["task", "metric", "score", *(["reference", "difference"] if compares else []), "documents"]
    last = (
        f"{found.requests} requests, {found.sequences} sequences of {found.tokens} tokens in all, "
        f"{found.seconds:.1f} s, peak {format_bytes(found.peak_rss_bytes)} (lm_eval {found.lm_eval})"
    )
    cut = f"\n{found.truncated} contexts were longer than the model takes, and lost their beginning"
    return f"{table(head, rows)}\n\n{last}{cut if found.truncated else ''}"


def _with_error(value: float | None, stderr: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def inspection_table(found: Inspection) -> str:
    """One line per linear, then the totals. A layer's experts share a line; empty optional columns are left out.

    With `--against`, the columns about bytes are replaced by the differences from the source.
    """
    heads = ["linear", "dtype", "shape", "zeros", "zeros/row", "pattern"]
    heads += ["kept changed", "revived", "rel. error"] if found.against else ["scales", "stored", "packed"]
    groups: dict[tuple[Any, ...], list[LinearReport]] = {}
    for n in found.linears:
        groups.setdefault((_EXPERT.sub(".experts.*.", n.name), n.shape, n.dtype, n.packed), []).append(n)
    rows = [
        _inspection_cells(key[0] if len(group) > 1 else group[0].name, group, found.totals.layout)
        for key, group in groups.items()
    ]
    optional = ("revived", "scales", "faults")
    shown = [h for h in [*heads, "faults"] if h not in optional or any(row[h] not in ("-", "0") for row in rows)]
    t = found.totals
    patterns = ", ".join(f"{p} in {c}" for p, c in t.patterns.items())
    lines = [
        table(shown, [[row[h] for h in shown] for row in rows]),
        "",
        f"{t.linears} linears, {t.weights} weights, {100 * t.sparsity:.2f} % zero; patterns: {patterns}; "
        f"faults: {'none' if _faults([t]) == '-' else _faults([t])}",
        _stored(t),
    ]
    if found.against:
        lines += _difference_lines(found.against)
    if found.ok is not None:
        left = len(found.left_dense)
        of = f" ({t.linears - left} linears; {left} more were left dense, as streamprune.json says)" if left else ""
        lines.append(f"expected {found.expect}: {'yes' if found.ok else 'NO'}{of}")
    return "\n".join(lines)


def _inspection_cells(name: str, linears: Sequence[LinearReport], layout: str | None) -> dict[str, str]:
    """The cells of one linear, or of similar ones in one line: sums, ranges, the largest error. Keys are the heads."""
    few, many = min(n.min_row_zeros for n in linears), max(n.max_row_zeros for n in linears)
    patterns = {n.pattern or "-" for n in linears}
    scales = [n.scale for n in linears if n.scale is not None and n.scale.least is not None]
    differences = [n.difference for n in linears if n.difference is not None]
    changed = [d.kept_changed for d in differences if d.kept_changed is not None]
    revived = [d.revived for d in differences if d.revived is not None]
    errors = [d.relative_error for d in differences if d.relative_error is not None]
    span = f"{min(s.least or 0 for s in scales):.2g}..{max(s.largest or 0 for s in scales):.2g}" if scales else "-"
    return {
        "linear": name if len(linears) == 1 else f"{name} ({len(linears)})",
        "dtype": linears[0].dtype,
        "shape": "x".join(map(str, linears[0].shape)),
        "zeros": f"{100 * sum(n.zeros for n in linears) / sum(n.weights for n in linears):.2f} %",
        "zeros/row": str(few) if few == many else f"{few}-{many}",
        "pattern": patterns.pop() if len(patterns) == 1 else "mixed",
        "scales": span,
        "stored": format_bytes(sum(n.nbytes for n in linears)),
        "packed": format_bytes(sum(n.nbytes_packed(layout) for n in linears)),
        "kept changed": str(sum(changed)) if changed else "-",
        "revived": str(sum(revived)) if revived else "-",
        "rel. error": f"{max(errors):.4g}" if errors else "-",
        "faults": _faults(linears),
    }


def _faults(found: Sequence[LinearReport] | Sequence[Totals]) -> str:
    kinds = {
        "-0.0": sum(n.negative_zeros for n in found),
        "NaN": sum(n.nans for n in found),
        "Inf": sum(n.infs for n in found),
        "empty rows" if hasattr(found[0], "linears") else "nil": sum(n.zero_rows for n in found),
        "bad scales": sum(n.bad_scales for n in found),
    }
    return ", ".join(f"{count} {what}" for what, count in kinds.items() if count) or "-"


def _stored(t: Totals) -> str:
    """Bytes of the linears, as stored and as packed."""
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
    """A table of stages (equal neighbours share a line), then the estimates for the whole run."""
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
        f"disk        {format_bytes(found.disk_bytes)} must be free: {format_bytes(found.output_bytes)} output, "
        f"{format_bytes(found.cache_bytes)} activations while running"
        + (f", {format_bytes(found.spool_bytes)} shards from the hub at once" if found.spool_bytes else ""),
        f"arithmetic  {found.flops / 1e12:.2f} TFLOP",
        f"time        about {format_duration(found.seconds)}: {_parts(asdict(found.split))}",
        *_busy(found),
        textwrap.fill(f"({found.rests_on})", 118, initial_indent=" " * 12, subsequent_indent=" " * 12),
        *_ranks(found),
    ]
    return "\n".join(lines)


def _busy(found: Plan) -> list[str]:
    if (found.busy or 0.0) < NOTICED:
        return []
    low, high = map(format_duration, found.seconds_range)
    return [
        f"            {low} to {high}, as other programs took {100 * (found.busy or 0.0):.0f} % of the processors "
        "while this was measured"
    ]


def _ranks(found: Plan) -> list[str]:
    if (shared := found.shared) is None:
        return []
    most = {
        "windows": "computing, which ranks share", "refits": "refits, which ranks share",
        "experts": "the slowest expert of each round", "tuning": "tuning on rank 0",
        "masks": "choosing masks on rank 0" if shared.tokens else "choosing masks, which ranks share",
        "disk": "the disk",
    }[shared.bound]  # fmt: skip
    said = (
        f"about {format_duration(shared.seconds)}, bound by {most}: {_parts(shared.parts)}; each takes the RAM above "
        f"and {format_bytes(shared.cache_bytes)} for activations (without what ranks exchange, if each is as fast "
        "as this process, and all have one disk)"
    )
    return [textwrap.fill(said, 118, initial_indent=f"{f'{shared.ranks} ranks':<12}", subsequent_indent=" " * 12)]


def _vram(found: Plan) -> list[str]:
    if not found.vram_bytes:
        return []
    least = format_bytes(found.least_vram_bytes)
    return [f"peak VRAM   {format_bytes(found.vram_bytes)} ({found.layout}); least --max-vram {least}"]


def _parts(split: Mapping[str, float]) -> str:
    """An estimated time by kind of work, largest first."""
    parts = sorted(split.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in parts if seconds > 0)


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
