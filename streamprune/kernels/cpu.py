"""CPU kernels (Numba): mask selection and input statistics in a single pass over memory.

Score of a weight: L_ij = |w_ij|**power * feature_j, in float32. Selectors, per row of L:

Exact: the `count` smallest L of each row. N:M: the M − N smallest L of every M consecutive ones.

EWMA (SwiftPrune, arXiv 2501.16376): the weights furthest below a moving average of their row. It works on
l = |w| * feature**(1 / power), the root of L if power is 2: l and L rank weights alike, but a mean of squares would be
dominated by its largest terms. A row is processed in blocks of B consecutive weights. With (est, dev) the state before
block b, a weight is pruned if l < est + λ·dev, and after the block

    est += α (mean(l) − est)        dev += α (mean|l − est| − dev)        with est the value before the block.

λ is chosen for each row so that exactly `count` weights are pruned: those with the `count` smallest z = (l − est) /
dev. dev is at least the smallest normal float32. What differs from the published recurrence (B = 1, a fixed λ, a start
from the first score): both states start from the mean over the row's blocks, and the mean of a block, there and in the
updates, is capped at LARGEST_BLOCK times the median of the nonzero ones. Thus a single score, however large, moves the
states by only a few percent and cannot cause its neighbours to be pruned.

Of equal scores, the lowest column is pruned first.

bf16, fp16 and fp32 weights are read as raw bits without a copy, and a row is processed in buffers that fit the cache,
so that a linear is never converted to float32 as a whole. Rows are distributed over torch.get_num_threads() threads of
our own (cpu_arrays.py; the loops release the GIL); the result does not depend on their number. Inputs are never
changed, except by `accumulate`, and by a pruning function whose `out` is its `weight`. torch_ops.py has the same
functions for any device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprune.kernels import EWMA_ALPHA, EWMA_BLOCK, Selection, cpu_alternate, cpu_arrays, cpu_eliminate, cpu_stats
from streamprune.kernels.lanes import COUNT

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_STRETCH = 2048  # columns per unit of work of `accumulate`, fewer if there are not as many for each thread


def prune_ewma(
    weight: Tensor,
    feature: Tensor,
    power: int,
    count: int,
    *,
    block: int = EWMA_BLOCK,
    alpha: float = EWMA_ALPHA,
    out: Tensor | None = None,
    want_keep: bool = False,
) -> Selection:
    """Prunes `count` weights of every row: those furthest below the moving average of the row's scores.

    weight (rows, in_features) bf16, fp16 or fp32; feature (in_features,) float32, not negative; power
    1 or 2; 0 <= count <= in_features; block >= 1; 0 <= alpha <= 1. `out`, like weight, receives the pruned weights; it
    may be `weight` itself, but not overlap it otherwise. Raises ValueError for anything else.
    """
    if block < 1 or not 0 <= alpha <= 1:
        raise ValueError(f"block {block} must be at least 1 and alpha {alpha} in 0..1")
    return _prune_rows(weight, feature, power, count, block, alpha, out, want_keep)


def prune_exact(
    weight: Tensor,
    feature: Tensor,
    power: int,
    count: int,
    *,
    out: Tensor | None = None,
    want_keep: bool = False,
) -> Selection:
    """Prunes the `count` weights of lowest score of every row. Arguments as in prune_ewma."""
    return _prune_rows(weight, feature, power, count, 0, 0.0, out, want_keep)


def prune_n_of_m(
    weight: Tensor,
    feature: Tensor,
    power: int,
    n: int,
    m: int,
    *,
    out: Tensor | None = None,
    want_keep: bool = False,
) -> Selection:
    """Keeps the n weights of highest score of every m consecutive inputs: 1 <= n < m, in_features % m == 0.

    The other arguments as in prune_ewma; raises ValueError.
    """
    if not 1 <= n < m or weight.shape[-1] % m:
        raise ValueError(f"{n}:{m} does not divide rows of {weight.shape[-1]} weights")
    rows, result, keep = _rows(weight, feature, power, out, want_keep)
    return Selection(result, keep, *rows.n_of_m(n, m))


def accumulate(x: Tensor, sum: Tensor, sumsq: Tensor) -> None:
    """Adds the sum and the sum of squares over tokens of x to `sum` and `sumsq`, in place.

    x (tokens, in_features) bf16, fp16 or fp32; sum, sumsq (in_features,) float64, contiguous. Runs of 256 tokens are
    summed in float32. The result does not depend on the number of threads. Raises ValueError for anything else.
    """
    if x.ndim != 2 or x.dtype not in NAMES:
        raise ValueError(f"x must be (tokens, in_features) bf16, fp16 or fp32, not {x.dtype} {[*x.shape]}")
    for total in (sum, sumsq):
        if total.dtype != torch.float64 or total.shape != x.shape[1:] or not total.is_contiguous():
            raise ValueError(f"sum and sumsq must be contiguous float64 of shape ({x.shape[1]},)")
    bits, sums, squares, width = bits_of(x).reshape(-1), sum.numpy(), sumsq.numpy(), x.shape[1]

    form, threads = cpu_arrays.FORMS[NAMES[x.dtype]], torch.get_num_threads()

    def part(begin: int, end: int) -> None:
        cpu_stats.accumulate_columns(bits, width, begin, end, form, sums, squares)

    step = max(cpu_arrays.PART // max(1, x.shape[0]), min(_STRETCH, -(-width // threads)))
    cpu_arrays.share(width, -(-step // 64) * 64, part, threads, multiple=64)


def eliminate(
    weight: Tensor, upper: Tensor, feature: Tensor, keep: Tensor, errors: Tensor, n: int = 0, m: int = 0
) -> None:
    """SparseGPT's sweep over the columns of one block, in place; see cpu_eliminate.eliminate_rows.

    weight, keep and errors (rows, width) may be column slices of wider tensors, with contiguous rows. With n and m,
    `keep` is not read but written: n of every m columns are kept.
    """
    arrays = [tensor.detach().numpy() for tensor in (weight, keep, errors)]
    block = np.ascontiguousarray(np.pad(upper.detach().numpy(), ((0, 0), (0, -upper.shape[1] % COUNT))))
    factors = feature.detach().contiguous().numpy()

    def part(begin: int, end: int) -> None:
        rows, kept, found = (array[begin:end] for array in arrays)
        cpu_eliminate.eliminate_rows(rows, block, factors, m, n, kept, found)

    step = max(1, (cpu_arrays.PART >> 3) // max(1, weight.shape[1]))
    cpu_arrays.share(len(weight), step, part, torch.get_num_threads())


class Alternation:
    """The iterations of ADMM (methods/admm.py) on rows of one linear, all but their matrix products.

    start (rows, in_features) and score (in_features,) float32, not negative; in_features is a multiple of COUNT;
    `products` is the dtype of the matrix products, bf16 or float32. `keep` (rows, in_features) bool is the mask, x the
    current weights.
    """

    def __init__(self, start: Tensor, score: Tensor, kappa: float, products: torch.dtype) -> None:
        if start.shape[1] % COUNT or products not in (torch.bfloat16, torch.float32):
            raise ValueError(f"rows of {start.shape[1]} weights, or products in {products}, are not supported")
        self.x = start.clone(memory_format=torch.contiguous_format)
        self.keep = torch.ones(start.shape, dtype=torch.bool)
        self._step = torch.empty(start.shape, dtype=products)
        self._shift = 16 if products == torch.bfloat16 else 0
        self._start, self._score = start.contiguous().numpy(), score.contiguous().numpy() + np.float32(0)
        self._kappa = np.float32(kappa)
        self._groups: dict[int, Any] = {}

    def step(self, product: Tensor | None, count: int, n: int = 0, m: int = 0) -> Tensor:
        """One iteration: what is to be multiplied with M next, (rows, in_features).

        `product` is that of the iteration before, None in the first one. The new mask prunes the `count` lowest
        |x|·score of each row, of equal ones the lowest column first; but with n and m none of the n highest of every m.
        With count −1 the mask stays.
        """
        width = self.x.shape[1]
        arrays = (
            self.x.numpy(), self._start, np.empty((len(self.x), 0), np.uint16) if product is None else bits_of(product),
            self.keep.view(torch.uint8).numpy(), bits_of(self._step),
        )  # fmt: skip
        groups: tuple[Any, ...] = ()
        if m and count >= 0:
            if m not in self._groups:
                self._groups[m] = cpu_arrays.in_groups(self._score, m, "F32")
            groups = (*self._groups[m], cpu_arrays.FORMS["F32"], m - n, m)

        def part(begin: int, end: int) -> None:
            x, start, given, keep, step = (array[begin:end] for array in arrays)
            common = (x, start, given, self._shift, self._kappa, self._score, count, keep, step)
            if groups:
                cpu_alternate.alternate_groups(*common, x.view(np.uint32), *groups)
            else:
                cpu_alternate.alternate_rows(*common)

        rows = max(1, (cpu_arrays.PART >> 3) // width)
        cpu_arrays.share(len(self.x), rows, part, torch.get_num_threads())
        return self._step

    def end(self, product: Tensor) -> Tensor:
        """x after the last iteration, (rows, in_features); `product` is that iteration's."""
        self.step(product, -1)
        return self.x


