"""Stored tensors in chunks of rows, and the place of the first weight that is not a finite number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError
from streamprune.kernels import cpu, torch_ops
from streamprune.model.loader import WeightLoader


def rows_of(source: WeightLoader | ShardMaps, ref: TensorRef, chunk_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """A stored tensor in chunks of whole rows, each with the number of its first; a scalar in one piece."""
    count = ref.shape[0] if ref.shape else 1
    step = max(1, chunk_bytes * count // max(ref.nbytes, 1))
    for begin in range(0, count, step):
        yield begin, source.rows(ref, begin, min(begin + step, count)) if ref.shape else source.tensor(ref)


def finite_rows(
    source: WeightLoader | ShardMaps, ref: TensorRef, chunk_bytes: int, whole: TensorRef | None = None
) -> Iterator[tuple[int, Tensor]]:
    """As rows_of. Raises CheckpointError naming file, tensor and index of the first NaN or Inf."""
    for begin, rows in rows_of(source, ref, chunk_bytes):
        refuse_nonfinite(ref, begin, rows, whole)
        yield begin, rows


def refuse_nonfinite(ref: TensorRef, begin: int, rows: Tensor, whole: TensorRef | None = None) -> None:
    """Raises CheckpointError naming the first NaN or Inf of a tensor's rows from `begin` on, if there is one.

    `ref` may be one of the equal parts of the tensor `whole`, along its first axis.
    """
    if rows.dtype == torch.float8_e4m3fn:
        found = ((rows.reshape(-1).view(torch.uint8) & 0x7F) == 0x7F).nonzero()
        flat = int(found[0]) if len(found) else None
    else:
        flat = (cpu if rows.device.type == "cpu" else torch_ops).first_nonfinite(rows)
    if flat is None:
        return
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), rows.shape)]
    place = [begin + index[0], *index[1:]] if index else []
    if whole is not None and whole.shape != ref.shape:
        place.insert(0, (ref.begin - whole.begin) // ref.nbytes)
    raise CheckpointError(
        f"{ref.shard}: tensor {ref.name} is {float(rows.reshape(-1)[flat])} at {place}; "
        "the checkpoint is damaged, download it again"
    )
