"""ADMM (Boža, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv 2401.02938), and ours.

Minimise (ŵ − w)ᵀ(G + damping)(ŵ − w) over weights ŵ that are zero where a mask says so. In normalised units,
v = w·√G_jj, with A = D⁻¹(G + damping)D⁻¹, D = diag √G_jj, the method alternates, for all rows at once,

    Z = P(V + U)        U ← U + V − Z        V ← (A + ρI)⁻¹ (A V₀ + ρ(Z − U))

starting from V = V₀, U = 0, where P sets the weights that the mask prunes to zero. Since (A + ρI)⁻¹A = I − ρ(A + ρI)⁻¹,
with X = V + U and M = ρ(A + ρI)⁻¹ an iteration is a single update with one matrix product, without G itself:

    X ← X + κ(V₀ − Z + M(2Z − X − V₀))

with κ = 1. With κ > 1 the iteration is over-relaxed (Eckstein and Bertsekas 1992): κV + (1 − κ)Z replaces V. In each of
the first T iterations a new mask is chosen from all weights, so that a pruned weight may come back; iteration t prunes
the fraction 1 − (1 − t/T)³ of the final number of weights, lowest score first. With N:M, the N highest scores of every
M are never pruned, and the others are pruned by their score within the row, until all of them are. Later iterations
keep the mask of iteration T. The last step is the projection P of the last X, as in the published code; no exact
solution on the support follows.

    PUBLISHED  score |X|; 20 iterations, T = 15, ρ = 1, κ = 1, damping 0.1
    OBS        ours: score X² / [A⁻¹]_jj, the optimal brain surgeon's saliency (Hassibi and Stork 1993) of the current
               weight: low for a weight that other weights can compensate. 20 iterations, T = 18, κ = 1.5,
               damping δ = 0.05, ρ = 0.55 + δ

On the CPU an iteration is one product and one compiled loop (kernels/cpu_alternate.py); elsewhere, and for rows that
are not whole lanes, it is a product and some ten operations on arrays. In float32 both choose the same masks up to
rounding.

What differs from the published code:

    - The schedule is applied. The published code computes s_t for unstructured pruning, but prunes s at once.
    - Rows are independent: floor(s_t·in) weights are pruned in every row, not the lowest scores of the whole linear.
    - Any N:M, by row. The published code has 2:4 only, by the whole linear.
    - The weights of dead features (G_jj = 0) are pruned first, and left unchanged where they are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.methods.inverse import Damping, Factor, feature_scale, inverse_diagonal, normalised_inverse
from streamprune.methods.selection import Amount, Pattern, check_pattern, prune_count, select
from streamprune.process.ranks import ALONE, Ranks

_DAMPING = Damping(0.1)
_LANES = 16  # compiled loops take rows of whole lanes
_SAFE = 3e38  # a finite score above all others: never pruned


class Variant(NamedTuple):
    """`iterations`, `gradual` (T), `rho` (ρ), `relax` (κ); `saliency`: score X² / [A⁻¹]_jj, else |X|. See the top."""

    iterations: int = 20
    gradual: int = 15
    rho: float = 1.0
    relax: float = 1.0
    saliency: bool = False
    follow: float = 0.0
    """ρ is `rho` + `follow` × damping: with stronger damping and the same ρ, masks would settle too early."""


PUBLISHED = Variant()
OBS = Variant(gradual=18, rho=0.55, follow=1.0, relax=1.5, saliency=True)


class Operator(NamedTuple):
    """What `solve` needs of a Gram matrix: matrix M (in, in), scale √G_jj and score, both (in,) float32.

    Weights are ranked by |X|·score, with score 1/√[A⁻¹]_jj or 1; squares would rank them alike, but underflow. X of
    dead features is 0. `damping` is the value that was used, larger than requested only where the factorisation failed
    with the requested one.
    """

    matrix: Tensor
    scale: Tensor
    score: Tensor
    damping: float


def prepare(
    gram: Tensor, damping: Damping = _DAMPING, variant: Variant = PUBLISHED, products: torch.dtype = torch.float32,
    diagonal: Factor | None = None, ranks: Ranks = ALONE,
) -> Operator:  # fmt: skip
    """The operator for the Gram matrix (in, in) float32 of a linear's inputs; serves any number of calls of `solve`.

    `products` is the dtype of solve's matrix products: bfloat16 is as good (the perplexity of a small model changed by
    0.2 %, in either direction), and several times as fast on processors with bf16 arithmetic. `diagonal` is what
    inverse_diagonal(gram, damping) gives, if it is known. All `ranks` must call this together.

    Raises UnsupportedError where the Gram matrix is not finite or cannot be factorised, see inverse.py, and ValueError
    unless rho > 0.
    """
    if not variant.rho > 0:
        raise ValueError(f"rho {variant.rho} must be positive")
    scale = feature_scale(gram)
    score, used, known = torch.ones_like(scale), damping, None
    if variant.saliency:
        if diagonal is None and ranks.size == 2:
            (inverse, value), known = _one_each(gram, damping, variant, products, ranks)
        else:
            inverse, value = diagonal or inverse_diagonal(gram, damping, ranks)
        score, used = torch.where(inverse > 0, inverse.rsqrt(), 0.0), damping._replace(value=value)
    matrix, value = known or _iterated(gram, used, variant, products, ranks)
    return Operator(matrix, scale, score, value)


def _iterated(gram: Tensor, damping: Damping, variant: Variant, products: torch.dtype, ranks: Ranks) -> Factor:
    """M, and the damping used."""
    rho = variant.rho + variant.follow * damping.value
    matrix, value = normalised_inverse(gram, damping, rho, ranks)
    return Factor(matrix.mul_(rho).to(products), value)


def _one_each(
    gram: Tensor, damping: Damping, variant: Variant, products: torch.dtype, ranks: Ranks
) -> tuple[Factor, Factor | None]:
    """inverse_diagonal on the first of two ranks, and M on the second one at the same time: (both, on both).

    Beside sharing each of them, a third of the bytes is sent, and what ranks cannot share is done once. M is None
    where the diagonal needed another damping.
    """
    diagonal, made = gram.new_empty(len(gram)), gram.new_empty(gram.shape, dtype=products) if not ranks.rank else None
    if made is None:
        made, value = _iterated(gram, damping, variant, products, ALONE)
    else:
        diagonal, value = inverse_diagonal(gram, damping, ALONE)
    first, second = ranks.gather(value)
    ranks.broadcast_(diagonal, 0)
    if first != damping.value:
        return Factor(diagonal, first), None
    ranks.broadcast_(made.view(torch.uint8), 1)
    return Factor(diagonal, first), Factor(made, second)


def solve(
    weight: Tensor,
    operator: Operator,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    variant: Variant = PUBLISHED,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Prunes rows of one linear to `sparsity` or to `pattern`, exactly one of the two, and refits the kept weights.

    weight (rows, in) float32, on the device of operator.matrix; it is not changed. Returns the new weight, zero where
    pruned, and keep (rows, in) bool. 0 <= gradual <= iterations; with gradual 0 the original weights determine the
    mask. Temporaries: four times the weight. A weight that is not finite makes all kept weights of its row NaN. Raises
    UsageError as `select` does, and ValueError for other dtypes or shapes.
    """
    rows, width = weight.shape
    if weight.dtype != torch.float32 or operator.matrix.shape != (width, width):
        shape = [*operator.matrix.shape]
        raise ValueError(f"expected a float32 weight for an operator {shape}, not {weight.dtype} {[*weight.shape]}")
    if not 0 <= variant.gradual <= variant.iterations:
        raise ValueError(f"gradual {variant.gradual} must be in 0..{variant.iterations}, the number of iterations")
    if (sparsity is None) == (pattern is None):
        raise UsageError("give either a sparsity or a pattern")
    if pattern is not None:
        check_pattern(pattern, width)
    amount = Amount(sparsity, pattern)
    if sparsity is not None and not prune_count(sparsity, width):
        return weight.detach().clone(), torch.ones((rows, width), dtype=torch.bool, device=weight.device)
    start = weight.detach() * operator.scale
    if backend != "torch" and weight.device.type == "cpu" and width % _LANES == 0 and variant.iterations:
        x, keep = _alternate_compiled(start, operator, amount, variant)
    else:
        x, keep = _alternate(start, operator, amount, variant, backend)
    fitted = torch.where(operator.scale > 0, x.div_(operator.scale), weight.detach())
    return fitted.masked_fill_(~keep, 0.0), keep


