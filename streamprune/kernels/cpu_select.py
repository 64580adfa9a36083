"""Compiled loops of the CPU kernels: from a row of scores to the weights to prune. See cpu.py for the drivers.

A selector maps a row of scores to int32 keys, sixteen at a time; selection is then a threshold on the keys:

    exact   key = bits of L (L >= 0, so the order of bits is the order of values)
    ewma    key = order-preserving bits of z = (l - est) / dev, with l = |w| * feature**(1 / power)

The k smallest of n keys are found without sorting. Thresholds of earlier rows predict that of the next one: a single
pass counts the keys below a bracket around the prediction, and packs those within it, a few percent, into a list. The
threshold is then found by counting, on the list, or on the whole row if it lies outside the bracket. The result does
not depend on the prediction.

Rounding: strict IEEE float32, so that every processor computes the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels import lanes
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_int, fill, load, pack, store

LOWEST = -(2**31)
HIGHEST = 2**31 - 1
BLOCK = 2 * COUNT  # the usual block of EWMA: its loops are written with lanes
SIGNLESS = 0x7FFFFFFF
_INFINITE_KEY = 0x7F800000


@jit()
def ordered(z: Any) -> Any:
    """The bits of a float32 as an int32 that orders like it."""
    bits = np.float32(z).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(SIGNLESS)))


@jit()
def _value(key: Any) -> Any:
    """The float32 with this key, as float64."""
    return np.float64(np.int32(ordered(np.int32(key).view(np.float32))).view(np.float32))


@jit()
def as_distance(threshold: Any) -> Any:
    """(whether z order like keys about this threshold, its z as float32, and that of the next lower key).

    They do not about zeros, which are equal but have two keys, and for thresholds that are beyond all z.
    """
    ordinary = _INFINITE_KEY >= threshold >= -_INFINITE_KEY - 1 and not -1 <= threshold <= 0
    return ordinary, np.float32(_value(threshold)), np.float32(_value(threshold - 1))


@jit()
def write_keys(score: Any, n: Any, block: Any, est: Any, inverse: Any, key: Any) -> None:
    """key = ordered bits of z = (l - est) / dev."""
    for b in range(est.size):
        for j in range(b * block, min((b + 1) * block, n)):
            key[j] = ordered((score[j] - est[b]) * inverse[b])


@jit(inline=True)
def distances(j: Any, score: Any, est: Any, inverse: Any) -> Any:
    """z of columns j.., for blocks of BLOCK columns."""
    return (load(score, j) - fill(est[j // BLOCK])) * fill(inverse[j // BLOCK])


@jit()
def _pack_bracket(key: Any, low: Any, high: Any, found: Any) -> Any:
    """(number of keys <= low, number with low < key <= high); the latter are packed into `found` (keys + COUNT,)."""
    below = inside = np.int64(0)
    bottom, top = fill(np.int32(low)), fill(np.int32(high))
    for j in range(0, key.size, COUNT):
        keys = load(key, j)
        above = bottom < keys
        chosen = above & (keys <= top)
        pack(found, inside, keys, chosen)
        inside += lanes.count(chosen)
        below += COUNT - lanes.count(above)
    return below, inside


@jit()
def _pack_distances(score: Any, est: Any, inverse: Any, low: Any, high: Any, found: Any) -> Any:
    """_pack_bracket for the keys that write_keys would write, from the z; neither bound is the key of a zero."""
    below = inside = np.int64(0)
    bottom, top = fill(np.float32(_value(low))), fill(np.float32(_value(high)))
    for j in range(0, score.size, COUNT):
        z = distances(j, score, est, inverse)
        above = bottom < z
        chosen = above & (z <= top)
        pack(found, inside, as_int(z), chosen)
        inside += lanes.count(chosen)
        below += COUNT - lanes.count(above)
    for j in range(0, inside, COUNT):
        bits = load(found, j)
        store(found, j, lanes.select(bits < 0, bits ^ SIGNLESS, bits))
    return below, inside


@jit()
def _scan(key: Any, trial: Any) -> Any:
    """Number of keys <= trial, the largest of them, and the smallest key > trial."""
    within = np.int64(0)
    below = not_above = fill(np.int32(LOWEST))
    for j in range(0, key.size, COUNT):
        keys = load(key, j)
        inside = keys <= np.int32(trial)
        within += lanes.count(inside)
        below = lanes.largest(below, lanes.select(inside, keys, below))
        not_above = lanes.largest(not_above, lanes.select(inside, not_above, keys ^ -1))
    return within, np.int64(lanes.top(below)), np.int64(~lanes.top(not_above))


@jit()
def _column_of_tie(key: Any, threshold: Any, ties: Any) -> Any:
    """1 + the column of the `ties`-th key equal to threshold."""
    j = -COUNT
    while ties > 0:
        j += COUNT
        ties -= lanes.count(load(key, j) == np.int32(threshold))
    j += COUNT
    while True:
        j -= 1
        if key[j] == threshold:
            if ties == 0:
                return j + 1
            ties += 1


@jit()
def _search(key: Any, k: Any, guess: Any, slope: Any) -> Any:
    """(threshold, ties): the k smallest keys, 0 < k <= size, are those <= threshold if ties is 0; otherwise those
    < threshold and the first `ties` of those equal to it.

    `guess` and `slope` (keys per unit of threshold) only speed up the search. Each pass counts the keys at or below a
    trial threshold and finds the nearest keys on both sides, so that the bracket always ends at existing keys. The next
    trial is a Newton step; the chord of the bracket if that leaves the bracket, or the bracket is narrow; the nearest
    key if one key is missing or too many; and from the eighth pass on a bisection every other time, which bounds the
    number of passes by 8 + 2 x 32.
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
            return below, np.int64(0)
        if count < k:
            low, count_low = above - 1, count
        else:
            high, count_high = below, count
        span = high - low
        if span == 1:
            return high, (np.int64(0) if count_high == k else k - count_low)
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


