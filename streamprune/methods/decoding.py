"""Rows of quantised weights: float32(code − zero point) · float32(scale), rounded once.

compressed-tensors computes in the dtype of the scales, which gives the same numbers for codes of up to eight bits: the
codes and their differences are exact in bf16. transformers' `Fp8Dequantize` computes in float32 and rounds to the
model's dtype; its `convert_moe_packed_tensors` (MXFP4) needs no rounding.

Codes are (n, width) or packed into fewer items, scales (n, ceil(width / shared)): `shared` consecutive codes of a row
have a scale in common. Zero points have the shape of the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.kernels.cpu_pairs import unpack_pairs
from streamprune.methods.fp8 import dequantise

_BYTES_OF_WORD = 4


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


def decode_pairs(codes: Tensor, exponents: Tensor) -> Tensor:
    """Rows (n, 32 · groups) in bf16 of MXFP4 blocks (n, groups, 16) uint8 with exponents (n, groups) uint8."""
    size = codes.shape[-1]
    out = torch.empty(exponents.numel(), 2 * size, dtype=torch.bfloat16)
    unpack_pairs(codes.reshape(-1, size).contiguous(), exponents.reshape(-1).contiguous(), out)
    return out.view(len(codes), -1)


def unpack_words(words: Tensor, bits: int, width: int) -> Tensor:
    """Codes (n, width) int8 of words (n, ceil(width · bits / 32)) int32, lowest bits first; 4 or 8 bits each."""
    found = words.contiguous().view(torch.uint8).view(len(words), _BYTES_OF_WORD * words.shape[1])
    if bits == 4:
        found = torch.stack((found & 15, found >> 4), dim=-1).view(len(words), -1)
        return found[:, :width].view(torch.int8) - 8
    return (found[:, :width] ^ 128).view(torch.int8)


def _units(codes: Tensor, scale: Tensor, shared: int) -> Tensor:
    """Codes (n, width) as (number of scales, shared), the last of each row padded."""
    missing = scale.shape[1] * shared - codes.shape[1]
    return (F.pad(codes, (0, missing)) if missing else codes).reshape(-1, shared)
