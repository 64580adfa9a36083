"""Compiled loops of the CPU kernels: input statistics, search for NaN and Inf. Drivers are in cpu.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.jit import jit
from streamprune.kernels.lanes import COUNT, as_float, as_int, count, fill, largest, load, select, store

TOKENS = 256  # tokens summed in float32 before they are added to the float64 accumulators
COLUMNS = 1024  # columns visited together: two float32 buffers of 4 KiB each
_AT_ONCE = 4  # tokens added in registers
_SEARCH = 8192


@jit(inline=True)
def _value(bits: Any, form: Any) -> Any:
    """Lanes of bits as signed float32; NaN and Inf are preserved."""
    mask, shift, factor, infinity = form
    if factor == np.float32(1.0):
        return as_float(bits << shift)
    size = bits & mask
    special = select(size < infinity, fill(np.int32(0)), fill(np.int32(0x7F800000)))
    return as_float(as_int(as_float(size << shift) * factor) | ((bits ^ size) << 16) | special)


@jit()
def _add(x: Any, width: Any, begin: Any, end: Any, left: Any, form: Any, sums: Any, squares: Any) -> None:
    """Adds tokens begin..end of the columns from `left` of x (tokens * width,) to sums and squares, float32 whole
    lanes."""
    for j in range(0, sums.size, COUNT):
        total, square = load(sums, j), load(squares, j)
        for t in range(begin, end):
            value = _value(load(x, t * width + left + j), form)
            total = total + value
            square = square + value * value
        store(sums, j, total)
        store(squares, j, square)


@jit(entry=True)
def accumulate_columns(x: Any, width: Any, left: Any, right: Any, form: Any, sums: Any, squares: Any) -> None:
    """sums += sum over tokens, squares += sum of squares, of columns left..right of x (tokens * width,) raw bits.

    sums, squares (width,) float64. Each column is summed on its own, with tokens in order, so that the result does not
    depend on the number of threads or on how they share the columns.
    """
    tokens = x.size // width
    edge = np.zeros(TOKENS * COUNT, x.dtype)
    part = np.empty((2, COLUMNS), np.float32)
    for begin in range(0, tokens, TOKENS):
        end = min(begin + TOKENS, tokens)
        for first in range(left, right, COLUMNS):
            columns = min(COLUMNS, right - first)
            whole = columns // COUNT * COUNT
            part[:] = np.float32(0.0)
            for t in range(begin, end, _AT_ONCE):
                _add(x, width, t, min(t + _AT_ONCE, end), first, form, part[0, :whole], part[1, :whole])
            if whole < columns:  # padded copy of the last columns, as memory behind them may not be readable
                for t in range(begin, end):
                    for j in range(columns - whole):
                        edge[(t - begin) * COUNT + j] = x[t * width + first + whole + j]
                own = whole + COUNT
                _add(edge, COUNT, 0, end - begin, 0, form, part[0, whole:own], part[1, whole:own])
            for j in range(columns):
                sums[first + j] += np.float64(part[0, j])
                squares[first + j] += np.float64(part[1, j])


@jit(entry=True)
def first_nonfinite(bits: Any, form: Any) -> Any:
    """Index of the first NaN or Inf of (size,) raw bits, or -1."""
    mask, _, _, infinity = form
    for begin in range(0, bits.size, _SEARCH):
        end = min(begin + _SEARCH, bits.size)
        whole, top = begin + (end - begin) // COUNT * COUNT, fill(np.int32(0))
        for i in range(begin, whole, COUNT):
            top = largest(top, load(bits, i) & mask)
        if whole < end or count(top < infinity) < COUNT:
            for i in range(begin, end):
                if np.int32(bits[i] & mask) >= infinity:
                    return i
    return -1
