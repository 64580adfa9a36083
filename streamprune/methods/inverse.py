"""Inverses of damped Gram matrices: what SparseGPT and ADMM need of a linear's inputs.

G = XᵀX / T, (in, in) float32, symmetric, on any device. What is factorised is A = G + damping + ridge·diag G, where

    Damping(v)                  adds v·diag G: in proportion to the power of each feature
    Damping(v, relative=False)  adds v·mean(diag G)·I, as SparseGPT and GPTQ do

Always in normalised units, N = A / (s sᵀ) with s = √diag A: N has a unit diagonal, so no feature is too small or too
large to be seen next to the others, and features multiplied by powers of two give N bit by bit. A relative damping
makes the whole factor equivariant under such a change of scales; an absolute one does not.

A feature with G_jj = 0 is dead: nothing of it was seen. It is taken out of the matrix, and row and column j of what is
returned are 0. Where all are dead, all count alike: G is read as I.

Float32 resolves a pivot of N only to about ε√in. A Cholesky pivot not above a few of that is a failed factorisation,
whatever sign it has; then the damping is multiplied by 10 and all is tried again. Factor.damping is the value that was
used, so the caller can report it. Temporaries: twice the Gram matrix, the result included.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UnsupportedError

_TRIES = 8
_SMALLEST = 1e-6  # damping after a failure without any
_LEAF = 256  # width of triangles that are inverted at once
_EPSILON = torch.finfo(torch.float32).eps


class Damping(NamedTuple):
    """What is added to the diagonal of G: value·G_jj, or value·mean(diag G) where it is not relative."""

    value: float
    relative: bool = True


class Factor(NamedTuple):
    """A factorisation: `matrix` (in, in) float32, and the value of the damping that it really has.

    `damping` is larger than what was asked for only where the factorisation failed with that.
    """

    matrix: Tensor
    damping: float


def feature_scale(gram: Tensor) -> Tensor:
    """√G_jj, (in,) float32: 0 where a feature is dead, 1 everywhere where all are."""
    diagonal = gram.detach().diagonal().float()
    return torch.where((diagonal > 0).any(), diagonal, torch.ones_like(diagonal)).sqrt()


def upper_factor(gram: Tensor, damping: Damping) -> Factor:
    """U, upper triangular (in, in), with (G + damping)⁻¹ = UᵀU; rows and columns of dead features are 0.

    SparseGPT (arXiv 2301.00774) inverts, then takes the Cholesky factor of the inverse. Here the matrix with its
    features in reverse order is factorised, A = R Rᵀ with R upper triangular, and U = R⁻¹: the same U, a third of
    the arithmetic, and no rounding of an inverse in between. Raises UnsupportedError, see _cholesky.
    """
    lower, reciprocal, used = _cholesky(gram, damping, 0.0, reverse=True)
    _invert_lower(lower)
    return Factor(lower.flip(0, 1).mul_(reciprocal), used)


def normalised_inverse(gram: Tensor, damping: Damping, ridge: float) -> Factor:
    """(D⁻¹ (G + damping) D⁻¹ + ridge·I)⁻¹ with D = diag feature_scale(gram), symmetric (in, in).

    Rows and columns of dead features are 0. Raises UnsupportedError, see _cholesky.
    """
    lower, reciprocal, used = _cholesky(gram, damping, ridge, reverse=False)
    scale = feature_scale(gram) * reciprocal
    return Factor(torch.cholesky_inverse(lower).mul_(scale).mul_(scale[:, None]), used)


def _cholesky(gram: Tensor, damping: Damping, ridge: float, reverse: bool) -> tuple[Tensor, Tensor, float]:
    """L with L Lᵀ = N, features in reverse order if asked for; 1/s (in,), 0 for dead features; the damping used.

    Raises UnsupportedError where the Gram matrix is not finite, and where no damping up to 10⁷ times the one asked for
    makes it positive definite: then it is no Gram matrix.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != torch.float32:
        raise ValueError(f"gram must be square float32, not {gram.dtype} {[*gram.shape]}")
    if not (0 <= damping.value < math.inf and 0 <= ridge < math.inf):
        raise ValueError(f"damping {damping.value} and ridge {ridge} must be finite and not negative")
    _check_finite(gram)
    value, tolerance = damping.value, 4 * _EPSILON * math.sqrt(max(1, len(gram)))
    for _ in range(_TRIES):
        matrix, reciprocal = _normalised(gram.detach(), damping._replace(value=value), ridge)
        if reverse:
            matrix = matrix.flip(0, 1)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if bool((info == 0) & (lower.diagonal().square() > tolerance).all()):
            return lower, reciprocal, value
        largest, value = value, max(float(f"{10 * value:g}"), _SMALLEST)
    raise UnsupportedError(
        f"the Gram matrix of the inputs is not positive definite, not even with damping {largest:g}: it is no sum over "
        f"tokens of products of features, or was damaged by rounding; calibrate again with --dtype float32"
    )


def _normalised(gram: Tensor, damping: Damping, ridge: float) -> tuple[Tensor, Tensor]:
    """N (in, in), a new matrix with a unit diagonal, and 1/s (in,), which is 0 for dead features (1 where all are)."""
    diagonal = gram.diagonal().double()  # the sum below cannot overflow
    live = diagonal != 0  # a negative one makes NaN below, and the factorisation fails
    added = diagonal if damping.relative else diagonal.mean().expand_as(diagonal)
    reciprocal = (diagonal * (1 + ridge) + damping.value * added).rsqrt()
    reciprocal = torch.where(live, reciprocal, (~live.any()).to(reciprocal.dtype)).to(gram.dtype)
    matrix = (gram * reciprocal[:, None]).mul_(reciprocal)
    matrix.diagonal().fill_(1.0)
    return matrix, reciprocal


def _invert_lower(lower: Tensor) -> None:
    """Put L⁻¹ in the place of L, lower triangular (n, n), without another matrix of that size.

    By halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹BA⁻¹, C⁻¹]].
    """
    n = len(lower)
    if n <= _LEAF:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = n // 2
    first, second = lower[:half, :half], lower[half:, half:]
    _invert_lower(first)
    _invert_lower(second)
    lower[half:, :half] = second @ (lower[half:, :half] @ first).neg_()


def _check_finite(gram: Tensor) -> None:
    finite = torch.isfinite(gram)
    if not bool(finite.all()):
        good = finite.all(1) if bool(finite.diagonal().all()) else finite.diagonal()
        bad = int((~good).to(torch.uint8).argmax())
        raise UnsupportedError(
            f"the Gram matrix of the inputs is not finite: input feature {bad} was NaN or Inf, or overflowed, during "
            f"calibration, as in float16 models; calibrate with --dtype float32"
        )
