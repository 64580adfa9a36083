"""Linears that hold nothing: the trace of a download that broke off in a file of full length.

All rows of zeros, or a stretch of an eighth of them and at least 4, is no trained linear. Scattered ones may be: what
has been pruned before, an expert's unused outputs. Embeddings are not looked at, whose unused tokens may well be zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError
from streamprune.methods.counting import long_run
from streamprune.model.finite import rows_of

_LOOKED_AT = 8
_CHUNK_BYTES = 16 << 20


def zero_rows(rows: Tensor) -> Tensor:
    """Which of rows (n, …) are zeros throughout, (n,) bool. On the CPU, a few columns tell it of nearly all."""
    flat = rows.reshape(len(rows), -1)
    if rows.device.type != "cpu":
        return ~(flat != 0).any(1)
    zero = ~(flat[:, :: max(1, flat.shape[1] // _LOOKED_AT)] != 0).any(1)
    if bool(zero.any()):
        zero[zero.clone()] = ~(flat[zero] != 0).any(1)
    return zero


def refuse_zeros(ref: TensorRef, chunks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The chunks of a linear's rows as they come. Raises CheckpointError at their end, if too many rows are zeros."""
    zero = []
    for begin, rows in chunks:
        zero.append(zero_rows(rows))
        yield begin, rows
    found = torch.cat(zero)
    if run := long_run(found.cpu().numpy()):
        what = "is all zeros" if run == len(found) else f"has {run} rows of zeros in one stretch, of {len(found)}"
        raise CheckpointError(
            f"{ref.shard}: tensor {ref.name} {what}; the file is likely damaged, download it again, or pass "
            "--allow-zeros if the model is meant to be so"
        )


def refuse_empty(maps: ShardMaps, linears: Iterable[TensorRef]) -> None:
    """Looks at the middle row of each linear, and at all of those where it is zeros. Raises as refuse_zeros."""
    for ref in linears:
        middle = ref.shape[0] // 2
        if ref.nbytes and bool(zero_rows(maps.rows(ref, middle, middle + 1)).all()):
            for _ in refuse_zeros(ref, rows_of(maps, ref, _CHUNK_BYTES)):
                maps.release([ref])
