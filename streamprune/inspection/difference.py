"""Comparison of a checkpoint with another one of the same tensors, its source: what changed, and linears by how much.

Linears are compared by value: scale × code for FP8 (in float32, as runtimes compute it), unpacked if they are packed.
All other tensors are compared bit for bit. Both checkpoints are read in blocks of rows that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamprune.disk.mapping import SAFETENSORS_DTYPES, ShardMaps
from streamprune.inspection.scales import WeightScales, read_scales
from streamprune.inspection.stored import BitStream, StoredTensor
from streamprune.kernels.cpu_compare import compare
from streamprune.kernels.lanes import COUNT

EQUAL, CHANGED, MISSING, EXTRA = "equal", "changed", "missing", "extra"
OTHER_SHAPE, OTHER_DTYPE = "other shape", "other dtype"

_BLOCK_BYTES = 2**18
_ITEMS = 2**16  # values compared at a time: half a megabyte as float64
_DOT = 8192
_SURELY = 1e-20  # sums of squares above it are not of numbers so small that float32 loses them
_CODES = {
    name: torch.arange(256, dtype=torch.uint8).view(SAFETENSORS_DTYPES[name]).float().numpy()
    for name in ("F8_E4M3", "F8_E5M2")
}


@dataclass(frozen=True)
class LinearDifference:
    """One linear W compared with W' of the source.

    kept_changed: nonzero weights whose value differs from the source's; revived: those of them that are zero in the
    source. squared_error, squared_norm: Σ(W − W')² and ΣW'², summed in float64. All four are None if values cannot be
    computed, because the scales of one of the two do not fit its codes.
    """

    status: str
    """"equal" (bit for bit, with the same dtype and scales) or "changed"."""
    source_dtype: str
    kept_changed: int | None
    revived: int | None
    squared_error: float | None
    squared_norm: float | None

    @property
    def relative_error(self) -> float | None:
        """‖W − W'‖ / ‖W'‖ (Frobenius norms); None if it is not finite or not known."""
        return relative_error(self.squared_error, self.squared_norm)

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values, with the relative error in place of the sums."""
        return {
            "status": self.status, "source_dtype": self.source_dtype, "kept_changed": self.kept_changed,
            "revived": self.revived, "relative_error": self.relative_error,
        }  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """All tensors compared with those of `source`.

    tensors: name -> "equal", "changed", "missing" (only the source has it), "extra" (the source does not have it),
    "other shape" or "other dtype"; a linear of another floating dtype is "changed". Linears that `only` and `skip`
    exclude are not listed; scales count as part of their linears.
    """

    source: Path
    tensors: Mapping[str, str]
    linears: frozenset[str]
    """Names of those tensors that are linears."""
    relative_error: float | None
    """Of all linears together, as if they were one matrix; None as for a single one."""

    def named(self, status: str, *, linears: bool) -> list[str]:
        """The tensors of that status that are linears, or those that are not."""
        return [name for name, is_so in self.tensors.items() if is_so == status and (name in self.linears) == linears]

    @property
    def amiss(self) -> dict[str, str]:
        """Name -> status of tensors that pruning should not have touched: all but equal tensors and changed linears."""
        return {
            name: status
            for name, status in self.tensors.items()
            if status != EQUAL and not (status == CHANGED and name in self.linears)
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "source": str(self.source),
            "tensors": len(self.tensors),
            "equal": sum(status == EQUAL for status in self.tensors.values()),
            "linears_changed": len(self.named(CHANGED, linears=True)),
            "relative_error": self.relative_error,
            "amiss": self.amiss,
        }


def relative_error(squared_error: float | None, squared_norm: float | None) -> float | None:
    """sqrt(squared_error / squared_norm); 0 if there is no error, None if it is not finite or not known."""
    if squared_error is None or squared_norm is None:
        return None
    if squared_error == 0:
        return 0.0
    found = math.sqrt(squared_error / squared_norm) if squared_norm > 0 else math.inf
    return found if math.isfinite(found) else None


class LinearComparison:
    """Compares a linear, whose bits are passed to `add`, with the source's, which it reads itself; by stored rows."""

    def __init__(self, maps: ShardMaps, tensor: StoredTensor, source_maps: ShardMaps, source: StoredTensor) -> None:
        self._source_dtype = source.dtype
        scales, source_scales = read_scales(maps, tensor), read_scales(source_maps, source)
        self._known = not (scales and scales.fault) and not (source_scales and source_scales.fault)
        width = tensor.shape[1]
        self._rows = max(1, _ITEMS // width)
        self._mine = _Values(tensor.dtype, scales, self._rows, width)
        self._source = _Values(source.dtype, source_scales, self._rows, width)
        self._wide = np.empty((self._rows, width))
        self._flags = np.empty((2, self._rows, width), np.bool_)
        self._stream = BitStream(source_maps, source)
        self._same_kind = tensor.dtype == source.dtype and _same_scales(maps, tensor, source_maps, source)
        self._equal = self._same_kind
        self._plain = self._same_kind and tensor.dtype == "BF16" and not scales
        self._changed = self._revived = 0
        self._error = self._norm = 0.0

    def add(self, row: int, bits: NDArray[Any]) -> None:
        """Compares `bits` (n, width), unsigned integers: the stored rows from `row` on. Rows must come in order."""
        for top in range(0, len(bits), self._rows):
            piece = bits[top : top + self._rows]
            self._add(row + top, piece, self._stream.take(piece.size).reshape(piece.shape))

    def _add(self, row: int, bits: NDArray[Any], source_bits: NDArray[Any]) -> None:
        if self._plain and bits.size % COUNT == 0:
            differing, changed, revived, error, norm = compare(bits.reshape(-1), source_bits.reshape(-1))
            if _SURELY < norm < math.inf and (not differing or _SURELY < error < math.inf):
                self._equal &= not differing
                self._changed, self._revived = self._changed + changed, self._revived + revived
                self._error, self._norm = self._error + error, self._norm + norm
                return
        same = self._same_kind and np.array_equal(bits, source_bits)
        self._equal &= same
        if not self._known:
            return
        wide, flags, others = (work[: len(bits)] for work in (self._wide, *self._flags))
        with np.errstate(over="ignore", invalid="ignore"):
            exact = self._source.values(row, source_bits)
            np.copyto(wide, exact)
            self._norm += _sum_of_squares(wide)
            if same:
                return
            values = self._mine.values(row, bits)
            np.subtract(values, exact, out=wide)
            self._error += _sum_of_squares(wide)
        kept = np.not_equal(values, 0, out=flags)
        differ = (
            np.not_equal(bits, source_bits, out=others) if self._same_kind else np.not_equal(values, exact, out=others)
        )
        self._changed += int(np.count_nonzero(np.logical_and(kept, differ, out=others)))
        zero = np.equal(exact, 0, out=others)
        if zero.any():
            self._revived += int(np.count_nonzero(np.logical_and(kept, zero, out=others)))

    def finish(self) -> LinearDifference:
        """The result, after the last row. Raises CheckpointError if the parts of the source do not fit together."""
        self._stream.finish()
        status = EQUAL if self._equal else CHANGED
        if not self._known:
            return LinearDifference(status, self._source_dtype, None, None, None, None)
        return LinearDifference(status, self._source_dtype, self._changed, self._revived, self._error, self._norm)


def same_bytes(maps: ShardMaps, tensor: StoredTensor, source_maps: ShardMaps, source: StoredTensor) -> bool:
    """Whether two tensors of the same shape and dtype are equal bit for bit, including their scales.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    equal = _same_scales(maps, tensor, source_maps, source)
    mine, other = BitStream(maps, tensor, as_bytes=True), BitStream(source_maps, source, as_bytes=True)
    while (piece := mine.take(_BLOCK_BYTES)).size:
        equal &= np.array_equal(piece, other.take(_BLOCK_BYTES))
    other.finish()
    return equal


def _same_scales(maps: ShardMaps, tensor: StoredTensor, source_maps: ShardMaps, source: StoredTensor) -> bool:
    mine, other = tensor.scale, source.scale
    if mine is None or other is None:
        return mine is other
    return (mine.dtype, mine.shape) == (other.dtype, other.shape) and maps.raw(mine) == source_maps.raw(other)


class _Values:
    """Converts bits to values, in a buffer that every call reuses, because newly allocated memory is slow."""

    def __init__(self, dtype: str, scales: WeightScales | None, rows: int, width: int) -> None:
        self._dtype = dtype
        self._scales = scales.values if scales else None
        self._work = np.empty((rows, width), np.float32)

    def values(self, row: int, bits: NDArray[Any]) -> NDArray[Any]:
        """The values of `bits` (n, width), the rows from `row` on: float32, or float64 for F64. Valid until the next
        call."""
        out = self._work[: len(bits)]
        if self._dtype in _CODES:
            np.take(_CODES[self._dtype], bits, out=out, mode="clip")
        elif self._dtype == "BF16":
            wide = out.view(np.uint32)
            np.copyto(wide, bits)
            np.left_shift(wide, 16, out=wide)
        elif self._dtype == "F16":
            torch.from_numpy(out).copy_(torch.from_numpy(bits.view(np.float16).copy()))
        else:
            return bits.view(np.float32 if self._dtype == "F32" else np.float64)
        if self._scales is not None:
            np.multiply(out, self._scales[row : row + len(bits)], out=out)
        return out


def _sum_of_squares(values: NDArray[np.float64]) -> float:
    """Summed in pieces too short for BLAS to use its threads, which would cost more than they gain."""
    flat = values.reshape(-1)
    pieces = (flat[at : at + _DOT] for at in range(0, flat.size, _DOT))
    return math.fsum(float(np.dot(piece, piece)) for piece in pieces)
