"""Which linears a job prunes, in which parts of tensors they lie, and what is reported of each."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from streamprune.disk.header import TensorRef
from streamprune.errors import UsageError
from streamprune.methods.selection import Amount, Pattern, check_pattern
from streamprune.model.stages import PRUNABLE, Outline, Stage

CHUNK_BYTES = 16 << 20
"""Bytes of a tensor's rows that are in memory at once."""

ROUTER = re.compile(r"\.(gate|router)(\.|$)|shared_expert_gate$")
"""Matches the names of routers of mixtures of experts, and of gates of shared experts."""


def selected_linears(stages: Sequence[Stage], only: Any, skip: Any, streams: int = 1) -> dict[str, TensorRef]:
    """The linears to prune, by module path: those that the compiled patterns `only` and `skip` leave.

    Left out unless a match of `only` includes the end of their names: in mixtures of experts, routers and the gates of
    shared experts; in models with several `streams` of hidden states, linears that say how streams are mixed. Raises
    UsageError if no linear is left, or one has a dtype that cannot be pruned.
    """
    names = {n: ref for s in stages for n, ref in s.linears.items()}
    routers = {n for n in names if ROUTER.search(n)} if any(stage.experts for stage in stages) else set()
    mixing = {n for n, ref in names.items() if streams > 1 and min(ref.shape) <= streams**2}
    named = {n for n in names if only and any(m.end() == len(n) for m in only.finditer(n))}
    names = {n: ref for n, ref in names.items() if n in named or n not in routers | mixing}
    chosen = {n: r for n, r in names.items() if (not only or only.search(n)) and not (skip and skip.search(n))}
    if not chosen:
        example = next(iter(names), "none")
        raise UsageError(f"--only and --skip leave no linear to prune; names look like {example}")
    for name, ref in chosen.items():
        if ref.dtype not in PRUNABLE:
            raise UsageError(f"{name} has dtype {ref.dtype}, which cannot be pruned; leave it out with --skip")
    return chosen


def check_widths(pattern: Pattern | None, linears: Mapping[str, TensorRef], model: Outline) -> None:
    """Raises UsageError for a linear whose in_features are not a multiple of the pattern's M."""
    if pattern is None:
        return
    for name, ref in linears.items():
        try:
            check_pattern(pattern, ref.shape[0] if name in model.transposed else ref.shape[1])
        except UsageError as e:
            raise UsageError(f"{name}: {e}") from e


def parts_of(stage: Stage, selected: Collection[str]) -> dict[str, list[tuple[str, TensorRef]]]:
    """Tensor -> the linears in it, in the order of their offsets; only tensors with a linear that is pruned."""
    parts: dict[str, list[tuple[str, TensorRef]]] = {}
    for name, ref in sorted(stage.linears.items(), key=lambda item: item[1].begin):
        parts.setdefault(ref.name, []).append((name, ref))
    return {name: held for name, held in parts.items() if any(linear in selected for linear, _ in held)}


def pieces(data: memoryview) -> Iterator[memoryview]:
    """The bytes in chunks."""
    for begin in range(0, len(data), CHUNK_BYTES):
        yield data[begin : begin + CHUNK_BYTES]


def linear_report(
    name: str, rows: int, in_features: int, amount: Amount, removed: float, total: float
) -> dict[str, Any]:
    """What streamprune.json says of a linear: `removed` of `total` is the score that its pruned weights had."""
    per_row = amount.count(in_features)
    return {
        "name": name, "rows": rows, "in_features": in_features, "pruned": per_row * rows,
        "sparsity": per_row / in_features, "removed_score": _share(removed, total),
    }  # fmt: skip


def _share(part: float, whole: float) -> float | None:
    """part / whole; None if a sum overflows float32, as with weights of 1e20."""
    if not math.isfinite(part) or not math.isfinite(whole):
        return None
    return part / whole if whole else 0.0
