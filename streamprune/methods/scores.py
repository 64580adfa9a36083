"""Scores: the estimated cost of removing a weight, L_ij = |w_ij|**power * feature_j.

A score is represented by the pair (feature, power): feature (in_features,) float32 of numpy, power 1 or 2. The
kernels combine it with the weights on the fly. Scaling all scores by a constant does not change a mask, so features
are computed in float64 and divided by their largest value before the cast to float32: activations of any scale neither
overflow nor underflow. With a_j = E[x_j²] over the calibration tokens and share_j = a_j / Σ_k a_k:

    lscore            w² a_j / (1 − share_j)   SwiftPrune with the diagonal of H kept, so that it does not
                                               depend on the scale of single features
    lscore-isotropic  w² / (1 − share_j)       SwiftPrune as published (arXiv 2501.16376): the saliency
                                               w² / [H⁻¹]_jj of H = xxᵀ + λI for λ → 0, by Sherman–Morrison
    wanda             |w| √a_j                 Wanda (arXiv 2306.11695, eq. 1), √T left out
    magnitude         |w|                      needs no statistics

If a single feature has all the power, 1 − share_j = 0 (H is singular). It is clamped to 2⁻²⁰, about the resolution of
float32 activations, so that the weights of this feature are pruned last. If all inputs were zero (all a_j = 0: an
expert to which no token was routed), all features count the same, and every score ranks a row's weights by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from streamprune.errors import UnsupportedError
from streamprune.methods.stats import InputStats, Sums

Feature = np.ndarray[Any, np.dtype[np.float32]]
_SMALLEST_REST = 2.0**-20


def lscore(stats: InputStats) -> tuple[Feature, int]:
    """L = w² a_j / (1 − a_j / Σ_k a_k)."""
    a = _power(stats)
    return _feature(a / _rest(a)), 2


def lscore_isotropic(stats: InputStats) -> tuple[Feature, int]:
    """L = w² / (1 − a_j / Σ_k a_k), SwiftPrune as published."""
    return _feature(1.0 / _rest(_power(stats))), 2


def wanda(stats: InputStats) -> tuple[Feature, int]:
    """L = |w| √a_j."""
    return _feature(np.sqrt(_power(stats))), 1


def magnitude(stats: InputStats) -> tuple[Feature, int]:
    """L = |w|; uses only stats.in_features, so InputStats.zeros(in_features) is enough."""
    return np.ones(stats.in_features, np.float32), 1


SCORES: dict[str, Callable[[InputStats], tuple[Feature, int]]] = {
    "lscore": lscore,
    "lscore-isotropic": lscore_isotropic,
    "wanda": wanda,
    "magnitude": magnitude,
}
WITHOUT_STATISTICS = frozenset({"magnitude"})


def _power(stats: InputStats) -> Sums:
    """a_j, (in_features,) float64; raises UnsupportedError where activations were NaN or Inf."""
    a = stats.mean_square
    if not np.isfinite(a).all():
        bad = int(np.isfinite(a).argmin())
        raise UnsupportedError(
            f"activations are not finite: input feature {bad} was NaN or Inf during calibration, as happens when a "
            f"float16 model overflows; calibrate with --dtype float32"
        )
    return a


def _rest(a: Sums) -> Sums:
    """1 − a_j / Σ_k a_k in float64, at least 2⁻²⁰; all 1 if all a_j are 0."""
    largest = a.max(initial=0.0)
    if not largest > 0:
        return np.ones_like(a)
    scaled = a / largest  # so that the sum cannot overflow
    rest: Sums = np.maximum(1.0 - scaled / scaled.sum(), _SMALLEST_REST)
    return rest


def _feature(values: Sums) -> Feature:
    """The values divided by the largest one, as float32; all 1 if all are zero."""
    largest = values.max(initial=0.0)
    if not largest > 0:
        return np.ones(values.shape, np.float32)
    with np.errstate(under="ignore"):
        feature: Feature = (values / largest).astype(np.float32)
    return feature
