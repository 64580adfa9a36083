"""ADMM (Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938).

Minimise (ŵ − w)ᵀ(G + damping)(ŵ − w) over weights ŵ that are zero where a mask says so. In normalised units,
v = w·√G_jj, with A = D⁻¹(G + damping)D⁻¹, D = diag √G_jj, the method alternates, for all rows at once,

    Z = P(V + U)        U ← U + V − Z        V ← (A + ρI)⁻¹ (A V₀ + ρ(Z − U))

from V = V₀, U = 0 on; P puts zeros where the mask does. As (A + ρI)⁻¹A = I − ρ(A + ρI)⁻¹, with X = V + U and
M = ρ(A + ρI)⁻¹ this is one line with one product of matrices, in which G itself does not occur any more:

    X ← X − Z + V₀ + M(2Z − X − V₀)

*Gradual*: in iteration t of the first 15, the mask keeps the largest |X| at the sparsity s_t = s(1 − (1 − t/15)³), each
time chosen anew; later iterations keep the mask of the 15th. The last step is the projection P of the last X = V + U,
as in the published code: no exact solution on the support follows. What differs from that code:

    - The schedule is used. Its unstructured pruning, as it is called there, computes s_t and then prunes s at once.
    - Rows are independent: floor(s_t·in) weights go in every row. There, they go wherever in the linear they are least.
    - N:M for any N and M; its groups are always of four, two kept. In iteration t, n_t = M(1 − s_t) of every M stay,
      rounded and never below N. There, the two best of every four are protected, and of all others the least go.
    - A dead feature (G_jj = 0) is pruned first, and where kept it stays as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.pruning.inverse import Damping, Factor, feature_scale, normalised_inverse
from streamprune.pruning.selection import Pattern, check_pattern, prune_count, select

_DAMPING = Damping(0.1)


def prepare(gram: Tensor, damping: Damping = _DAMPING, rho: float = 1.0) -> Factor:
    """M = ρ(A + ρI)⁻¹, for any number of `solve`; gram (in, in) float32, of a linear's inputs.

    Raises UnsupportedError where the Gram matrix is not finite or cannot be factorised, see inverse.py, and ValueError
    unless rho > 0.
    """
    if not rho > 0:
        raise ValueError(f"rho {rho} must be positive")
    matrix, used = normalised_inverse(gram, damping, rho)
    return Factor(matrix.mul_(rho), used)


def solve(
    weight: Tensor,
    gram: Tensor,
    factor: Factor,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    iterations: int = 20,
    gradual: int = 15,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune rows of one linear to `sparsity` or to `pattern`, exactly one of the two, and refit what stays.

    weight (rows, in) float32, finite, and gram (in, in) float32, of which only the diagonal is read; weight is
    on the device of factor.matrix, and none is changed. Returns the new weight, zero where pruned, and keep (rows, in)
    bool. 0 <= gradual <= iterations; gradual 0 chooses the mask from the weights themselves. Temporaries: about five
    times the weight. Raises UsageError as select does.
    """
    rows, width = weight.shape
    if weight.dtype != torch.float32 or not factor.matrix.shape == gram.shape == (width, width):
        raise ValueError(f"{weight.dtype} {[*weight.shape]} is no float32 weight for a factor {[*factor.matrix.shape]}")
    if not 0 <= gradual <= iterations:
        raise ValueError(f"gradual {gradual} must be in 0..{iterations}, the number of iterations")
    if (sparsity is None) == (pattern is None):
        raise UsageError("give either a sparsity or a pattern")
    if pattern is not None:
        check_pattern(pattern, width)
    keep = torch.ones((rows, width), dtype=torch.bool, device=weight.device)
    if sparsity is not None and not prune_count(sparsity, width):
        return weight.detach().clone(), keep
    scale = feature_scale(gram).to(weight.device)
    start = weight.detach() * scale
    x = start.clone()
    for t in range(1, iterations + 1):
        if t <= max(1, gradual):
            share = 1 - (1 - t / gradual) ** 3 if gradual else 1.0
            keep = _choose(x, share, sparsity, pattern, backend)
        z = x.masked_fill(~keep, 0.0)
        step = (2 * z).sub_(x).sub_(start)
        x.sub_(z).add_(start).addmm_(step, factor.matrix)
    if not iterations:
        keep = _choose(x, 1.0, sparsity, pattern, backend)
    fitted = torch.where(scale > 0, x.div_(scale), weight.detach())
    return fitted.masked_fill_(~keep, 0.0), keep


def _choose(x: Tensor, share: float, sparsity: float | None, pattern: Pattern | None, backend: str | None) -> Tensor:
    """keep (rows, in) bool: the largest |x|, at `share` of the final sparsity. sparsity·1.0 is sparsity, bit by bit."""
    if pattern is not None:
        n = max(pattern.n, math.floor(pattern.m * (1 - share * pattern.sparsity) + 0.5))
        if n >= pattern.m:
            return torch.ones(x.shape, dtype=torch.bool, device=x.device)
        pattern = pattern._replace(n=n)
    else:
        assert sparsity is not None
        sparsity = sparsity * share
    ones = torch.ones(x.shape[1], device=x.device)
    keep = select(
        x, ones, 1, selector="exact", sparsity=sparsity, pattern=pattern, want_keep=True, backend=backend
    ).keep
    assert keep is not None
    return keep
