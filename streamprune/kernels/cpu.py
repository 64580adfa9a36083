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
our own (the loops release the GIL); the result does not depend on their number. Inputs are never changed, except by
`accumulate`, and by a pruning function whose `out` is its `weight`. torch_ops.py has the same functions for any device.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprune.kernels import EWMA_ALPHA, Selection, cpu_eliminate, cpu_groups, cpu_rows, cpu_stats
from streamprune.kernels.lanes import COUNT

_Array = np.ndarray[Any, np.dtype[Any]]
_FORMS = {  # (mask of all bits but the sign; shift and factor that convert magnitude bits to float32; bits of infinity)
    torch.bfloat16: (np.int32(0x7FFF), np.int32(16), np.float32(1), np.int32(0x7F80)),
    torch.float16: (np.int32(0x7FFF), np.int32(13), np.float32(2.0**112), np.int32(0x7C00)),
    torch.float32: (np.int32(0x7FFFFFFF), np.int32(0), np.float32(1), np.int32(0x7F800000)),
}
_PART = 1 << 18  # least number of weights per unit of work, so that the cost of a call does not matter
_STRETCH = 2048  # columns per unit of work of `accumulate`, fewer if there are not as many for each thread
_CHUNK = 2048  # approximate number of weights that are transposed together to compare their groups


