"""Compiled loops of the CPU kernels: rows of weights in, pruned rows out. See cpu.py for the drivers.

Weights are raw bits, uint16 for bf16 and fp16, uint32 for fp32. `form`, from cpu.py, says how to convert them to
magnitudes: (mask of all bits but the sign, shift, factor, bits of infinity); |w| = float32(bits << shift) * factor,
exactly. Each row is scored, selected (cpu_select.py) and written in buffers that fit the level-1 or level-2 cache. Rows
are padded to whole lanes.
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
    """|w|**power * feature, lanes of float32; `square` is a mask, set if power is 2."""
    return size * select(square, size, fill(np.float32(1.0))) * feature


@jit(inline=True)
def as_loss(value: Any, rooted: Any) -> Any:
    """L from lanes of scores; `rooted` is a mask, set if the score is the root of L."""
    return value * select(rooted, value, fill(np.float32(1.0)))


@jit()
def copy(source: Any, target: Any) -> None:
    """Copies as much as fits. (A slice assignment would take longer to compile than everything else here.)"""
    for i in range(min(source.size, target.size)):
        target[i] = source[i]


@jit()
def _load_scores(
    row: Any, n: Any, out: Any, feature: Any, power: Any, root: Any, form: Any, score: Any, sums: Any, by_lanes: Any
) -> Any:
    """score[j] = |w_j|**power * feature[j]; if by_lanes, sums[b] = sum of the scores of block b, of BLOCK columns.

    Prefetches the next row (n weights further on) and the output of this one. Returns (sum of L, sum of |w|, whether
    all weights are finite); L is the score, or its square if `root`.
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
    """Copies the bits of kept weights; pruned weights, and all zeros, become +0.0.

    Pruned are keys <= threshold left of column `cut`, and keys < threshold from there on. Returns the sum of L of the
    pruned weights.
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
    """Prunes `count` weights of every row; block 0 means the exact selector, else EWMA.

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
            threshold = np.int64(HIGHEST - 1)  # all but the padding
        elif count > 0:
            unit = ((sizes / n) ** power, middle, spread)
            threshold, cut = find_threshold(key, score, block, est, inverse, by_lanes, count, unit, track, found)
        removed = _emit(row, threshold, cut, form[0], key, score, est, inverse, by_lanes, root, row_out, row_keep)
        loss[r, 0], loss[r, 1], loss[r, 2] = removed, total, np.float64(finite)
        if n < size:
            copy(line_out, out[r])
            copy(line_keep, keep[r])
