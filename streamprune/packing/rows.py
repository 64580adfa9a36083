"""Tensors in mapped files, a piece at a time: their bytes, their rows as bits, and the dense rows of packed tensors.

Bits are unsigned integers of the dtype's item size. A piece is some CHUNK_BYTES, whatever the size of the tensor.
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
from streamprune.methods.bitmask import UNSIGNED, count_bits, scatter

CHUNK_BYTES = 16 << 20


def pieces(maps: ShardMaps, ref: TensorRef, row_bytes: int = 1, *, release: bool = True) -> Iterator[memoryview]:
    """The bytes of a tensor, some CHUNK_BYTES at a time, cut between rows of `row_bytes` bytes.

    While one piece is in use, the next is being read. With `release`, the pages of a piece are given back when the next
    one is asked for.
    """
    step = max(1, CHUNK_BYTES // row_bytes) * row_bytes
    cut = [replace(ref, begin=at, end=min(at + step, ref.end)) for at in range(ref.begin, ref.end, step)]
    for number, piece in enumerate(cut):
        maps.prefetch(cut[number + 1 : number + 2])
        yield maps.raw(piece)
        if release:
            maps.release([piece])


def rows_of(maps: ShardMaps, ref: TensorRef) -> Iterator[NDArray[Any]]:
    """The rows of a dense tensor as bits (n, in), some CHUNK_BYTES at a time."""
    width, dtype = ref.shape[-1], UNSIGNED[DTYPE_BITS[ref.dtype] // 8]
    for piece in pieces(maps, ref, ref.nbytes // math.prod(ref.shape[:-1])):
        yield np.frombuffer(piece, dtype).reshape(-1, width)


def unpacked_rows(
    maps: ShardMaps, packed: PackedTensor, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The dense rows of a packed tensor as (first row, bits (n, in)), some `chunk_bytes` at a time.

    A tensor of rank other than 2 comes as a matrix (product of the other axes, last axis). The pages of a chunk are
    given back when the next one is asked for.

    Raises:
        CheckpointError: the bitmask does not have as many bits set as there are values, or has one set beyond the last
            column.
    """
    width, rows = packed.in_features, packed.rows
    item_bytes = DTYPE_BITS[packed.dtype] // 8
    mask_bytes = -(-width // 8)  # of one row
    step = max(1, chunk_bytes // max(1, width * item_bytes))
    done, total = 0, math.prod(packed.compressed.shape)
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        mask_ref = _part(packed.bitmask, top * mask_bytes, bottom * mask_bytes)
        mask = _items(maps, mask_ref, np.uint8).reshape(bottom - top, mask_bytes)
        try:
            kept = int(count_bits(mask, width).sum())
        except ValueError as e:
            raise _bad(packed.bitmask, f"has {e}") from e
        if done + kept > total:
            raise _bad(packed.bitmask, f"has more bits than there are values ({total})")
        value_ref = _part(packed.compressed, done * item_bytes, (done + kept) * item_bytes)
        yield top, scatter(_items(maps, value_ref, UNSIGNED[item_bytes]), mask, width)
        done += kept
        maps.release([mask_ref, value_ref])
    if done != total:
        raise _bad(packed.bitmask, f"has {done} bits for {total} values")


def _part(ref: TensorRef, begin: int, end: int) -> TensorRef:
    """Bytes begin to end of a tensor."""
    return replace(ref, begin=ref.begin + begin, end=ref.begin + end)


def _items(maps: ShardMaps, ref: TensorRef, dtype: Any) -> NDArray[Any]:
    """The items of `ref` as a view on the file, 1-D."""
    return np.frombuffer(maps.raw(ref), dtype) if ref.nbytes else np.empty(0, dtype)


def _bad(ref: TensorRef, why: str) -> CheckpointError:
    return CheckpointError(f"{ref.shard}: tensor {show(ref.name)} {why}; download the checkpoint again")
