"""Encoders of GPTQ and AWQ, from the published descriptions of the formats alone: plain loops in numpy, float64.

They are for `quantised_files.quantise`; nothing of the program is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from quantised_files import Encode
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The outputs of a word of AWQ, from its lowest bits on."""


def words_of(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Words (n, m · bits / 32) int32 of codes (n, m), those of a word in this order from its lowest bits on."""
    each = 32 // bits
    order = tuple(range(each)) if order is None else order
    words = np.zeros((codes.shape[0], codes.shape[1] // each), np.uint64)
    for word in range(words.shape[1]):
        for place, code in enumerate(order):
            words[:, word] |= codes[:, word * each + code].astype(np.uint64) << np.uint64(place * bits)
    return words.astype(np.uint32).view(np.int32)


def less_one(words: np.ndarray, bits: int) -> np.ndarray:
    """Words of zero points as the first format has them: less a word of ones."""
    ones = sum(1 << place for place in range(0, 32, bits))
    return ((words.view(np.uint32).astype(np.int64) - ones) % (1 << 32)).astype(np.uint32).view(np.int32)


def gptq(
    bits: int = 4, size: int = 16, sym: bool = True, desc_act: bool = False, form: str | None = "gptq",
    scales: torch.dtype = torch.bfloat16, g_idx: bool = True, seed: int = 0,
) -> tuple[Encode, dict[str, Any]]:  # fmt: skip
    """GPTQ; a third of the scales of symmetric codes are negative, as AutoRound's may be."""
    drawn = np.random.default_rng(seed)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        inputs = weight.shape[1]
        group = np.arange(inputs) // (inputs if size == -1 else size)
        if desc_act:
            group = drawn.permutation(group)
        codes, scale, zero, dense = _rounded(weight, group, bits, sym, scales, drawn)
        zeros = words_of(zero.T, bits)
        module = name.removesuffix(".weight")
        made = {
            f"{module}.qweight": torch.from_numpy(words_of(codes, bits).T.copy()),
            f"{module}.qzeros": torch.from_numpy(zeros if form == "gptq_v2" else less_one(zeros, bits)),
            f"{module}.scales": scale.T.contiguous(),
        }
        if g_idx:
            made[f"{module}.g_idx"] = torch.from_numpy(group.astype(np.int32))
        return made, dense

    described = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, "desc_act": desc_act}
    return encode, described | ({} if form is None else {"checkpoint_format": form})


def awq(size: int = 16, scales: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Encode, dict[str, Any]]:
    """AWQ as AutoAWQ's version "gemm" has it."""
    drawn = np.random.default_rng(seed)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        inputs = weight.shape[1]
        group = np.arange(inputs) // (inputs if size == -1 else size)
        codes, scale, zero, dense = _rounded(weight, group, 4, False, scales, drawn)
        module = name.removesuffix(".weight")
        made = {
            f"{module}.qweight": torch.from_numpy(words_of(codes.T, 4, AWQ_ORDER)),
            f"{module}.qzeros": torch.from_numpy(words_of(zero.T, 4, AWQ_ORDER)),
            f"{module}.scales": scale.T.contiguous(),
        }
        return made, dense

    described = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    return encode, described | {"modules_to_not_convert": None}


def _rounded(
    weight: Tensor, group: np.ndarray, bits: int, sym: bool, dtype: torch.dtype, drawn: np.random.Generator
) -> tuple[np.ndarray, Tensor, np.ndarray, Tensor]:
    """Codes (out, in), scales (out, groups), zero points (out, groups), and what they stand for in the weight's dtype.

    Every seventh output is positive, so that its zero points are 0.
    """
    dense = weight.double().numpy().copy()
    if not sym:
        dense[::7] = abs(dense[::7])
    most, half = 2**bits - 1, 2 ** (bits - 1)
    count = int(group.max()) + 1
    scale, zero = np.zeros((len(dense), count)), np.full((len(dense), count), half)
    for number in range(count):
        part = dense[:, group == number]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale[:, number] = np.maximum(-low, high) / half if sym else (high - low) / most
        if not sym:
            zero[:, number] = np.clip(np.round(-low / scale[:, number]), 0, most)
    if sym:
        scale *= np.where(drawn.random(scale.shape) < 1 / 3, -1, 1)
    stored = torch.from_numpy(scale).to(dtype)
    scale = stored.double().numpy()
    codes = np.clip(np.round(dense / scale[:, group]) + zero[:, group], 0, most).astype(np.int64)
    product = torch.from_numpy((codes - zero[:, group]) * scale[:, group])
    return codes, stored, zero.astype(np.int64), product.to(dtype).to(weight.dtype)
