"""Compiled loops of the CPU kernels: prune `drop` of every m consecutive weights. See cpu.py for the drivers.

A weight's rank is the number of weights of its group that are pruned before it: those of lower score, and those of
equal score to its left. A row is processed in chunks of a few hundred groups, which stay in the core's caches. A chunk
is transposed into planes: plane i holds column i of every group, so that one vector comparison serves sixteen groups.
The transposition moves 32-bit words, each of which holds two 16-bit weights if m is even. With P words to a group it
takes log2(P) steps, each of which moves the even words to the front and the odd ones behind them; undoing the steps
transposes back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels import lanes
from streamprune.kernels.cpu_rows import copy, scored
from streamprune.kernels.cpu_select import HIGHEST
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, above, as_float, as_int, fill, fill_eight, load, load_eight, select, store


@jit(inline=True)
def _read(row: Any, i: Any, halves: Any) -> Any:
    return lanes.load_words(row, i) if halves == 2 else load(row, i)


@jit(inline=True)
def _write(out: Any, i: Any, halves: Any, words: Any) -> None:
    if halves == 2:
        lanes.store_words(out, i, words)
    else:
        store(out, i, words)


@jit()
def _turn(row: Any, begin: Any, words: Any, size: Any, halves: Any, out: Any) -> Any:
    """Transposes row[begin:], `size` words to a group, into planes, in one half of `words`; returns where it begins.

    Prefetches the following input, and the output of this chunk.
    """
    half = words.size // 2
    single = size == 1 or size & (size - 1) != 0
    for i in range(0, half, 2 * COUNT):
        for j in range(i, i + 2 * COUNT, COUNT):
            lanes.will_read(row, begin + halves * (half + j))
            lanes.will_write(out, begin + halves * j)
        a, b = _read(row, begin + halves * i, halves), _read(row, begin + halves * (i + COUNT), halves)
        if single:
            store(words, i, a)
            store(words, i + COUNT, b)
        else:
            store(words, i // 2, lanes.even(a, b))
            store(words, (half + i) // 2, lanes.odd(a, b))
    if size & (size - 1):
        for g in range(half // size):
            for p in range(size):
                words[half + p * (half // size) + g] = words[g * size + p]
        return half
    source, target, step = 0, half, 2
    while step < size:
        for i in range(0, half // 2, COUNT):
            a, b = load(words, source + 2 * i), load(words, source + 2 * i + COUNT)
            store(words, target + i, lanes.even(a, b))
            store(words, target + half // 2 + i, lanes.odd(a, b))
        source, target, step = target, source, 2 * step
    return source


@jit()
def _turn_back(words: Any, source: Any, size: Any, halves: Any, out: Any, begin: Any) -> None:
    """Transposes back, to out[begin:]; `source` is what _turn returned."""
    half = words.size // 2
    target, step, single = half - source, size, size == 1 or size & (size - 1) != 0
    if size & (size - 1):
        for g in range(half // size):
            for p in range(size):
                words[target + g * size + p] = words[source + p * (half // size) + g]
        source, step = target, 1
    while step > 2:
        for i in range(0, half // 2, COUNT):
            a, b = load(words, source + i), load(words, source + half // 2 + i)
            store(words, target + 2 * i, lanes.first(a, b))
            store(words, target + 2 * i + COUNT, lanes.last(a, b))
        source, target, step = target, source, step // 2
    for i in range(0, half // 2, COUNT):
        if single:
            a, b = load(words, source + 2 * i), load(words, source + 2 * i + COUNT)
        else:
            x, y = load(words, source + i), load(words, source + half // 2 + i)
            a, b = lanes.first(x, y), lanes.last(x, y)
        _write(out, begin + halves * 2 * i, halves, a)
        _write(out, begin + halves * (2 * i + COUNT), halves, b)


@jit()
def _score_planes(
    words: Any, feature: Any, begin: Any, power: Any, form: Any, halves: Any, m: Any, groups: Any, key: Any
) -> Any:
    """key = bits of |w|**power * feature[begin:], in planes. Returns (sum of scores, whether all weights are
    finite)."""
    mask, shift, factor, infinity = form
    square, total, top = fill(np.int32(power)) == 2, fill(np.float32(0.0)), fill(np.int32(0))
    for i in range(m):
        word, place = i // halves * groups, 16 * (i % halves)
        for g in range(0, groups, COUNT):
            bits = (load(words, word + g) >> place) & mask
            top = lanes.largest(top, bits)
            score = scored(as_float(bits << shift) * factor, load(feature, begin + i * groups + g), square)
            total = total + score
            store(key, i * groups + g, as_int(score))
    return np.float64(lanes.total(total)), lanes.count(top < infinity) == COUNT


@jit(inline=True)
def _meet(a: Any, b: Any, rank_a: Any, rank_b: Any) -> Any:
    """Updates the ranks of planes a and b, with a left of b; ranks start from the number of planes to the left."""
    after = above(a, b)
    return rank_a - after, rank_b + after


@jit()
def _rank(key: Any, m: Any, step: Any, rank: Any) -> None:
    """Computes the rank of each key, four planes at a time; there are m planes of `step` keys, m a multiple of four."""
    for i in range(0, m, 4):
        ia, ib, ic, id_ = fill_eight(i), fill_eight(i + 1), fill_eight(i + 2), fill_eight(i + 3)
        for g in range(i * step, (i + 1) * step, 8):
            a, b = load_eight(key, g), load_eight(key, g + step)
            c, d = load_eight(key, g + 2 * step), load_eight(key, g + 3 * step)
            ra, rb = _meet(a, b, ia, ib)
            rc, rd = _meet(c, d, ic, id_)
            ra, rc = _meet(a, c, ra, rc)
            rb, rd = _meet(b, d, rb, rd)
            ra, rd = _meet(a, d, ra, rd)
            rb, rc = _meet(b, c, rb, rc)
            j = g - i * step
            for _ in range(i):
                x = load_eight(key, j)
                ra, rb, rc, rd = ra + above(x, a), rb + above(x, b), rc + above(x, c), rd + above(x, d)
                j += step
            j += 4 * step
            for _ in range(i + 4, m):
                x = load_eight(key, j)
                ra, rb, rc, rd = ra - above(a, x), rb - above(b, x), rc - above(c, x), rd - above(d, x)
                j += step
            store(rank, g, ra)
            store(rank, g + step, rb)
            store(rank, g + 2 * step, rc)
            store(rank, g + 3 * step, rd)


@jit()
def _clear(words: Any, key: Any, rank: Any, mask: Any, halves: Any, m: Any, groups: Any, drop: Any) -> Any:
    """Sets weights of rank < drop, and all zeros, to +0.0. Returns the sum of the scores of the former."""
    removed, nothing = fill(np.float32(0.0)), fill(np.float32(0.0))
    for i in range(m):
        at, place = i // halves * groups, 16 * (i % halves)
        others = np.int32(~(0xFFFF << place)) if halves == 2 else np.int32(0)
        for g in range(0, groups, COUNT):
            word, gone = load(words, at + g), load(rank, i * groups + g) < drop
            removed = removed + select(gone, as_float(load(key, i * groups + g)), nothing)
            store(words, at + g, select(gone | (((word >> place) & mask) == 0), word & others, word))
    return np.float64(lanes.total(removed))


@jit()
def _write_keep(rank: Any, drop: Any, m: Any, groups: Any, keep: Any, begin: Any) -> None:
    for g in range(groups):
        for i in range(m):
            keep[begin + g * m + i] = rank[i * groups + g] >= drop


@jit(entry=True)
def prune_groups(
    weight: Any, feature: Any, power: Any, form: Any, drop: Any, m: Any, halves: Any, groups: Any, out: Any, keep: Any,
    loss: Any,
) -> None:  # fmt: skip
    """Prunes `drop` of every m consecutive weights. Arrays as in cpu_rows.prune_rows, except for the feature.

    feature (chunks * m * groups,) is padded to whole chunks, and transposed like the weights. groups: number of groups
    in a chunk, a multiple of 32. halves: weights per word, 2 for 16-bit weights if m is even, else 1.
    """
    rows, n = weight.shape
    size, width = m // halves, feature.size
    words, planes = np.empty(2 * size * groups, np.int32), -(-m // 4) * 4
    key, rank = np.empty(planes * groups, np.int32), np.empty(planes * groups, np.int32)
    for i in range(key.size):
        key[i] = HIGHEST
    line, line_out = np.zeros(width, weight.dtype), np.empty(width, weight.dtype)
    line_keep = np.empty(width if keep.shape[1] else 0, np.bool_)
    for r in range(rows):
        row, row_out, row_keep = weight[r], out[r], keep[r]
        if n < width:
            copy(row, line)
            row, row_out, row_keep = line, line_out, line_keep
        removed, total, finite = 0.0, 0.0, True
        for begin in range(0, width, m * groups):
            source = _turn(row, begin, words, size, halves, row_out)
            turned = words[source : source + size * groups]
            scores, fine = _score_planes(turned, feature, begin, power, form, halves, m, groups, key)
            _rank(key, planes, groups, rank)
            removed += _clear(turned, key, rank, form[0], halves, m, groups, np.int32(drop))
            total += scores
            finite = finite and fine
            _turn_back(words, source, size, halves, row_out, begin)
            if row_keep.size:
                _write_keep(rank, drop, m, groups, row_keep, begin)
        loss[r, 0], loss[r, 1], loss[r, 2] = removed, total, np.float64(finite)
        if n < width:
            copy(line_out, out[r])
            copy(line_keep, keep[r])
