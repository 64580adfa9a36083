"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune column by column, and let later columns compensate.

With H = G + damping and H⁻¹ = UᵀU, U upper triangular, the columns of W are visited from left to right. Where w_ij is
pruned, the optimal brain surgeon's update (their eq. 3) of the remaining weights of the row is

    e_ij = w_ij / U_jj        w_ik −= e_ij U_jk    for k > j

and the saliency of a weight, given all columns before it, is (w_ij / U_jj)². Masks are chosen from the updated weights:
for a block of 128 columns when the sweep reaches the block, or with a pattern N:M for each group of M columns when it
reaches the group. The published code does the same. What differs:

    - Every row prunes floor(sparsity·in) weights, and in each block its share of them: floor(sparsity·end) −
      floor(sparsity·begin) in columns begin to end. The published code uses one threshold for all rows of a block, and
      prunes all ties at it. With independent rows, a linear can be passed in chunks of rows.
    - The damping is 0.01·G_jj rather than 0.01·mean(diag G): multiplying features by factors, and dividing their
      weights by them, changes neither mask nor outputs. Damping(0.01, relative=False) is the published one.
    - Weights of dead features (G_jj = 0) are pruned first, and left unchanged where they are kept. The published code
      zeroes them.

Speed: on the CPU a compiled loop sweeps a block row by row (kernels/cpu_eliminate.py). On other devices the weights are
held transposed, (in, rows), so that a column is contiguous. A block is split in halves recursively, down to `_LEAF`
columns or one group; when the left half is done, one matrix product updates the right half. Only within a leaf are
columns visited one by one, each with a matrix-vector product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.methods.inverse import Damping, Factor, upper_factor
from streamprune.methods.selection import Pattern, check_pattern, prune_count, select
from streamprune.process.ranks import ALONE, Ranks

_LEAF = 32  # columns; a leaf is swept column by column
_DAMPING = Damping(0.01)


def prepare(gram: Tensor, damping: Damping = _DAMPING, ranks: Ranks = ALONE) -> Factor:
    """U with (G + damping)⁻¹ = UᵀU; serves any number of calls of `solve`. gram (in, in) float32, of a linear's inputs.

    All `ranks` must call this together. Raises UnsupportedError where the Gram matrix is not finite or cannot be
    factorised, see inverse.py.
    """
    return upper_factor(gram, damping, ranks)


