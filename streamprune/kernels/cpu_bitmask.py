"""Compiled loops that pack the nonzeros of rows and unpack them. See methods/bitmask.py for the drivers.

Weights are raw bits, uint8 to uint64, in C order; only an item without any bit set is zero, so -0.0 is kept. Column j
of a row is bit j % 8 of byte j // 8 of its mask. Every value is written to the output, and the position advances only
past those to keep, so that there is no branch to mispredict.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.kernels.jit import jit


def _two_of_four() -> tuple[Any, Any, Any, Any]:
    """Tables by the 4-bit mask of nonzero columns: the mask completed to two bits, these two columns, 1 if there are
    more."""
    filled, first, second, over = (np.zeros(16, np.uint8) for _ in range(4))
    for mask in range(16):
        nonzero = [j for j in range(4) if mask >> j & 1]
        zero = [j for j in range(4) if not mask >> j & 1]
        kept = sorted(nonzero + zero[: max(0, 2 - len(nonzero))])
        filled[mask] = sum(1 << j for j in kept)
        first[mask], second[mask] = kept[:2]
        over[mask] = len(kept) > 2
    return filled, first, second, over


_FILLED, _FIRST, _SECOND, _OVER = _two_of_four()


@jit(entry=True)
def count_rows(bits: Any, counts: Any) -> Any:
    """counts (n,) int64 = nonzeros of each row of bits (n, in)."""
    for r in range(bits.shape[0]):
        row = bits[r]
        kept: Any = 0
        for j in range(row.size):
            kept += row[j] != 0
        counts[r] = kept


@jit(entry=True)
def most_of_four(bits: Any) -> Any:
    """The largest number of nonzeros in a group of four columns of bits (n, in), in % 4 == 0."""
    flat = bits.reshape(-1)
    most = 0
    for i in range(0, flat.size, 4):
        kept = np.int32(flat[i] != 0) + (flat[i + 1] != 0) + (flat[i + 2] != 0) + (flat[i + 3] != 0)
        most = max(most, kept)
    return most


@jit(entry=True)
def pack(bits: Any, values: Any, mask: Any) -> Any:
    """Writes the nonzeros of bits (n, in) to values, and mask (n, ceil(in / 8)) uint8. Returns their number.

    values must have room for one more item than there are nonzeros.
    """
    at: Any = 0
    for r in range(bits.shape[0]):
        row, line = bits[r], mask[r]
        whole = row.size // 8
        for b in range(whole):
            byte = np.uint32(0)
            for j in range(8):
                value = row[8 * b + j]
                kept = np.uint32(value != 0)
                values[at] = value
                at += kept
                byte |= kept << np.uint32(j)
            line[b] = byte
        if row.size > 8 * whole:
            byte = np.uint32(0)
            for j in range(row.size - 8 * whole):
                value = row[8 * whole + j]
                kept = np.uint32(value != 0)
                values[at] = value
                at += kept
                byte |= kept << np.uint32(j)
            line[whole] = byte
    return at


@jit(entry=True)
def pack_two_four(bits: Any, values: Any, mask: Any) -> Any:
    """Writes two of every four columns of bits (n, in), in % 4 == 0, to values (n * in / 2,); mask as in pack.

    Where fewer than two are nonzero, the first zeros of the four are added. Returns False if more than two are nonzero
    anywhere; values and mask are then invalid.
    """
    at: Any = 0
    over = np.uint8(0)
    for r in range(bits.shape[0]):
        row, line = bits[r], mask[r]
        for g in range(row.size // 4):
            byte = np.uint32(0)
            for j in range(4):
                byte |= np.uint32(row[4 * g + j] != 0) << np.uint32(j)
            filled = _FILLED[byte]
            over |= _OVER[byte]
            values[at] = row[4 * g + _FIRST[byte]]
            values[at + 1] = row[4 * g + _SECOND[byte]]
            at += 2
            if g % 2:
                line[g // 2] |= filled << 4
            else:
                line[g // 2] = filled
    return over == 0


@jit(entry=True)
def count_bits(mask: Any, width: Any, counts: Any) -> Any:
    """counts (n,) int64 = bits set in each row of mask (n, ceil(width / 8)). False if a bit beyond `width` is set."""
    last = width % 8
    fine = True
    for r in range(mask.shape[0]):
        line = mask[r]
        kept: Any = 0
        for b in range(line.size):
            byte: Any = np.uint32(line[b])
            byte = byte - ((byte >> np.uint32(1)) & np.uint32(0x55))
            byte = (byte & np.uint32(0x33)) + ((byte >> np.uint32(2)) & np.uint32(0x33))
            kept += (byte + (byte >> np.uint32(4))) & np.uint32(0x0F)
        counts[r] = kept
        if last and line[line.size - 1] >> last:
            fine = False
    return fine


@jit(entry=True)
def unpack(values: Any, mask: Any, bits: Any) -> Any:
    """bits (n, in) = the next of `values` where mask (n, ceil(in / 8)) is set, 0 elsewhere.

    There must be as many values as bits set. The fast path reads up to eight values ahead, so it is not used near the
    end of values: nothing is read beyond them, even if a mapped mask has changed since its bits were counted.
    """
    at: Any = 0
    for r in range(bits.shape[0]):
        row, line = bits[r], mask[r]
        whole = row.size // 8
        for b in range(line.size):
            byte = np.uint32(line[b])
            if b < whole and at + 8 < values.size:
                for j in range(8):
                    kept = (byte >> np.uint32(j)) & np.uint32(1)
                    row[8 * b + j] = values[at] * kept
                    at += kept
            else:
                for j in range(min(8, row.size - 8 * b)):
                    row[8 * b + j] = 0
                    if (byte >> np.uint32(j)) & np.uint32(1) and at < values.size:
                        row[8 * b + j] = values[at]
                        at += 1
