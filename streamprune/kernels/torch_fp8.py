"""Torch kernels for FP8 E4M3, for any device: the functions of cpu_fp8.py, with bit-identical codes and scales.

Rows are processed in chunks, so that temporaries stay below about 256 MiB. Nothing waits for the device. Divisions are
by tensors, because on a GPU Torch replaces division by a Python number with multiplication by its reciprocal.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
FOLDS = 256  # as in cpu_fp8.py
_TEMPORARY = 256 << 20  # bytes
_PER_WEIGHT = 24  # bytes of temporaries for each weight of a chunk
_CUT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # float32 mantissa bits that the dtype lacks


def quantise_rows(
    weight: Tensor, power: Tensor, factors: tuple[float, ...], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See cpu_fp8.quantise_rows; `weight` and `power` are on one device, and so are the results."""
    rows, width = weight.shape
    codes = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.ones((rows, 1), dtype=torch.float32, device=weight.device)
    sums = torch.zeros((rows, 2), dtype=torch.float64, device=weight.device)
    step = max(1, _TEMPORARY // (_PER_WEIGHT * max(1, width)))
    with torch.no_grad():
        for begin in range(0, rows if width else 0, step):
            part = slice(begin, begin + step)
            values = weight[part].detach().float()
            scale[part] = _scale(values.abs(), power, factors, scale_dtype)
            ratio = values / scale[part]  # not in place: the values may be the weight
            found = codes[part] = encode(ratio)
            squared = scale[part].double().square()
            sums[part, :1] = squared * _fold((ratio - found.float()).square_().mul_(power))
            sums[part, 1:] = squared * _fold(ratio.square_().mul_(power))
    return codes, scale, sums


def dequantise_rows(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """See cpu_fp8.dequantise_rows; out is bf16, fp16 or fp32."""
    step = max(1, _TEMPORARY // (_PER_WEIGHT * max(1, codes.shape[1])))
    for begin in range(0, codes.shape[0], step):
        out[begin : begin + step] = codes[begin : begin + step].float().mul_(scale[begin : begin + step])


def descend_block(
    value: Tensor, error: Tensor, gradient: Tensor, keep: Tensor, gram: Tensor, inverse: Tensor, scale: Tensor
) -> None:
    """See cpu_fp8.descend_block; the rounding of intermediate results differs. About ten operations per column."""
    for j in range(len(value)):
        wanted = torch.addcmul(value[j], gradient[j], inverse[j])
        new = encode(wanted / scale).float().mul_(scale).mul_(keep[j])
        change = value[j] - new
        value[j] = new
        error[j] += change
        gradient[j + 1 :].addr_(gram[j, j + 1 :], change)


def encode(ratio: Tensor) -> Tensor:
    """The nearest E4M3 numbers to float32 numbers, of any shape; all zeros are +0.0."""
    bits = ratio.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits.masked_fill(bits == 0x80, 0).view(torch.float8_e4m3fn)


def _scale(sizes: Tensor, power: Tensor, factors: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """For each row of |w| (n, in) float32, the scale amax/448 × factor with the least error: (n, 1) float32."""
    amax = sizes.amax(1, keepdim=True)
    unit = amax / torch.full_like(amax, LARGEST)
    scale, least = torch.ones_like(unit), torch.zeros_like(unit, dtype=torch.float64)
    for i, factor in enumerate(factors):
        tried = _rounded_up(unit * factor, dtype)
        if len(factors) == 1:
            scale = tried
            break
        ratio = sizes / tried
        rest = ratio.sub_(ratio.clamp(max=LARGEST).to(torch.float8_e4m3fn).float())
        lost = tried.double().square() * _fold(rest.square_().mul_(power))
        better = lost < least if i else torch.ones_like(lost, dtype=torch.bool)
        scale, least = torch.where(better, tried, scale), torch.where(better, lost, least)
    return torch.where(amax > 0, scale, 1.0)


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale rounded up to `dtype`, at least its smallest normal number; as float32."""
    cut = (1 << _CUT[dtype]) - 1
    bits = (scale.view(torch.int32) + cut) & ~cut
    return bits.view(torch.float32).clamp_min_(torch.finfo(dtype).tiny)


def _fold(terms: Tensor) -> Tensor:
    """Sums over rows (n, in) float32 in the order of cpu_fp8.py: (n, 1) float64."""
    width = terms.shape[1]
    places = min(FOLDS, max(16, 1 << (width - 1).bit_length()))
    sums = torch.zeros((terms.shape[0], places), dtype=torch.float32, device=terms.device)
    for begin in range(0, width, places):
        part = terms[:, begin : begin + places]
        sums[:, : part.shape[1]] += part
    while places > 1:
        places //= 2
        sums = sums[:, :places] + sums[:, places:]
    return sums.double()
