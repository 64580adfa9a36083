"""CPU kernels (Numba): mask selection and input statistics in one visit to memory.

Score of a weight: L_ij = |w_ij|**power * feature_j, in float32. Selectors, per row of L:

EWMA (SwiftPrune, arXiv 2501.16376; there block = 1 and a fixed λ). The row is read in blocks of B neighbours.
With (est, dev) the state before block b, a weight is pruned when L < est + λ·dev, and after the block

    est += α (mean(L) − est)        dev += α (mean|L − est| − dev)        with est the value before the block.

It starts from the first block: est = mean(L), dev = mean|L − est|. λ is solved per row so that exactly
`count` weights go: they are the `count` smallest z = (L − est) / dev. dev is held above the smallest normal
float32. Exact: the `count` smallest L. N:M: the M − N smallest L of every M consecutive ones. Ties: lowest
column first.

bf16, fp16 and fp32 weights are read through their bits without a copy; a row lives in cache-sized buffers, so
no float32 image of a linear ever exists. Rows are shared out to torch.get_num_threads() threads of our own
(the loops release the GIL); the result does not depend on their number. Nothing changes its inputs, except
`accumulate`, whose purpose it is. torch_ops.py has the same functions for any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamprune.kernels import EWMA_ALPHA, Selection, cpu_rows, cpu_stats

_Array = np.ndarray[Any, np.dtype[Any]]
_KINDS = {torch.bfloat16: cpu_rows.BF16, torch.float16: cpu_rows.FP16, torch.float32: cpu_rows.FP32}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_PART = 1 << 18  # weights per unit of work: large against the cost of a call, small against a linear


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
    """Prune `count` weights of every row, those furthest below the running mean of the row's scores.

    weight (rows, in_features) bf16, fp16 or fp32, finite; feature (in_features,) float32, not negative; power
    1 or 2; 0 <= count <= in_features; block >= 1; 0 <= alpha <= 1. `out` (like weight) receives the weights.
    Raises ValueError for anything else.
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
    """Prune the `count` weights of lowest score of every row. Arguments as in prune_ewma."""
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
    """Keep the n weights of highest score of every m consecutive inputs: 1 <= n < m, in_features % m == 0.

    The other arguments as in prune_ewma; raises ValueError.
    """
    if not 1 <= n < m or weight.shape[-1] % m:
        raise ValueError(f"{n}:{m} does not divide rows of {weight.shape[-1]} weights")
    job = _Job(weight, feature, power, out, want_keep)

    def part(begin: int, end: int) -> None:
        rows = slice(begin, end)
        cpu_rows.prune_groups(
            job.weight[rows], job.feature, power, job.kind, m - n, m, job.bits, job.out[rows], job.keep[rows],
            job.loss[rows],
        )  # fmt: skip

    return job.run(part)


