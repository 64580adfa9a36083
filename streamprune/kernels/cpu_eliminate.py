"""The compiled loop of SparseGPT's sweep over a block of columns. See methods/sparsegpt.py for the method.

It works row by row: a row of the block (128 columns) stays in the level-1 cache, the block of U in the level-2 cache.
Pruning a weight subtracts a scaled row of U from the rest of its row, sixteen columns at a time. There are no sums
whose order could vary, so that every processor computes the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, fill, load, store


@jit(inline=True)
def _choose(line: Any, feature: Any, begin: Any, m: Any, drop: Any, keep: Any) -> None:
    """Prunes the `drop` lowest |w| * feature of m columns from `begin`; of equal ones, the lowest column first."""
    for j in range(begin, begin + m):
        keep[j] = True
    for _ in range(drop):
        least, place = np.float32(np.inf), -1
        for j in range(begin, begin + m):
            score = abs(line[j]) * feature[j]
            if keep[j] and (place < 0 or score < least):
                least, place = score, j
        keep[place] = False


@jit(entry=True)
def eliminate_rows(weight: Any, upper: Any, feature: Any, m: Any, n: Any, keep: Any, errors: Any) -> None:
    """Sweeps weight (rows, width) float32 in place: each column gets its value when the sweep reaches it, 0 if pruned.

    upper (width, width padded to whole lanes) float32 is 0 left of its diagonal; feature (width,) float32 is 1 / U_jj,
    0 if dead. keep (rows, width) bool is read if m is 0, else written: n of every m columns, width % m == 0.
    errors (rows, width) float32 receives w / U_jj where a weight is pruned, else 0.
    """
    width, size = upper.shape
    line = np.zeros(size, np.float32)
    for r in range(weight.shape[0]):
        kept, error = keep[r], errors[r]
        for j in range(width):
            line[j] = weight[r, j]
        for j in range(width):
            if m > 0 and j % m == 0:
                _choose(line, feature, j, m, m - n, kept)
            error[j] = np.float32(0.0)
            if not kept[j]:
                e = line[j] * feature[j]
                error[j] = e
                row, scale = upper[j], fill(e)
                for k in range(j // COUNT * COUNT, size, COUNT):
                    store(line, k, load(line, k) - scale * load(row, k))
                line[j] = np.float32(0.0)
        for j in range(width):
            weight[r, j] = line[j]
