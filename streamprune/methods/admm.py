"""ADMM (Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938), and ours.

Minimise (ŵ − w)ᵀ(G + damping)(ŵ − w) over weights ŵ that are zero where a mask says so. In normalised units,
v = w·√G_jj, with A = D⁻¹(G + damping)D⁻¹, D = diag √G_jj, the method alternates, for all rows at once,

    Z = P(V + U)        U ← U + V − Z        V ← (A + ρI)⁻¹ (A V₀ + ρ(Z − U))

from V = V₀, U = 0 on; P puts zeros where the mask does. As (A + ρI)⁻¹A = I − ρ(A + ρI)⁻¹, with X = V + U and
M = ρ(A + ρI)⁻¹ this is one line with one product of matrices, in which G itself does not occur any more:

    X ← X + κ(V₀ − Z + M(2Z − X − V₀))

κ = 1; with κ > 1 it is over-relaxed (Eckstein and Bertsekas 1992): κV + (1 − κ)Z takes the place of V. In iteration t
of the first T the mask is chosen anew, from all weights: what was pruned may come back. It takes the share
1 − (1 − t/T)³ of the weights that are to go, lowest score first. With N:M, the N best of every M are safe and the
others go by their score within the row, until in the end all are gone. Later iterations keep the mask of the Tth. The
last step is the projection P of the last X, as in the published code: no exact solution on the support follows.

    PUBLISHED  score |X|; 20 iterations, T = 15, ρ = 1, κ = 1, damping 0.1
    OBS        ours: score X² / [A⁻¹]_jj, the optimal brain surgeon's saliency (Hassibi and Stork 1993) of what the
               weight is at the moment: one whose work others can do is cheap. 20 iterations, T = 18,
               κ = 1.5, damping δ = 0.05, ρ = 0.55 + δ

What differs from the published code:

    - The schedule is used. Its unstructured pruning, as it is called there, computes s_t and then prunes s at once.
    - Rows are independent: floor(s_t·in) weights go in every row. There, they go wherever in the linear they are least.
    - N:M for any N and M, going by rows; its groups are always of four, two kept, going by the whole linear.
    - A dead feature (G_jj = 0) is pruned first, and where kept it stays as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.methods.inverse import Damping, feature_scale, normalised_inverse
from streamprune.methods.selection import Amount, Pattern, check_pattern, prune_count, select

_DAMPING = Damping(0.1)
_SAFE = 3e38  # a score above all others, and finite


class Variant(NamedTuple):
    """See the file's docstring: T, ρ, κ and the score."""

    iterations: int = 20
    gradual: int = 15
    rho: float = 1.0
    relax: float = 1.0
    saliency: bool = False
    follow: float = 0.0
    """ρ is `rho` + `follow` times the damping: with more damping and the same ρ, masks settle too early."""


PUBLISHED = Variant()
OBS = Variant(gradual=18, rho=0.55, follow=1.0, relax=1.5, saliency=True)


class Operator(NamedTuple):
    """What `solve` needs of a Gram: matrix M (in, in), scale √G_jj and score (in,) float32.

    Ranked is |X|·score, with score 1/√[A⁻¹]_jj or 1: the squares order alike, but those of small numbers vanish.
    X of dead features is 0. `damping` is the value that was used, larger than what was asked for only where the
    factorisation failed with that.
    """

    matrix: Tensor
    scale: Tensor
    score: Tensor
    damping: float


