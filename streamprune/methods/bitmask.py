"""Rows of weights as their nonzero values and a bitmask, and back: bits in, bits out, whatever the dtype.

A weight is kept when any of its bits is set, so -0.0 is kept and comes back bit for bit. A row of a bitmask has one bit
for each column, the lowest bit of each byte first; columns beyond the last one have no bits set. disk/packed.py
describes the layouts of packed checkpoints.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.kernels import cpu_bitmask

Bits = NDArray[np.unsignedinteger[Any]]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Unsigned dtype by item size in bytes."""


def count_kept(bits: Bits) -> NDArray[np.int64]:
    """How many items of each row of bits (n, in) are kept: (n,) int64."""
    counts = np.empty(len(bits), np.int64)
    cpu_bitmask.count_rows(_reading(bits), counts)
    return counts


def holds_24(bits: Bits) -> bool:
    """Whether at most two of every four consecutive columns of bits (n, in) are nonzero.

    False if `in` is not a multiple of 4.
    """
    return bits.shape[1] % 4 == 0 and int(cpu_bitmask.most_of_four(_reading(bits))) <= 2


def pack_rows(bits: Bits, two_four: bool) -> tuple[Bits, NDArray[np.uint8]]:
    """The kept values of bits (n, in), row after row (kept,), and their bitmask (n, ceil(in / 8)) uint8.

    With `two_four`, exactly two of every four columns are kept: where fewer are nonzero, the first zeros of the four
    are kept as well. Raises ValueError where more than two are nonzero, or if `in` is not a multiple of 4.
    """
    rows, width = bits.shape
    mask = np.empty((rows, -(-width // 8)), np.uint8)
    if not two_four:
        values = np.empty(bits.size + 1, bits.dtype)
        return values[: cpu_bitmask.pack(_reading(bits), values, mask)], mask
    values = np.empty(bits.size // 2, bits.dtype)
    if width % 4 or not cpu_bitmask.pack_two_four(_reading(bits), values, mask):
        raise ValueError("the rows do not satisfy 2:4")
    return values, mask


def unpack_rows(values: Bits, bitmask: NDArray[np.uint8], in_features: int) -> Bits:
    """The inverse of pack_rows: values (kept,) and bitmask (n, ceil(in / 8)) to bits (n, in), in the dtype of values.

    Raises ValueError when the bitmask does not have as many bits set as there are values, or has one set beyond the
    last column.
    """
    if int(count_bits(bitmask, in_features).sum()) != values.size:
        raise ValueError(f"{values.size} values do not fit the bitmask")
    return scatter(values, bitmask, in_features)


def count_bits(bitmask: NDArray[np.uint8], in_features: int) -> NDArray[np.int64]:
    """How many bits are set in each row of a bitmask (n, ceil(in / 8)): (n,) int64.

    Raises ValueError for a bitmask of another width, or with a bit set beyond the last column.
    """
    if bitmask.shape[1] != -(-in_features // 8):
        raise ValueError(f"{bitmask.shape[1]} bytes a row for {in_features} columns")
    counts = np.empty(len(bitmask), np.int64)
    if not cpu_bitmask.count_bits(_reading(bitmask), in_features, counts):
        raise ValueError(f"bits beyond column {in_features - 1}")
    return counts


def scatter(values: Bits, bitmask: NDArray[np.uint8], in_features: int) -> Bits:
    """As unpack_rows, without its checks: the bitmask must have as many bits set as there are values (`count_bits`)."""
    bits = np.empty((len(bitmask), in_features), values.dtype)
    cpu_bitmask.unpack(_reading(values), _reading(bitmask), bits)
    return bits


def _reading(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous, aligned, read-only view or copy. Mapped files are read-only too, so that Numba compiles each loop
    only once for a dtype."""
    view = np.require(array, requirements=["C", "A"]).view()
    view.flags.writeable = False
    return view
