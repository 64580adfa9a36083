"""Compiled loops of the CPU kernels: which weights of every m consecutive ones go. See cpu.py for the drivers.

A weight's rank is the number of weights of its group that go before it: those of lower score, and of equal
score those to the left. Everything is branch-free, and one vector instruction works on many groups. For that
a row is taken apart into planes, which hold the same columns of every group; for 4 and 8, the common cases,
by even/odd splits, as loops of stride two become vector code and larger strides do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.jit import jit


@jit()
def keys_of_m(score: Any, key: Any, m: Any, drop: Any, scratch: Any, ranks: Any) -> None:
    """key = 0 for the `drop` smallest of every m scores, lowest column first, else 1.

    score (n,) float32, key (n,) int32; scratch (2, n) float32 and ranks (2, n) int32 are overwritten.
    """
    groups = score.size // m
    if m != 4 and m != 8:
        _rank_any(
            score.reshape(groups, m), key.reshape(groups, m), drop,
            scratch[0].reshape(m, groups), ranks[0].reshape(m, groups),
        )  # fmt: skip
        return
    if m == 4:
        half = score.size // 2
        _split(score, scratch[0], 1)
        _rank_4(scratch[0, :half], scratch[0, half:], ranks[0, :half], ranks[0, half:], drop)
    else:
        _split(score, scratch[1], 1)
        _split(scratch[1], scratch[0], 2)
        _split(scratch[0], scratch[1], 4)
        _rank_8(scratch[1].reshape(8, groups), ranks[0].reshape(8, groups), drop)
        _join(ranks[0], ranks[1], 4)
        _join(ranks[1], ranks[0], 2)
    _join(ranks[0], key, 1)


@jit()
def _split_one(values: Any, even: Any, odd: Any) -> None:
    for i in range(even.size):
        even[i] = values[2 * i]
        odd[i] = values[2 * i + 1]


@jit()
def _split(values: Any, halves: Any, stretches: Any) -> None:
    """Each of `stretches` equal stretches of values becomes its even elements, then its odd ones."""
    source, target = values.reshape(stretches, -1), halves.reshape(2 * stretches, -1)
    for s in range(stretches):
        _split_one(source[s], target[2 * s], target[2 * s + 1])


@jit()
def _join_one(even: Any, odd: Any, values: Any) -> None:
    for i in range(even.size):
        values[2 * i] = even[i]
        values[2 * i + 1] = odd[i]


@jit()
def _join(halves: Any, values: Any, stretches: Any) -> None:
    """Undo _split."""
    source, target = halves.reshape(2 * stretches, -1), values.reshape(stretches, -1)
    for s in range(stretches):
        _join_one(source[2 * s], source[2 * s + 1], target[s])


@jit()
def _le(left: Any, right: Any) -> Any:
    return np.int32(left <= right)


@jit()
def _rank_4(even: Any, odd: Any, even_keys: Any, odd_keys: Any, drop: Any) -> None:
    """Keys of groups of four, after one split; a second split would cost more than these strides of two."""
    for i in range(even.size // 2):
        a, b, c, d = even[2 * i], odd[2 * i], even[2 * i + 1], odd[2 * i + 1]
        ab, ac, ad = _le(a, b), _le(a, c), _le(a, d)
        bc, bd, cd = _le(b, c), _le(b, d), _le(c, d)
        even_keys[2 * i] = np.int32(np.int32(3 - ab - ac - ad) >= drop)
        odd_keys[2 * i] = np.int32(np.int32(2 + ab - bc - bd) >= drop)
        even_keys[2 * i + 1] = np.int32(np.int32(1 + ac + bc - cd) >= drop)
        odd_keys[2 * i + 1] = np.int32(np.int32(ad + bd + cd) >= drop)


@jit()
def _rank_8(planes: Any, keys: Any, drop: Any) -> None:
    """Keys of groups of eight, after three splits: column i is in the plane of i's three bits reversed."""
    p0, p1, p2, p3 = planes[0], planes[4], planes[2], planes[6]
    p4, p5, p6, p7 = planes[1], planes[5], planes[3], planes[7]
    k0, k1, k2, k3 = keys[0], keys[4], keys[2], keys[6]
    k4, k5, k6, k7 = keys[1], keys[5], keys[3], keys[7]
    for i in range(planes.shape[1]):
        a, b, c, d, e, f, g, h = p0[i], p1[i], p2[i], p3[i], p4[i], p5[i], p6[i], p7[i]
        ab, ac, ad, ae = _le(a, b), _le(a, c), _le(a, d), _le(a, e)
        af, ag, ah = _le(a, f), _le(a, g), _le(a, h)
        bc, bd, be, bf, bg, bh = _le(b, c), _le(b, d), _le(b, e), _le(b, f), _le(b, g), _le(b, h)
        cd, ce, cf, cg, ch = _le(c, d), _le(c, e), _le(c, f), _le(c, g), _le(c, h)
        de, df, dg, dh = _le(d, e), _le(d, f), _le(d, g), _le(d, h)
        ef, eg, eh = _le(e, f), _le(e, g), _le(e, h)
        fg, fh = _le(f, g), _le(f, h)
        gh = _le(g, h)
        k0[i] = np.int32(np.int32(7 - ab - ac - ad - ae - af - ag - ah) >= drop)
        k1[i] = np.int32(np.int32(6 + ab - bc - bd - be - bf - bg - bh) >= drop)
        k2[i] = np.int32(np.int32(5 + ac + bc - cd - ce - cf - cg - ch) >= drop)
        k3[i] = np.int32(np.int32(4 + ad + bd + cd - de - df - dg - dh) >= drop)
        k4[i] = np.int32(np.int32(3 + ae + be + ce + de - ef - eg - eh) >= drop)
        k5[i] = np.int32(np.int32(2 + af + bf + cf + df + ef - fg - fh) >= drop)
        k6[i] = np.int32(np.int32(1 + ag + bg + cg + dg + eg + fg - gh) >= drop)
        k7[i] = np.int32(np.int32(ah + bh + ch + dh + eh + fh + gh) >= drop)


@jit()
def _compare(first: Any, second: Any, rank_first: Any, rank_second: Any) -> None:
    for g in range(first.size):
        before = np.int32(first[g] <= second[g])
        rank_first[g] = np.int32(rank_first[g] - before)
        rank_second[g] = np.int32(rank_second[g] + before)


@jit()
def _rank_any(scores: Any, keys: Any, drop: Any, planes: Any, ranks: Any) -> None:
    """Any m: scores, keys (groups, m); planes, ranks (m, groups) are scratch."""
    groups, m = scores.shape
    for g in range(groups):
        for i in range(m):
            planes[i, g] = scores[g, i]
    for i in range(m):
        ranks[i, :] = np.int32(m - 1 - i)
    for i in range(m):
        for j in range(i + 1, m):
            _compare(planes[i], planes[j], ranks[i], ranks[j])
    for g in range(groups):
        for i in range(m):
            keys[g, i] = np.int32(ranks[i, g] >= drop)