def prepare(
    gram: Tensor, damping: Damping = _DAMPING, variant: Variant = PUBLISHED, products: torch.dtype = torch.float32
) -> Operator:
    """The operator of the Gram matrix (in, in) float32 of a linear's inputs, for any number of `solve`.

    `products` is what solve multiplies in: bfloat16 is as good (the perplexity of a small model moved by 0.2 %, either
    way) and several times as fast where the processor has it.

    Raises UnsupportedError where the Gram matrix is not finite or cannot be factorised, see inverse.py, and ValueError
    unless rho > 0.
    """
    if not variant.rho > 0:
        raise ValueError(f"rho {variant.rho} must be positive")
    scale = feature_scale(gram)
    score, used = torch.ones_like(scale), damping
    if variant.saliency:
        inverse, value = normalised_inverse(gram, damping, 0.0)
        diagonal = inverse.diagonal().clone()
        score, used = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0), damping._replace(value=value)
        del inverse  # before the next one
    rho = variant.rho + variant.follow * used.value
    matrix, value = normalised_inverse(gram, used, rho)
    return Operator(matrix.mul_(rho).to(products), scale, score, value)


def solve(
    weight: Tensor,
    operator: Operator,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    variant: Variant = PUBLISHED,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune rows of one linear to `sparsity` or to `pattern`, exactly one of the two, and refit what stays.

    weight (rows, in) float32, on the device of operator.matrix; it is not changed. Returns the new weight, zero where
    pruned, and keep (rows, in) bool. 0 <= gradual <= iterations; with gradual 0 the weights themselves choose the mask.
    Temporaries: four times the weight. A weight that is not finite makes all that is kept of its row NaN. Raises
    UsageError as select does.
    """
    rows, width = weight.shape
    if weight.dtype != torch.float32 or operator.matrix.shape != (width, width):
        shape = [*operator.matrix.shape]
        raise ValueError(f"{weight.dtype} {[*weight.shape]} is no float32 weight for an operator {shape}")
    if not 0 <= variant.gradual <= variant.iterations:
        raise ValueError(f"gradual {variant.gradual} must be in 0..{variant.iterations}, the number of iterations")
    if (sparsity is None) == (pattern is None):
        raise UsageError("give either a sparsity or a pattern")
    if pattern is not None:
        check_pattern(pattern, width)
    amount = Amount(sparsity, pattern)
    keep = torch.ones((rows, width), dtype=torch.bool, device=weight.device)
    if sparsity is not None and not prune_count(sparsity, width):
        return weight.detach().clone(), keep
    scale, score, kappa = operator.scale, operator.score, variant.relax
    start = weight.detach() * scale
    x = start.clone()
    for t in range(1, variant.iterations + 1):
        if t <= max(1, variant.gradual):
            share = 1 - (1 - t / variant.gradual) ** 3 if variant.gradual else 1.0
            keep = _choose(x, score, share, amount, backend)
        z = x.masked_fill(~keep, 0.0)
        step = (2 * z).sub_(x).sub_(start)
        x.sub_(z, alpha=kappa).add_(start, alpha=kappa).add_(_product(step, operator.matrix), alpha=kappa)
    if not variant.iterations:
        keep = _choose(x, score, 1.0, amount, backend)
    fitted = torch.where(scale > 0, x.div_(scale), weight.detach())
    return fitted.masked_fill_(~keep, 0.0), keep


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in the dtype of b."""
    return a.to(b.dtype) @ b


def _choose(x: Tensor, score: Tensor, share: float, amount: Amount, backend: str | None) -> Tensor:
    """keep (rows, in) bool: the largest |x|·score, at `share` of the final amount. s·1.0 is s exactly."""
    if amount.pattern is None:
        return _keep(x, score, amount.at(share), backend)
    final = _keep(x, score, amount, backend)
    if share == 1.0:
        return final
    ranked = (x * score).abs_().clamp_max_(_SAFE / 2).masked_fill_(final, _SAFE)
    return _keep(ranked, torch.ones_like(score), Amount(share * amount.pattern.sparsity), backend)


def _keep(x: Tensor, feature: Tensor, amount: Amount, backend: str | None) -> Tensor:
    keep = select(
        x, feature, 1, selector="exact", want_keep=True, backend=backend, **amount._asdict()
    ).keep  # fmt: skip
    assert keep is not None
    return keep
