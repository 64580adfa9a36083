"""Compiled loops of the CPU kernels: from a row of scores to the weights that go. See cpu.py for the drivers.

A selector turns a row of scores into int32 keys; then selection is a threshold on keys:

    exact   key = bits of L (L >= 0, so the order of bits is the order of values)
    ewma    key = order-preserving bits of z = (L - est) / dev
    n of m  key = 0 for the weights to go, 1 for the others (cpu_groups.py)

The k smallest of n keys are found without sorting: each pass counts the keys at or below a trial threshold
and notes its two neighbours among the keys, so that the bracket always snaps to keys that exist. Trials come
from the previous row, then from Newton steps, and from bisection when those stall: at most 8 + 2 x 32 passes,
usually four. The outcome does not depend on where the search began.

Rounding: strict IEEE float32, sums over a block by a fixed tree, so every processor computes the same bits.
Sums of equal numbers over a block are exact: a constant row has dev = 0 exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.jit import jit

LOWEST = -(2**31)
HIGHEST = 2**31 - 1
_TINY = np.float32(np.finfo(np.float32).tiny)


@jit()
def _fold(values: Any, pairs: Any, size: Any) -> None:
    for i in range(size):
        pairs[i] = values[2 * i] + values[2 * i + 1]


@jit()
def _block_means(values: Any, block: Any, spare: Any, other: Any, means: Any) -> None:
    """means[b] = mean of values[b * block : (b + 1) * block], all b at once; spare and other are scratch.

    `other` may be `values` where those are no longer needed.
    """
    odd = block
    while odd % 2 == 0:
        odd //= 2
        _fold(values, spare, means.size * odd)
        values, spare, other = spare, other, spare
    for b in range(means.size):
        total = np.float64(0.0)
        for j in range(odd):
            total += np.float64(values[b * odd + j])
        means[b] = np.float32(total / block)


@jit()
def _distances(score: Any, est: Any, out: Any) -> None:
    for b in range(score.shape[0]):
        for j in range(score.shape[1]):
            out[b, j] = abs(score[b, j] - est[b])


@jit()
def _ordered(z: Any) -> Any:
    bits = np.float32(z).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@jit()
def _block_keys(score: Any, est: Any, dev: Any, key: Any) -> None:
    for b in range(score.shape[0]):
        inverse = np.float32(1.0) / max(dev[b], _TINY)
        for j in range(score.shape[1]):
            key[b, j] = _ordered((score[b, j] - est[b]) * inverse)


@jit()
def _moving(values: Any, alpha: Any, state: Any) -> None:
    """state[b] = the moving mean of values before block b; it starts at the first value."""
    now = values[0]
    for b in range(values.size):
        state[b] = now
        now += alpha * np.float32(values[b] - now)
    state[values.size] = now


@jit()
def ewma_keys(score: Any, key: Any, block: Any, alpha: Any, work: Any, spare: Any, state: Any) -> None:
    """key = ordered bits of z; score (n,), 1 <= block <= n; the rest is scratch.

    work, spare (n,) and state (4, n // block + 1) float32.
    """
    full = score.size // block
    end = full * block
    mean, est, spread, dev = state[0, :full], state[1], state[2, :full], state[3]
    blocks = score[:end].reshape(full, block)
    _block_means(score, block, spare, work, mean)
    _moving(mean, alpha, est)
    _distances(blocks, est, work[:end].reshape(full, block))
    _block_means(work, block, spare, work, spread)
    _moving(spread, alpha, dev)
    _block_keys(blocks, est, dev, key[:end].reshape(full, block))
    rest = score.size - end
    if rest > 0:  # nothing follows the shorter last block, so its own means are not needed
        _block_keys(score[end:].reshape(1, rest), est[full:], dev[full:], key[end:].reshape(1, rest))


@jit()
def _scan(key: Any, trial: Any) -> Any:
    """Number of keys <= trial, the largest of them, and the smallest key > trial."""
    count = np.int32(0)
    below = np.int32(LOWEST)
    above = np.int32(HIGHEST)
    for j in range(key.size):
        x = key[j]
        inside = x <= trial
        count = np.int32(count + np.int32(inside))
        below = max(below, x if inside else np.int32(LOWEST))
        above = min(above, np.int32(HIGHEST) if inside else x)
    return np.int64(count), np.int64(below), np.int64(above)


@jit()
def _column_of_tie(key: Any, threshold: Any, ties: Any) -> Any:
    """1 + the column of the `ties`-th key equal to threshold."""
    begin = 0
    while True:
        end = min(begin + 64, key.size)
        here = np.int32(0)
        for j in range(begin, end):
            here = np.int32(here + np.int32(key[j] == threshold))
        if here >= ties:
            break
        ties -= np.int64(here)
        begin = end
    while True:
        ties -= np.int64(key[begin] == threshold)
        begin += 1
        if ties == 0:
            return begin


@jit()
def find_threshold(key: Any, k: Any, guess: Any, slope: Any) -> Any:
    """The k smallest keys, 0 < k < n: key <= threshold in columns < cut, key < threshold beyond.

    Returns (threshold, cut, slope). `guess` and `slope`, keys per unit of threshold, only steer the search:
    Newton steps, along the chord of the bracket where they leave it or it is narrow, one neighbour up or down
    when one key is missing or too many, bisection every other pass from the eighth.
    """
    low, count_low = np.int64(LOWEST) - 1, np.int64(0)
    high, count_high = np.int64(HIGHEST), np.int64(key.size)
    trial, last, count_last = np.int64(guess), np.int64(0), np.int64(-1)
    passes = 0
    while True:
        trial = min(max(trial, low + 1), high - 1)
        count, below, above = _scan(key, np.int32(trial))
        passes += 1
        if count == k:
            return below, key.size, slope
        if count < k:
            low, count_low = above - 1, count
        else:
            high, count_high = below, count
        span = high - low
        if span == 1:
            if count_high == k:
                return high, key.size, slope
            return high, _column_of_tie(key, high, k - count_low), slope
        if count_last >= 0 and abs(count - count_last) >= 16:
            slope = np.float64(abs(count - count_last)) / (np.float64(abs(trial - last)) + 1.0)
        last, count_last = trial, count
        if passes >= 8 and passes % 2 == 0:
            trial = low + span // 2
        elif count == k - 1:
            trial = above
        elif count == k + 1:
            trial = below - 1
        else:
            step = np.float64(k - count) / max(slope, 1e-9)
            trial += np.int64(min(max(step, -4.0e9), 4.0e9))
            if trial <= low or trial >= high or count_high - count_low < 24:
                chord = np.float64(span) / np.float64(count_high - count_low)
                trial = low + np.int64(np.float64(k - count_low) * chord)
