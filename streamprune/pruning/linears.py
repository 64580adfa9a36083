"""Which linears a job prunes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from streamprune.disk.header import TensorRef
from streamprune.errors import UsageError
from streamprune.methods.selection import Pattern, check_pattern
from streamprune.model.naming import TORCH_DTYPES
from streamprune.model.skeleton import Skeleton, Stage

_ROUTER = re.compile(r"\.(gate|router)(\.|$)|shared_expert_gate$")


def selected_linears(stages: Sequence[Stage], only: Any, skip: Any, streams: int = 1) -> dict[str, TensorRef]:
    """The linears to prune, by module path: those that the compiled patterns `only` and `skip` leave.

    Left out unless a match of `only` includes the end of their names: in mixtures of experts, routers and the gates of
    shared experts; in models with several `streams` of hidden states, linears that say how streams are mixed. Raises
    UsageError if no linear is left, or one has a dtype that cannot be pruned.
    """
    names = {n: ref for s in stages for n, ref in s.linears.items()}
    routers = {n for n in names if _ROUTER.search(n)} if any(stage.experts for stage in stages) else set()
    mixing = {n for n, ref in names.items() if streams > 1 and min(ref.shape) <= streams**2}
    named = {n for n in names if only and any(m.end() == len(n) for m in only.finditer(n))}
    names = {n: ref for n, ref in names.items() if n in named or n not in routers | mixing}
    chosen = {n: r for n, r in names.items() if (not only or only.search(n)) and not (skip and skip.search(n))}
    if not chosen:
        example = next(iter(names), "none")
        raise UsageError(f"--only and --skip leave no linear to prune; names look like {example}")
    for name, ref in chosen.items():
        if ref.dtype not in TORCH_DTYPES:
            raise UsageError(f"{name} has dtype {ref.dtype}, which cannot be pruned; leave it out with --skip")
    return chosen


def check_widths(pattern: Pattern | None, linears: Mapping[str, TensorRef], skeleton: Skeleton) -> None:
    """Raises UsageError for a linear whose in_features are not a multiple of the pattern's M."""
    if pattern is None:
        return
    for name, ref in linears.items():
        try:
            check_pattern(pattern, ref.shape[0] if name in skeleton.transposed else ref.shape[1])
        except UsageError as e:
            raise UsageError(f"{name}: {e}") from e
