"""Compiled loops of the CPU kernels: the moving means of EWMA, of COUNT rows at once. See cpu.py for the formulas.

A moving mean is a chain of dependent operations, and so is a search for a median: a processor waits for most of
them. With a row in each lane, all rows wait at once. Arrays "by blocks" hold the numbers of a block of all rows side by
side: (blocks * COUNT,).

Sums over a block are float32 in a fixed tree, moving means are float64 and then rounded, so that every processor
computes the same bits. Sums and means of equal numbers are exact: a constant row has dev = 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels import LARGEST_BLOCK, TYPICAL_BITS, lanes
from streamprune.kernels.cpu_select import BLOCK, SIGNLESS
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, as_int, fill, load, rounded, select, store, widened
from streamprune.kernels.squares import totals, turn

PER_BLOCK = np.float32(1 / BLOCK)
"""Exact, and so is a product with it, but for subnormal numbers."""
_TINY = np.float32(np.finfo(np.float32).tiny)


@jit()
def _typical(means: Any) -> Any:
    """The median of the nonzero ones of each row's means, its TYPICAL_BITS low bits cleared; 0 if all are 0.

    means float32 >= 0, by blocks. The bits of a median are found from the highest down; those above all in which means
    of a row differ are known.
    """
    bits, nothing = means.view(np.int32), fill(np.int32(0))
    zeros = differing = nothing
    first = load(bits, 0)
    for i in range(0, bits.size, COUNT):
        value = load(bits, i)
        zeros = zeros - lanes.minus_one(value <= 0)
        differing = differing | (value ^ first)
    rank = zeros + ((fill(np.int32(bits.size // COUNT)) - zeros + 1) >> 1)
    place, top = 30, lanes.top(differing & SIGNLESS)
    while place >= TYPICAL_BITS and not top >> place:
        place -= 1
    found = first & (SIGNLESS & -(2 << place))
    while place >= TYPICAL_BITS:
        trial, below = found | (1 << place), nothing
        for i in range(0, bits.size, COUNT):
            below = below - lanes.minus_one(load(bits, i) < trial)
        found = select(below < rank, trial, found)
        place -= 1
    return as_float(found)


@jit()
def _moving(means: Any, alpha: Any, moving: Any, middle: Any) -> None:
    """moving = the moving means before each block, and behind the last one; middle (COUNT,) = the first of them.

    means float32, by blocks, are changed: those above the cap to it. Four steps at a time: now = keep**4 now + four, so
    that the chain of dependent operations has one product and one sum per four blocks instead of eight operations. In
    float64, so that a constant row has a constant mean.
    """
    cap, total = _typical(means) * np.float32(LARGEST_BLOCK), fill(0.0)
    for i in range(0, means.size, COUNT):
        value = load(means, i)
        value = select(cap < value, cap, value)
        store(means, i, value)
        total = total + widened(value)
    keep, now = 1.0 - alpha, total / np.float64(means.size // COUNT)
    keep_2, keep_3, keep_4 = keep * keep, keep * keep * keep, keep * keep * keep * keep
    store(middle, 0, rounded(now))
    store(moving, 0, rounded(now))
    whole = means.size // (4 * COUNT) * (4 * COUNT)
    for i in range(0, whole, 4 * COUNT):
        one = widened(load(means, i)) * alpha
        two = one * keep + widened(load(means, i + COUNT)) * alpha
        three = two * keep + widened(load(means, i + 2 * COUNT)) * alpha
        four = three * keep + widened(load(means, i + 3 * COUNT)) * alpha
        store(moving, i + COUNT, rounded(now * keep + one))
        store(moving, i + 2 * COUNT, rounded(now * keep_2 + two))
        store(moving, i + 3 * COUNT, rounded(now * keep_3 + three))
        now = now * keep_4 + four
        store(moving, i + 4 * COUNT, rounded(now))
    for i in range(whole, means.size, COUNT):
        now = now * keep + widened(load(means, i)) * alpha
        store(moving, i + COUNT, rounded(now))


@jit()
def _block_means(score: Any, est: Any, blocks: Any, means: Any, sums: Any) -> None:
    """means[b] = mean of |score - est[b]| over block b, for blocks of BLOCK columns; sums (COUNT * COUNT,) is
    scratch."""
    for first in range(0, blocks, COUNT):
        for b in range(first, min(first + COUNT, blocks)):
            middle = fill(est[b * COUNT])
            left = as_int(load(score, b * BLOCK) - middle) & SIGNLESS
            right = as_int(load(score, b * BLOCK + COUNT) - middle) & SIGNLESS
            store(sums, (b - first) * COUNT, as_float(left) + as_float(right))
        store(means, first, totals(sums, 0) * PER_BLOCK)


@jit()
def _plain_means(score: Any, block: Any, est: Any, blocks: Any, means: Any) -> None:
    """_block_means for blocks of any size."""
    for b in range(blocks):
        total = 0.0
        for j in range(b * block, (b + 1) * block):
            total += np.float64(abs(score[j] - est[b * COUNT]))
        means[b] = np.float32(total / block)


@jit()
def _turn(rows: Any, turned: Any) -> None:
    """turned, by blocks, = rows (COUNT, a multiple of COUNT), both flat."""
    wide = rows.size // COUNT
    for b in range(0, wide, COUNT):
        turn(rows, b, wide, turned, b * COUNT)


@jit()
def follow(
    rows: Any, scores: Any, block: Any, alpha: Any, by_lanes: Any, means: Any, turned: Any, sums: Any, est: Any,
    inverse: Any, middle: Any,
) -> None:  # fmt: skip
    """Computes est and 1 / dev before each block, and behind the last one, of up to COUNT rows.

    scores (at least rows, n padded); est and inverse ((n // block + 1) * COUNT,)
    float32, by blocks; middle (2, COUNT) gets the means of the blocks' est and dev. Scratch are means (COUNT, more than
    n // block, a multiple of COUNT), finite, turned, of as many numbers, and sums (COUNT * COUNT,), all float32; if
    by_lanes, means already holds the means of the blocks of scores.
    """
    blocks, flat = est.size // COUNT - 1, means.reshape(-1)
    by_blocks = turned[: blocks * COUNT]
    if not by_lanes:
        for i in range(est.size):
            est[i] = np.float32(0.0)
        for r in range(rows):
            _plain_means(scores[r], block, est[r:], blocks, means[r])
    _turn(flat, turned)
    _moving(by_blocks, alpha, est, middle[0])
    for r in range(rows):
        if by_lanes:
            _block_means(scores[r], est[r:], blocks, means[r], sums)
        else:
            _plain_means(scores[r], block, est[r:], blocks, means[r])
    _turn(flat, turned)
    _moving(by_blocks, alpha, inverse, middle[1])
    for i in range(0, inverse.size, COUNT):
        dev = load(inverse, i)
        store(inverse, i, fill(np.float32(1.0)) / select(fill(_TINY) < dev, dev, fill(_TINY)))
