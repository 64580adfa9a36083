"""Compiled loops of the CPU kernels: rows of weights in, pruned rows out. See cpu.py for the drivers.

Weights arrive as raw bits, uint16 for bf16 and fp16, uint32 for fp32. `form`, from cpu.py, says how these become
magnitudes: (mask of everything but the sign, shift, factor, bits of infinity); |w| = float32(bits << shift) * factor,
exactly. Work goes row by row in buffers that fit the level-1 or level-2 cache: score, decide (cpu_select.py), write.
Rows are padded to whole lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels import lanes
from streamprune.kernels.cpu_select import BLOCK, HIGHEST, LOWEST, find_threshold, follow, keys_at, write_keys
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, fill, load, select, store


@jit(inline=True)
def scored(size: Any, feature: Any, square: Any) -> Any:
    """|w|**power * feature, lanes of float32; `square` where power is 2."""
    return size * select(square, size, fill(np.float32(1.0))) * feature


@jit(inline=True)
def as_loss(value: Any, rooted: Any) -> Any:
    """L of lanes of scores: their squares where the score is the root of L."""
    return value * select(rooted, value, fill(np.float32(1.0)))


@jit()
def copy(source: Any, target: Any) -> None:
    """As much as fits. An assignment of slices takes longer to compile than all the rest: its error has a message."""
    for i in range(min(source.size, target.size)):
        target[i] = source[i]


@jit()
def _load_scores(
    row: Any, n: Any, out: Any, feature: Any, power: Any, root: Any, form: Any, score: Any, sums: Any, by_lanes: Any
) -> Any:
    """score[j] = |w_j|**power * feature[j]; if by_lanes, sums[b] = their sums over blocks of BLOCK.

    The row behind this one, n further on, and the place for what is left of this one are asked for meanwhile.
    Returns (sum of L, which is the score or, of a `root`, its square; sum of |w|; are all weights finite).
    """
    mask, shift, factor, infinity = form
    square, nothing = fill(np.int32(power)) == 2, fill(np.float32(0.0))
    rooted = fill(np.int32(root)) == 1
    total, sizes, top, left = nothing, nothing, fill(np.int32(0)), nothing
    for j in range(0, score.size, COUNT):
        lanes.will_read(row, j + n)
        lanes.will_write(out, j)
        bits = load(row, j) & mask
        top = lanes.largest(top, bits)
        size = as_float(bits << shift) * factor
        value = scored(size, load(feature, j), square)
        store(score, j, value)
        total = total + as_loss(value, rooted)
        sizes = sizes + size
        if by_lanes and j % BLOCK:
            sums[j // BLOCK] = np.float64(lanes.total(left + value))
        left = value
    return np.float64(lanes.total(total)), np.float64(lanes.total(sizes)), lanes.count(top < infinity) == COUNT


@jit()
def _emit(
    row: Any, threshold: Any, cut: Any, mask: Any, key: Any, score: Any, est: Any, inverse: Any, by_lanes: Any,
    root: Any, out: Any, keep: Any,
) -> Any:  # fmt: skip
    """Copy the bits of the weights that stay; those that go, and every zero, become +0.0.

    Keys <= threshold go left of column cut, keys < threshold from there on. Returns the sum of L of what goes.
    """
    removed, nothing = fill(np.float32(0.0)), fill(np.float32(0.0))
    rooted = fill(np.int32(root)) == 1
    limit, behind = fill(np.int32(threshold)), fill(np.int32(threshold - 1))
    for j in range(0, key.size, COUNT):
        if j + COUNT > cut:
            limit = select(lanes.columns() < np.int32(max(cut - j, 0)), limit, behind)
        bits, gone = load(row, j), keys_at(j, key, score, est, inverse, by_lanes) <= limit
        store(out, j, select(gone | ((bits & mask) == 0), fill(np.int32(0)), bits))
        removed = removed + select(gone, as_loss(load(score, j), rooted), nothing)
        if keep.size:
            store(keep, j, lanes.invert(gone))
    return np.float64(lanes.total(removed))


@jit(entry=True)
def prune_rows(
    weight: Any, feature: Any, power: Any, root: Any, form: Any, count: Any, block: Any, alpha: Any, out: Any,
    keep: Any, loss: Any,
) -> None:  # fmt: skip
    """`count` weights of every row go; block 0 means the exact selector, else EWMA.

    A score is |w|**power * feature; with `root` 1, L is its square, else itself.
    weight, out (rows, n) uint16|uint32, may be the same; feature (n, padded to whole lanes) float32; keep (rows, n)
    bool or (rows, 0); loss (rows, 3) float64 gets removed, total and whether the row is finite.
    """
    rows, n = weight.shape
    size = feature.size
    by_lanes = block == BLOCK and n == size
    score = np.empty(size, np.float32)
    key = score.view(np.int32) if block == 0 else np.empty(size, np.int32)
    found, blocks = np.empty(size + COUNT, np.int32), n // max(block, 1)
    sums, state = np.empty(blocks, np.float64), np.empty(blocks + 1, np.float64)
    est, inverse = np.empty(blocks + 1, np.float32), np.empty(blocks + 1, np.float32)
    means = np.empty(-(-blocks // COUNT) * COUNT, np.float32)
    middle, spread, track = 0.0, 1.0, np.empty(2, np.float64)
    track[0] = track[1] = np.nan
    line, line_out = np.zeros(size, weight.dtype), np.empty(size, weight.dtype)
    line_keep = np.empty(size if keep.shape[1] else 0, np.bool_)
    for r in range(rows):
        row, row_out, row_keep = weight[r], out[r], keep[r]
        if n < size:
            copy(row, line)
            row, row_out, row_keep = line, line_out, line_keep
        total, sizes, finite = _load_scores(row, n, row_out, feature, power, root, form, score, sums, by_lanes)
        if block > 0:
            middle, spread = follow(score, block, alpha, by_lanes, sums, state, means, est, inverse)
            if not by_lanes:
                write_keys(score, n, block, est, inverse, key)
        for j in range(n, size):
            key[j] = HIGHEST
        threshold, cut = np.int64(LOWEST), size
        if count == n:
            threshold = np.int64(HIGHEST - 1)  # the padding stays
        elif count > 0:
            unit = ((sizes / n) ** power, middle, spread)
            threshold, cut = find_threshold(key, score, block, est, inverse, by_lanes, count, unit, track, found)
        removed = _emit(row, threshold, cut, form[0], key, score, est, inverse, by_lanes, root, row_out, row_keep)
        loss[r, 0], loss[r, 1], loss[r, 2] = removed, total, np.float64(finite)
        if n < size:
            copy(line_out, out[r])
            copy(line_keep, keep[r])