def accumulate(x: Tensor, sum: Tensor, sumsq: Tensor) -> None:
    """Add the sum and the sum of squares over tokens of x to `sum` and `sumsq`, in place.

    x (tokens, in_features) bf16, fp16 or fp32; sum, sumsq (in_features,) float64, contiguous. Runs of 256
    tokens are summed in float32. The bits do not depend on the number of threads. Raises ValueError.
    """
    if x.ndim != 2 or x.dtype not in _KINDS:
        raise ValueError(f"x must be (tokens, in_features) bf16, fp16 or fp32, not {x.dtype} {[*x.shape]}")
    for total in (sum, sumsq):
        if total.dtype != torch.float64 or total.shape != x.shape[1:] or not total.is_contiguous():
            raise ValueError(f"sum and sumsq must be contiguous float64 of shape ({x.shape[1]},)")
    bits, sums, squares = _bits(x), sum.numpy(), sumsq.numpy()
    kind = _KINDS[x.dtype]

    def part(begin: int, end: int) -> None:
        columns = slice(begin, end)
        cpu_stats.accumulate_columns(bits[:, columns], kind, sums[columns], squares[columns])

    threads = torch.get_num_threads() if x.numel() > _PART else 1
    step = -(-x.shape[1] // threads // 64) * 64
    _share(x.shape[1], max(64, step), part)


def first_nonfinite(weight: Tensor) -> int | None:
    """Flat index of the first NaN or Inf of a bf16, fp16 or fp32 tensor of any shape, or None."""
    if weight.dtype not in _KINDS:
        raise ValueError(f"expected bf16, fp16 or fp32, not {weight.dtype}")
    bits = _bits(weight).reshape(-1)
    infinity = bits.dtype.type(_INFINITY[weight.dtype])
    found: list[int] = []

    def part(begin: int, end: int) -> None:
        index = cpu_stats.first_at_least(bits[begin:end], _magnitude(bits)[0], infinity)
        if index >= 0:
            found.append(begin + int(index))

    _share(bits.size, 4 * _PART, part)
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

    def part(begin: int, end: int) -> None:
        rows = slice(begin, end)
        cpu_rows.prune_rows(
            job.weight[rows], job.feature, power, job.kind, count, block, np.float32(alpha), job.bits,
            job.out[rows], job.keep[rows], job.loss[rows],
        )  # fmt: skip

    return job.run(part)


class _Job:
    """Arrays of one call: inputs and outputs as numpy views of the tensors' memory."""

    def __init__(self, weight: Tensor, feature: Tensor, power: int, out: Tensor | None, want_keep: bool) -> None:
        if weight.ndim != 2 or weight.dtype not in _KINDS:
            raise ValueError(f"weight must be 2-D bf16, fp16 or fp32, not {weight.dtype} {[*weight.shape]}")
        if feature.dtype != torch.float32 or feature.shape != weight.shape[1:]:
            raise ValueError(f"feature must be float32 of shape ({weight.shape[1]},)")
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, not {power}")
        if out is None:
            out = torch.empty(weight.shape, dtype=weight.dtype)
        if out.dtype != weight.dtype or out.shape != weight.shape or not out.is_contiguous():
            raise ValueError("out must be contiguous, with the shape and dtype of weight")
        self.result = out
        self.kept = torch.empty(weight.shape, dtype=torch.bool) if want_keep else None
        self.kind = _KINDS[weight.dtype]
        self.weight, self.out = _bits(weight), _bits(out)
        self.bits = _magnitude(self.weight)
        self.feature = (feature.detach() + 0.0).contiguous().numpy()  # + 0.0: -0.0 would order below +0.0
        rows = weight.shape[0]
        self.keep = np.empty((rows, 0), np.bool_) if self.kept is None else self.kept.numpy()
        self.loss = np.zeros((rows, 2), np.float64)

    def run(self, part: Callable[[int, int], None]) -> Selection:
        rows, width = self.weight.shape
        if width:
            _share(rows, max(1, _PART // width), part)
        removed, total = math.fsum(self.loss[:, 0]), math.fsum(self.loss[:, 1])
        return Selection(self.result, self.kept, removed, total)


def _bits(tensor: Tensor) -> _Array:
    """The tensor's memory as uint16 or uint32; a copy only if it is not contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.element_size() == 2:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.view(torch.int32).numpy().view(np.uint32)


def _magnitude(bits: _Array) -> _Array:
    """[mask of everything but the sign, zero] in the dtype of `bits`."""
    return np.array([np.iinfo(bits.dtype).max >> 1, 0], bits.dtype)


def _share(size: int, step: int, part: Callable[[int, int], None]) -> None:
    """Call part(begin, end) for stretches of `step` that cover 0..size, on as many threads as torch uses."""
    stretches = [(begin, min(begin + step, size)) for begin in range(0, size, step)]
    threads = min(torch.get_num_threads(), len(stretches))
    if threads <= 1:
        for begin, end in stretches:
            part(begin, end)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="streamprune-kernel") as pool:
        for done in [pool.submit(part, begin, end) for begin, end in stretches]:
            done.result()
