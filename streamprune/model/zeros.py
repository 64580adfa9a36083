"""Detects linears with zero rows, see damage.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from streamprune.disk.encoded import EncodedRef
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.model.damage import SAMPLED_COLUMNS, ZEROS_CHUNK_BYTES, refuse_zero_rows
from streamprune.model.finite import rows_of


def zero_rows(rows: Tensor) -> Tensor:
    """Which of `rows` (n, …) are all zeros: (n,) bool. On the CPU, a few columns rule out nearly all rows."""
    flat = rows.reshape(len(rows), -1)
    if rows.device.type != "cpu":
        return ~(flat != 0).any(1)
    zero = ~(flat[:, :: max(1, flat.shape[1] // SAMPLED_COLUMNS)] != 0).any(1)
    if bool(zero.any()):
        zero[zero.clone()] = ~(flat[zero] != 0).any(1)
    return zero


def refuse_zeros(ref: TensorRef, chunks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Passes on the chunks of a linear's rows. Raises CheckpointError at the end if the linear counts as damaged."""
    zero = []
    for begin, rows in chunks:
        zero.append(zero_rows(rows))
        yield begin, rows
    refuse_zero_rows(ref, torch.cat(zero).cpu().numpy())


def refuse_empty(maps: ShardMaps, linears: Iterable[TensorRef]) -> None:
    """Checks each linear whose middle row is all zeros. Raises as refuse_zeros.

    The pages that were read are released: the system may map far more than one row, and this looks at every layer.
    """
    for ref in linears:
        if isinstance(ref, EncodedRef) and ref.encoding.transposed:
            continue  # reading one of its rows would read all its codes; refuse_zeros checks it later
        middle = ref.shape[0] // 2
        if ref.nbytes and bool(zero_rows(maps.rows(ref, middle, middle + 1)).all()):
            for _ in refuse_zeros(ref, rows_of(maps, ref, ZEROS_CHUNK_BYTES)):
                maps.release([ref])
        maps.release([ref])