def first_nonfinite(weight: Tensor) -> int | None:
    """Flat index of the first NaN or Inf of a bf16, fp16 or fp32 tensor of any shape, or None."""
    if weight.dtype not in NAMES:
        raise ValueError(f"expected bf16, fp16 or fp32, not {weight.dtype}")
    return cpu_arrays.first_nonfinite(bits_of(weight).reshape(-1), NAMES[weight.dtype], torch.get_num_threads())


def _prune_rows(
    weight: Tensor,
    feature: Tensor,
    power: int,
    count: int,
    block: int,
    alpha: float,
    out: Tensor | None,
    want_keep: bool,
) -> Selection:
    if not 0 <= count <= weight.shape[-1]:
        raise ValueError(f"cannot prune {count} of {weight.shape[-1]} weights in a row")
    rows, result, keep = _rows(weight, feature, power, out, want_keep)
    return Selection(result, keep, *rows.ewma(count, block, alpha))


def _rows(
    weight: Tensor, feature: Tensor, power: int, out: Tensor | None, want_keep: bool
) -> tuple[cpu_arrays.Rows, Tensor, Tensor | None]:
    """The checked arguments of one call as arrays of the tensors' memory, the tensor to prune to, and the mask's."""
    if weight.ndim != 2 or weight.dtype not in NAMES:
        raise ValueError(f"weight must be 2-D bf16, fp16 or fp32, not {weight.dtype} {[*weight.shape]}")
    if feature.dtype != torch.float32 or feature.shape != weight.shape[1:]:
        raise ValueError(f"feature must be float32 of shape ({weight.shape[1]},)")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, not {power}")
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype)
    fits = out.dtype == weight.dtype and out.shape == weight.shape
    if not fits or not out.is_contiguous() or out.data_ptr() % out.element_size():
        raise ValueError("out must be contiguous and aligned, with the shape and dtype of weight")
    keep = torch.empty(weight.shape, dtype=torch.bool) if want_keep else None
    rows = cpu_arrays.Rows(
        bits_of(weight), NAMES[weight.dtype], feature.detach().contiguous().numpy(), power, bits_of(out),
        torch.get_num_threads(), *([] if keep is None else [keep.numpy()]),
    )  # fmt: skip
    return rows, out, keep


def bits_of(tensor: Tensor) -> cpu_arrays.Array:
    """The tensor's memory as uint16 or uint32; a copy only if it is not contiguous, or not aligned."""
    tensor = tensor.detach().contiguous()
    kind, unsigned = (torch.int16, np.uint16) if tensor.element_size() == 2 else (torch.int32, np.uint32)
    return np.require(tensor.view(kind).numpy().view(unsigned), requirements="A")
