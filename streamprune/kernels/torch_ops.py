"""Torch kernels, for any device: the functions of cpu.py, with the same signatures and meaning.

They prune the same number of weights in every row and group as cpu.py, and the same weights except where two scores are
equal up to float32 rounding. Rows are processed in chunks, so that temporaries stay below about 256 MiB. Only at the
end of a call is the device waited for, to read three sums. See cpu.py for the mathematics and the arguments.

There are no matrix products, so that TF32 has no effect. EWMA's states, one for 32 weights, are computed by a scan in
log2(blocks) steps, in float64 so that a constant row has a constant mean. Thresholds come from Torch's kthvalue, a
radix select on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from streamprune.kernels import EWMA_ALPHA, LARGEST_BLOCK, TYPICAL_BITS, Selection

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TEMPORARY = 256 << 20  # bytes
_PER_WEIGHT = 40  # bytes of temporaries for each weight of a chunk
_RUN = 256  # tokens summed in float32
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
    return _prune(
        weight, feature, power, out, want_keep, lambda root: _lowest(_ewma_z(root, block, alpha), count), rooted=True
    )  # fmt: skip


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
    """See cpu.accumulate; everything is on the device of x, which is read twice and not copied."""
    if x.ndim != 2 or x.dtype not in _DTYPES:
        raise ValueError(f"x must be (tokens, in_features) bf16, fp16 or fp32, not {x.dtype} {[*x.shape]}")
    for total in (sum, sumsq):
        if total.dtype != torch.float64 or total.shape != x.shape[1:] or total.device != x.device:
            raise ValueError(f"sum and sumsq must be float64 of shape ({x.shape[1]},) on {x.device}")
    with torch.no_grad():
        runs, width = x.shape[0] // _RUN, x.shape[1]
        for part in (x[: runs * _RUN].reshape(runs, _RUN, width), x[None, runs * _RUN :]):
            if part.numel():
                sum += part.sum(1, dtype=torch.float32).sum(0, dtype=torch.float64)
                norms = torch.linalg.vector_norm(part, dim=1, dtype=torch.float32)
                sumsq += norms.double().square_().sum(0)


def first_nonfinite(weight: Tensor) -> int | None:
    """See cpu.first_nonfinite."""
    if weight.dtype not in _DTYPES:
        raise ValueError(f"expected bf16, fp16 or fp32, not {weight.dtype}")
    begin = 0
    for chunk in torch.split(weight.detach().reshape(-1), _TEMPORARY // 4):
        if chunk.numel() and not math.isfinite(float(_extent(chunk))):
            return begin + int((~torch.isfinite(chunk)).to(torch.uint8).argmax())
        begin += chunk.numel()
    return None


def _prune(
    weight: Tensor,
    feature: Tensor,
    power: int,
    out: Tensor | None,
    want_keep: bool,
    gone: Callable[[Tensor], Tensor],
    rooted: bool = False,
) -> Selection:
    """Scores chunks of rows, selects with `gone` (scores -> bool, True where pruned), and writes the kept weights.

    If `rooted`, `gone` gets |w| * feature**(1 / power) instead of L.
    """
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
    rows = max(1, _TEMPORARY // (_PER_WEIGHT * max(1, weight.shape[1])))
    figures = []
    with torch.no_grad():
        for begin in range(0, weight.shape[0] if weight.shape[1] else 0, rows):
            chunk = weight[begin : begin + rows].detach()
            extent = _extent(chunk)
            score = chunk.abs().float()
            if rooted and power == 2:
                score.mul_((feature + 0.0).sqrt())
                pruned = gone(score)
                score.square_()
            else:
                score = (score.square_() if power == 2 else score).mul_(feature + 0.0)
                pruned = gone(score)
            if keep is not None:
                torch.logical_not(pruned, out=keep[begin : begin + rows])
            total = score.sum(dtype=torch.float64)
            removed = score.masked_fill_(~pruned, 0).sum(dtype=torch.float64)
            figures.append(torch.stack((removed, total, extent)))
            result[begin : begin + rows] = chunk.masked_fill(pruned.logical_or_(chunk == 0), 0)
        sums = torch.stack(figures).tolist() if figures else []
    return Selection(
        result, keep, sum(row[0] for row in sums), sum(row[1] for row in sums),
        finite=all(math.isfinite(row[2]) for row in sums),
    )  # fmt: skip


def _extent(values: Tensor) -> Tensor:
    """max − min in float64, on the device: finite if and only if all values are. Reads the values once."""
    low, high = torch.aminmax(values)
    return high.double() - low.double()


def _ewma_z(score: Tensor, block: int, alpha: float) -> Tensor:
    """z = (l - est) / dev, (rows, in_features) float32, with (est, dev) updated from block to block; see cpu.py."""
    width = score.shape[1]
    block = min(block, width)
    end = width // block * block
    shape = (score.shape[0], end // block, block)
    blocks = score[:, :end].view(shape)
    est = _moving(_block_means(blocks), alpha)
    z = torch.empty_like(score)
    distance = torch.sub(blocks, est[:, :-1, None], out=z[:, :end].view(shape))
    dev = _moving(_block_means(distance.abs()), alpha)
    inverse = 1.0 / dev.clamp_min(_TINY)
    distance.mul_(inverse[:, :-1, None])
    if end < width:  # the shorter last block
        torch.sub(score[:, end:], est[:, -1:], out=z[:, end:]).mul_(inverse[:, -1:])
    return z


def _block_means(blocks: Tensor) -> Tensor:
    """Means over the last axis, (rows, blocks) float32; summed in halves, so that means of equal numbers are exact."""
    size, values = blocks.shape[-1], blocks
    while values.shape[-1] % 2 == 0:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    sums = values[..., 0].double() if values.shape[-1] == 1 else values.sum(-1, dtype=torch.float64)
    return (sums / size).float()


def _moving(values: Tensor, alpha: float) -> Tensor:
    """The moving mean of values (rows, blocks) before each block and after the last, (rows, blocks + 1) float32.

    With values capped at LARGEST_BLOCK times the typical one of their row, state[0] is their mean and
    state[b + 1] = (1 - alpha) state[b] + alpha values[b]. This is computed by adding the row to itself, shifted by 1,
    2, 4, ... blocks and multiplied by the matching power of 1 - alpha. All terms are >= 0, so that nothing cancels.
    """
    values = torch.minimum(values.double(), LARGEST_BLOCK * _typical(values).double())
    state = torch.cat((values.mean(1, keepdim=True), alpha * values), 1)
    fade, step = 1.0 - alpha, 1
    while step < state.shape[1]:
        moved = state[:, :-step] * fade
        state[:, step:] += moved
        fade, step = fade * fade, 2 * step
    return state.float()


def _typical(values: Tensor) -> Tensor:
    """The median of the nonzero values of each row, their TYPICAL_BITS low bits cleared: (rows, 1). values >= 0."""
    bits = values.contiguous().view(torch.int32).sort(1).values
    zeros = (bits <= 0).sum(1, keepdim=True)
    rank = zeros + (bits.shape[1] - zeros + 1) // 2
    return (bits.gather(1, rank - 1) >> TYPICAL_BITS << TYPICAL_BITS).view(torch.float32)


def _lowest(values: Tensor, count: int) -> Tensor:
    """True at the `count` smallest of each row, ties by column, in the order of int32 keys."""
    if count in (0, values.shape[1]):
        return torch.full_like(values, count > 0, dtype=torch.bool)
    bits = values.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    threshold = keys.kthvalue(count, dim=1, keepdim=True).values
    pruned = keys <= threshold
    excess = pruned.sum(1, keepdim=True, dtype=torch.int32) - count
    if values.device.type == "cpu" and not bool(excess.any()):  # on a GPU, the check would wait for the device
        return pruned
    tied = keys == threshold
    room = tied.sum(1, keepdim=True, dtype=torch.int32) - excess
    return pruned.logical_and_((tied.cumsum(1, dtype=torch.int32) <= room).logical_or_(~tied))


def _lowest_of_groups(score: Tensor, m: int, drop: int) -> Tensor:
    """True at the `drop` smallest of every m consecutive scores, ties by column, by computing ranks.

    Plane i holds column i of every group; every pair of planes is compared once.
    """
    planes = score.view(score.shape[0], -1, m).permute(2, 0, 1).contiguous()
    ranks = torch.empty(planes.shape, dtype=torch.int8, device=score.device)
    for i in range(m):
        ranks[i] = m - 1 - i
    for i in range(m):
        for j in range(i + 1, m):
            first = (planes[i] <= planes[j]).view(torch.int8)
            ranks[i] -= first
            ranks[j] += first
    return (ranks < drop).permute(1, 2, 0).flatten(1)
