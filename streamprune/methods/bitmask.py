"""Rows of weights as their nonzeros and a bitmask, and back: bits in, bits out, whatever the dtype.

A weight is kept when any of its bits is set; -0.0 is, and comes back bit for bit. Layouts: disk/packed.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.disk.header import DTYPE_BITS, TensorRef, show
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.packed import PackedTensor
from streamprune.errors import CheckpointError
from streamprune.kernels import cpu_bitmask

Bits = NDArray[np.unsignedinteger[Any]]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""By bytes of an item."""

CHUNK_BYTES = 16 << 20


def count_kept(bits: Bits) -> NDArray[np.int64]:
    """Nonzeros of each row of bits (n, in): (n,) int64."""
    counts = np.empty(len(bits), np.int64)
    cpu_bitmask.count_rows(_reading(bits), counts)
    return counts


def holds_24(bits: Bits) -> bool:
    """Whether at most two of every four neighbouring columns of bits (n, in) are nonzero; False if 4 does not
    divide in."""
    return bits.shape[1] % 4 == 0 and int(cpu_bitmask.most_of_four(_reading(bits))) <= 2


def pack_rows(bits: Bits, two_four: bool) -> tuple[Bits, NDArray[np.uint8]]:
    """What is kept of bits (n, in), row after row (kept,), and where it was: (n, ceil(in / 8)) uint8.

    With `two_four` two of every four columns are kept; where fewer are nonzero, the zeros with the lowest numbers
    too. Raises ValueError where more are, or if 4 does not divide in.
    """
    rows, width = bits.shape
    mask = np.empty((rows, -(-width // 8)), np.uint8)
    if not two_four:
        values = np.empty(bits.size + 1, bits.dtype)
        return values[: cpu_bitmask.pack(_reading(bits), values, mask)], mask
    values = np.empty(bits.size // 2, bits.dtype)
    if width % 4 or not cpu_bitmask.pack_two_four(_reading(bits), values, mask):
        raise ValueError("rows that do not hold 2:4")
    return values, mask


def unpack_rows(values: Bits, bitmask: NDArray[np.uint8], in_features: int) -> Bits:
    """Undoes pack_rows: values (kept,) and bitmask (n, ceil(in / 8)) to bits (n, in) in the dtype of values.

    Raises ValueError when there are not as many values as bits, or bits beyond the last column.
    """
    if int(_count_bits(bitmask, in_features).sum()) != values.size:
        raise ValueError(f"{values.size} values do not fit the bitmask")
    return _unpack(values, bitmask, in_features)


def unpacked_rows(
    maps: ShardMaps, packed: PackedTensor, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The dense rows of a packed tensor as (first row, bits (n, in)), some `chunk_bytes` at a time.

    Bits are unsigned integers of the item size; a tensor of rank other than 2 comes as (product of the rest, last
    axis). Pages that have been read are given back when the next chunk is asked for.

    Raises:
        CheckpointError: bits and values are not equally many, or a bit is set beyond the last column.
    """
    width, rows = packed.in_features, packed.rows
    item = DTYPE_BITS[packed.dtype] // 8
    line = -(-width // 8)
    step = max(1, chunk_bytes // max(1, width * item))
    at, total = 0, math.prod(packed.compressed.shape)
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        mask_ref = _piece(packed.bitmask, top * line, bottom * line)
        mask = _mapped(maps, mask_ref, np.uint8).reshape(bottom - top, line)
        try:
            kept = int(_count_bits(mask, width).sum())
        except ValueError as e:
            raise _wrong(packed.bitmask, f"has {e}") from e
        if at + kept > total:
            raise _wrong(packed.bitmask, f"has more bits than there are values ({total})")
        value_ref = _piece(packed.compressed, at * item, (at + kept) * item)
        yield top, _unpack(_mapped(maps, value_ref, UNSIGNED[item]), mask, width)
        at += kept
        maps.release([mask_ref, value_ref])
    if at != total:
        raise _wrong(packed.bitmask, f"has {at} bits for {total} values")


def _piece(ref: TensorRef, begin: int, end: int) -> TensorRef:
    return replace(ref, begin=ref.begin + begin, end=ref.begin + end)


def _mapped(maps: ShardMaps, ref: TensorRef, dtype: Any) -> NDArray[Any]:
    """The items of `ref` as they lie in the file, 1-D."""
    return np.frombuffer(maps.raw(ref), dtype) if ref.nbytes else np.empty(0, dtype)


def _wrong(ref: TensorRef, why: str) -> CheckpointError:
    return CheckpointError(f"{ref.shard}: tensor {show(ref.name)} {why}; download the checkpoint again")


def _reading(array: NDArray[Any]) -> NDArray[Any]:
    """The array in C order, aligned, and read-only as mapped files are: loops are then compiled once for a dtype."""
    view = np.require(array, requirements=["C", "A"]).view()
    view.flags.writeable = False
    return view


def _count_bits(bitmask: NDArray[np.uint8], in_features: int) -> NDArray[np.int64]:
    if bitmask.shape[1] != -(-in_features // 8):
        raise ValueError(f"{bitmask.shape[1]} bytes a row for {in_features} columns")
    counts = np.empty(len(bitmask), np.int64)
    if not cpu_bitmask.count_bits(_reading(bitmask), in_features, counts):
        raise ValueError(f"bits beyond column {in_features - 1}")
    return counts


def _unpack(values: Bits, bitmask: NDArray[np.uint8], in_features: int) -> Bits:
    bits = np.empty((len(bitmask), in_features), values.dtype)
    cpu_bitmask.unpack(_reading(values), _reading(bitmask), bits)
    return bits