def prune_ewma(
    weight: Tensor,
    feature: Tensor,
    power: int,
    count: int,
    *,
    block: int = 32,
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
    job = _Job(weight, feature, power, out, want_keep)
    halves = 2 if weight.element_size() == 2 and m % 2 == 0 else 1
    chunks = max(1, weight.shape[1] // _CHUNK)
    groups = max(1, -(-weight.shape[1] // (chunks * m * 2 * COUNT))) * 2 * COUNT
    turned = np.ascontiguousarray(job.padded(m * groups).reshape(-1, groups, m).transpose(0, 2, 1)).reshape(-1)

    def part(begin: int, end: int) -> None:
        rows = slice(begin, end)
        cpu_groups.prune_groups(
            job.weight[rows], turned, power, job.form, m - n, m, halves, groups, job.out[rows], job.keep[rows],
            job.loss[rows],
        )  # fmt: skip

    return job.run(part)


def accumulate(x: Tensor, sum: Tensor, sumsq: Tensor) -> None:
    """Adds the sum and the sum of squares over tokens of x to `sum` and `sumsq`, in place.

    x (tokens, in_features) bf16, fp16 or fp32; sum, sumsq (in_features,) float64, contiguous. Runs of 256 tokens are
    summed in float32. The result does not depend on the number of threads. Raises ValueError for anything else.
    """
    if x.ndim != 2 or x.dtype not in _FORMS:
        raise ValueError(f"x must be (tokens, in_features) bf16, fp16 or fp32, not {x.dtype} {[*x.shape]}")
    for total in (sum, sumsq):
        if total.dtype != torch.float64 or total.shape != x.shape[1:] or not total.is_contiguous():
            raise ValueError(f"sum and sumsq must be contiguous float64 of shape ({x.shape[1]},)")
    bits, sums, squares, width = _bits(x).reshape(-1), sum.numpy(), sumsq.numpy(), x.shape[1]

    def part(begin: int, end: int) -> None:
        cpu_stats.accumulate_columns(bits, width, begin, end, _FORMS[x.dtype], sums, squares)

    step = max(_PART // max(1, x.shape[0]), min(_STRETCH, -(-width // torch.get_num_threads())))
    _share(width, -(-step // 64) * 64, part, multiple=64)


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

    _share(len(weight), max(1, (_PART >> 3) // max(1, weight.shape[1])), part)


def first_nonfinite(weight: Tensor) -> int | None:
    """Flat index of the first NaN or Inf of a bf16, fp16 or fp32 tensor of any shape, or None."""
    if weight.dtype not in _FORMS:
        raise ValueError(f"expected bf16, fp16 or fp32, not {weight.dtype}")
    bits = _bits(weight).reshape(-1)
    found: list[int] = []

    def part(begin: int, end: int) -> None:
        index = cpu_stats.first_nonfinite(bits[begin:end], _FORMS[weight.dtype])
        if index >= 0:
            found.append(begin + int(index))

    _share(bits.size, _PART, part)
    return min(found, default=None)


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
    job = _Job(weight, feature, power, out, want_keep)
    block = min(block, weight.shape[-1])
    padded, root = job.padded(COUNT), int(block > 0 and power == 2)
    if root:
        padded, power = np.sqrt(padded), 1

    def part(begin: int, end: int) -> None:
        rows = slice(begin, end)
        cpu_rows.prune_rows(
            job.weight[rows], padded, power, root, job.form, count, block, float(alpha), job.out[rows], job.keep[rows],
            job.loss[rows],
        )  # fmt: skip

    return job.run(part)


class _Job:
    """The checked arguments of one call, as numpy views of the tensors' memory."""

    def __init__(self, weight: Tensor, feature: Tensor, power: int, out: Tensor | None, want_keep: bool) -> None:
        if weight.ndim != 2 or weight.dtype not in _FORMS:
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
        self.result = out
        self.kept = torch.empty(weight.shape, dtype=torch.bool) if want_keep else None
        self.form = _FORMS[weight.dtype]
        self.weight, self.out = _bits(weight), _bits(out)
        self.feature = (
            (feature.detach() + 0.0).contiguous().numpy()
        )  # + 0.0, as the bits of -0.0 would sort before those of +0.0
        rows = weight.shape[0]
        self.keep = np.empty((rows, 0), np.bool_) if self.kept is None else self.kept.numpy()
        self.loss = np.ones((rows, 3), np.float64)  # removed, total, is the row finite

    def padded(self, multiple: int) -> _Array:
        """The feature, padded with zeros to a multiple of `multiple`."""
        return np.pad(self.feature, (0, -self.feature.size % multiple))

    def run(self, part: Callable[[int, int], None]) -> Selection:
        rows, width = self.weight.shape
        if width:
            _share(rows, max(1, _PART // width), part)
            removed, total = (math.fsum(self.loss[:, i]) for i in range(2))
            return Selection(self.result, self.kept, removed, total, bool(self.loss[:, 2].all()))
        return Selection(self.result, self.kept, 0.0, 0.0, True)


def _bits(tensor: Tensor) -> _Array:
    """The tensor's memory as uint16 or uint32; a copy only if it is not contiguous, or not aligned."""
    tensor = tensor.detach().contiguous()
    kind, unsigned = (torch.int16, np.uint16) if tensor.element_size() == 2 else (torch.int32, np.uint32)
    return np.require(tensor.view(kind).numpy().view(unsigned), requirements="A")


def _share(size: int, step: int, part: Callable[[int, int], None], multiple: int = 1) -> None:
    """Calls part(begin, end) for ranges that cover 0..size, on as many threads as torch uses.

    There are about four ranges per thread, to balance the load. All but the last are at least `step` long, and
    multiples of `multiple`.
    """
    threads = torch.get_num_threads()
    step = max(step, -(-size // (4 * threads) // multiple) * multiple)
    stretches = deque((begin, min(begin + step, size)) for begin in range(0, size, step))

    def work() -> None:
        while stretches:
            try:
                stretch = stretches.popleft()
            except IndexError:
                return
            part(*stretch)

    helpers = min(threads, len(stretches)) - 1
    if helpers < 1:
        work()
        return
    pool = _pool(os.getpid(), helpers)
    others = [pool.submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        for other in others:
            if not other.cancel():  # it may still be queued behind another call's work
                other.result()


@lru_cache(maxsize=1)
def _pool(process: int, helpers: int) -> ThreadPoolExecutor:
    """A pool of threads that is kept, because starting threads takes 0.1 ms, or 1 ms on a busy machine.

    `process` is part of the cache key because threads do not survive a fork. A request for another number of threads
    replaces the pool.
    """
    return ThreadPoolExecutor(helpers, thread_name_prefix="streamprune-kernel")
