"""Scores: the estimated cost of removing a weight, L_ij = |w_ij|**power * feature_j.

A score is represented by the pair (feature, power): feature (in_features,) float32 on the CPU, power 1 or 2. The
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

import torch
from torch import Tensor

from streamprune.errors import UnsupportedError
from streamprune.methods.stats import InputStats

_SMALLEST_REST = 2.0**-20


def lscore(stats: InputStats) -> tuple[Tensor, int]:
    """L = w² a_j / (1 − a_j / Σ_k a_k)."""
    a = _power(stats)
    return _feature(a / _rest(a)), 2


def lscore_isotropic(stats: InputStats) -> tuple[Tensor, int]:
    """L = w² / (1 − a_j / Σ_k a_k), SwiftPrune as published."""
    return _feature(1.0 / _rest(_power(stats))), 2


def wanda(stats: InputStats) -> tuple[Tensor, int]:
    """L = |w| √a_j."""
    return _feature(_power(stats).sqrt()), 1


def magnitude(stats: InputStats) -> tuple[Tensor, int]:
    """L = |w|; uses only stats.in_features, so InputStats.zeros(in_features) is enough."""
    return torch.ones(stats.in_features), 1


SCORES: dict[str, Callable[[InputStats], tuple[Tensor, int]]] = {
    "lscore": lscore,
    "lscore-isotropic": lscore_isotropic,
    "wanda": wanda,
    "magnitude": magnitude,
}
WITHOUT_STATISTICS = frozenset({"magnitude"})


def _power(stats: InputStats) -> Tensor:
    """a_j, (in_features,) float64; raises UnsupportedError where activations were NaN or Inf."""
    a = stats.mean_square
    if not bool(torch.isfinite(a).all()):
        bad = int((~torch.isfinite(a)).to(torch.uint8).argmax())
        raise UnsupportedError(
            f"activations are not finite: input feature {bad} was NaN or Inf during calibration, as happens when a "
            f"float16 model overflows; calibrate with --dtype float32"
        )
    return a


def _rest(a: Tensor) -> Tensor:
    """1 − a_j / Σ_k a_k in float64, at least 2⁻²⁰; all 1 if all a_j are 0."""
    largest = a.max() if a.numel() else a.sum()
    if not bool(largest > 0):
        return torch.ones_like(a)
    scaled = a / largest  # so that the sum cannot overflow
    return (1.0 - scaled / scaled.sum()).clamp_min(_SMALLEST_REST)


def _feature(values: Tensor) -> Tensor:
    """The values divided by the largest one, as float32; all 1 if all are zero."""
    largest = values.max() if values.numel() else values.sum()
    if not bool(largest > 0):
        return torch.ones(values.shape, dtype=torch.float32)
    return (values / largest).to(torch.float32)
