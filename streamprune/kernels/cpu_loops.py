"""Compiled loops of the CPU kernels. Drivers, and what the functions mean, are in cpu.py.

Weights arrive as raw bits: uint16 for bf16 and fp16 (`kind` says which), uint32 for fp32. Work goes row by
row in buffers that fit the level-1 or level-2 cache. A selector turns a row of scores into int32 keys; then
selection is a threshold on keys:

    exact   key = bits of L (L >= 0, so the order of bits is the order of values)
    ewma    key = order-preserving bits of z = (L - est) / dev
    n of m  key = 0 for the weights to go, 1 for the others

The k smallest of n keys are found without sorting: each pass counts the keys at or below a trial threshold
and notes its two neighbours among the keys, so that the bracket always snaps to keys that exist. Trials come
from the previous row, then from interpolation, and from bisection when that stalls: at most 4 x 32 passes,
usually five. The outcome does not depend on where the search began.

Rounding: strict IEEE float32, block sums by a fixed tree. Only `_loss` may be reassociated by the compiler.
Sums of equal numbers over a block are exact, so a constant row has dev = 0 exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.jit import jit

BF16, FP16, FP32 = 0, 1, 2
_LOWEST = -(2**31)
_HIGHEST = 2**31 - 1
_TINY = np.float32(np.finfo(np.float32).tiny)
_F16_SCALE = np.float32(2.0**112)
_LOSS_CHUNK = 1024


@jit()
def load_scores(row: Any, feature: Any, power: Any, kind: Any, score: Any) -> None:
    """score[j] = |w_j|**power * feature[j] in float32, with w decoded from bits."""
    n = row.size
    if kind == BF16:
        for j in range(n):
            score[j] = np.uint32((np.uint32(row[j]) & np.uint32(0x7FFF)) << np.uint32(16)).view(np.float32)
    elif kind == FP16:  # exact for normals and subnormals; Inf and NaN were refused before
        for j in range(n):
            bits = np.uint32((np.uint32(row[j]) & np.uint32(0x7FFF)) << np.uint32(13))
            score[j] = bits.view(np.float32) * _F16_SCALE
    else:
        for j in range(n):
            score[j] = np.uint32(np.uint32(row[j]) & np.uint32(0x7FFFFFFF)).view(np.float32)
    if power == 2:
        for j in range(n):
            score[j] = (score[j] * score[j]) * feature[j]
    else:
        for j in range(n):
            score[j] = score[j] * feature[j]


@jit()
def _block_sums(values: Any, spare: Any, block: Any, sums: Any) -> None:
    """sums[b] = sum of values[b*block : (b+1)*block], all b at once. Overwrites `values` and `spare`."""
    size = sums.size * block
    while block % 2 == 0:
        size //= 2
        block //= 2
        for i in range(size):
            spare[i] = values[2 * i] + values[2 * i + 1]
        values, spare = spare, values
    for b in range(sums.size):
        total = np.float64(0.0)
        for j in range(block):
            total += np.float64(values[b * block + j])
        sums[b] = np.float32(total)


@jit()
def _distances(score: Any, est: Any, out: Any) -> None:
    if score.size == 32:
        for j in range(32):
            out[j] = abs(score[j] - est)
    else:
        for j in range(score.size):
            out[j] = abs(score[j] - est)


@jit()
def _ordered(z: Any) -> Any:
    bits = np.float32(z).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@jit()
def _block_keys(score: Any, est: Any, dev: Any, key: Any) -> None:
    inverse = np.float32(1.0) / max(dev, _TINY)
    if score.size == 32:
        for j in range(32):
            key[j] = _ordered((score[j] - est) * inverse)
    else:
        for j in range(score.size):
            key[j] = _ordered((score[j] - est) * inverse)


@jit()
def ewma_keys(score: Any, key: Any, block: Any, alpha: Any, work: Any, spare: Any, state: Any) -> None:
    """key = ordered bits of z; work, spare (n,) and state (3, blocks + 1) float32 are scratch."""
    n = score.size
    full = n // block
    rest = n - full * block
    mean, est_at, spread = state[0], state[1], state[2]
    scale = np.float32(1.0) / np.float32(block)
    work[:] = score
    _block_sums(work, spare, block, mean[:full])
    for b in range(full):
        mean[b] *= scale
    if rest > 0:
        total = np.float64(0.0)
        for j in range(full * block, n):
            total += np.float64(score[j])
        mean[full] = np.float32(total / rest)

    blocks = score[: full * block].reshape(full, block)
    distances = work[: full * block].reshape(full, block)
    est = mean[0]
    for b in range(full):
        est_at[b] = est
        _distances(blocks[b], est, distances[b])
        est += alpha * np.float32(mean[b] - est)
    est_at[full] = est
    _block_sums(work, spare, block, spread[:full])
    for b in range(full):
        spread[b] *= scale
    if full == 0:
        total = np.float64(0.0)
        for j in range(n):
            total += np.float64(abs(score[j] - est))
        spread[0] = np.float32(total / n)

    dev = spread[0]
    keys = key[: full * block].reshape(full, block)
    for b in range(full):
        _block_keys(blocks[b], est_at[b], dev, keys[b])
        dev += alpha * np.float32(spread[b] - dev)
    if rest > 0:
        _block_keys(score[full * block :], est_at[full], dev, key[full * block :])


@jit()
def _scan(key: Any, trial: Any) -> Any:
    """Number of keys <= trial, the largest of them, and the smallest key > trial."""
    count = np.int32(0)
    below = np.int32(_LOWEST)
    above = np.int32(_HIGHEST)
    for j in range(key.size):
        x = key[j]
        inside = x <= trial
        count = np.int32(count + np.int32(inside))
        below = max(below, x if inside else np.int32(_LOWEST))
        above = min(above, np.int32(_HIGHEST) if inside else x)
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

    Returns (threshold, cut, slope). `guess` and `slope`, keys per unit of threshold, only steer the search.
    """
    low, count_low = np.int64(_LOWEST) - 1, np.int64(0)
    high, count_high = np.int64(_HIGHEST), np.int64(key.size)
    bounded_low = bounded_high = False
    trial = np.int64(guess)
    passes = 0
    while True:
        trial = min(max(trial, low + 1), high - 1)
        count, below, above = _scan(key, np.int32(trial))
        passes += 1
        if count == k:
            return below, key.size, slope
        if count < k:
            low, count_low, bounded_low = above - 1, count, True
        else:
            high, count_high, bounded_high = below, count, True
        span = high - low
        if span == 1:
            if count_high == k:
                return high, key.size, slope
            return high, _column_of_tie(key, high, k - count_low), slope
        if passes % 4 == 3:
            trial = low + span // 2
        elif bounded_low and bounded_high:
            slope = np.float64(count_high - count_low) / np.float64(span)
            trial = low + np.int64(np.float64(k - count_low) / slope)
        else:
            step = 1.25 * np.float64(k - count) / slope
            trial += np.int64(min(max(step, -4.0e9), 4.0e9))


