"""Counts over raw weights: zeros per row, nonzeros per group of M inputs, -0.0, NaN, Inf.

Works on the bits, so that all floating dtypes share one code path, and bf16 and FP8 need no conversion. Blocks should
be about a quarter of a megabyte, so that they stay in the cache for the ten or so passes over them. Eight flags are
summed with one multiplication: they are bytes of 0 or 1, and the top byte of `eight flags as one integer ×
0x0101010101010101` is their sum.

When does a matrix have a pattern N:M? For every M, some N holds for all groups by accident. A pattern counts as
intended if groups are full (nine tenths of N on average), or if N would not hold for randomly placed zeros. The latter
means that in a single row of in / M groups, with weights nonzero at the matrix's own density p, at least ten groups
with more than N nonzeros would be expected: in / M · P(Binomial(M, p) > N) >= 10. The test uses one row because zeros
of different rows are correlated (dead inputs, scores that depend on the input), so that an accident repeats itself in
every row. Thus a 2:4 matrix with many more zeros than 2:4 requires is still recognised as 2:4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUPS = (2, 4, 8, 16, 32)
"""The M of the N:M patterns that are looked for."""

_FULL = 0.9  # mean nonzeros of a group / N, from which N:M counts as intended
_BROKEN = 10.0  # or the expected groups of a row that random zeros would make too full


@dataclass(frozen=True)
class FloatBits:
    """The bits of a floating dtype: a magnitude >= `nan` is NaN, one equal to `inf` is Inf (None: it has no Inf)."""

    view: type[np.unsignedinteger[Any]]
    sign: int
    nan: int
    inf: int | None


FLOATS: Mapping[str, FloatBits] = {
    "F64": FloatBits(np.uint64, 1 << 63, 0x7FF0000000000001, 0x7FF0000000000000),
    "F32": FloatBits(np.uint32, 1 << 31, 0x7F800001, 0x7F800000),
    "F16": FloatBits(np.uint16, 1 << 15, 0x7C01, 0x7C00),
    "BF16": FloatBits(np.uint16, 1 << 15, 0x7F81, 0x7F80),
    "F8_E5M2": FloatBits(np.uint8, 1 << 7, 0x7D, 0x7C),
    "F8_E4M3": FloatBits(np.uint8, 1 << 7, 0x7F, None),
}
"""By the dtype's name in safetensors; the FNUZ variants of float8 are not supported."""


