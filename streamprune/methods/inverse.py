"""Inverses and factors of damped Gram matrices, for SparseGPT and ADMM.

G = XᵀX / T, (in, in) float32, symmetric, on any device. The matrix that is factorised is A = G + damping + ridge·diag
G, where

    Damping(v)                  adds v·diag G, in proportion to the power of each feature
    Damping(v, relative=False)  adds v·mean(diag G)·I, as SparseGPT and GPTQ do

The factorisation works on the normalised matrix N = A / (s sᵀ) with s = √diag A. N has a unit diagonal, so that
features of very different scales do not spoil its condition, and multiplying features by powers of two leaves N the
same bit for bit. With relative damping the whole factor is equivariant under such a rescaling; with absolute damping it
is not.

A feature with G_jj = 0 is dead: it was 0 for every token. It is left out, and row and column j of the result are 0. If
all features are dead, G is replaced by I.

In float32 the pivots of N are accurate only to about ε√in. A Cholesky factorisation with a pivot below a few times that
counts as failed even if the pivot is positive; it is then repeated with ten times the damping. Factor.damping is the
value that was used in the end, for the report. Peak memory: twice the Gram matrix, result included.

Factors and inverses are made of matrix products and of blocks that are factorised on a single thread: LAPACK's results
depend on the number of threads, those of products of such sizes do not. Products are cut into the same parts for any
number of ranks; several ranks share them, so all must call these functions together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UnsupportedError
from streamprune.process.ranks import ALONE, Ranks
from streamprune.process.share import parts_of, share_

_TRIES = 8
_SMALLEST = 1e-6  # damping to try after a failure with none
_LEAF = 256  # width of the blocks that are factorised, and of triangles that are inverted by one solve
_EPSILON = torch.finfo(torch.float32).eps


class Damping(NamedTuple):
    """What is added to the diagonal of G: value·G_jj if relative, else value·mean(diag G)."""

    value: float
    relative: bool = True


class Factor(NamedTuple):
    """A factor or inverse (in, in) float32, and the value of the damping that was used.

    `damping` is larger than requested only where the factorisation failed with the requested one.
    """

    matrix: Tensor
    damping: float


def feature_scale(gram: Tensor) -> Tensor:
    """√G_jj, (in,) float32: 0 for dead features; all 1 if all features are dead."""
    diagonal = gram.detach().diagonal().float()
    return torch.where((diagonal > 0).any(), diagonal, torch.ones_like(diagonal)).sqrt()


def upper_factor(gram: Tensor, damping: Damping, ranks: Ranks = ALONE) -> Factor:
    """U, upper triangular (in, in), with (G + damping)⁻¹ = UᵀU; rows and columns of dead features are 0.

    SparseGPT (arXiv 2301.00774) inverts A, then takes the Cholesky factor of the inverse. Here A is factorised with its
    features in reverse order, A = R Rᵀ with R upper triangular, and U = R⁻¹. This gives the same U with a third of the
    arithmetic, without the rounding errors of an explicit inverse. Raises UnsupportedError, see _cholesky.
    """
    lower, reciprocal, used = _cholesky(gram, damping, 0.0, ranks, reverse=True)
    _invert_lower(lower, ranks)
    return Factor(lower.flip(0, 1).mul_(reciprocal), used)


def normalised_inverse(gram: Tensor, damping: Damping, ridge: float, ranks: Ranks = ALONE) -> Factor:
    """(D⁻¹ (G + damping) D⁻¹ + ridge·I)⁻¹ with D = diag feature_scale(gram), symmetric (in, in).

    Rows and columns of dead features are 0. Raises UnsupportedError, see _cholesky.
    """
    lower, reciprocal, used = _cholesky(gram, damping, ridge, ranks)
    scale = feature_scale(gram) * reciprocal
    _invert_lower(lower, ranks)
    return Factor(_gram_of_lower(lower, ranks).mul_(scale).mul_(scale[:, None]), used)


def inverse_diagonal(gram: Tensor, damping: Damping, ranks: Ranks = ALONE) -> Factor:
    """The diagonal (in,) of normalised_inverse(gram, damping, 0), for two thirds of the arithmetic."""
    lower, reciprocal, used = _cholesky(gram, damping, 0.0, ranks)
    _invert_lower(lower, ranks)
    return Factor(lower.square_().sum(0).mul_((feature_scale(gram) * reciprocal).square_()), used)


def _cholesky(
    gram: Tensor, damping: Damping, ridge: float, ranks: Ranks, *, reverse: bool = False
) -> tuple[Tensor, Tensor, float]:
    """L with L Lᵀ = N (features in reverse order if `reverse`); 1/s (in,), 0 for dead features; the damping used.

    Raises UnsupportedError if the Gram matrix is not finite, or not positive definite even with 10⁷ times the requested
    damping, which cannot happen to a sum of squares.
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
        if _factorise(matrix, ranks) and bool((matrix.diagonal().square() > tolerance).all()):
            return matrix, reciprocal, value
        largest, value = value, max(float(f"{10 * value:g}"), _SMALLEST)
    raise UnsupportedError(
        f"the Gram matrix of the inputs is not positive definite, not even with damping {largest:g}, probably "
        f"because of rounding errors; calibrate again with --dtype float32"
    )


