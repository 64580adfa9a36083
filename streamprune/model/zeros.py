"""Detects linears with zero rows: an interrupted download can leave a file of full length with zeros in it.

A linear counts as damaged if all its rows are zeros, or a run of at least 4 rows and an eighth of them is. Scattered
zero rows are legitimate: an already pruned linear has them, or an expert's unused outputs. Embeddings are not checked:
the rows of unused tokens may be zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from streamprune.disk.encoded import EncodedRef
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError
from streamprune.methods.counting import long_run
from streamprune.model.finite import rows_of

_SAMPLED_COLUMNS = 8
_CHUNK_BYTES = 16 << 20


def zero_rows(rows: Tensor) -> Tensor:
    """Which of `rows` (n, …) are all zeros: (n,) bool. On the CPU, a few columns rule out nearly all rows."""
    flat = rows.reshape(len(rows), -1)
    if rows.device.type != "cpu":
        return ~(flat != 0).any(1)
    zero = ~(flat[:, :: max(1, flat.shape[1] // _SAMPLED_COLUMNS)] != 0).any(1)
    if bool(zero.any()):
        zero[zero.clone()] = ~(flat[zero] != 0).any(1)
    return zero


def refuse_zeros(ref: TensorRef, chunks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Passes on the chunks of a linear's rows. Raises CheckpointError at the end if the linear counts as damaged."""
    zero = []
    for begin, rows in chunks:
        zero.append(zero_rows(rows))
        yield begin, rows
    found = torch.cat(zero)
    if run := long_run(found.cpu().numpy()):
        what = "is all zeros" if run == len(found) else f"has {run} consecutive zero rows of {len(found)}"
        raise CheckpointError(
            f"{ref.shard}: tensor {ref.name} {what}; the file is likely damaged, download it again, or pass "
            "--allow-zeros if the model is meant to be like that"
        )


def refuse_empty(maps: ShardMaps, linears: Iterable[TensorRef]) -> None:
    """Checks each linear whose middle row is all zeros. Raises as refuse_zeros.

    The pages that were read are released: the system may map far more than one row, and this looks at every layer.
    """
    for ref in linears:
        if isinstance(ref, EncodedRef) and ref.encoding.transposed:
            continue  # reading one of its rows would read all its codes; refuse_zeros checks it later
        middle = ref.shape[0] // 2
        if ref.nbytes and bool(zero_rows(maps.rows(ref, middle, middle + 1)).all()):
            for _ in refuse_zeros(ref, rows_of(maps, ref, _CHUNK_BYTES)):
                maps.release([ref])
        maps.release([ref])
