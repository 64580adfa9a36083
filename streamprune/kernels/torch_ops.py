"""Torch kernels, for any device: the functions of cpu.py, same signatures, same meaning.

The same number of weights goes in every row and group, and the same ones except where two scores agree to
float32 rounding: sums over a block are taken in another order. Rows are worked on in chunks, so temporaries
stay below about 256 MiB. See cpu.py for the mathematics and for the arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from streamprune.kernels import EWMA_ALPHA, Selection

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TEMPORARY = 256 << 20  # bytes
_PER_WEIGHT = 40  # bytes of temporaries for each weight of a chunk
_TINY = torch.finfo(torch.float32).tiny


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
    """See cpu.prune_ewma; `weight`, `feature` and `out` are on one device, and so is the result."""
    if block < 1 or not 0 <= alpha <= 1:
        raise ValueError(f"block {block} must be at least 1 and alpha {alpha} in 0..1")
    if not 0 <= count <= weight.shape[-1]:
        raise ValueError(f"cannot prune {count} of {weight.shape[-1]} weights in a row")
    return _prune(weight, feature, power, out, want_keep, lambda score: _lowest(_ewma_z(score, block, alpha), count))


def prune_exact(
    weight: Tensor,
    feature: Tensor,
    power: int,
    count: int,
    *,
    out: Tensor | None = None,
    want_keep: bool = False,
) -> Selection:
    """See cpu.prune_exact."""
    if not 0 <= count <= weight.shape[-1]:
        raise ValueError(f"cannot prune {count} of {weight.shape[-1]} weights in a row")
    return _prune(weight, feature, power, out, want_keep, lambda score: _lowest(score, count))


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
    """See cpu.prune_n_of_m."""
    if not 1 <= n < m or weight.shape[-1] % m:
        raise ValueError(f"{n}:{m} does not divide rows of {weight.shape[-1]} weights")
    return _prune(weight, feature, power, out, want_keep, lambda score: _lowest_of_groups(score, m, m - n))


def accumulate(x: Tensor, sum: Tensor, sumsq: Tensor) -> None:
    """See cpu.accumulate; sums in float64 throughout, on the device of x."""
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise ValueError(f"x must be (tokens, in_features) bf16, fp16 or fp32, not {x.dtype} {[*x.shape]}")
    for total in (sum, sumsq):
        if total.dtype != torch.float64 or total.shape != x.shape[1:] or total.device != x.device:
            raise ValueError(f"sum and sumsq must be float64 of shape ({x.shape[1]},) on {x.device}")
    with torch.no_grad():
        for chunk in torch.split(x, max(1, _TEMPORARY // (16 * max(1, x.shape[1])))):
            values = chunk.to(torch.float64) if x.device.type == "cpu" else chunk.float()
            sum += values.sum(0, dtype=torch.float64)
            sumsq += values.square().sum(0, dtype=torch.float64)


def first_nonfinite(weight: Tensor) -> int | None:
    """See cpu.first_nonfinite."""
    if weight.dtype not in _DTYPES:
        raise ValueError(f"expected bf16, fp16 or fp32, not {weight.dtype}")
    begin = 0
    for chunk in torch.split(weight.detach().reshape(-1), _TEMPORARY // 4):
        bad = ~torch.isfinite(chunk)
        if bool(bad.any()):
            return begin + int(bad.to(torch.uint8).argmax())
        begin += chunk.numel()
    return None


def _prune(
    weight: Tensor,
    feature: Tensor,
    power: int,
    out: Tensor | None,
    want_keep: bool,
    gone: Callable[[Tensor], Tensor],
) -> Selection:
    """Score row chunks, ask `gone` (scores -> bool, True where pruned), write what is left."""
    if weight.ndim != 2 or weight.dtype not in _DTYPES:
        raise ValueError(f"weight must be 2-D bf16, fp16 or fp32, not {weight.dtype} {[*weight.shape]}")
    if feature.dtype != torch.float32 or feature.shape != weight.shape[1:]:
        raise ValueError(f"feature must be float32 of shape ({weight.shape[1]},)")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, not {power}")
    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    if result.dtype != weight.dtype or result.shape != weight.shape or not result.is_contiguous():
        raise ValueError("out must be contiguous, with the shape and dtype of weight")
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device) if want_keep else None
    removed = torch.zeros((), dtype=torch.float64, device=weight.device)
    total = removed.clone()
    rows = max(1, _TEMPORARY // (_PER_WEIGHT * max(1, weight.shape[1])))
    with torch.no_grad():
        for begin in range(0, weight.shape[0] if weight.shape[1] else 0, rows):
            chunk = weight[begin : begin + rows].detach()
            score = chunk.float().abs()
            score = (score * score if power == 2 else score) * (feature + 0.0)
            pruned = gone(score)
            result[begin : begin + rows] = chunk.masked_fill(pruned | (chunk == 0), 0)
            if keep is not None:
                keep[begin : begin + rows] = ~pruned
            total += score.sum(dtype=torch.float64)
            removed += score.masked_fill_(~pruned, 0).sum(dtype=torch.float64)
    return Selection(result, keep, float(removed), float(total))


def _ewma_z(score: Tensor, block: int, alpha: float) -> Tensor:
    """z = (L - est) / dev, (rows, in_features) float32; the state moves from block to block."""
    width = score.shape[1]
    step = torch.tensor(alpha, dtype=torch.float32, device=score.device)
    means = _block_means(score, min(block, width))
    est = means[0]
    ests = []
    for mean in means:
        ests.append(est)
        est = est + step * (mean - est)
    distance = score - torch.stack(ests).repeat_interleave(min(block, width), 0)[:width].T
    spreads = _block_means(distance.abs(), min(block, width))
    dev = spreads[0]
    inverses = []
    for spread in spreads:
        inverses.append(1.0 / dev.clamp_min(_TINY))
        dev = dev + step * (spread - dev)
    return distance * torch.stack(inverses).repeat_interleave(min(block, width), 0)[:width].T


def _block_means(values: Tensor, block: int) -> list[Tensor]:
    """Mean of each block of columns, the last one perhaps shorter: a list of (rows,) float32."""
    full = values.shape[1] // block
    sums = values[:, : full * block].reshape(-1, full, block).sum(-1, dtype=torch.float64)
    means = list((sums / block).float().T.contiguous().unbind(0))
    if full * block < values.shape[1]:
        means.append(values[:, full * block :].mean(1, dtype=torch.float64).float())
    return means


def _lowest(values: Tensor, count: int) -> Tensor:
    """True at the `count` smallest of each row, ties by column: bisection on order-preserving int32 keys."""
    if count == values.shape[1]:
        return torch.ones_like(values, dtype=torch.bool)
    bits = values.view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = torch.full((values.shape[0], 1), -(2**31), dtype=torch.int64, device=values.device)
    high = torch.full_like(low, 2**31 - 1)
    for _ in range(32):  # the smallest threshold with at least `count` keys at or below it
        middle = (low + high) >> 1
        enough = (keys <= middle.int()).sum(1, keepdim=True) >= count
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle + 1)
    threshold = high.int()
    below = keys < threshold
    tied = keys == threshold
    room = count - below.sum(1, keepdim=True)
    return below | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))


def _lowest_of_groups(score: Tensor, m: int, drop: int) -> Tensor:
    """True at the `drop` smallest of every m consecutive scores, ties by column, by counting ranks."""
    groups = score.reshape(-1, score.shape[1] // m, m)
    pruned = torch.empty(groups.shape, dtype=torch.bool, device=score.device)
    for i in range(m):
        own = groups[..., i : i + 1]
        rank = (groups[..., :i] <= own).sum(-1) + (groups[..., i + 1 :] < own).sum(-1)
        pruned[..., i] = rank < drop
    return pruned.flatten(1)
