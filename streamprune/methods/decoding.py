"""Rows of quantised weights: float32(code − zero point) · float32(scale), rounded once.

compressed-tensors computes in the dtype of the scales, which gives the same numbers for codes of up to eight bits: the
codes and their differences are exact in bf16. transformers' `Fp8Dequantize` computes in float32 and rounds to the
model's dtype; its `convert_moe_packed_tensors` (MXFP4) needs no rounding. GPTQModel (GPTQ) and AutoAWQ compute in the
dtype of the scales, too. If that is float16 and the model's is bfloat16, vLLM and transformers round the scales to
bfloat16 before they multiply; here, as in the files, scales keep their bits, so that weights differ in the last one.

Codes are (n, width) or packed into fewer items, scales (n, ceil(width / shared)): `shared` consecutive codes of a row
have a scale in common. Zero points have the shape of the scales. Codes from words come less half of their range, as do
their zero points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.kernels.cpu_pairs import unpack_pairs
from streamprune.methods.fp8 import dequantise


def decode_floats(codes: Tensor, scale: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """Rows (n, width) in `dtype` of FP8 codes (n, width), with scales in float32."""
    width = codes.shape[1]
    units = _units(codes.view(torch.uint8), scale, shared).view(codes.dtype)
    found = dequantise(units, scale.reshape(-1, 1), dtype)
    return found.view(len(codes), -1)[:, :width]


def decode_integers(codes: Tensor, scale: Tensor, zero: Tensor | None, shared: int, dtype: torch.dtype) -> Tensor:
    """Rows (n, width) in `dtype` of int8 codes (n, width), with scales and zero points in float32."""
    width = codes.shape[1]
    values = _units(codes, scale, shared).float()
    if zero is not None:
        values.sub_(zero.reshape(-1, 1))
    return values.mul_(scale.reshape(-1, 1)).to(dtype).view(len(codes), -1)[:, :width]


def decode_grouped(codes: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (n, width) in `dtype` of int8 codes (n, width), with scales and zero points (n, groups) in float32.

    group (width,): which of the groups a column belongs to.
    """
    values = codes.float()
    if zero is not None:
        values.sub_(zero.index_select(1, group))
    return values.mul_(scale.index_select(1, group)).to(dtype)


def decode_pairs(codes: Tensor, exponents: Tensor) -> Tensor:
    """Rows (n, 32 · groups) in bf16 of MXFP4 blocks (n, groups, 16) uint8 with exponents (n, groups) uint8."""
    size = codes.shape[-1]
    out = torch.empty(exponents.numel(), 2 * size, dtype=torch.bfloat16)
    unpack_pairs(codes.reshape(-1, size).contiguous(), exponents.reshape(-1).contiguous(), out)
    return out.view(len(codes), -1)


def unpack_words(words: Tensor, bits: int, width: int) -> Tensor:
    """Codes (n, width) int8 of words (n, ceil(width · bits / 32)) int32, lowest bits first; 4 or 8 bits each."""
    found = _bytes(words)
    if bits == 4:
        found = torch.stack((found & 15, found >> 4), dim=-1).view(len(words), -1)
        return found[:, :width].view(torch.int8) - 8
    return (found[:, :width] ^ 128).view(torch.int8)


def unpack_columns(words: Tensor) -> Tensor:
    """Codes (8 · c, n) int8, transposed, of words (n, c) int32 of AWQ: eight in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    rows, columns = words.shape
    found = _bytes(words.t())
    found = torch.stack((found & 15, found >> 4), dim=-1).view(columns, rows, 2, 4)  # (odd, half of the number)
    return found.permute(0, 3, 2, 1).reshape(8 * columns, rows).view(torch.int8) - 8


def one_more(words: Tensor, bits: int) -> Tensor:
    """Words int32 of zero points that are stored less one (see disk/gptq.py), as the zero points' own words."""
    return words + sum(1 << place for place in range(0, 32, bits))


def _bytes(words: Tensor) -> Tensor:
    """The bytes (n, 4 · c) of words (n, c), copied in this order whatever their strides are."""
    return torch.empty(words.shape, dtype=words.dtype).copy_(words).view(torch.uint8)


def _units(codes: Tensor, scale: Tensor, shared: int) -> Tensor:
    """Codes (n, width) as (number of scales, shared), the last of each row padded."""
    missing = scale.shape[1] * shared - codes.shape[1]
    return (F.pad(codes, (0, missing)) if missing else codes).reshape(-1, shared)