@jit()
def find_threshold(
    key: Any, score: Any, block: Any, est: Any, inverse: Any, by_lanes: Any, k: Any, unit: Any, track: Any, found: Any
) -> Any:
    """(threshold, cut): the k smallest keys are those <= threshold left of column cut, < threshold from there on.

    0 < k < n; if by_lanes, `key` is scratch, and keys are those that write_keys would write there. found
    (key.size + COUNT,) int32 is scratch. unit (scale, est, dev) holds the row's scale and the means of its states: a
    key is that of (score - est) / dev. track, two float64, is learned from earlier rows: the mean threshold on
    score / scale, and the mean distance of thresholds from it.
    """
    scale, middle, spread = unit
    guess, reach = (track[0] * scale - middle) / spread, 5.0 * track[1] * scale / spread
    low, high = np.int64(ordered(np.float32(guess - reach))), np.int64(ordered(np.float32(guess + reach)))
    if by_lanes:
        low, high = (low - 2 if -1 <= low <= 0 else low), (high + 2 if -1 <= high <= 0 else high)
        below, inside = _pack_distances(score, est, inverse, low, high, found)
    else:
        below, inside = _pack_bracket(key, low, high, found)
    slope = np.float64(inside) / np.float64(abs(high - low) + 1)
    hit = below < k <= below + inside
    if hit:
        size = -(-inside // COUNT) * COUNT
        for i in range(inside, size):
            found[i] = HIGHEST
        threshold, ties = _search(found[:size], k - below, low + np.int64(np.float64(k - below) / slope), slope)
    if by_lanes and (not hit or ties > 0):
        write_keys(score, score.size, block, est, inverse, key)
    if not hit:
        threshold, ties = _search(key, k, np.int64(ordered(np.float32(guess))), slope)
    _learn(track, (_value(threshold) * spread + middle) / scale)
    return threshold, (_column_of_tie(key, threshold, ties) if ties > 0 else key.size)


@jit()
def _learn(track: Any, usual: Any) -> None:
    """Updates `track` with the threshold of one more row; ignores one that is not finite."""
    off = abs(usual - track[0])
    if off < np.inf:
        track[0] += (usual - track[0]) / 8
        track[1] += (off - track[1]) / 8
    elif abs(usual) < np.inf:
        track[0], track[1] = usual, abs(usual) / 16
