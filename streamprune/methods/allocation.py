"""Allocation: the sparsity of each linear, for a given sparsity of all linears together.

    uniform  the same for all
    owl      by layer: the more outliers a layer's weights have, the less it is pruned (OWL, arXiv 2310.05175)
    error    by layer: minimises the sum over layers of the estimated damage to the residual stream (ours). The estimate
             for a layer is the relative error of its linears (the share of w²a that is pruned) times the layer's
             contribution to the stream, the mean over tokens of ‖h_out − h_in‖² / ‖h_out‖². A ratio of sums over tokens
             would be dominated by a few massive activations, and allocate badly.

All rows of a linear still prune the same number of weights. Patterns N:M fix the sparsity of every linear, so that
there is nothing to allocate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

OUTLIER = 5.0
"""A weight whose score |w| √a exceeds the layer's mean by this factor is an outlier. OWL's M, 5 for LLaMA."""

SPREAD = 0.08
"""Half of the range of the layers' sparsities. OWL's λ."""

REACH = 0.2
"""`by_error`: largest deviation of a linear's sparsity from the requested one, if that is 0.6 or more."""

LITTLE = 0.4
"""`by_error`: below 0.6 the largest deviation is the requested sparsity minus this, at least 0.05: where little is
pruned, the estimated errors predict little."""

STEPS = 9
"""Number of sparsities at which the error of a linear is evaluated."""

LOOKS = {"owl": 2, "error": STEPS}
"""How many passes over the weights of a linear each kind of allocation makes."""


@dataclass(frozen=True)
class Curve:
    """The relative error `errors[i]` of a linear of `size` weights at the sparsity `levels[i]`; both are increasing."""

    size: int
    levels: Sequence[float]
    errors: Sequence[float]


def levels_around(sparsity: float) -> list[float]:
    """STEPS sparsities, evenly spaced over the range that REACH and LITTLE allow, within 0 and 0.98."""
    reach = min(REACH, max(0.05, sparsity - LITTLE))
    low, high = max(0.0, sparsity - reach), min(max(0.98, sparsity), sparsity + reach)
    return [low + (high - low) * i / (STEPS - 1) for i in range(STEPS)]


def least_share(kind: str, sparsity: float) -> float:
    """The lowest sparsity that a layer can get when `sparsity` is allocated; `kind` is "owl" or "error"."""
    return levels_around(sparsity)[0] if kind == "error" else max(0.0, sparsity - 2 * SPREAD)


def owl(outliers: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The sparsity of each layer from its share of outliers, 0 to 1; `sizes` are the layers' numbers of weights.

    Shares are scaled to a range of 2·SPREAD and shifted so that the mean sparsity, weighted by size, is the requested
    one; the published code does so for layers of equal size. Sparsities are clamped to [0, 0.98], and the others
    shifted to compensate.
    """
    low, high = min(outliers), max(outliers)
    scaled = [2 * SPREAD * (share - low) / (high - low) if high > low else 0.0 for share in outliers]
    return _balanced(sizes, sparsity, [-value for value in scaled])


def by_error(curves: Mapping[str, Curve], sparsity: float) -> dict[str, float]:
    """The sparsity of each linear that minimises the sum of relative errors, for a `sparsity` of all weights together.

    Each curve is replaced by its lower convex hull. Then segments of the hulls are taken in order of their error per
    weight until enough weights are pruned; for a sum of convex functions under one linear constraint this greedy
    solution is optimal. Segments of equal cost are used to the same fraction. All linears' errors count the same, so
    that of two linears with the same curve the larger one is pruned more. Raises ValueError if the levels do not reach
    the requested sparsity.
    """
    pieces: list[tuple[float, str, float]] = []
    found: dict[str, float] = {}
    for name, curve in curves.items():
        hull = _hull(list(zip(curve.levels, curve.errors, strict=True)))
        found[name] = hull[0][0]
        for (x0, y0), (x1, y1) in pairwise(hull):
            pieces.append(((y1 - y0) / ((x1 - x0) * curve.size), name, x1 - x0))
    total = sum(curve.size for curve in curves.values())
    left = sparsity * total - sum(found[name] * curve.size for name, curve in curves.items())
    for _, tied in groupby(sorted(pieces), key=lambda piece: piece[0]):
        alike = list(tied)
        weights = sum(width * curves[name].size for _, name, width in alike)
        part = min(1.0, max(0.0, left / weights))
        for _, name, width in alike:
            found[name] += part * width
        left -= part * weights
    if abs(left) > 1e-9 * total:
        raise ValueError(f"levels of the curves do not reach a sparsity of {sparsity} of all linears together")
    return {name: _settled(min(value, curves[name].levels[-1]), sparsity) for name, value in found.items()}


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points in increasing order of x."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        if not hull or x > hull[-1][0]:
            hull.append((x, y))
    return hull


def _balanced(sizes: Sequence[int], sparsity: float, offsets: Sequence[float]) -> list[float]:
    """sparsity + offset + a common shift, clamped to [0, max(0.98, sparsity)], with the size-weighted mean
    `sparsity`."""
    most, total = max(0.98, sparsity), sum(sizes)
    low, high = -2.0, 2.0
    for _ in range(60):
        shift = (low + high) / 2
        mean = sum(n * min(most, max(0.0, sparsity + o + shift)) for n, o in zip(sizes, offsets, strict=True)) / total
        low, high = (shift, high) if mean < sparsity else (low, shift)
    return [_settled(min(most, max(0.0, sparsity + o + (low + high) / 2)), sparsity) for o in offsets]


def _settled(value: float, sparsity: float) -> float:
    """`sparsity` where `value` differs from it only by rounding: 0.7 of 10 weights are 7, 0.6999999999999999 are 6."""
    return sparsity if abs(value - sparsity) < 1e-12 else value
