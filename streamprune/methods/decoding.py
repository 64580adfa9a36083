"""Rows of quantised weights (disk/encoded.py): float32(code − zero) · float32(scale), rounded once.

compressed-tensors computes in the scales' dtype, which comes to the same for codes of eight bits: they, and their
differences, are exact in bf16. transformers' `Fp8Dequantize` computes in float32 and rounds to the model's dtype, its
`convert_moe_packed_tensors` (MXFP4) does not round at all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.disk.encoded import FLOAT, INTEGER, PACKED
from streamprune.kernels.cpu_pairs import unpack_pairs
from streamprune.methods.fp8 import dequantise

_BYTES_OF_WORD = 4


def decode(
    kind: str, codes: Tensor, scale: Tensor, zero: Tensor | None, width: int, shared: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """Rows (n, width) in `dtype`; of each, `shared` weights after another have a scale of their own.

    codes (n, …) as they are stored, scale (n, ceil(width / shared)) float32, zero the same shape or None. Of `pairs`,
    whose scales are exponents (uint8), the dtype is bf16.
    """
    if kind not in (FLOAT, INTEGER, PACKED):
        out = torch.empty(codes.shape[0] * scale.shape[1], 2 * codes.shape[-1], dtype=torch.bfloat16)
        unpack_pairs(codes.reshape(-1, codes.shape[-1]).contiguous(), scale.reshape(-1).contiguous(), out)
        return out.view(-1, width).to(dtype)
    padded = scale.shape[1] * shared
    if kind == FLOAT:
        found = dequantise(
            _units(codes.view(torch.uint8), padded, shared).view(codes.dtype), scale.reshape(-1, 1), dtype
        )
        return found.view(-1, padded)[:, :width]
    numbers = codes if kind == INTEGER else unpack_words(codes, bits, width)
    values = _units(numbers, padded, shared).float()
    if zero is not None:
        values.sub_(zero.reshape(-1, 1))
    return values.mul_(scale.reshape(-1, 1)).to(dtype).view(-1, padded)[:, :width]


def _units(codes: Tensor, padded: int, shared: int) -> Tensor:
    """Codes (n, width) as (n · padded / shared, shared), one scale for each row."""
    missing = padded - codes.shape[1]
    return (F.pad(codes, (0, missing)) if missing else codes).reshape(-1, shared)


def unpack_words(words: Tensor, bits: int, width: int) -> Tensor:
    """Codes (n, width) int8 of words (n, ceil(width · bits / 32)) int32, the lowest bits first; 4 or 8 bits each."""
    found = words.contiguous().view(torch.uint8).view(len(words), _BYTES_OF_WORD * words.shape[1])
    if bits == 4:
        found = torch.stack((found & 15, found >> 4), dim=-1).view(len(words), -1)
    return (
        found[:, :width].view(torch.int8) - (1 << (bits - 1))
        if bits == 4
        else (found[:, :width] ^ 128).view(torch.int8)
    )
