"""The scales of FP8 weights, stored beside their codes: one per row (output), or one for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamprune.disk.mapping import ShardMaps
from streamprune.inspection.stored import StoredTensor, release_around

_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class WeightScales:
    """Scales by row: `values` (rows, 1) float32, or None if `fault` says why they cannot be applied to the codes."""

    dtype: str
    shape: tuple[int, ...]
    values: NDArray[np.float32] | None
    bad: int
    """Number of stored scales that are NaN, Inf, zero or negative."""
    fault: str | None


def read_scales(maps: ShardMaps, tensor: StoredTensor) -> WeightScales | None:
    """The scales of a matrix of codes (rows, in), stored as (rows, 1), (rows,), (1,) or (); None if it has none.

    Raises CheckpointError if they cannot be read.
    """
    ref = tensor.scale
    if ref is None:
        return None
    rows = tensor.shape[0]
    fault = None
    if ref.dtype not in _DTYPES:
        fault = f"weight_scale is {ref.dtype}, not a float of 16 bits or more"
    elif ref.shape not in ((rows, 1), (rows,), (1,), ()):
        fault = f"weight_scale has the shape {list(ref.shape)}; {rows} rows need {[rows, 1]}, {[rows]} or []"
    if fault:
        return WeightScales(ref.dtype, ref.shape, None, 0, fault)
    stored = maps.tensor(ref).reshape(-1, 1).float().numpy()
    values = np.broadcast_to(stored, (rows, 1)).copy()
    bad = int(np.count_nonzero(is_bad(stored)))
    release_around(maps, ref)
    return WeightScales(ref.dtype, ref.shape, values, bad, None)


def is_bad(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which scales are NaN, Inf, zero or negative."""
    return ~(np.isfinite(values) & (values > 0))
