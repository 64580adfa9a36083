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
from streamprune.kernels.cpu_moving import PER_BLOCK, follow
from streamprune.kernels.cpu_select import BLOCK, HIGHEST, LOWEST, as_distance, distances, find_threshold, write_keys
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, fill, load, select, store


@jit(inline=True)
def scored(size: Any, feature: Any, square: Any) -> Any:
    """|w|**power * feature, lanes of float32; `square`: whether power is 2."""
    if square:
        return size * size * feature
    return size * feature


@jit(inline=True)
def as_loss(value: Any, rooted: Any) -> Any:
    """L from lanes of scores; `rooted`: whether the score is the root of L."""
    if rooted:
        return value * value
    return value


@jit()
def copy(source: Any, target: Any) -> None:
    """Copies as much as fits. (A slice assignment would take longer to compile than everything else here.)"""
    for i in range(min(source.size, target.size)):
        target[i] = source[i]


@jit()
def _load_scores(
    row: Any, n: Any, out: Any, feature: Any, power: Any, root: Any, form: Any, score: Any, means: Any, by_lanes: Any
) -> Any:
    """score[j] = |w_j|**power * feature[j]; if by_lanes, means[b] = mean score of block b, of BLOCK columns.

    Prefetches the next row (n weights further on) and the output of this one. Returns (sum of L, sum of |w|, whether
    all weights are finite); L is the score, or its square if `root`.
    """
    mask, shift, factor, infinity = form
    square, rooted, nothing = power == 2, root == 1, fill(np.float32(0.0))
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
            means[j // BLOCK] = lanes.total(left + value) * PER_BLOCK
        left = value
    return np.float64(lanes.total(total)), np.float64(lanes.total(sizes)), lanes.count(top < infinity) == COUNT


@jit()
def _emit(
    row: Any, threshold: Any, cut: Any, mask: Any, key: Any, score: Any, root: Any, out: Any, keep: Any
) -> Any:  # fmt: skip
    """Copies the bits of kept weights; pruned weights, and all zeros, become +0.0.

    Pruned are keys <= threshold left of column `cut`, and keys < threshold from there on. Returns the sum of L of the
    pruned weights.
    """
    removed, rooted = fill(np.float32(0.0)), root == 1
    limit, behind = fill(np.int32(threshold)), fill(np.int32(threshold - 1))
    for j in range(0, key.size, COUNT):
        if j + COUNT > cut:
            limit = select(lanes.columns() < np.int32(max(cut - j, 0)), limit, behind)
        removed = removed + _clear(row, j, load(key, j) <= limit, mask, score, rooted, out, keep)
    return np.float64(lanes.total(removed))


@jit()
def _emit_distances(
    row: Any, limits: Any, cut: Any, mask: Any, score: Any, est: Any, inverse: Any, root: Any, out: Any, keep: Any
) -> Any:  # fmt: skip
    """_emit for z; limits: the largest that is pruned left of column `cut`, and from there on."""
    removed, rooted = fill(np.float32(0.0)), root == 1
    limit, behind = fill(limits[0]), fill(limits[1])
    for j in range(0, score.size, COUNT):
        if j + COUNT > cut:
            limit = select(lanes.columns() < np.int32(max(cut - j, 0)), limit, behind)
        gone = distances(j, score, est, inverse) <= limit
        removed = removed + _clear(row, j, gone, mask, score, rooted, out, keep)
    return np.float64(lanes.total(removed))


@jit(inline=True)
def _clear(row: Any, j: Any, gone: Any, mask: Any, score: Any, rooted: Any, out: Any, keep: Any) -> Any:
    """Writes columns j.. without those that are `gone`; returns L of these, and 0 elsewhere."""
    bits, nothing = load(row, j), fill(np.int32(0))
    store(out, j, select(gone | ((bits & mask) == 0), nothing, bits))
    if keep.size:
        store(keep, j, lanes.invert(gone))
    return select(gone, as_loss(load(score, j), rooted), as_float(nothing))


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
    state = np.empty(blocks + 1, np.float64)
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
        total, sizes, finite = _load_scores(row, n, row_out, feature, power, root, form, score, means, by_lanes)
        if block > 0:
            middle, spread = follow(score, block, alpha, by_lanes, state, means, est, inverse)
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
        ordinary, limit, behind = as_distance(threshold)
        if by_lanes and ordinary:
            limits = limit, behind
            removed = _emit_distances(row, limits, cut, form[0], score, est, inverse, root, row_out, row_keep)
        else:
            if by_lanes:
                write_keys(score, n, block, est, inverse, key)
            removed = _emit(row, threshold, cut, form[0], key, score, root, row_out, row_keep)
        loss[r, 0], loss[r, 1], loss[r, 2] = removed, total, np.float64(finite)
        if n < size:
            copy(line_out, out[r])
            copy(line_keep, keep[r])
