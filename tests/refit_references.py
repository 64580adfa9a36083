"""Slow float64 references of the refits that need an inverse, written from the papers' formulas and not from the code.

Weights are (rows, in), Gram matrices (in, in), both numpy float64. Nothing is normalised, blocked or rearranged here.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from references import Bools, Floats, lowest, lowest_of_groups


def error(weight: Floats, fitted: Floats, gram: Floats) -> float:
    """Σ over rows of (w − ŵ)ᵀ G (w − ŵ)."""
    change = weight - fitted
    return float(np.einsum("ri,ij,rj->", change, gram, change))


def damped(gram: Floats, damping: float, relative: bool) -> Floats:
    """G + damping·diag G or G + damping·mean(diag G)·I; dead features are decoupled, with 1 on the diagonal."""
    power = np.diag(gram)
    result = gram + np.diag(damping * (power if relative else np.full_like(power, power.mean())))
    for dead in np.flatnonzero(power == 0):
        result[dead, :] = result[:, dead] = 0
        result[dead, dead] = 1
    return result


def floor(sparsity: float, width: int) -> int:
    return math.floor(Fraction(repr(sparsity)) * width)


def sparsegpt(
    weight: Floats,
    gram: Floats,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    relative: bool = True,
    block: int = 128,
) -> tuple[Floats, Bools]:
    """Optimal brain surgeon, column after column: for each, the inverse over the columns that are not yet fixed.

    arXiv 2301.00774, eq. 3 with F = {j, j + 1, …}: δ = −w_j / [H_F⁻¹]_jj · [H_F⁻¹]_:j, saliency w_j² / [H_F⁻¹]_jj. No
    Cholesky factor is taken.
    """
    h, w = damped(gram, damping, relative), weight.copy()
    width = w.shape[1]
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(width)]
    saliency = np.array([inverse[0, 0] for inverse in inverses])
    live = np.diag(gram) > 0
    saliency[~live] = np.inf
    keep = np.ones(w.shape, bool)
    step = pattern[1] if pattern else block
    for begin in range(0, width, step):
        end = min(begin + step, width)
        score = w[:, begin:end] ** 2 / saliency[begin:end]
        if pattern:
            pruned = lowest_of_groups(score, *pattern)
        else:
            assert sparsity is not None
            pruned = lowest(score, floor(sparsity, end) - floor(sparsity, begin))
        keep[:, begin:end] = ~pruned
        for j in range(begin, end):
            gone = ~keep[:, j]
            w[gone, j:] -= np.outer(w[gone, j], inverses[j][0] / inverses[j][0, 0])
            w[gone, j] = 0
    return w, keep


def admm(
    weight: Floats,
    gram: Floats,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.1,
    rho: float = 1.0,
    follow: float = 0.0,
    iterations: int = 20,
    gradual: int = 15,
    relax: float = 1.0,
    saliency: bool = False,
) -> tuple[Floats, Bools]:
    """arXiv 2401.02938 with its three variables: V, its copy Z with zeros, the scaled dual U; dead features apart.

    Over-relaxed as in Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 3.4.3: relax·V +
    (1 - relax)·Z takes the place of V, with the Z of the round before. Of N:M, see `admm_mask`.
    """
    rho += follow * damping
    live = np.diag(gram) > 0
    scale = np.where(live, np.sqrt(np.diag(gram)), 1)
    a = damped(gram, damping, True) / np.outer(scale, scale)
    cost = np.diag(np.linalg.inv(a)) if saliency else np.ones(len(a))
    start = np.where(live, weight * scale, 0)
    v, u = start.copy(), np.zeros_like(start)
    keep = np.ones(start.shape, bool)
    for t in range(iterations + 1):
        if t < iterations and t < gradual:
            keep = admm_mask((v + u) ** 2 / cost, 1 - (1 - (t + 1) / gradual) ** 3, sparsity, pattern)
        z = (v + u) * keep
        if t == iterations:
            return np.where(live, z / scale, weight * keep), keep
        u = u + v - z
        v = np.linalg.solve(a + rho * np.eye(len(a)), a @ start.T + rho * (z - u).T).T
        v = relax * v + (1 - relax) * z
    raise AssertionError("the last round returns")


def admm_mask(score: Floats, share: float, sparsity: float | None, pattern: tuple[int, int] | None) -> Bools:
    """True where kept at `share` of the sparsity. Of N:M, the N best of every M never go, whatever others there are."""
    width = score.shape[1]
    if pattern is None:
        assert sparsity is not None
        return ~lowest(score, floor(sparsity * share, width))
    n, m = pattern
    others = lowest_of_groups(score, n, m)
    return ~lowest(np.where(others, score, np.inf), floor((1 - n / m) * share, width))
