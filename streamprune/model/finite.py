"""Reads stored tensors in chunks of rows, and finds the first weight that is NaN or Inf, or the first bad scale."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from streamprune.disk.encoded import bad_scale
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.kernels import cpu, torch_ops
from streamprune.model.damage import nonfinite
from streamprune.model.loader import WeightLoader


def rows_of(source: WeightLoader | ShardMaps, ref: TensorRef, chunk_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a stored tensor, in chunks of about `chunk_bytes`; a scalar comes in one piece."""
    count = ref.shape[0] if ref.shape else 1
    step = max(1, chunk_bytes * count // max(ref.nbytes, 1))
    for begin in range(0, count, step):
        yield begin, source.rows(ref, begin, min(begin + step, count)) if ref.shape else source.tensor(ref)


def finite_rows(
    source: WeightLoader | ShardMaps, ref: TensorRef, chunk_bytes: int, whole: TensorRef | None = None
) -> Iterator[tuple[int, Tensor]]:
    """As rows_of. Raises CheckpointError, with file, tensor and index, at the first NaN or Inf."""
    for begin, rows in rows_of(source, ref, chunk_bytes):
        refuse_nonfinite(ref, begin, rows, whole)
        yield begin, rows


def refuse_nonfinite(ref: TensorRef, begin: int, rows: Tensor, whole: TensorRef | None = None) -> None:
    """Raises CheckpointError if `rows`, which begin at row `begin` of the tensor `ref`, hold a NaN or Inf.

    If `ref` is a slice of the tensor `whole` along its first axis (an expert's), the index is one of `whole`.
    """
    if not rows.dtype.is_floating_point:  # a table of integers
        return
    if rows.dtype == torch.float8_e4m3fn:
        found = ((rows.reshape(-1).view(torch.uint8) & 0x7F) == 0x7F).nonzero()
        flat = int(found[0]) if len(found) else None
    else:
        flat = (cpu if rows.device.type == "cpu" else torch_ops).first_nonfinite(rows)
    if flat is None:
        return
    raise nonfinite(ref, begin, tuple(rows.shape), flat, float(rows.reshape(-1)[flat]), whole)


def refuse_bad_scales(ref: TensorRef, scales: Tensor, codes: TensorRef, values: Tensor) -> None:
    """Raises CheckpointError for a scale that is NaN, infinite or negative, or zero where a code of its row is not.

    `scales` are one, or one for each row of `values` (out, in), which are float8_e4m3fn; `ref` and `codes` name both.
    """
    each = scales.reshape(-1).float()
    bad, nil = ~(torch.isfinite(each) & (each >= 0)), each == 0
    if bool(nil.any()):
        used = ((values.view(torch.uint8) & 0x7F) != 0).any(1)
        bad |= nil & (used if len(each) > 1 else used.any())
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise bad_scale(ref, codes, float(each[row]), row, 0)
