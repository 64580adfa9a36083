"""Refits by conjugate gradients: new values for the kept weights, so that the outputs change as little as possible.

With the Gram matrix G = XᵀX of the inputs, D = diag(G) and damping δ, every row w is replaced by the solution, on the
support that its mask allows, of

    min over ŵ   (w − ŵ)ᵀ A (w − ŵ)        A = G + δ D     (relative)   or   G + δ mean(D) I     (absolute)

by conjugate gradients preconditioned with diag(A). An iteration is one product with G for all rows at once; no inverse
or factorisation is needed, and every iteration decreases the error, whatever the start. With relative damping the
result is equivariant under a rescaling of features (G_jk c_j c_k, w_j / c_j); with absolute damping, as in SparseGPT
and GPTQ, it is not. Rows are independent. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping

_TINY = torch.finfo(torch.float32).tiny


class Metric(NamedTuple):
    """A = G + diag(extra). `inverse` is 1 / diag(A), or 0 where that is below the smallest normal float32.

    extra, inverse (in,) float32, on the refit's device.
    """

    gram: Gram
    extra: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, gram: Gram, damping: Damping) -> Metric:
        """The damped metric of a Gram."""
        d = gram.diagonal
        extra = damping.value * (d if damping.relative else d.mean().expand_as(d))
        whole = d + extra
        return cls(gram, extra, torch.where(whole >= _TINY, 1 / whole, 0.0))

    def times(self, rows: Tensor) -> Tensor:
        """rows (n, in) · A."""
        return torch.addcmul(self.gram.times(rows), rows, self.extra)


def descend(weight: Tensor, start: Tensor, keep: Tensor, metric: Metric, iterations: int) -> Tensor:
    """Runs `iterations` of conjugate gradients from `start`, on the support `keep`.

    weight, start (n, in) float32, start zero outside of keep; keep (n, in) bool. Returns (n, in) float32.
    """
    fitted = start.clone()
    residual = metric.times(weight - fitted).mul_(keep)
    step = residual * metric.inverse
    along = step.clone()
    power = _dot(residual, step)
    for i in range(iterations):
        image = metric.times(along)
        length = _ratio(power, _dot(along, image))[:, None]
        fitted.addcmul_(along, length)
        if i + 1 == iterations:
            break
        residual.addcmul_(image.mul_(keep), length, value=-1)
        torch.mul(residual, metric.inverse, out=step)
        before, power = power, _dot(residual, step)
        along.mul_(_ratio(power, before)[:, None]).add_(step)
    return fitted


def gradually(
    weight: Tensor, select: Callable[[Tensor, float], Tensor], metric: Metric, *,
    steps: int, iterations: int, last: int,
) -> Tensor:  # fmt: skip
    """Gradual pruning: prunes in `steps` to a rising sparsity s_t = s (1 − (1 − t/steps)³), and refits after each step.

    weight (n, in) float32; `select(weight, share)` returns a mask (n, in) bool of the weights to keep at `share` of the
    final sparsity, chosen from the current weights. `iterations` of `descend` follow each step, `last` the last one.
    Returns (n, in) float32. The schedule is Zhu and Gupta's (arXiv 1710.01878).
    """
    fitted = weight
    for t in range(1, steps + 1):
        keep = select(fitted, 1 - (1 - t / steps) ** 3)
        fitted = descend(weight, torch.where(keep, fitted, 0.0), keep, metric, iterations if t < steps else last)
    return fitted


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot products of corresponding rows, (n,) float32."""
    found: Tensor = torch.linalg.vecdot(a, b)
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, or 0 for converged rows, whose residual is too small to be squared in float32."""
    return torch.where(below >= _TINY, above / below, 0.0)
