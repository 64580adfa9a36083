"""What counts as damage in weights, and what is said about it: NaN, Inf, and linears with zero rows.

An interrupted download can leave a file of full length with zeros in it. A linear counts as damaged if all its rows are
zeros, or a run of at least 4 rows and an eighth of them is. Scattered zero rows are legitimate: an already pruned
linear has them, or an expert's unused outputs. Embeddings are not checked: the rows of unused tokens may be zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamprune.disk.header import TensorRef
from streamprune.errors import CheckpointError
from streamprune.methods.counting import long_run

SAMPLED_COLUMNS = 8
ZEROS_CHUNK_BYTES = 16 << 20


def nonfinite(
    ref: TensorRef, begin: int, shape: tuple[int, ...], flat: int, value: float, whole: TensorRef | None
) -> CheckpointError:
    """The error for `value`, number `flat` of rows of `shape` that begin at row `begin` of the tensor `ref`.

    If `ref` is a slice of the tensor `whole` along its first axis (an expert's), the index is one of `whole`.
    """
    index = [int(i) for i in np.unravel_index(flat, shape)]
    position = [begin + index[0], *index[1:]] if index else []
    if whole is not None and whole.shape != ref.shape:
        position.insert(0, (ref.begin - whole.begin) // ref.nbytes)
    return CheckpointError(
        f"{ref.shard}: tensor {ref.name} is {value} at {position}; the checkpoint is damaged, download it again"
    )


def refuse_zero_rows(ref: TensorRef, zero: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Raises CheckpointError if these zero rows (n,) bool of a linear count as damage."""
    if run := long_run(zero):
        what = "is all zeros" if run == len(zero) else f"has {run} consecutive zero rows of {len(zero)}"
        raise CheckpointError(
            f"{ref.shard}: tensor {ref.name} {what}; the file is likely damaged, download it again, or pass "
            "--allow-zeros if the model is meant to be like that"
        )
