"""Compiled loops of ADMM's iterations, all but their matrix products. See methods/admm.py for the method.

An iteration is one pass over a row of weights, which stays in the cache: what the product of the iteration before adds
to x, a new mask, and what is multiplied next. Rows are whole lanes wide. Steps and products are raw bits, uint16 of
bf16 or uint32 of float32; `shift`, 16 or 0, converts them to bits of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels import lanes
from streamprune.kernels.cpu_groups import prune_groups
from streamprune.kernels.cpu_select import HIGHEST, LOWEST, SIGNLESS, find_threshold
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, as_int, fill, load, select, store


@jit()
def _advance(x: Any, start: Any, product: Any, shift: Any, keep: Any, kappa: Any) -> None:
    """x += kappa (start − z + product), where z is x if kept, else 0."""
    nothing = fill(np.float32(0.0))
    for j in range(0, x.size, COUNT):
        value = load(x, j)
        z = select(load(keep, j) == np.int32(1), value, nothing)
        value = value - z * kappa + load(start, j) * kappa
        store(x, j, value + as_float(load(product, j) << np.int32(shift)) * kappa)


@jit()
def _rank(x: Any, score: Any, spared: Any, key: Any) -> Any:
    """key = bits of |x|·score, or HIGHEST if spared. Returns the mean of |x|·score."""
    total, never = fill(np.float32(0.0)), fill(np.int32(HIGHEST))
    for j in range(0, x.size, COUNT):
        value = as_float(as_int(load(x, j)) & np.int32(SIGNLESS)) * load(score, j)
        total = total + value
        bits = as_int(value)
        if spared.size:
            bits = select(load(spared, j) == np.int32(1), never, bits)
        store(key, j, bits)
    return np.float64(lanes.total(total)) / x.size


@jit()
def _keep_above(key: Any, threshold: Any, cut: Any, keep: Any) -> None:
    """Prunes keys <= threshold left of column `cut`, and keys < threshold from there on."""
    limit, behind = fill(np.int32(threshold)), fill(np.int32(threshold - 1))
    one, zero = fill(np.int32(1)), fill(np.int32(0))
    for j in range(0, key.size, COUNT):
        if j + COUNT > cut:
            limit = select(lanes.columns() < np.int32(max(cut - j, 0)), limit, behind)
        store(keep, j, select(load(key, j) <= limit, zero, one))


@jit()
def _next_step(x: Any, start: Any, keep: Any, shift: Any, step: Any) -> None:
    """step = 2z − x − start, where z is x if kept, else 0; rounded to nearest even if it is bf16."""
    minus, one, nan = fill(np.float32(-1.0)), np.int32(1), fill(np.int32(0x7FC0))
    for j in range(0, x.size, COUNT):
        value = load(x, j)
        made = select(load(keep, j) == one, value, value * minus) - load(start, j)
        bits = as_int(made)
        if shift:
            bits = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & one)) >> np.int32(16)
            bits = select(made == made, bits, nan)  # the carry would turn some NaN into zero
        store(step, j, bits)


@jit()
def _choose(
    x: Any, score: Any, spared: Any, count: Any, key: Any, track: Any, found: Any, none: Any, keep: Any
) -> None:
    """The mask that prunes the `count` lowest |x|·score that are not spared."""
    threshold, cut = np.int64(LOWEST), x.size
    scale = _rank(x, score, spared, key)
    if count > 0:
        threshold, cut = find_threshold(key, none, 0, none, none, False, count, (scale, 0.0, 1.0), track, found)
    _keep_above(key, threshold, cut, keep)


@jit(entry=True)
def alternate_rows(
    x: Any, start: Any, product: Any, shift: Any, kappa: Any, score: Any, count: Any, keep: Any, step: Any
) -> None:
    """One iteration on rows, in place, with a mask that prunes the `count` lowest |x|·score of each row.

    x, start (rows, n) float32; product (rows, n) of the iteration before, (rows, 0) if there was none; score (n,)
    float32, not negative; keep (rows, n) uint8, 1 where kept: the mask before, which the new one replaces. With count
    −1 it stays. step (rows, n) receives what is to be multiplied. 0 <= count < n.
    """
    rows, n = x.shape
    key, found, none = np.empty(n, np.int32), np.empty(n + COUNT, np.int32), np.empty(0, np.float32)
    everyone, track = np.empty(0, np.uint8), np.full(2, np.nan)
    for r in range(rows):
        if product.shape[1]:
            _advance(x[r], start[r], product[r], shift, keep[r], kappa)
        if count >= 0:
            _choose(x[r], score, everyone, count, key, track, found, none, keep[r])
        _next_step(x[r], start[r], keep[r], shift, step[r])


@jit(entry=True)
def alternate_groups(
    x: Any, start: Any, product: Any, shift: Any, kappa: Any, score: Any, count: Any, keep: Any, step: Any,
    bits: Any, feature: Any, shape: Any, form: Any, drop: Any, m: Any,
) -> None:  # fmt: skip
    """alternate_rows, where the m − drop highest |x|·score of every m are never pruned.

    bits (rows, n) uint32 is the memory of x; feature, shape, form, drop and m as for prune_groups.
    """
    rows, n = x.shape
    key, found, none = np.empty(n, np.int32), np.empty(n + COUNT, np.int32), np.empty(0, np.float32)
    track, spared = np.full(2, np.nan), np.empty((1, n), np.bool_)
    out, loss = np.empty((1, n), np.uint32), np.empty((1, 3), np.float64)
    for r in range(rows):
        if product.shape[1]:
            _advance(x[r], start[r], product[r], shift, keep[r], kappa)
        prune_groups(bits[r : r + 1], feature, 1, shape, form, drop, m, out, spared, loss)
        _choose(x[r], score, spared[0].view(np.uint8), count, key, track, found, none, keep[r])
        _next_step(x[r], start[r], keep[r], shift, step[r])
