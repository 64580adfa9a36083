"""How much each linear gives to a sparsity that is asked of all of them together.

    uniform  all the same
    owl      by layer: the more outliers a layer's weights have, the less of it is pruned (OWL, arXiv 2310.05175)
    error    by layer: the sum over layers of what pruning does to the residual stream is smallest (ours). Foretold
             as the relative errors of the layer's linears (the share of w²a that goes) times the part of the stream
             that the layer makes, the mean over tokens of ‖h_out − h_in‖² / ‖h_out‖². Of sums over tokens instead of
             each token's own part, a few massive activations would own both, and it would do harm.

A row of a linear still prunes the same number of weights as every other. Patterns N:M fix the sparsity of each linear,
so there is nothing to allocate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

OUTLIER = 5.0
"""A weight whose score |w| √a is this many times the layer's mean is an outlier. OWL's M, 5 for LLaMA."""

SPREAD = 0.08
"""Half of how far apart the sparsities of two layers may be. OWL's λ."""

REACH = 0.2
"""How far from the asked sparsity a linear may be, of `by_error`: at 60 % and more."""

LITTLE = 0.4
"""Below 60 %, it may be as far as the asked sparsity is from this, 0.05 at least: where little is lost, errors foretell
little."""

STEPS = 9
"""Sparsities at which the error of a linear is looked at."""

LOOKS = {"owl": 2, "error": STEPS}
"""How often each way of sharing out goes through the weights of a linear."""


@dataclass(frozen=True)
class Curve:
    """What pruning a linear of `size` weights costs: `errors[i]` is the relative error at `levels[i]`, both rising."""

    size: int
    levels: Sequence[float]
    errors: Sequence[float]


def levels_around(sparsity: float) -> list[float]:
    """STEPS sparsities from as far below the asked one as REACH and LITTLE allow to as far above, within 0 and 0.98."""
    reach = min(REACH, max(0.05, sparsity - LITTLE))
    low, high = max(0.0, sparsity - reach), min(max(0.98, sparsity), sparsity + reach)
    return [low + (high - low) * i / (STEPS - 1) for i in range(STEPS)]


def least_share(kind: str, sparsity: float) -> float:
    """The lowest sparsity of a layer that sharing out `sparsity` can come to; `kind` is "owl" or "error"."""
    return levels_around(sparsity)[0] if kind == "error" else max(0.0, sparsity - 2 * SPREAD)


def owl(outliers: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The sparsity of each layer from its share of outliers; `sizes` are their weights.

    Shares are scaled to a range of 2·SPREAD, their mean (by weights) goes to the asked sparsity, as the published code
    does it for layers of one size. What would leave [0, 1) is held there and the rest makes up for it.
    """
    low, high = min(outliers), max(outliers)
    scaled = [2 * SPREAD * (share - low) / (high - low) if high > low else 0.0 for share in outliers]
    return _balanced(sizes, sparsity, [-value for value in scaled])


def by_error(curves: Mapping[str, Curve], sparsity: float) -> dict[str, float]:
    """The sparsity of each linear at which the sum of relative errors is smallest, for the asked share of all weights.

    Each curve is replaced by its lower convex hull; then linears give up, a piece at a time, whatever costs least error
    for a weight, until enough are pruned (the greedy solution of a sum of convex functions under one linear constraint
    is the best one). Pieces that cost the same give up the same part. Every linear's error counts alike, so of two with
    the same curve the larger one gives more. Raises ValueError where the levels do not reach the asked sparsity.
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
    """The lower convex hull of points in rising order of x."""
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
    """sparsity + offset + a common shift, held within [0, 0.98] or the asked one, with the asked mean by weights."""
    most, total = max(0.98, sparsity), sum(sizes)
    low, high = -2.0, 2.0
    for _ in range(60):
        shift = (low + high) / 2
        mean = sum(n * min(most, max(0.0, sparsity + o + shift)) for n, o in zip(sizes, offsets, strict=True)) / total
        low, high = (shift, high) if mean < sparsity else (low, shift)
    return [_settled(min(most, max(0.0, sparsity + o + (low + high) / 2)), sparsity) for o in offsets]


def _settled(value: float, sparsity: float) -> float:
    """The asked sparsity where only rounding is in between: 0.7 of 10 weights are 7, 0.6999999999999999 of them 6."""
    return sparsity if abs(value - sparsity) < 1e-12 else value
