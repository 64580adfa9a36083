"""Compiled loops of the CPU kernels: the moving means of EWMA, one row at a time. See cpu.py for the formulas.

Sums over a block are float32 in a fixed tree, moving means are float64 and then rounded, so that every processor
computes the same bits. Sums and means of equal numbers are exact: a constant row has dev = 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels import LARGEST_BLOCK, TYPICAL_BITS, lanes
from streamprune.kernels.cpu_select import BLOCK, HIGHEST, SIGNLESS
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, as_int, fill, load

PER_BLOCK = np.float32(1 / BLOCK)
"""Exact, and so is a product with it, but for subnormal numbers."""
_TINY = np.float32(np.finfo(np.float32).tiny)


@jit()
def _moving(values: Any, alpha: Any, start: Any, state: Any) -> None:
    """state[b] = the moving mean of values before block b, state (values.size + 1,); state[0] = start.

    Four steps at a time: now = keep**4 now + four, so that the chain of dependent operations has one product and one
    sum per four blocks instead of eight operations. In float64, so that a constant row has a constant mean.
    """
    keep, now = 1.0 - alpha, start
    keep_2, keep_3, keep_4 = keep * keep, keep * keep * keep, keep * keep * keep * keep
    state[0] = now
    whole = values.size // 4 * 4
    for b in range(0, whole, 4):
        one = alpha * values[b]
        two = keep * one + alpha * values[b + 1]
        three = keep * two + alpha * values[b + 2]
        four = keep * three + alpha * values[b + 3]
        state[b + 1] = keep * now + one
        state[b + 2] = keep_2 * now + two
        state[b + 3] = keep_3 * now + three
        now = keep_4 * now + four
        state[b + 4] = now
    for b in range(whole, values.size):
        now = keep * now + alpha * values[b]
        state[b + 1] = now


@jit()
def _block_means(score: Any, est: Any, blocks: Any, means: Any) -> None:
    """means[b] = mean of |score - est[b]| over block b, for blocks of BLOCK columns; est is float32."""
    for b in range(blocks):
        middle = fill(est[b])
        left = as_int(load(score, b * BLOCK) - middle) & SIGNLESS
        right = as_int(load(score, b * BLOCK + COUNT) - middle) & SIGNLESS
        means[b] = lanes.total(as_float(left) + as_float(right)) * PER_BLOCK


@jit()
def _plain_means(score: Any, block: Any, est: Any, blocks: Any, means: Any) -> None:
    """_block_means for blocks of any size."""
    for b in range(blocks):
        total = 0.0
        for j in range(b * block, (b + 1) * block):
            total += np.float64(abs(score[j] - est[b]))
        means[b] = np.float32(total / block)


@jit()
def _typical(values: Any, n: Any) -> Any:
    """(the median of the nonzero ones of n numbers, its TYPICAL_BITS low bits cleared, 0 if all are 0; their sum).

    values (n, padded to whole lanes with the bits of HIGHEST) float32 >= 0. The sum is taken in order, in parts between
    the passes: both are chains of dependent operations, which a processor works on at once.
    """
    bits, total, begin, step = values.view(np.int32), 0.0, 0, -(-n // (31 - TYPICAL_BITS))
    zeros = _at_most(bits, np.int32(0))
    rank, found = zeros + (n - zeros + 1) // 2, np.int64(0)
    for place in range(30, TYPICAL_BITS - 1, -1):
        if _at_most(bits, np.int32(found | ((1 << place) - 1))) < rank:
            found |= 1 << place
        for b in range(begin, min(begin + step, n)):
            total += np.float64(values[b])
        begin += step
    return np.int32(found).view(np.float32), total


@jit()
def _at_most(bits: Any, trial: Any) -> Any:
    """How many of `bits` are <= trial."""
    number = np.int64(0)
    for j in range(0, bits.size, COUNT):
        number += lanes.count(load(bits, j) <= trial)
    return number


@jit()
def _mean_states(means: Any, blocks: Any, alpha: Any, state: Any, rounded: Any) -> Any:
    """state (float64) and rounded (float32) = the moving mean before each block; returns approximately its mean.

    means (blocks, padded to whole lanes) float32; those above the cap are changed to it.
    """
    bits = means.view(np.int32)
    for b in range(blocks, means.size):
        bits[b] = HIGHEST
    typical, total = _typical(means, blocks)
    cap = np.float32(LARGEST_BLOCK) * typical
    if _at_most(bits, np.float32(cap).view(np.int32)) < blocks:
        total = 0.0
        for b in range(blocks):
            means[b] = cap if means[b] > cap else means[b]
            total += np.float64(means[b])
    _moving(means[:blocks], alpha, total / blocks, state)
    total, size = 0.0, 0
    for b in range(blocks + 1):
        rounded[b] = np.float32(state[b])
    for b in range(0, state.size, 8):
        total += state[b]
        size += 1
    return total / size


@jit()
def follow(score: Any, block: Any, alpha: Any, by_lanes: Any, state: Any, means: Any, est: Any, inverse: Any) -> Any:
    """Computes est and 1 / dev before each block, (n // block + 1,) float32; returns approximately their means.

    state (n // block + 1,) float64 and means (n // block, padded to whole lanes) float32 are scratch; if by_lanes,
    means already holds the means of the blocks of scores.
    """
    blocks = est.size - 1
    if not by_lanes:
        for b in range(est.size):
            est[b] = np.float32(0.0)
        _plain_means(score, block, est, blocks, means)
    middle = _mean_states(means, blocks, alpha, state, est)
    if by_lanes:
        _block_means(score, est, blocks, means)
    else:
        _plain_means(score, block, est, blocks, means)
    spread = _mean_states(means, blocks, alpha, state, inverse)
    for b in range(inverse.size):
        inverse[b] = np.float32(1.0) / (inverse[b] if inverse[b] > _TINY else _TINY)
    return middle, spread
