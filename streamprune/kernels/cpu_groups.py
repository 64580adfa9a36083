"""Compiled loops of the CPU kernels: prune `drop` of every m consecutive weights. See cpu.py for the drivers.

Rows are pruned in tiles of eight groups (cpu_tiles.py), of sizes that are powers of two. For other m the groups of a
row are copied to a buffer, with as many zeros before each as are missing. They are pruned first: their scores are 0,
and of equal scores the leftmost is pruned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.cpu_tiles import EIGHT, move, prune_tile
from streamprune.kernels.jit import jit


@jit()
def _spread(source: Any, begin: Any, m: Any, shape: Any, mask: Any, target: Any) -> None:
    """Copies groups of m from source[begin:] to the ends of larger ones; mask (size of those,) clears what precedes."""
    missing = mask.size - m
    if begin < source.size:
        for i in range(m):
            target[missing + i] = source[begin + i]
    for g in range(1, (source.size - begin) // m):
        move(shape, source, begin + g * m - missing, mask, target, g * mask.size)


@jit()
def _gather(source: Any, m: Any, shape: Any, mask: Any, target: Any, begin: Any) -> None:
    """The inverse, to target[begin:]. What one group writes too much is overwritten by the next one."""
    missing, last = mask.size - m, (target.size - begin) // m - 1
    for g in range(last):
        move(shape, source, g * mask.size + missing, mask, target, begin + g * m)
    for i in range(m if last >= 0 else 0):
        target[begin + last * m + i] = source[last * mask.size + missing + i]


@jit()
def _finite(top: Any, form: Any, itemsize: Any) -> Any:
    """Whether the largest magnitude bits, one of 32 bits in each element or two of 16 bits, are of a finite number."""
    for i in range(top.size):
        bits = np.int32(top[i])
        if (bits >> 16 if itemsize == 2 else bits) >= form[3] or (itemsize == 2 and (bits & 0xFFFF) >= form[3]):
            return False
    return True


@jit()
def _sum(numbers: Any) -> Any:
    """The sum of eight, in halves."""
    a, b = numbers[0] + numbers[4], numbers[1] + numbers[5]
    c, d = numbers[2] + numbers[6], numbers[3] + numbers[7]
    return np.float64((a + c) + (b + d))


@jit(entry=True)
def prune_groups(
    weight: Any, feature: Any, power: Any, shape: Any, form: Any, drop: Any, m: Any, out: Any, keep: Any, loss: Any
) -> None:
    """Prunes `drop` of every m consecutive weights. Arrays as in cpu_rows.prune_rows, except for the feature.

    shape: see prune_tile; the length of its first tuple is the size of the groups in tiles, the power of two from m on.
    feature (tiles * 8 * size,) is that of a row of such groups, padded to whole tiles, in the order of planes.
    """
    rows, n = weight.shape
    size = len(shape[0])
    step, gone = EIGHT * size, np.int32(drop + size - m)
    whole = n // step * step if m == size else 0
    rest = feature.size - whole
    ends, ones, trues = np.empty(size, weight.dtype), np.empty(size, weight.dtype), np.ones(size, np.bool_)
    for i in range(size):
        ones[i] = ~np.uint32(0)
        ends[i] = ones[i] if i >= size - m else 0
    order, sums = np.empty(step, np.int32), np.empty((3, EIGHT), np.float32)
    line, line_out = np.zeros(rest, weight.dtype), np.empty(rest, weight.dtype)
    line_keep = np.empty(rest if keep.shape[1] else 0, np.bool_)
    top, square = sums[2].view(np.int32), power == 2
    for r in range(rows):
        row, row_out, row_keep = weight[r], out[r], keep[r]
        sums[:] = np.float32(0.0)
        for j in range(0, whole, step):
            prune_tile(shape, row, j, feature, j, square, gone, order, row_out, row_keep, sums)
        if rest:
            _spread(row, whole, m, shape, ends, line)
            for j in range(0, rest, step):
                prune_tile(shape, line, j, feature, whole + j, square, gone, order, line_out, line_keep, sums)
            _gather(line_out, m, shape, ones, row_out, whole)
            if row_keep.size:
                _gather(line_keep, m, shape, trues, row_keep, whole)
        loss[r, 0], loss[r, 1] = _sum(sums[1]), _sum(sums[0])
        loss[r, 2] = np.float64(_finite(top, form, weight.itemsize))