def long_run(zero: NDArray[np.bool_]) -> int:
    """The longest run of zero rows, where it is longer than in any trained matrix; else 0. `zero` is (n,) bool.

    Suspicious is a run of all rows, or of at least an eighth of them and at least 4.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], zero, [False]]).astype(np.int8)))
    longest = int((edges[1::2] - edges[::2]).max(initial=0))
    return longest if longest and (longest == len(zero) or longest >= max(4, len(zero) / 8)) else 0


class MatrixCount:
    """Counts over one matrix (out, in), passed in blocks to `add`; each weight exactly once.

    limit: (n, m) if every m inputs should have at most n nonzeros, else None. The number of groups with more and the
    first of them are recorded.
    """

    def __init__(self, dtype: str, shape: tuple[int, int], limit: tuple[int, int] | None = None) -> None:
        self.bits = FLOATS[dtype]
        self.shape = shape
        self.limit = limit
        self.row_nonzeros: NDArray[np.int64] = np.zeros(shape[0], np.int64)  # (out,)
        sizes = {*GROUPS, limit[1]} if limit else set(GROUPS)
        self.fullest = {m: 0 for m in sorted(sizes) if shape[1] % m == 0}
        """M -> the largest number of nonzeros in a group of M, for GROUPS and the limit's M."""
        self.found = dict.fromkeys(("-0.0", "NaN", "Inf"), 0)
        self.first: dict[str, tuple[int, int]] = {}
        """A key of `found`, or "group" (see limit) -> row and first input of the first occurrence."""
        self.overfull = 0
        self.first_overfull = 0
        """Groups with more than limit's n nonzeros, and how many nonzeros the first of them has."""

    @property
    def row_zeros(self) -> NDArray[np.int64]:
        """Zeros of each row, -0.0 counted: int64 (out,)."""
        return self.shape[1] - self.row_nonzeros

    @property
    def pattern(self) -> tuple[int, int] | None:
        """The (n, m) with the smallest n / m that all groups satisfy, and of equal ones that with the smallest m.

        None if there is none with 0 < n < m that counts as intended (see the top).
        """
        nonzeros, weights = int(self.row_nonzeros.sum()), self.shape[0] * self.shape[1]
        held = []
        for m, n in self.fullest.items():
            if 0 < n < m:
                full = nonzeros >= _FULL * n * (weights // m)
                if full or self.shape[1] // m * _chance_of_more(n, m, nonzeros / weights) >= _BROKEN:
                    held.append((n / m, m, n))
        return (min(held)[2], min(held)[1]) if held else None

    def add(self, row: int, column: int, block: NDArray[Any]) -> None:
        """Counts `block`, unsigned integers (rows, inputs): the part of the matrix that begins at `row` and `column`.

        Its width must be that of the matrix, or a multiple of every M in `fullest`.
        """
        bits = self.bits
        block = np.ascontiguousarray(block)
        magnitude = block & bits.view(bits.sign - 1)
        nonzero = magnitude != 0
        counts8 = self._groups(row, column, nonzero)
        rows = counts8 if counts8 is not None else nonzero
        self.row_nonzeros[row : row + len(block)] += rows.sum(axis=1, dtype=np.int64)
        if np.count_nonzero(block) != np.count_nonzero(nonzero):
            self._note("-0.0", row, column, block == bits.view(bits.sign))
        if magnitude.size and int(magnitude.max()) >= (bits.nan if bits.inf is None else bits.inf):
            self._note("NaN", row, column, magnitude >= bits.view(bits.nan))
            if bits.inf is not None:
                self._note("Inf", row, column, magnitude == bits.view(bits.inf))

    def _note(self, kind: str, row: int, column: int, where: NDArray[np.bool_]) -> None:
        count = int(np.count_nonzero(where))
        if count:
            y, x = divmod(int(where.argmax()), where.shape[1])
            place = (row + y, column + x)
            self.first[kind] = min(place, self.first.get(kind, place))
            self.found[kind] += count

    def _groups(self, row: int, column: int, nonzero: NDArray[np.bool_]) -> NDArray[np.uint8] | None:
        """Updates `fullest` and `overfull`; returns the nonzeros of every 8 inputs, or None if 8 does not divide
        `in`."""
        limit = self.limit[1] if self.limit else 0
        counts8: NDArray[np.uint8] | None = None
        if self.shape[1] % 8 == 0:
            counts8 = group_counts(nonzero, 8)
        for m in self.fullest:
            if m != limit and self.fullest[m] == m:
                continue  # a group is full: there is no pattern with this M
            if m > 8 and m % 8 == 0 and counts8 is not None:
                counts = _added(counts8, m // 8)
            else:
                counts = counts8 if m == 8 and counts8 is not None else group_counts(nonzero, m)
            most = int(counts.max(initial=0))
            self.fullest[m] = max(self.fullest[m], most)
            if self.limit and m == limit and most > self.limit[0]:
                over = counts > self.limit[0]
                y, x = divmod(int(over.argmax()), over.shape[1])
                place = (row + y, column + x * m)
                if not self.overfull or place < self.first["group"]:
                    self.first["group"], self.first_overfull = place, int(counts[y, x])
                self.overfull += int(np.count_nonzero(over))
        return counts8


def group_counts(nonzero: NDArray[np.bool_], m: int) -> NDArray[np.uint8]:
    """How many of every m consecutive columns are true: bool (rows, in), contiguous -> uint8 (rows, in / m)."""
    if m == 2:
        return ((nonzero.view(np.uint16) * np.uint16(0x0101)) >> np.uint16(8)).astype(np.uint8)
    if m == 4:
        return ((nonzero.view(np.uint32) * np.uint32(0x01010101)) >> np.uint32(24)).astype(np.uint8)
    if m == 8:
        product = nonzero.view(np.uint64) * np.uint64(0x0101010101010101)
        return (product >> np.uint64(56)).astype(np.uint8)
    return _added(nonzero.view(np.uint8), m)


def _chance_of_more(n: int, m: int, density: float) -> float:
    """P(Binomial(m, density) > n)."""
    return math.fsum(math.comb(m, k) * density**k * (1 - density) ** (m - k) for k in range(n + 1, m + 1))


def _added(counts: NDArray[np.uint8], m: int) -> NDArray[np.uint8]:
    """Sums of every m consecutive columns of uint8 (rows, n * m): uint8 (rows, n). A sum must stay below 256."""
    total = counts[:, 0::m].copy()
    for k in range(1, m):
        total += counts[:, k::m]
    return total