def solve(
    weight: Tensor,
    factor: Factor,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    block: int = 128,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Prunes rows of one linear to `sparsity` or to `pattern`, exactly one of the two, and refits the kept weights.

    weight (rows, in) float32, finite, on the device of factor.matrix, (in, in); it is not changed. Returns the new
    weight, zero where pruned, and keep (rows, in) bool. With a pattern, the block width is the largest multiple of M up
    to `block`, at least M. `backend` is "numba" (the compiled loop), "torch", or None: by device. Temporaries: about
    twice the weight. Raises UsageError as `select` does, and ValueError for other dtypes or shapes.
    """
    rows, width = weight.shape
    if weight.dtype != torch.float32 or factor.matrix.shape != (width, width):
        shape = [*factor.matrix.shape]
        raise ValueError(f"expected a float32 weight for a factor {shape}, not {weight.dtype} {[*weight.shape]}")
    if (sparsity is None) == (pattern is None):
        raise UsageError("give either a sparsity or a pattern")
    if pattern is not None:
        check_pattern(pattern, width)
        block = pattern.m * max(1, block // pattern.m)
    if sparsity is not None and not prune_count(sparsity, width):
        return weight.detach().clone(), torch.ones((rows, width), dtype=torch.bool, device=weight.device)
    diagonal = factor.matrix.diagonal()
    feature = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    ends = [*range(block, width, block), width]
    counts = [0 if sparsity is None else prune_count(sparsity, end) for end in ends]
    blocks = [
        _Block(begin, end, count - before)
        for begin, end, before, count in zip([0, *ends], ends, [0, *counts], counts, strict=False)
    ]
    by_rows = (backend or ("numba" if weight.device.type == "cpu" else "torch")) == "numba"
    return (_by_rows if by_rows else _by_columns)(weight.detach(), factor.matrix, feature, pattern, blocks)


class _Block(NamedTuple):
    """Columns begin to end, whose mask is chosen at once, and how many weights each row prunes; 0 with a pattern."""

    begin: int
    end: int
    pruned: int


def _by_rows(
    weight: Tensor, upper: Tensor, feature: Tensor, pattern: Pattern | None, blocks: Sequence[_Block]
) -> tuple[Tensor, Tensor]:
    """The sweep with a compiled loop, on the CPU."""
    from streamprune.kernels.cpu import eliminate

    n, m = pattern or (0, 0)
    fitted = weight.clone(memory_format=torch.contiguous_format)
    keep = torch.ones(weight.shape, dtype=torch.bool)
    errors = torch.empty((len(weight), max(end - begin for begin, end, _ in blocks)), dtype=torch.float32)
    for begin, end, count in blocks:
        now, error, chosen = slice(begin, end), errors[:, : end - begin], keep[:, begin:end]
        if pattern is None:
            chosen.copy_(_kept(fitted[:, now].contiguous(), feature[now], count, "numba"))
        eliminate(fitted[:, now], upper[now, now], feature[now], chosen, error, n, m)
        if end < upper.shape[0]:
            fitted[:, end:].addmm_(error, upper[now, end:], alpha=-1.0)
    return fitted, keep


def _by_columns(
    weight: Tensor, upper: Tensor, feature: Tensor, pattern: Pattern | None, blocks: Sequence[_Block]
) -> tuple[Tensor, Tensor]:
    """The sweep with Torch alone, on any device."""
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    keep = torch.ones(columns.shape, dtype=torch.bool, device=weight.device)
    largest = max(end - begin for begin, end, _ in blocks)
    errors = torch.empty((largest, len(weight)), dtype=torch.float32, device=weight.device)
    for begin, end, count in blocks:
        part, kept, error = columns[begin:end], keep[begin:end], errors[: end - begin]
        if pattern is None:
            kept.copy_(_kept(part.T.contiguous(), feature[begin:end], count, "torch").T)
        _eliminate(part, upper[begin:end, begin:end], feature[begin:end], kept, error, pattern)
        part.masked_fill_(~kept, 0.0)
        columns[end:].addmm_(upper[begin:end, end:].T, error, alpha=-1.0)
    return columns.T.contiguous(), keep.T.contiguous()


def _kept(rows: Tensor, feature: Tensor, count: int, backend: str) -> Tensor:
    """The mask of rows (n, width) that prunes the `count` weights of lowest |w| / U_jj: True where kept."""
    width = rows.shape[1]
    if count in (0, width):
        return torch.full(rows.shape, count == 0, dtype=torch.bool, device=rows.device)
    share = (count + 0.5) / width  # floor(share·width) is count despite rounding
    keep = select(rows, feature, 1, selector="exact", sparsity=share, want_keep=True, backend=backend).keep
    assert keep is not None
    return keep


def _eliminate(
    columns: Tensor,
    upper: Tensor,
    feature: Tensor,
    keep: Tensor,
    errors: Tensor,
    pattern: Pattern | None,
) -> None:
    """Sweeps columns from left to right; every argument is the slice of a larger one that belongs to these columns.

    columns (n, rows), already updated for all columns to the left, is changed: each column gets the value that it has
    when the sweep reaches it. upper (n, n); feature (n,) is 1 / U_jj, 0 if dead; errors (n, rows) receives e, zero
    where kept. keep (n, rows) is read, or, with a pattern, written.
    """
    n, leaf = len(columns), pattern.m if pattern else _LEAF
    if n > leaf:
        half = leaf * (-(-n // leaf) // 2)
        left, right = slice(0, half), slice(half, n)
        for side in (left, right):
            _eliminate(columns[side], upper[side, side], feature[side], keep[side], errors[side], pattern)
            if side is left:
                columns[right].addmm_(upper[left, right].T, errors[left], alpha=-1.0)
        return
    if pattern:
        chosen = select(columns.T.contiguous(), feature, 1, pattern=pattern, want_keep=True, backend="torch").keep
        assert chosen is not None
        keep.copy_(chosen.T)
    scale = feature[:, None] * ~keep
    for j in range(n):
        if j:
            columns[j].addmv_(errors[:j].T, upper[:j, j], alpha=-1.0)
        torch.mul(columns[j], scale[j], out=errors[j])
