"""CPU kernels (Numba) for FP8 E4M3: a scale for each row, codes, and their errors. torch_fp8.py has the same functions.

E4M3 has four exponent bits and three mantissa bits: 448 is the largest number, 2**-6 the smallest normal one, 2**-9 the
smallest subnormal one. u = float32(|w|) / float32(scale) is rounded to nearest even by a float32 addition: let m be
2**20 times the largest power of two <= u (at least 2**-6). The last mantissa bit of u + m then has the value of the
last mantissa bit of an E4M3 number of u's size, so that (u + m) - m is the rounded number, exactly. There are no
branches, and no special case for subnormal numbers.

Sums over a row are float32 in a fixed order, the same as in torch_fp8.py, so that both choose the same scales: column j
is added to partial sum j mod `folds`, a power of two of at most FOLDS; then the upper half of the partial sums is added
to the lower half until one is left.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from streamprune.kernels import cpu, cpu_arrays, lanes
from streamprune.kernels.cpu_rows import copy
from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, as_int, fill, largest, load, select, store

LARGEST = 448.0
FOLDS = 256
_ROUND_UP = {  # (number of float32 mantissa bits that the scale's dtype lacks, bits of its smallest normal number)
    torch.bfloat16: (np.int32(16), np.int32(0x00800000)),
    torch.float16: (np.int32(13), np.int32(0x38800000)),
    torch.float32: (np.int32(0), np.int32(0x00800000)),
}

# Division of lanes is needed only here.
lanes._operator(operator.truediv, lanes.FLOAT, lanes.FLOAT, ir.IRBuilder.fdiv)


def quantise_rows(
    weight: Tensor, power: Tensor, factors: tuple[float, ...], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of rows; the scale of each is amax/448 times the one of `factors` with the least error, of equal ones the
    first.

    weight (n, in) bf16, fp16 or fp32, finite; power (in,) float32, not negative; factors >= 1, exact in
    float32; scale_dtype bf16, fp16 or fp32, to which scales are rounded up. Returns codes (n, in) float8_e4m3fn, scales
    (n, 1) float32, exact in scale_dtype (fp16: where finite), and sums (n, 2) float64: power (w - s q)², power w².
    """
    rows, width = weight.shape
    codes, scale = torch.empty((rows, width), dtype=torch.uint8), torch.ones((rows, 1), dtype=torch.float32)
    sums = torch.zeros((rows, 2), dtype=torch.float64)
    bits, form, codes_out = cpu.bits_of(weight), cpu_arrays.FORMS[cpu.NAMES[weight.dtype]], codes.numpy()
    padded = np.pad(power.detach().contiguous().numpy(), (0, -width % COUNT))
    tried, scales, sums_out = np.array(factors, np.float32), scale.numpy()[:, 0], sums.numpy()

    def part(begin: int, end: int) -> None:
        _quantise(
            bits[begin:end], padded, tried, form, _ROUND_UP[scale_dtype], folds(width), codes_out[begin:end],
            scales[begin:end], sums_out[begin:end],
        )  # fmt: skip

    if width:
        cpu_arrays.share(rows, max(1, cpu_arrays.PART // width), part, torch.get_num_threads())
    return codes.view(torch.float8_e4m3fn), scale, sums


def dequantise_rows(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """out = float32(codes) * scale, rounded once; codes (n, in) float8_e4m3fn, scale (n, 1) float32.

    out (n, in) bf16 or fp32, contiguous, is overwritten.
    """
    bits, factor, out_bits = (
        codes.contiguous().view(torch.uint8).numpy(),
        scale.contiguous().numpy()[:, 0],
        cpu.bits_of(out),
    )

    def part(begin: int, end: int) -> None:
        _dequantise(bits[begin:end], factor[begin:end], out_bits[begin:end])

    if codes.numel():
        cpu_arrays.share(codes.shape[0], max(1, cpu_arrays.PART // codes.shape[1]), part, torch.get_num_threads())


def descend_block(
    value: Tensor, error: Tensor, gradient: Tensor, keep: Tensor, gram: Tensor, inverse: Tensor, scale: Tensor
) -> None:
    """One sweep of coordinate descent over the columns of a block, from first to last, for n rows of weights at once.

    All arrays are transposed: value, error, gradient (block, n) float32 and keep (block, n) bool, contiguous, n a
    multiple of 16. gram (block, block) float32, read right of the diagonal only; inverse (block,) float32; scale (n,)
    float32. Column j is set to the representable number (scale times an E4M3 number) nearest to
    value_j + inverse_j gradient_j where keep is set, else to 0. The decrease of value_j is added to error_j and, times
    gram_jk, to gradient_k. value and error are changed; so may be gradient.
    """
    values, errors, slopes, kept = (a.numpy() for a in (value, error, gradient, keep.view(torch.uint8)))
    matrix, inverses, scales = (a.contiguous().numpy() for a in (gram, inverse, scale))

    def part(begin: int, end: int) -> None:
        _descend(values, errors, slopes, kept, matrix, inverses, scales, begin, end)

    step = max(COUNT, cpu_arrays.PART // max(1, len(value)) // COUNT * COUNT)
    cpu_arrays.share(value.shape[1], step, part, torch.get_num_threads(), multiple=COUNT)


def folds(width: int) -> int:
    """The number of partial sums for a row of `width` columns."""
    return min(FOLDS, max(COUNT, 1 << (width - 1).bit_length()))


@jit(inline=True)
def _rounded(u: Any) -> Any:
    """u >= 0 lanes float32 -> (nearest E4M3 number as float32, its code without a sign as int32)."""
    unit = largest(as_int(u) & np.int32(0x7F800000), fill(np.int32(0x3C800000))) + np.int32(20 << 23)
    sum = u + as_float(unit)
    return sum - as_float(unit), as_int(sum) - unit + (unit >> np.int32(20)) - np.int32(141 << 3)


@jit(inline=True)
def _size(bits: Any, form: Any) -> Any:
    mask, shift, factor, _ = form
    return as_float((bits & mask) << shift) * factor


@jit()
def _fold(parts: Any) -> Any:
    half = parts.size // 2
    while half >= COUNT:
        for i in range(0, half, COUNT):
            store(parts, i, load(parts, i) + load(parts, half + i))
        half //= 2
    return lanes.total(load(parts, 0))


@jit()
def _lost(row: Any, scale: Any, power: Any, form: Any, parts: Any) -> Any:
    """The sum of power (u - q)² over a row, with q the rounded u."""
    by = fill(scale)
    for place in range(0, parts.size, COUNT):
        lost = fill(np.float32(0.0))
        for j in range(place, power.size, parts.size):
            u = _size(load(row, j), form) / by
            rest = u - _rounded(u)[0]
            lost = lost + rest * rest * load(power, j)
        store(parts, place, lost)
    return _fold(parts)


@jit()
def _write(row: Any, scale: Any, power: Any, form: Any, sign: Any, codes: Any, parts: Any, others: Any) -> Any:
    """Writes the codes of a row; returns the sums of power (u - q)² and of power u²."""
    by, nothing = fill(scale), fill(np.int32(0))
    for place in range(0, parts.size, COUNT):
        lost, whole = fill(np.float32(0.0)), fill(np.float32(0.0))
        for j in range(place, power.size, parts.size):
            bits, factor = load(row, j), load(power, j)
            u = _size(bits, form) / by
            q, code = _rounded(u)
            store(codes, j, select(code == nothing, nothing, code | ((bits >> sign) & np.int32(128))))
            rest = u - q
            lost = lost + rest * rest * factor
            whole = whole + u * u * factor
        store(parts, place, lost)
        store(others, place, whole)
    return _fold(parts), _fold(others)


@jit()
def _largest(row: Any, n: Any, out: Any, form: Any) -> Any:
    """Bits of the largest |w| of each lane, int32; prefetches the next row and the output."""
    top = fill(np.int32(0))
    for j in range(0, n // COUNT * COUNT, COUNT):
        lanes.will_read(row, j + n)
        lanes.will_write(out, j)
        top = largest(top, load(row, j) & form[0])
    return top


@jit(entry=True)
def _quantise(
    weight: Any, power: Any, factors: Any, form: Any, rounding: Any, folds: Any, codes: Any, scales: Any, sums: Any
) -> None:
    """Arguments as of quantise_rows: weight (rows, n) uint16|uint32; power (n, padded to whole lanes); codes uint8;
    scales (rows,) float32; sums (rows, 2) float64.
    """
    rows, n = weight.shape
    sign, size = np.int32(8 * weight.itemsize - 8), power.size
    parts, others = np.empty(folds, np.float32), np.empty(folds, np.float32)
    value, cut = np.empty(1, np.float32), np.int32((1 << rounding[0]) - 1)
    word = value.view(np.int32)
    line, line_out = np.zeros(size, weight.dtype), np.empty(size, np.uint8)
    for r in range(rows):
        row, row_out = weight[r], codes[r]
        if n < size:
            copy(row, line)
            row, row_out = line, line_out
        word[0] = lanes.top(_largest(row, size, row_out, form)) << form[1]
        amax = value[0] * form[2]
        scale, least = np.float32(1.0), np.inf
        for i in range(factors.size if amax > 0 else 0):
            value[0] = amax / np.float32(LARGEST) * factors[i]
            word[0] = max((word[0] + cut) & ~cut, rounding[1])
            lost = 0.0
            if factors.size > 1:
                lost = np.float64(value[0]) * value[0] * _lost(row, value[0], power, form, parts)
            if i == 0 or lost < least:
                scale, least = value[0], lost
        lost, whole = _write(row, scale, power, form, sign, row_out, parts, others)
        scales[r] = scale
        sums[r, 0] = np.float64(scale) * scale * lost
        sums[r, 1] = np.float64(scale) * scale * whole
        if n < size:
            copy(line_out, codes[r])


@jit(entry=True)
def _dequantise(codes: Any, scale: Any, out: Any) -> None:
    """codes (rows, n) uint8; scale (rows,) float32; out (rows, n), bits of bf16 (uint16) or float32 (uint32)."""
    rows, n = codes.shape
    size = -(-n // COUNT) * COUNT
    line, line_out = np.zeros(size, np.uint8), np.empty(size, out.dtype)
    least = fill(np.int32(121 << 23))  # 2**-6
    for r in range(rows):
        row, row_out, by = codes[r], out[r], fill(scale[r])
        if n < size:
            copy(row, line)
            row, row_out = line, line_out
        for j in range(0, size, COUNT):
            code = load(row, j)
            size_bits = (code & np.int32(127)) << np.int32(20)
            normal, small = size_bits + np.int32(120 << 23), as_float(size_bits + least) - as_float(least)
            value = select((code & np.int32(120)) == 0, as_int(small), normal)
            value = select((code & np.int32(127)) == 127, fill(np.int32(0x7FC00000)), value)
            found = as_int(as_float(value | ((code & np.int32(128)) << np.int32(24))) * by)
            if out.itemsize == 2:  # to nearest, ties to even
                found = (found + ((found >> np.int32(16)) & np.int32(1)) + np.int32(0x7FFF)) >> np.int32(16)
            store(row_out, j, found)
        if n < size:
            copy(line_out, out[r])


@jit(entry=True)
def _descend(
    value: Any, error: Any, gradient: Any, keep: Any, gram: Any, inverse: Any, scale: Any, begin: Any, end: Any
) -> None:
    """See descend_block; rows begin to end, a multiple of COUNT, sixteen at a time."""
    block, nothing, most = len(value), fill(np.float32(0.0)), fill(np.float32(LARGEST))
    slope = np.empty(block * COUNT, np.float32)
    for i in range(begin, end, COUNT):
        by = load(scale, i)
        for j in range(block):
            store(slope, j * COUNT, load(gradient[j], i))
        for j in range(block):
            old, row = load(value[j], i), gram[j]
            wanted = as_int(old + load(slope, j * COUNT) * inverse[j])
            u = as_float(wanted & np.int32(0x7FFFFFFF)) / by
            size = _rounded(select(u < most, u, most))[0] * by
            new = select(load(keep[j], i) == 1, as_float(as_int(size) | (wanted & np.int32(-0x80000000))), nothing)
            change = old - new
            store(value[j], i, new)
            store(error[j], i, load(error[j], i) + change)
            for k in range(j + 1, block):
                store(slope, k * COUNT, load(slope, k * COUNT) + change * row[k])