@jit()
def keys_of_4(score: Any, key: Any, drop: Any) -> None:
    """Branch-free ranks in groups of four: key = 0 for the `drop` smallest, lowest column first."""
    scores = score.reshape(score.size // 4, 4)
    keys = key.reshape(score.size // 4, 4)
    for g in range(scores.shape[0]):
        a, b, c, d = scores[g, 0], scores[g, 1], scores[g, 2], scores[g, 3]
        ab, ac, ad = np.int32(a <= b), np.int32(a <= c), np.int32(a <= d)
        bc, bd, cd = np.int32(b <= c), np.int32(b <= d), np.int32(c <= d)
        keys[g, 0] = np.int32(np.int32(3) - ab - ac - ad >= drop)
        keys[g, 1] = np.int32(np.int32(2) + ab - bc - bd >= drop)
        keys[g, 2] = np.int32(np.int32(1) + ac + bc - cd >= drop)
        keys[g, 3] = np.int32(ad + bd + cd >= drop)


@jit()
def keys_of_m(score: Any, key: Any, m: Any, drop: Any, lanes: Any, ranks: Any) -> None:
    """The same for any m by counting ranks; lanes and ranks (m, groups) are scratch."""
    groups = score.size // m
    scores = score.reshape(groups, m)
    keys = key.reshape(groups, m)
    for g in range(groups):
        for i in range(m):
            lanes[i, g] = scores[g, i]
    for i in range(m):
        ranks[i, :] = np.int32(m - 1 - i)
    for i in range(m):
        for j in range(i + 1, m):
            first, second = lanes[i], lanes[j]
            rank_first, rank_second = ranks[i], ranks[j]
            for g in range(groups):
                before = np.int32(first[g] <= second[g])
                rank_first[g] = np.int32(rank_first[g] - before)
                rank_second[g] = np.int32(rank_second[g] + before)
    for g in range(groups):
        for i in range(m):
            keys[g, i] = np.int32(ranks[i, g] >= drop)


@jit()
def _emit(row: Any, key: Any, limit: Any, magnitude: Any, zero: Any, out: Any) -> None:
    """Copy the bits of the weights with key > limit; every other weight, and every zero, becomes +0.0."""
    for j in range(row.size):
        bits = row[j]
        gone = (key[j] <= limit) | ((bits & magnitude) == zero)
        out[j] = zero if gone else bits


@jit(fastmath={"reassoc"})
def _loss(score: Any, key: Any, limit: Any) -> Any:
    removed = total = np.float32(0.0)
    for j in range(score.size):
        total += score[j]
        removed += score[j] if key[j] <= limit else np.float32(0.0)
    return removed, total


@jit()
def _finish(row: Any, key: Any, limit: Any, score: Any, bits: Any, out: Any, keep: Any, loss: Any) -> None:
    """Everything that follows the decision for one stretch of a row: key <= limit goes."""
    _emit(row, key, limit, bits[0], bits[1], out)
    for j in range(keep.size):
        keep[j] = key[j] > limit
    for begin in range(0, score.size, _LOSS_CHUNK):
        end = min(begin + _LOSS_CHUNK, score.size)
        removed, total = _loss(score[begin:end], key[begin:end], limit)
        loss[0] += np.float64(removed)
        loss[1] += np.float64(total)


@jit()
def prune_rows(
    weight: Any, feature: Any, power: Any, kind: Any, count: Any, block: Any, alpha: Any, bits: Any, out: Any,
    keep: Any, loss: Any,
) -> None:  # fmt: skip
    """`count` weights of every row go; block 0 means the exact selector, else EWMA.

    weight, out (rows, n) uint16|uint32; keep (rows, n) bool or (rows, 0); loss (rows, 2) float64; bits holds
    the mask of everything but the sign, and zero, in the dtype of weight.
    """
    rows, n = weight.shape
    score = np.empty(n, np.float32)
    work, spare = np.empty(n, np.float32), np.empty(n, np.float32)
    key = score.view(np.int32) if block == 0 else np.empty(n, np.int32)
    state = np.empty((3, n // max(block, 1) + 1), np.float32)
    guess, slope = np.int64(0), 1e-6
    for r in range(rows):
        load_scores(weight[r], feature, power, kind, score)
        if block > 0:
            ewma_keys(score, key, block, alpha, work, spare, state)
        threshold, cut = np.int64(_LOWEST), n
        if count == n:
            threshold = np.int64(_HIGHEST)
        elif count > 0:
            threshold, cut, slope = find_threshold(key, count, guess, slope)
            guess = threshold
        loss[r] = 0.0
        kept = min(cut, keep.shape[1])
        _finish(
            weight[r, :cut], key[:cut], np.int32(threshold), score[:cut], bits, out[r, :cut],
            keep[r, :kept], loss[r],
        )  # fmt: skip
        if cut < n:
            _finish(
                weight[r, cut:], key[cut:], np.int32(threshold - 1), score[cut:], bits, out[r, cut:],
                keep[r, kept:], loss[r],
            )  # fmt: skip


@jit()
def prune_groups(
    weight: Any, feature: Any, power: Any, kind: Any, drop: Any, m: Any, bits: Any, out: Any, keep: Any,
    loss: Any,
) -> None:  # fmt: skip
    """`drop` weights of every m consecutive ones go. Arrays as in prune_rows."""
    rows, n = weight.shape
    score, key = np.empty(n, np.float32), np.empty(n, np.int32)
    lanes, ranks = np.empty((m, n // m), np.float32), np.empty((m, n // m), np.int32)
    for r in range(rows):
        load_scores(weight[r], feature, power, kind, score)
        if m == 4:
            keys_of_4(score, key, np.int32(drop))
        else:
            keys_of_m(score, key, m, np.int32(drop), lanes, ranks)
        loss[r] = 0.0
        _finish(weight[r], key, np.int32(0), score, bits, out[r], keep[r], loss[r])
