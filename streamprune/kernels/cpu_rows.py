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
from streamprune.kernels.cpu_select import BLOCK, HIGHEST, LOWEST, as_distance, find_threshold, write_keys
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, borrowed, fill, load, select, store
from streamprune.kernels.squares import totals

_TOGETHER = 1 << 17
"""Weights of rows whose moving means are computed at once: their scores shall fit the level-2 cache."""


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
def _load_scores(row: Any, n: Any, out: Any, feature: Any, power: Any, root: Any, form: Any, score: Any) -> Any:
    """score[j] = |w_j|**power * feature[j]. Prefetches the next row (n weights further on) and the output of this one.

    Returns (sum of L, sum of |w|, whether all weights are finite); L is the score, or its square if `root`.
    """
    mask, shift, factor, infinity = form
    square, rooted, nothing = power == 2, root == 1, fill(np.float32(0.0))
    total, sizes, top = nothing, nothing, fill(np.int32(0))
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
    return np.float64(lanes.total(total)), np.float64(lanes.total(sizes)), lanes.count(top < infinity) == COUNT


@jit()
def _load_blocks(row: Any, feature: Any, root: Any, form: Any, score: Any, means: Any, sums: Any) -> Any:
    """_load_scores for power 1, without sum of |w|; and means[b] = mean score of block b, of BLOCK columns.

    sums (COUNT * COUNT,) is scratch. Prefetches nothing: the rows of a group are read one behind the other.
    """
    mask, shift, factor, infinity = form
    rooted, total, top = root == 1, fill(np.float32(0.0)), fill(np.int32(0))
    step = BLOCK * COUNT
    for first in range(0, score.size, step):
        for j in range(first, min(first + step, score.size), BLOCK):
            bits = load(row, j) & mask
            top = lanes.largest(top, bits)
            value = as_float(bits << shift) * factor * load(feature, j)
            store(score, j, value)
            total = total + as_loss(value, rooted)
            if j + COUNT < score.size:
                left = value
                bits = load(row, j + COUNT) & mask
                top = lanes.largest(top, bits)
                value = as_float(bits << shift) * factor * load(feature, j + COUNT)
                store(score, j + COUNT, value)
                total = total + as_loss(value, rooted)
                store(sums, (j - first) // BLOCK * COUNT, left + value)
        store(means, first // BLOCK, totals(sums, 0) * PER_BLOCK)
    return np.float64(lanes.total(total)), lanes.count(top < infinity) == COUNT


@jit(inline=True)
def _without(bits: Any, gone: Any, mask: Any) -> Any:
    """Lanes of weights without those that are `gone`; those, and all zeros, are +0.0."""
    return select(gone | ((bits & mask) == 0), fill(np.int32(0)), bits)


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
        gone = load(key, j) <= limit
        store(out, j, _without(load(row, j), gone, mask))
        if keep.size:
            store(keep, j, lanes.invert(gone))
        removed = select(gone, removed + as_loss(load(score, j), rooted), removed)
    return np.float64(lanes.total(removed))


@jit()
def _emit_distances(
    row: Any, ahead: Any, limits: Any, cut: Any, mask: Any, score: Any, est: Any, inverse: Any, root: Any, out: Any,
    keep: Any,
) -> Any:  # fmt: skip
    """_emit for z; limits: the largest that is pruned left of column `cut`, and from there on.

    Prefetches the weights that are `ahead`, and the next row's output.
    """
    removed, rooted = fill(np.float32(0.0)), root == 1
    limit, behind = fill(limits[0]), fill(limits[1])
    for j in range(0, score.size, COUNT):
        i = j // BLOCK * COUNT
        if j + COUNT > cut:
            limit = select(lanes.columns() < np.int32(max(cut - j, 0)), limit, behind)
        lanes.will_read(row, j + ahead)
        lanes.will_write(out, j + score.size)
        value = load(score, j)
        gone = (value - fill(est[i])) * fill(inverse[i]) <= limit
        store(out, j, _without(load(row, j), gone, mask))
        if keep.size:
            store(keep, j, lanes.invert(gone))
        removed = select(gone, removed + as_loss(value, rooted), removed)
    return np.float64(lanes.total(removed))


@jit()
def _prune_row(
    row: Any, n: Any, ahead: Any, count: Any, block: Any, by_lanes: Any, mask: Any, root: Any, score: Any, key: Any,
    est: Any, inverse: Any, unit: Any, track: Any, found: Any, out: Any, keep: Any,
) -> Any:  # fmt: skip
    """Selects and writes one row; returns the sum of L of the pruned weights."""
    if block > 0 and not by_lanes:
        write_keys(score, n, block, est, inverse, key)
    for j in range(n, key.size):
        key[j] = HIGHEST
    threshold, cut = np.int64(LOWEST), key.size
    if count == n:
        threshold = np.int64(HIGHEST - 1)  # all but the padding
    elif count > 0:
        threshold, cut = find_threshold(key, score, block, est, inverse, by_lanes, count, unit, track, found)
    ordinary, limit, behind = as_distance(threshold)
    if by_lanes and ordinary:
        return _emit_distances(row, ahead, (limit, behind), cut, mask, score, est, inverse, root, out, keep)
    if by_lanes:
        write_keys(score, n, block, est, inverse, key)
    return _emit(row, threshold, cut, mask, key, score, root, out, keep)


@jit(entry=True)
def prune_rows(
    weight: Any, feature: Any, power: Any, root: Any, form: Any, count: Any, block: Any, alpha: Any, out: Any,
    keep: Any, loss: Any,
) -> None:  # fmt: skip
    """Prunes `count` weights of every row; block 0 means the exact selector, else EWMA.

    A score is |w|**power * feature; with `root` 1, L is its square, else itself; with the usual block, power is 1.
    weight, out (rows, n) uint16|uint32, may be the same; feature (n, padded to whole lanes) float32; keep (rows, n)
    bool or (rows, 0); loss (rows, 3) float64 gets removed, total and whether the row is finite.
    """
    weight, out, keep = borrowed(weight), borrowed(out), borrowed(keep)
    rows, n = weight.shape
    size = feature.size
    by_lanes, group = block == BLOCK and n == size, 1
    blocks, height = 0, 1
    if block > 0:
        blocks, group = n // block, min(COUNT, max(4, _TOGETHER // size), rows)
        height = COUNT
    scores, units = np.empty((group, size), np.float32), np.empty(group, np.float64)
    keys = scores.view(np.int32) if block == 0 else np.empty((1, size), np.int32)
    found, track = np.empty(size + COUNT, np.int32), np.full(2, np.nan)
    est, inverse = np.empty((blocks + 1) * COUNT, np.float32), np.empty((blocks + 1) * COUNT, np.float32)
    means = np.zeros((height, (blocks // COUNT + 1) * COUNT), np.float32)
    turned, sums = np.empty(means.size, np.float32), np.zeros(COUNT * COUNT, np.float32)
    middle = np.zeros((2, COUNT), np.float32)
    middle[1] = 1.0
    narrow = (group, size) if n < size else (0, 0)  # rows that are not whole lanes are copied
    lines, lines_out = np.zeros(narrow, weight.dtype), np.empty(narrow, weight.dtype)
    lines_keep = np.empty((group, size if keep.shape[1] and n < size else 0), np.bool_)
    for first in range(0, rows, group):
        last = min(first + group, rows)
        source, target, kept = weight[first:last], out[first:last], keep[first:last]
        if n < size:
            for i in range(last - first):
                copy(source[i], lines[i])
            source, target, kept = lines[: last - first], lines_out, lines_keep
        for i in range(last - first):
            row, score = source[i], scores[i]
            if by_lanes:
                total, finite = _load_blocks(row, feature, root, form, score, means[i], sums)
            else:
                total, sizes, finite = _load_scores(row, n, target[i], feature, power, root, form, score)
                units[i] = (sizes / n) ** power
            loss[first + i, 1], loss[first + i, 2] = total, np.float64(finite)
        if block > 0:
            follow(last - first, scores, block, alpha, by_lanes, means, turned, sums, est, inverse, middle)
        for i in range(last - first):
            centre = np.float64(middle[0, i])
            unit = centre if by_lanes else units[i], centre, np.float64(middle[1, i])
            loss[first + i, 0] = _prune_row(
                source[i], n, group * n, count, block, by_lanes, form[0], root, scores[i], keys[i if block == 0 else 0],
                est[i:], inverse[i:], unit, track, found, target[i], kept[i],
            )  # fmt: skip
        if n < size:
            for i in range(last - first):
                copy(lines_out[i], out[first + i])
                copy(lines_keep[i], keep[first + i])
