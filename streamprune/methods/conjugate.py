"""Refits by conjugate gradients: new values for the weights that stay, so that the outputs change least.

With G = XᵀX of the input, D = diag(G) and damping δ, every row w solves on its support

    min over ŵ   (w − ŵ)ᵀ A (w − ŵ)        A = G + δ D     (relative)   or   G + δ mean(D) I     (absolute)

by conjugate gradients preconditioned with diag(A): one product with G an iteration for all rows at once, no inverse
and no factorisation. Every iteration takes the error down, from wherever it starts. Relative damping leaves the result
as it is when features are scaled (G_jk c_j c_k, w_j / c_j); absolute damping, SparseGPT's and GPTQ's, does not.
Rows are independent. Everything is float32, sums over a row float64 where they decide.
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
    """A = G + diag(extra). extra, inverse (in,) float32; inverse is 1 / diag(A), and 0 for inputs (almost) always 0."""

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
    """`iterations` of conjugate gradients from `start`, on the support `keep`.

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
    """Prunes in `steps`, a little more each time, and refits in between: s_t = s (1 − (1 − t/steps)³).

    weight (n, in) float32; `select(weight, share)` is a bool (n, in) of what stays when `share` of the final sparsity
    is reached, chosen by the weights as they are now. `iterations` of descend after each step, `last` after the last.
    Returns (n, in) float32. The schedule is Zhu and Gupta's (arXiv 1710.01878).
    """
    fitted = weight
    for t in range(1, steps + 1):
        keep = select(fitted, 1 - (1 - t / steps) ** 3)
        fitted = descend(weight, torch.where(keep, fitted, 0.0), keep, metric, iterations if t < steps else last)
    return fitted


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row, (n,) float32."""
    found: Tensor = torch.linalg.vecdot(a, b)
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where a row has arrived: what is left of its residual is below what float32 can square."""
    return torch.where(below >= _TINY, above / below, 0.0)
