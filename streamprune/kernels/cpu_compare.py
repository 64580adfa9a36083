"""The compiled loop that compares bf16 weights with those of their source. See inspection/difference.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels import lanes
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, fill, invert, load

_RUN = 16 * COUNT  # summed in float32


@jit(entry=True)
def compare(bits: Any, source: Any) -> Any:
    """(weights that differ, those of them that are not zero, those that are zero in `source` only, Σ(w − s)², Σ s²).

    bits, source (n,) uint16, of bf16; n is a multiple of COUNT. Runs of 256 squares are summed in float32, so that sums
    overflow or vanish where they would not in float64.
    """
    differing = changed = revived = np.int64(0)
    error = norm = np.float64(0.0)
    sign, zero, shift = np.int32(0x7FFF), np.int32(0), np.int32(16)
    for begin in range(0, bits.size, _RUN):
        errors = norms = fill(np.float32(0.0))
        for j in range(begin, min(begin + _RUN, bits.size), COUNT):
            a, b = load(bits, j), load(source, j)
            value, exact = as_float(a << shift), as_float(b << shift)
            rest = value - exact
            errors, norms = errors + rest * rest, norms + exact * exact
            other, kept = invert(a == b), invert((a & sign) == zero)
            differing += lanes.count(other)
            changed += lanes.count(other & kept)
            revived += lanes.count(kept & ((b & sign) == zero))
        error += np.float64(lanes.total(errors))
        norm += np.float64(lanes.total(norms))
    return differing, changed, revived, error, norm
