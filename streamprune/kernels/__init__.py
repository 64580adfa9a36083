"""Mask selection and input statistics: the same functions for Numba (cpu) and Torch (torch_ops)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


EWMA_ALPHA = 1 / 128
"""Weight of a new block of scores in EWMA's estimates; 0 is exact selection. See CONTRIBUTING.md for what was
tried."""

EWMA_BLOCK = 32
"""Scores in a block of EWMA."""

LARGEST_BLOCK = 4.0
"""A block's mean is capped at this many times the median block mean of its row in EWMA's estimates."""

TYPICAL_BITS = 19
"""Low bits of the median block mean (float32) that are rounded down to 0; four bits of its mantissa remain."""


class Selection(NamedTuple):
    """What a pruning kernel returns.

    weight   (rows, in_features), the dtype of the input. Kept weights are bit-identical to the source; every
             zero, pruned or kept, is +0.0.
    keep     (rows, in_features) bool, False where pruned; None unless requested. A weight that is kept but
             happens to be zero is True.
    removed  sum of the scores L of the pruned weights.
    total    sum of all scores L.
    finite   whether no weight is NaN or Inf, judged by the weights' bits, as scores may overflow. If it is False,
             weight and sums are meaningless; first_nonfinite finds the offending weight.
    """

    weight: Tensor
    keep: Tensor | None
    removed: float
    total: float
    finite: bool
