"""Reads stored tensors in chunks of rows as arrays of bits; refuses NaN, Inf and linears of zeros in them.

As finite.py and zeros.py, which are for tensors, with the same messages; without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from streamprune.disk.header import TensorRef
from streamprune.disk.mapped import MappedFiles
from streamprune.kernels.cpu_arrays import FORMS, Array, first_nonfinite
from streamprune.model.damage import SAMPLED_COLUMNS, ZEROS_CHUNK_BYTES, nonfinite, refuse_zero_rows


def row_ranges(maps: MappedFiles, ref: TensorRef, chunk_bytes: int) -> Iterator[tuple[int, Array]]:
    """(first row, bits of rows) of a stored tensor, in chunks of about `chunk_bytes`; a scalar comes in one piece."""
    count = ref.shape[0] if ref.shape else 1
    step = max(1, chunk_bytes * count // max(ref.nbytes, 1))
    for begin in range(0, count, step):
        yield begin, maps.bits(ref, begin, min(begin + step, count)) if ref.shape else maps.bits(ref)


def finite_bits(
    maps: MappedFiles, ref: TensorRef, chunk_bytes: int, threads: int, whole: TensorRef
) -> Iterator[tuple[int, Array]]:
    """As row_ranges. Raises CheckpointError, with file, tensor and index, at the first NaN or Inf."""
    for begin, rows in row_ranges(maps, ref, chunk_bytes):
        refuse_nonfinite_bits(ref, begin, rows, threads, whole)
        yield begin, rows


def refuse_nonfinite_bits(ref: TensorRef, begin: int, rows: Array, threads: int, whole: TensorRef) -> None:
    """As finite.refuse_nonfinite."""
    flat = first_nonfinite(rows.reshape(-1), ref.dtype, threads)
    if flat is not None:
        bits = rows.reshape(-1)[flat : flat + 1]
        raise nonfinite(ref, begin, rows.shape, flat, _value(bits, ref.dtype), whole)


def _value(bits: Array, dtype: str) -> float:
    if dtype == "BF16":
        return float((bits.astype(np.uint32) << 16).view(np.float32)[0])
    return float(bits.view(np.float16 if dtype == "F16" else np.float32)[0])


def zero_rows_of_bits(rows: Array, dtype: str) -> Array:
    """Which of `rows` (n, …) are all zeros, of either sign: (n,) bool. A few columns rule out nearly all rows."""
    flat = rows.reshape(len(rows), -1)
    size = flat.dtype.type(FORMS[dtype][0])
    zero: Array = ~((flat[:, :: max(1, flat.shape[1] // SAMPLED_COLUMNS)] & size) != 0).any(1)
    if zero.any():
        zero[zero] = ~((flat[zero] & size) != 0).any(1)
    return zero


def refuse_zero_bits(ref: TensorRef, chunks: Iterable[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
    """As zeros.refuse_zeros."""
    zero = []
    for begin, rows in chunks:
        zero.append(zero_rows_of_bits(rows, ref.dtype))
        yield begin, rows
    refuse_zero_rows(ref, np.concatenate(zero))


def refuse_empty_bits(maps: MappedFiles, linears: Iterable[TensorRef]) -> None:
    """As zeros.refuse_empty, for linears that can be pruned; others are looked at when they are copied."""
    for ref in linears:
        middle = ref.shape[0] // 2
        if ref.dtype in FORMS and ref.nbytes and zero_rows_of_bits(maps.bits(ref, middle, middle + 1), ref.dtype).all():
            for _ in refuse_zero_bits(ref, row_ranges(maps, ref, ZEROS_CHUNK_BYTES)):
                maps.release([ref])
        maps.release([ref])
