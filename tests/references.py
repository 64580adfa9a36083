"""Slow float64 references, written from the formulas and not from the kernels.

Arrays are numpy float64 unless said otherwise. The formulas are in DESIGN: EWMA is SwiftPrune's (arXiv
2501.16376) with blocks, where a block of one weight is the published recurrence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Ewma(NamedTuple):
    """z = (l - est) / dev of one row, with the state that each weight saw; all (in_features,)."""

    z: Floats
    est: Floats
    dev: Floats


def scores(weight: torch.Tensor, feature: torch.Tensor, power: int) -> Floats:
    """L_ij = |w_ij|**power * feature_j, (rows, in_features)."""
    return np.abs(weight.double().numpy()) ** power * feature.double().numpy()


def ewma(row: Floats, block: int, alpha: float) -> Ewma:
    """Of the roots of scores, (in_features,): blocks of neighbours are compared with the state before the block.

    First the means of the blocks, held at four times their typical size; from these est before each block; then the
    same for the distances from est.
    """
    floor = float(np.finfo(np.float32).tiny)
    block = min(block, len(row))
    parts = row[: len(row) // block * block].reshape(-1, block)
    est = _moving(parts.mean(1), alpha)
    dev = _moving(np.abs(parts - est[:-1, None]).mean(1), alpha)
    number = np.arange(len(row)) // block
    est_at, dev_at = est[number], np.maximum(dev, floor)[number]
    return Ewma((row - est_at) / dev_at, est_at, dev_at)


def _moving(means: Floats, alpha: float) -> Floats:
    """The state before each block and after the last."""
    held = np.minimum(means, 4 * _typical(means))
    states = [float(held.mean())]
    for mean in held:
        states.append(states[-1] + alpha * (float(mean) - states[-1]))
    return np.array(states)


def _typical(means: Floats) -> float:
    """The lower median of those that are not 0, rounded down to four binary digits behind the point of a mantissa."""
    above = np.sort(means[means > 0])
    if not len(above):
        return 0.0
    mantissa, exponent = np.frexp(above[(len(above) - 1) // 2])
    return float(np.ldexp(np.floor(mantissa * 32) / 32, exponent))


def published_recurrence(row: Floats, alpha: float, threshold: float) -> Bools:
    """SwiftPrune as published, weight by weight, but for the start: True where l < est + λ·dev, λ = `threshold`."""
    pruned = np.zeros(len(row), bool)
    est = float(row.mean())
    dev = float(ewma(row, 1, alpha).dev[0])
    for j, score in enumerate(row):
        pruned[j] = score < est + threshold * dev
        dev = (1 - alpha) * dev + alpha * abs(score - est)
        est = (1 - alpha) * est + alpha * score
    return pruned


def lowest(values: Floats, count: int) -> Bools:
    """True at the `count` smallest of each row, ties by column."""
    pruned = np.zeros(values.shape, bool)
    np.put_along_axis(pruned, np.argsort(values, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return pruned


def lowest_of_groups(values: Floats, n: int, m: int) -> Bools:
    """True at the m - n smallest of every m consecutive values, ties by column."""
    return lowest(values.reshape(values.shape[0], -1, m), m - n).reshape(values.shape)


def lscore_feature(a: Floats) -> Floats:
    return a / (1 - a / a.sum())


def lscore_by_inverse(a: Floats, damping: float) -> Floats:
    """1 / [H⁻¹]_jj of H = x xᵀ + λ I with x_j² = a_j, by a real inverse; SwiftPrune takes λ → 0."""
    x = np.sqrt(a)
    return 1 / np.diag(np.linalg.inv(np.outer(x, x) + damping * np.eye(len(a))))


def sums(x: torch.Tensor) -> tuple[Floats, Floats]:
    """Sum and sum of squares over tokens."""
    values = x.double().numpy()
    return values.sum(0), (values * values).sum(0)
