"""Compiled loops of the CPU kernels: rows of weights in, pruned rows out. See cpu.py for the drivers.

Weights arrive as raw bits: uint16 for bf16 and fp16 (`kind` says which), uint32 for fp32. Work goes row by
row in buffers that fit the level-1 or level-2 cache: decode and score, decide (cpu_select.py or
cpu_groups.py), write. Scores are strict IEEE float32; only the sums in `_loss` may be reassociated by the
compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.cpu_groups import keys_of_m
from streamprune.kernels.cpu_select import HIGHEST, LOWEST, ewma_keys, find_threshold
from streamprune.kernels.jit import jit

BF16, FP16, FP32 = 0, 1, 2
_F16_SCALE = np.float32(2.0**112)
_LOSS_CHUNK = 4096


@jit()
def _score(magnitude: Any, square: Any, feature: Any) -> Any:
    return (magnitude * (magnitude if square else np.float32(1.0))) * feature


@jit()
def load_scores(row: Any, feature: Any, power: Any, kind: Any, score: Any) -> None:
    """score[j] = |w_j|**power * feature[j] in float32, with w decoded from bits."""
    square = power == 2
    if kind == BF16:
        for j in range(row.size):
            bits = np.uint32((np.uint32(row[j]) & np.uint32(0x7FFF)) << np.uint32(16))
            score[j] = _score(bits.view(np.float32), square, feature[j])
    elif kind == FP16:  # exact for normals and subnormals; Inf and NaN were refused before
        for j in range(row.size):
            bits = np.uint32((np.uint32(row[j]) & np.uint32(0x7FFF)) << np.uint32(13))
            score[j] = _score(bits.view(np.float32) * _F16_SCALE, square, feature[j])
    else:
        for j in range(row.size):
            bits = np.uint32(np.uint32(row[j]) & np.uint32(0x7FFFFFFF))
            score[j] = _score(bits.view(np.float32), square, feature[j])


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
    state = np.empty((4, n // max(block, 1) + 1), np.float32)
    guess, slope = np.int64(0), 1e-6
    for r in range(rows):
        load_scores(weight[r], feature, power, kind, score)
        if block > 0:
            ewma_keys(score, key, block, alpha, work, spare, state)
        threshold, cut = np.int64(LOWEST), n
        if count == n:
            threshold = np.int64(HIGHEST)
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
    scratch, ranks = np.empty((2, n), np.float32), np.empty((2, n), np.int32)
    for r in range(rows):
        load_scores(weight[r], feature, power, kind, score)
        keys_of_m(score, key, m, np.int32(drop), scratch, ranks)
        loss[r] = 0.0
        _finish(weight[r], key, np.int32(0), score, bits, out[r], keep[r], loss[r])