def _shares(variant: Variant) -> list[float | None]:
    """For each iteration the share of the final amount that its mask prunes, None if the mask stays."""
    chosen = max(1, variant.gradual)
    shares = [1 - (1 - t / variant.gradual) ** 3 if variant.gradual else 1.0 for t in range(1, chosen + 1)]
    return [*shares, *[None] * (variant.iterations - chosen)]


def _alternate(
    start: Tensor, operator: Operator, amount: Amount, variant: Variant, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(X, mask) after all iterations."""
    kappa, x = variant.relax, start.clone()
    keep = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    for share in _shares(variant)[: variant.iterations]:
        if share is not None:
            keep = _choose(x, operator.score, share, amount, backend)
        z = x.masked_fill(~keep, 0.0)
        step = (2 * z).sub_(x).sub_(start)
        x.sub_(z, alpha=kappa).add_(start, alpha=kappa).add_(_product(step, operator.matrix), alpha=kappa)
    if not variant.iterations:
        keep = _choose(x, operator.score, 1.0, amount, backend)
    return x, keep


def _alternate_compiled(start: Tensor, operator: Operator, amount: Amount, variant: Variant) -> tuple[Tensor, Tensor]:
    """The same by compiled loops, on the CPU."""
    from streamprune.kernels.cpu import Alternation

    work, width = Alternation(start, operator.score, variant.relax, operator.matrix.dtype), start.shape[1]
    product: Tensor | None = None
    for share in _shares(variant):
        count = -1
        if share is not None:  # of a pattern, the share is a float: 1 - 4/5 of 80 would be 15
            count = amount.count(width) if share == 1.0 else prune_count(share * amount.share, width)
        product = work.step(product, count, *(amount.pattern or ())) @ operator.matrix
    assert product is not None
    return work.end(product), work.keep


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, computed in the dtype of b."""
    return a.to(b.dtype) @ b


def _choose(x: Tensor, score: Tensor, share: float, amount: Amount, backend: str | None) -> Tensor:
    """keep (rows, in) bool: the weights of largest |x|·score, at `share` (0 to 1) of the final amount."""
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
