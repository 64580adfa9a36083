"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune a column at a time, let the columns after it make up for it.

With H = G + damping and H⁻¹ = UᵀU, U upper triangular, the columns of W are visited from left to right. Where w_ij is
pruned, the optimal brain surgeon's update (their eq. 3) of what comes after it in the row is

    e_ij = w_ij / U_jj        w_ik −= e_ij U_jk    for k > j

and the saliency of a weight, given all columns before it, is (w_ij / U_jj)². A mask is chosen from the weights as they
are by then: for a block of 128 columns when the block is reached, or for every group of M columns of a pattern N:M when
the group is reached. The published code does the same. What differs:

    - A row prunes floor(sparsity·in) weights, and in each block its share of them: floor(sparsity·end) −
      floor(sparsity·begin) for columns begin to end. The published code thresholds over all rows of a block at once,
      and prunes every tie. With rows independent, a linear can come in chunks of rows.
    - The damping is 0.01·G_jj rather than 0.01·mean(diag G): multiplying features by factors, and dividing their
      weights by them, changes neither mask nor outputs. Damping(0.01, relative=False) is the published one.
    - Dead features (G_jj = 0) are pruned first, and where kept they stay as they are. The published code zeroes them.

Speed: all is held transposed, (in, rows), so a column is one piece of memory. A block is halved down to `_LEAF` columns
or to a group; the right half is brought up to date by one product of matrices when the left one is done, and only
within a leaf do columns go one by one, each with one product of a matrix and a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.pruning.inverse import Damping, Factor, upper_factor
from streamprune.pruning.selection import Pattern, check_pattern, prune_count, select

_LEAF = 32  # columns that are visited one by one
_DAMPING = Damping(0.01)


def prepare(gram: Tensor, damping: Damping = _DAMPING) -> Factor:
    """U with (G + damping)⁻¹ = UᵀU, for any number of `solve`; gram (in, in) float32, of a linear's inputs.

    Raises UnsupportedError where the Gram matrix is not finite or cannot be factorised, see inverse.py.
    """
    return upper_factor(gram, damping)


def solve(
    weight: Tensor,
    factor: Factor,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    block: int = 128,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune rows of one linear to `sparsity` or to `pattern`, exactly one of the two, and refit what stays.

    weight (rows, in) float32, finite, on the device of factor.matrix, (in, in); it is not changed. Returns the new
    weight, zero where pruned, and keep (rows, in) bool. With a pattern, blocks are the largest multiple of M up to
    `block`, or M. `backend` is select's; for groups, None means Torch everywhere: they are few weights at a time, for
    which Numba's loops are slower (2 ms against 0.3 ms for 4096 rows of one 2:4). Temporaries: about
    twice the weight. Raises UsageError as select does.
    """
    rows, width = weight.shape
    if weight.dtype != torch.float32 or factor.matrix.shape != (width, width):
        raise ValueError(f"{weight.dtype} {[*weight.shape]} is no float32 weight for a factor {[*factor.matrix.shape]}")
    if (sparsity is None) == (pattern is None):
        raise UsageError("give either a sparsity or a pattern")
    if pattern is not None:
        check_pattern(pattern, width)
        block = pattern.m * max(1, block // pattern.m)
    keep = torch.ones((width, rows), dtype=torch.bool, device=weight.device)
    if sparsity is not None and not prune_count(sparsity, width):
        return weight.detach().clone(), keep.T.contiguous()
    upper = factor.matrix
    diagonal = upper.diagonal()
    feature = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    columns = weight.detach().T.clone(memory_format=torch.contiguous_format)
    errors = torch.empty((min(block, width), rows), dtype=torch.float32, device=weight.device)
    for begin in range(0, width, block):
        end = min(begin + block, width)
        part, kept, error = columns[begin:end], keep[begin:end], errors[: end - begin]
        if sparsity is not None:
            count = prune_count(sparsity, end) - prune_count(sparsity, begin)
            _choose(part, feature[begin:end], count, kept, backend)
        _eliminate(part, upper[begin:end, begin:end], feature[begin:end], kept, error, pattern, backend)
        part.masked_fill_(~kept, 0.0)
        columns[end:].addmm_(upper[begin:end, end:].T, error, alpha=-1.0)
    return columns.T.contiguous(), keep.T.contiguous()


def _choose(columns: Tensor, feature: Tensor, count: int, keep: Tensor, backend: str | None) -> None:
    """Write into keep (columns, rows) which `count` weights of every row have the lowest |w| / U_jj."""
    width = len(columns)
    if count in (0, width):
        keep.fill_(count == 0)
        return
    share = (count + 0.5) / width  # floor(share·width) is count, however share is rounded
    chosen = select(
        columns.T.contiguous(), feature, 1, selector="exact", sparsity=share, want_keep=True, backend=backend
    ).keep
    assert chosen is not None
    keep.copy_(chosen.T)


def _eliminate(
    columns: Tensor,
    upper: Tensor,
    feature: Tensor,
    keep: Tensor,
    errors: Tensor,
    pattern: Pattern | None,
    backend: str | None,
) -> None:
    """Visit columns from left to right; every argument is the part of a larger one that belongs to these columns.

    columns (n, rows), up to date with all that was pruned to the left, is changed: each column becomes what it is when
    it is reached. upper (n, n); feature (n,) is 1 / U_jj, 0 if dead; errors (n, rows) receives e, zero where kept. keep
    (n, rows) is given, or, with a pattern, written.
    """
    n, leaf = len(columns), pattern.m if pattern else _LEAF
    if n > leaf:
        half = leaf * (-(-n // leaf) // 2)
        left, right = slice(0, half), slice(half, n)
        for side in (left, right):
            _eliminate(columns[side], upper[side, side], feature[side], keep[side], errors[side], pattern, backend)
            if side is left:
                columns[right].addmm_(upper[left, right].T, errors[left], alpha=-1.0)
        return
    if pattern:
        chosen = select(
            columns.T.contiguous(), feature, 1, pattern=pattern, want_keep=True, backend=backend or "torch"
        ).keep
        assert chosen is not None
        keep.copy_(chosen.T)
    scale = feature[:, None] * ~keep
    for j in range(n):
        if j:
            columns[j].addmv_(errors[:j].T, upper[:j, j], alpha=-1.0)
        torch.mul(columns[j], scale[j], out=errors[j])
