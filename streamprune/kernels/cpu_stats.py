"""Compiled loops of the CPU kernels: input statistics, search for NaN and Inf. Drivers are in cpu.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.jit import jit

TOKENS = 256  # tokens summed in float32 before they are added to the float64 accumulators
COLUMNS = 1024  # columns visited together: two float32 buffers of 4 KiB each
_SEARCH = 8192
_F16_SCALE = np.float32(2.0**112)


@jit()
def _decode(row: Any, kind: Any, value: Any) -> None:
    """Signed float32 values of one stretch of a row of raw bits; NaN and Inf stay what they are."""
    if kind == 0:
        for j in range(row.size):
            value[j] = np.uint32(np.uint32(row[j]) << np.uint32(16)).view(np.float32)
    elif kind == 1:
        for j in range(row.size):
            half = np.uint32(row[j])
            small = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * _F16_SCALE
            sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
            special = np.uint32(0x7F800000) if (half & np.uint32(0x7C00)) == 0x7C00 else np.uint32(0)
            value[j] = np.uint32(np.float32(small).view(np.uint32) | sign | special).view(np.float32)
    else:
        for j in range(row.size):
            value[j] = np.uint32(row[j]).view(np.float32)


@jit()
def _add(value: Any, sums: Any, squares: Any) -> None:
    for j in range(value.size):
        v = value[j]
        sums[j] += v
        squares[j] += v * v


@jit()
def accumulate_columns(x: Any, kind: Any, sums: Any, squares: Any) -> None:
    """sums += sum over tokens, squares += sum of squares; x (tokens, columns) raw bits, the rest float64.

    Each column is added up on its own, tokens in order, so neither the number of threads nor the way the
    columns are split between them changes a bit.
    """
    tokens, columns = x.shape
    value = np.empty(COLUMNS, np.float32)
    part, part_squares = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    for left in range(0, columns, COLUMNS):
        right = min(left + COLUMNS, columns)
        width = right - left
        for begin in range(0, tokens, TOKENS):
            part[:] = np.float32(0.0)
            part_squares[:] = np.float32(0.0)
            for t in range(begin, min(begin + TOKENS, tokens)):
                _decode(x[t, left:right], kind, value[:width])
                _add(value[:width], part[:width], part_squares[:width])
            for j in range(width):
                sums[left + j] += np.float64(part[j])
                squares[left + j] += np.float64(part_squares[j])


@jit()
def first_at_least(bits: Any, magnitude: Any, infinity: Any) -> Any:
    """Index of the first element with (bits & magnitude) >= infinity, or -1."""
    for begin in range(0, bits.size, _SEARCH):
        end = min(begin + _SEARCH, bits.size)
        found = np.int32(0)
        for value in bits[begin:end]:
            found = np.int32(found | np.int32((value & magnitude) >= infinity))
        if found:
            for i in range(begin, end):
                if (bits[i] & magnitude) >= infinity:
                    return i
    return -1
