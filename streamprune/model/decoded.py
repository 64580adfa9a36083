"""Tensors of a quantised checkpoint, dequantised on demand.

Codes are decoded a few rows at a time, and their pages are released at once, so that only the rows that were asked for
take memory. Unlike those of ShardMaps, tensors are not views of the file, and are decoded anew on each call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.encoded import (
    FLOAT,
    GPTQ,
    PACKED,
    PAIRS,
    EncodedRef,
    Encoding,
    bad_group,
    bad_scale,
    bad_zero,
)
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import SAFETENSORS_DTYPES, ShardMaps
from streamprune.disk.quantised import PlainView
from streamprune.disk.remote import RemoteCheckpoint
from streamprune.disk.spool import Spool
from streamprune.methods.decoding import (
    decode_floats,
    decode_grouped,
    decode_integers,
    decode_pairs,
    one_more,
    unpack_columns,
    unpack_words,
)

_AT_ONCE = 1 << 20
"""Weights that are decoded at once; they stay in the processor's caches."""

_OUTPUTS, _MAPPED = 1 << 10, 1 << 22
"""Columns that are read at once of codes that are stored inputs first, and bytes whose pages are mapped for them."""

_NAN = 255
"""The exponent that says NaN where scales are exponents."""


def maps_of(checkpoint: Checkpoint, folder: Path | None = None) -> ShardMaps:
    """The maps of a checkpoint, dense or quantised; `folder` is where shards from the hub are while they are needed."""
    stored = checkpoint.stored if isinstance(checkpoint, PlainView) else checkpoint
    spool = Spool(stored, folder) if isinstance(stored, RemoteCheckpoint) and folder is not None else None
    return DecodedMaps(checkpoint, spool) if isinstance(checkpoint, PlainView) else ShardMaps(checkpoint, spool)


