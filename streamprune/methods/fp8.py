"""FP8 (HWPQ, arXiv 2501.16376): weights as E4M3 numbers with one scale for each output row, W ≈ scale · code.

The scale is rounded up to the dtype it is stored in before the codes are made, so that no weight exceeds 448 scales and
every reader computes with the same scale that the codes were made with. It is at least the dtype's smallest normal
number; that of float16, 2**-14, applies to rows whose weights are all below 2**-14 · 448 = 0.027. Such rows lose
little, as E4M3 has full precision from 2**-6 on, that is for weights above 2**-20. A row of zeros has scale 1.

    amax  scale = max_j |w_j| / 448, as published
    mse   of amax's scale times 1 + i/16, i = 0 … 15, the one with the least Σ_j a_j (w_j − scale·code_j)²,
          a_j = E[x_j²]; of equal ones the largest

Codes are floating-point numbers, so that a factor of 2 changes only what is nearly 0; factors between 1 and 2 shift the
weights relative to the powers of two. Factors below 1 clip the largest weight, and gained nothing. Error of mse
relative to amax with bf16 scales and 4096 columns, for normal, Laplace and Student-t (3 degrees of freedom) weights:
.950, .952, .923 with 16 factors; .959, .963, .944 with 8; .940, .938, .901 with 64. 512 columns, normal: .866 with 16.

With a Gram matrix, rounding is part of the refit (`compensate`): with mask and scales fixed, each row w solves

    min over q   (w − s q)ᵀ A (w − s q)        A = G + damping, q E4M3 numbers on the support

by cyclic coordinate descent (QuantEase, arXiv 2309.01885): q_j = E4M3((s q_j + ((w − s q) A)_j / A_jj) / s). w is the
row before pruning, so that the error of pruning counts too. What differs from QuantEase: the support; the start, which
is the refitted row before rounding, so that the first visit to a column compensates for the rounding of the columns
before it; and the damping. Use the refit's damping: without it, little of the gain remains on unseen inputs.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.kernels.torch_fp8 import encode
from streamprune.methods.conjugate import Metric
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping
from streamprune.methods.recipes import FP8_SCALES

FP8_MAX = 448.0  # the largest number of E4M3
_FACTORS = {"amax": (1.0,), "mse": tuple(1 + i / 16 for i in reversed(range(16)))}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 128  # columns between two products with the Gram
_LANES = 16  # rows that the CPU kernel works on at once
_CHUNK = 1 << 18  # weights converted to float16 at once, by way of float32


class Quantised(NamedTuple):
    """What quantise returns.

    codes  (n, in) float8_e4m3fn; every zero is +0.0, and none is NaN.
    scale  (n, 1), in the requested dtype.
    error  sum of a_j (w_ij - scale_i code_ij)².
    total  sum of a_j w_ij². Both are summed over columns in float32, over rows in float64.
    """

    codes: Tensor
    scale: Tensor
    error: float
    total: float


def quantise(
    weight: Tensor,
    scale_dtype: torch.dtype,
    how: str = "amax",
    power: Tensor | None = None,
    backend: str | None = None,
) -> Quantised:
    """Codes and scales of rows of one linear; a code is float32(w) / float32(scale), rounded to nearest even.

    weight (n, in) bf16, fp16 or fp32, finite, on any device; scale_dtype is one of these dtypes, `how` one of
    FP8_SCALES; power (in,) float32, not negative, holds the a_j, None means all 1. Rows are independent, so a linear
    may be passed in chunks of rows. backend None uses Numba for CPU tensors and Torch for all others; "numba" or
    "torch" forces one; both give the same bits. Raises UsageError for an unknown `how`, and where scale · code would
    overflow `scale_dtype`.
    """
    if weight.ndim != 2 or weight.dtype not in _DTYPES or scale_dtype not in _DTYPES:
        raise ValueError(f"expected 2-D bf16, fp16 or fp32, not {weight.dtype} {[*weight.shape]} and {scale_dtype}")
    if how not in FP8_SCALES:
        raise UsageError(f"FP8 scale {how!r} is not one of {', '.join(FP8_SCALES)}")
    if power is None:
        power = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    if power.dtype != torch.float32 or power.shape != weight.shape[1:]:
        raise ValueError(f"power must be float32 of shape ({weight.shape[1]},)")
    kernels = _kernels(backend, weight)
    codes, scale, sums = kernels.quantise_rows(weight, power.to(weight.device), _FACTORS[how], scale_dtype)
    stored = scale.to(scale_dtype)
    largest = torch.finfo(scale_dtype).max
    if len(scale) and float(scale.max()) * FP8_MAX > largest:  # rare, so the check may be slow
        beyond = ~torch.isfinite(dequantise(codes, stored, scale_dtype, backend)).all(1)
        if bool(beyond.any()):
            raise UsageError(
                f"a weight of {float(weight[beyond].abs().max()):g} is too large: rounded to FP8 it would exceed "
                f"{largest:g}, the largest number of {str(scale_dtype).removeprefix('torch.')}; --skip its linear"
            )
    error, total = sums.sum(0).tolist()
    return Quantised(codes, stored, error, total)


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """float32(code) · float32(scale), rounded once to `dtype`: (n, in), on the device of codes.

    codes (n, in) float8_e4m3fn; scale bf16, fp16 or fp32, (n, 1), (n,) or a single number; dtype bf16, fp16 or fp32.
    backend as for `quantise`.
    """
    if codes.ndim != 2 or codes.dtype != torch.float8_e4m3fn or dtype not in _DTYPES:
        raise ValueError(f"expected 2-D float8_e4m3fn, not {codes.dtype} {[*codes.shape]}, and to bf16, fp16 or fp32")
    rows = codes.shape[0]
    if scale.numel() != 1 and scale.shape not in ((rows, 1), (rows,)):
        raise ValueError(f"scale must be of shape ({rows}, 1), ({rows},) or (), not {[*scale.shape]}")
    scales = scale.to(codes.device).float().reshape(-1, 1).expand(rows, 1)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    kernels = _kernels(backend, codes)
    if dtype != torch.float16:
        kernels.dequantise_rows(codes, scales, out)
        return out
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        values = torch.empty_like(codes[part], dtype=torch.float32)
        kernels.dequantise_rows(codes[part], scales[part], values)
        out[part] = values
    return out


def compensate(
    exact: Tensor,
    fitted: Tensor,
    keep: Tensor | None,
    gram: Gram,
    scale: Tensor,
    sweeps: int = 2,
    backend: str | None = None,
    damping: Damping | None = None,
) -> Tensor:
    """Codes (n, in) float8_e4m3fn of rows, chosen jointly so that the rounding errors of a row compensate each other.

    exact (n, in) float32, the dense rows; fitted (n, in) float32, pruned and refitted, the start of the descent; keep
    (n, in) bool, False where codes stay 0, None if all are kept; scale (n, 1), as `quantise` chose it for `fitted`; all
    on gram.device. A row is rounded plainly if its error in the damped metric would not get lower than that of rounding
    `fitted`; so are dead features (G_jj = 0). A sweep costs one product with the Gram matrix, and so does the final
    comparison. Temporaries: about five times `exact`. Rows are independent. Raises ValueError for shapes that do not
    fit.
    """
    if exact.shape != fitted.shape or scale.shape != (len(exact), 1):
        raise ValueError(f"rows {[*exact.shape]} and {[*fitted.shape]} with scales {[*scale.shape]} do not fit")
    kernels, by = _kernels(backend, exact), scale.float()
    start = fitted if keep is None else torch.where(keep, fitted, 0.0)
    metric = Metric.of(gram, damping or Damping(0.0))
    plain = encode(start / by)
    codes = encode(_descended(exact, start, keep, metric, by, sweeps, kernels).div_(by))
    # (w − p) A (w − p) − (w − c) A (w − c) = (c − p) A (2 (w − p) − (c − p)): one product
    before = plain.float().mul_(by)
    change = codes.float().mul_(by).sub_(before)
    rest = (exact - before).mul_(2).sub_(change)
    gain = rest.mul_(metric.times(change)).sum(1, dtype=torch.float64)
    chosen = torch.where(gain[:, None] > 0, codes.view(torch.uint8), plain.view(torch.uint8))
    return chosen.contiguous().view(torch.float8_e4m3fn)


def _descended(
    exact: Tensor, start: Tensor, keep: Tensor | None, metric: Metric, scale: Tensor, sweeps: int, kernels: ModuleType
) -> Tensor:
    """The values scale · q after `sweeps`, (n, in) float32. Works on transposed copies, so that columns are
    contiguous."""
    rows, width = exact.shape
    padded = -(-rows // _LANES) * _LANES
    value, error = (torch.zeros((width, padded), dtype=torch.float32, device=exact.device) for _ in range(2))
    value[:, :rows] = start.T
    torch.sub(exact.T, value[:, :rows], out=error[:, :rows])
    kept = torch.ones((width, padded), dtype=torch.bool, device=exact.device)
    if keep is not None:
        kept[:, :rows] = keep.T
    by = torch.ones(padded, dtype=torch.float32, device=exact.device)
    by[:rows] = scale[:, 0]
    gram = metric.gram
    for _ in range(sweeps):
        for begin in range(0, width, _BLOCK):
            part = slice(begin, begin + _BLOCK)
            panel = gram.matrix[part].to(exact.device)
            gradient = torch.addcmul(panel @ error, error[part], metric.extra[part, None])
            kernels.descend_block(
                value[part], error[part], gradient, kept[part], panel[:, part], metric.inverse[part], by
            )
            if gram.mapped is not None:
                gram.mapped.forget(begin, min(begin + _BLOCK, width))
    return value[:, :rows].T


def _kernels(backend: str | None, tensor: Tensor) -> ModuleType:
    backend = backend or ("numba" if tensor.device.type == "cpu" else "torch")
    if backend == "numba":
        from streamprune.kernels import cpu_fp8

        return cpu_fp8
    if backend == "torch":
        from streamprune.kernels import torch_fp8

        return torch_fp8
    raise UsageError(f"backend {backend!r} is neither numba nor torch")