def _normalised(gram: Tensor, damping: Damping, ridge: float) -> tuple[Tensor, Tensor]:
    """N (in, in), a new matrix with a unit diagonal, and 1/s (in,): 0 for dead features, all 1 if all are dead."""
    diagonal = gram.diagonal().double()  # so that the sum below cannot overflow
    live = diagonal != 0  # a negative entry becomes NaN below, and the factorisation fails
    added = diagonal if damping.relative else diagonal.mean().expand_as(diagonal)
    reciprocal = (diagonal * (1 + ridge) + damping.value * added).rsqrt()
    reciprocal = torch.where(live, reciprocal, (~live.any()).to(reciprocal.dtype)).to(gram.dtype)
    matrix = (gram * reciprocal[:, None]).mul_(reciprocal)
    matrix.diagonal().fill_(1.0)
    return matrix, reciprocal


def _factorise(matrix: Tensor, ranks: Ranks) -> bool:
    """Replaces N, symmetric (n, n), by L, lower triangular with L Lᵀ = N, in place; False if that failed.

    Block column by block column: what the columns before contribute is subtracted, the block on the diagonal is
    factorised, and the blocks below are multiplied by its inverse.
    """
    for begin in range(0, len(matrix), _LEAF):
        end = min(begin + _LEAF, len(matrix))
        before = matrix[begin:end, :begin].T
        with _one_thread():
            block, info = torch.linalg.cholesky_ex(matrix[begin:end, begin:end] - matrix[begin:end, :begin] @ before)
            inverse = block.clone()
            _invert_lower(inverse, ALONE)
        if bool(info):
            return False
        below = [matrix[part, :end] for part in parts_of(end, len(matrix), _LEAF)]
        column = functools.partial(_rows_below, below, before, inverse)
        share_([rows[:, begin:] for rows in below], column, ranks)
        matrix[begin:end, begin:end] = block
        matrix[begin:end, end:] = 0
    return True


def _rows_below(below: Sequence[Tensor], before: Tensor, inverse: Tensor, i: int) -> Tensor:
    """Rows of a block column of L: `below` are rows of N, of L where `before` has the rows of the block above."""
    done = len(before)
    return (below[i][:, done:] - below[i][:, :done] @ before) @ inverse.T


def _gram_of_lower(lower: Tensor, ranks: Ranks) -> Tensor:
    """LᵀL of L, lower triangular (n, n): without the products of blocks that are zero."""
    product = torch.empty_like(lower)
    blocks = [slice(begin, min(begin + _LEAF, len(lower))) for begin in range(0, len(lower), _LEAF)]

    def upper(i: int) -> Tensor:
        begin, end = blocks[i].start, blocks[i].stop
        return lower[begin:, :end].T @ lower[begin:, begin:end]

    share_([product[: block.stop, block] for block in blocks], upper, ranks)
    for block in blocks:
        product[block, : block.start] = product[: block.start, block].T
    return product


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it, torch computes on one thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _invert_lower(lower: Tensor, ranks: Ranks) -> None:
    """Replaces L, lower triangular (n, n), by L⁻¹ in place.

    Recursively, by halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹BA⁻¹, C⁻¹]], without most of the products of zeros.
    """
    n = len(lower)
    if n <= _LEAF:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        with _one_thread():
            lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = n // 2
    first, second, between = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first, ranks)
    _invert_lower(second, ranks)
    columns, rows = parts_of(0, half, _LEAF), parts_of(0, n - half, _LEAF)

    def left(i: int) -> Tensor:
        begin = columns[i].start  # what is before it may have been replaced already
        product = (between[:, begin:] @ first[begin:, columns[i]]).neg_()
        return torch.cat([second[part, : part.stop] @ product[: part.stop] for part in rows])

    share_([between[:, part] for part in columns], left, ranks)


def _check_finite(gram: Tensor) -> None:
    if bool(torch.isfinite(gram.sum())):
        return
    finite = torch.isfinite(gram)
    if not bool(finite.all()):
        good = finite.all(1) if bool(finite.diagonal().all()) else finite.diagonal()
        bad = int((~good).to(torch.uint8).argmax())
        raise UnsupportedError(
            f"the Gram matrix of the inputs is not finite: input feature {bad} was NaN or Inf during calibration, or "
            f"its square overflowed, as happens with float16 models; calibrate with --dtype float32"
        )