class DecodedMaps(ShardMaps):
    """ShardMaps of a PlainView. Also raises CheckpointError for scales that are NaN, infinite or negative, or zero for
    codes that are not."""

    def tensor(self, ref: TensorRef) -> Tensor:
        if not isinstance(ref, EncodedRef):
            return super().tensor(ref)
        return self._values(ref, ref.begin, ref.shape)

    def rows(self, ref: TensorRef, start: int, stop: int) -> Tensor:
        if not isinstance(ref, EncodedRef):
            return super().rows(ref, start, stop)
        if not 0 <= start <= stop <= ref.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {ref.name} with shape {list(ref.shape)}")
        row = math.prod(ref.shape[1:]) * SAFETENSORS_DTYPES[ref.dtype].itemsize
        return self._values(ref, ref.begin + start * row, (stop - start, *ref.shape[1:]))

    def raw(self, ref: TensorRef) -> memoryview:
        if not isinstance(ref, EncodedRef):
            return super().raw(ref)
        width = ref.encoding.shape[-1]
        row = width * SAFETENSORS_DTYPES[ref.dtype].itemsize
        first = ref.begin // row
        found = self._values(ref, first * row, (-(-ref.end // row) - first, width))
        data: memoryview = found.reshape(-1).view(torch.uint8).numpy().data
        return data[ref.begin - first * row : ref.end - first * row].toreadonly()

    def prefetch(self, refs: Iterable[TensorRef]) -> None:
        super().prefetch(_stored(refs))

    def release(self, refs: Iterable[TensorRef], *, drop_cache: bool = False) -> None:
        super().release(_stored(refs), drop_cache=drop_cache)

    def _values(self, ref: EncodedRef, begin: int, shape: tuple[int, ...]) -> Tensor:
        """A tensor of `shape` from byte `begin` of the whole weight on, which is where a row of it begins."""
        encoding, dtype = ref.encoding, SAFETENSORS_DTYPES[ref.dtype]
        out = torch.empty(shape, dtype=dtype)
        matrix = out.view(-1, encoding.shape[-1])
        first, high = begin // (encoding.shape[-1] * dtype.itemsize), encoding.shape[-2]
        done = 0
        while done < len(matrix):  # one of the weight's matrices after the other
            number, top = divmod(first + done, high)
            count = min(high - top, len(matrix) - done)
            into = matrix[done : done + count]
            if encoding.kind == PAIRS:
                self._decode_across(encoding, number, top, into)
            elif encoding.transposed:
                for at in range(0, count, _OUTPUTS):
                    self._decode_words(encoding, top + at, into[at : at + _OUTPUTS])
            else:
                self._decode(encoding, number, top, into)
            done += count
        return out

    def _decode(self, encoding: Encoding, number: int, top: int, out: Tensor) -> None:
        """Rows of a matrix from `top` on."""
        high, width = encoding.matrix
        step = max(1, _AT_ONCE // width)
        for at in range(0, len(out), step):
            begin, end = top + at, min(top + len(out), top + at + step)
            which = torch.arange(begin, end) // encoding.block[0]
            scale, zero = self._scales(encoding, number, which), self._zeros(encoding, which)
            nil = scale == 0
            some_nil = bool(nil.any())
            if some_nil:  # 1 leaves zeros as they are, and shows what is none
                scale = scale.masked_fill(nil, 1)
            first = number * high
            codes = self._codes(encoding, first + begin, first + end)
            dtype = out.dtype if encoding.rounded == "F32" else SAFETENSORS_DTYPES[encoding.rounded]
            if encoding.kind == FLOAT:
                out[at : at + end - begin] = decode_floats(codes, scale, encoding.block[1], dtype)
            else:
                if encoding.kind == PACKED:
                    codes = unpack_words(codes, encoding.bits, width)
                out[at : at + end - begin] = decode_integers(codes, scale, zero, encoding.block[1], dtype)
            if some_nil:
                _refuse_lost(encoding, which, nil, out[at : at + end - begin])
            self._let_go(encoding, first + begin, first + end)

    def _decode_across(self, encoding: Encoding, number: int, top: int, out: Tensor) -> None:
        """Columns of a matrix, as it is stored, from `top` on: rows of `out` (n, rows)."""
        high, _ = encoding.matrix
        unit = encoding.block[1]
        groups = slice(top // unit, -(-(top + len(out)) // unit))
        width = (groups.stop - groups.start) * unit
        left = top - groups.start * unit
        step = max(1, _AT_ONCE // width)
        for begin in range(0, high, step):
            end = min(high, begin + step)
            first = number * high
            scale = self._scales(encoding, number, torch.arange(begin, end))[:, groups]
            codes = self._codes(encoding, first + begin, first + end)[:, groups]
            out[:, begin:end] = decode_pairs(codes, scale)[:, left : left + len(out)].t()
            self._let_go(encoding, first + begin, first + end)

    def _decode_words(self, encoding: Encoding, top: int, out: Tensor) -> None:
        """As _decode_across, of GPTQ and AWQ; only the groups that a block of inputs belongs to are decoded for it."""
        count, (high, _) = len(out), encoding.matrix
        unit = 32 // encoding.bits if encoding.kind == GPTQ else 1  # inputs in a row of codes
        step = min(_AT_ONCE // 2 // count, _MAPPED * high // encoding.codes.nbytes)
        step = max(unit, step - step % unit)
        groups, dtype = self._groups(encoding), SAFETENSORS_DTYPES[encoding.rounded]
        for begin in range(0, high, step):
            end = min(high, begin + step)
            which, place = torch.unique(groups[begin:end], return_inverse=True)
            scale, zero = self._scales_of(encoding, which, top, count), self._zeros_of(encoding, which, top, count)
            nil = scale == 0
            some_nil = bool(nil.any())
            words = self._codes(encoding, begin // unit, end // unit)
            codes = _codes_in(encoding, words, top, count, end - begin)
            rows = decode_grouped(codes, scale.masked_fill(nil, 1) if some_nil else scale, zero, place, dtype)
            if some_nil and len(lost := (nil[:, place] & (rows != 0)).nonzero()):
                row, column = (int(n) for n in lost[0])
                raise bad_scale(encoding.scale, encoding.codes, "zero", int(which[place[column]]), top + row)
            out[:, begin:end] = rows
            self._let_go(encoding, begin // unit, end // unit)

    def _groups(self, encoding: Encoding) -> Tensor:
        """The group of each input."""
        (high, _), (_, count, _) = encoding.matrix, encoding.scales
        if encoding.groups is None:
            return torch.arange(high) // encoding.block[0]
        found = super().tensor(encoding.groups).long()
        if len(bad := ((found < 0) | (found >= count)).nonzero()):
            place = int(bad[0])
            raise bad_group(encoding.groups, encoding.codes, int(found[place]), place, count)
        return found

    def _scales_of(self, encoding: Encoding, which: Tensor, top: int, count: int) -> Tensor:
        """Scales (count, len(which)) of these groups and of `count` outputs from `top` on."""
        _, high, wide = encoding.scales
        stored = super().tensor(encoding.scale).reshape(high, wide)
        found = stored[:, top : top + count].index_select(0, which).t().float().contiguous()
        bad = ~torch.isfinite(found) if encoding.symmetric else ~(torch.isfinite(found) & (found >= 0))
        if bool(bad.any()):
            row, column = (int(n) for n in bad.nonzero()[0])
            says = float(found[row, column])
            raise bad_scale(encoding.scale, encoding.codes, says, int(which[column]), top + row)
        return found

    def _zeros_of(self, encoding: Encoding, which: Tensor, top: int, count: int) -> Tensor | None:
        """As _scales_of, zero points less half of the range; None if they are all 0."""
        assert encoding.zero is not None
        _, high, wide = encoding.scales
        each = 32 // encoding.bits
        first = top // each
        stored = super().tensor(encoding.zero).reshape(high, wide // each)
        words = stored[:, first : -(-(top + count) // each)].index_select(0, which)
        if encoding.less_one and not encoding.symmetric:
            words = one_more(words, encoding.bits)
        if encoding.kind == GPTQ:
            found = unpack_words(words, encoding.bits, each * words.shape[1]).t()
        else:
            found = unpack_columns(words)
        found = found[top - first * each :][:count]
        if not encoding.symmetric:
            return found.float().contiguous()
        if len(bad := ((found != 0) & (found != -1)).nonzero()):
            row, column = (int(n) for n in bad[0])
            says = int(found[row, column]) + (1 << encoding.bits - 1)
            raise bad_zero(encoding.zero, encoding.codes, says, int(which[column]), top + row)
        return None

    def _codes(self, encoding: Encoding, begin: int, end: int) -> Tensor:
        """Rows of codes, counted through all matrices."""
        return super().tensor(_rows_of(encoding.codes, len(encoding.shape) - 1, begin, end))

    def _let_go(self, encoding: Encoding, begin: int, end: int) -> None:
        super().release([_rows_of(encoding.codes, len(encoding.shape) - 1, begin, end)])

    def _scales(self, encoding: Encoding, number: int, which: Tensor) -> Tensor:
        """The scales of a matrix in these rows of scales: float32, or uint8 where they are exponents."""
        _, high, wide = encoding.scales
        low = int(which[0])
        some = super().tensor(encoding.scale).reshape(-1, high, wide)[number, low : int(which[-1]) + 1]
        exponents = encoding.kind == PAIRS
        found = (some if exponents else some.float())[which - low]
        bad = found == _NAN if exponents else ~(torch.isfinite(found) & (found >= 0))
        if bool(bad.any()):
            row, column = (int(n) for n in bad.nonzero()[0])
            says = "nan" if exponents else float(found[row, column])
            raise bad_scale(encoding.scale, encoding.codes, says, int(which[row]), column)
        return found

    def _zeros(self, encoding: Encoding, which: Tensor) -> Tensor | None:
        if encoding.zero is None:
            return None
        _, high, wide = encoding.scales
        stored = super().tensor(encoding.zero)
        if encoding.kind == PACKED:
            stored = unpack_words(stored.reshape(-1, wide).t(), encoding.bits, high).t()
        return stored.reshape(high, wide)[which].float()


def _codes_in(encoding: Encoding, words: Tensor, top: int, count: int, inputs: int) -> Tensor:
    """Codes (count, inputs) less half of their range, of rows of words: those of `count` outputs from `top` on."""
    if encoding.kind == GPTQ:
        return unpack_words(words[:, top : top + count].t(), encoding.bits, inputs)
    each = 32 // encoding.bits
    first = top // each
    return unpack_columns(words[:, first : -(-(top + count) // each)])[top - first * each :][:count]


def _refuse_lost(encoding: Encoding, which: Tensor, nil: Tensor, rows: Tensor) -> None:
    """Raises CheckpointError for a scale of zero (`nil`) of weights that are not zero in `rows`, where it is 1."""
    lost = (nil.repeat_interleave(encoding.block[1], 1)[:, : rows.shape[1]] & (rows != 0)).nonzero()
    if len(lost):
        row, column = (int(n) for n in lost[0])
        raise bad_scale(encoding.scale, encoding.codes, "zero", int(which[row]), column // encoding.block[1])


def _rows_of(codes: TensorRef, axes: int, begin: int, end: int) -> TensorRef:
    """Rows of codes along their first `axes` axes, which count as one."""
    within = codes.shape[axes:]
    size = codes.nbytes // math.prod(codes.shape[:axes])
    return TensorRef(
        codes.name,
        codes.shard,
        codes.dtype,
        (end - begin, *within),
        codes.begin + begin * size,
        codes.begin + end * size,
    )


def _stored(refs: Iterable[TensorRef]) -> Iterator[TensorRef]:
    for ref in refs:
        if isinstance(ref, EncodedRef):
            yield from ref.stored
        else:
            yield ref
