"""Mask selection and input statistics: the same functions for Numba (cpu) and Torch (torch_ops)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


EWMA_ALPHA = 1 / 128
"""How fast EWMA's estimates follow, per block of 32 scores; 0 is exact selection. See CONTRIBUTING.md for what was
tried."""

LARGEST_BLOCK = 4.0
"""A block counts in EWMA's estimates for no more than this many times the typical block of its row."""

TYPICAL_BITS = 19
"""Low bits of a float32 that the typical block's mean is rounded down by: four binary digits of it are kept."""


class Selection(NamedTuple):
    """What a pruning kernel returns.

    weight   (rows, in_features), the dtype of the input. Kept weights are bit-identical to the source; every
             zero, pruned or kept, is +0.0.
    keep     (rows, in_features) bool, False where pruned; None unless asked for. It is the selection itself:
             a kept weight that happens to be zero is True.
    removed  sum of the scores L of the pruned weights.
    total    sum of all scores L.
    finite   no weight is NaN or Inf, by their bits: a score may overflow where no weight does. Where it is False,
             neither the weights nor the sums mean anything, and first_nonfinite finds the place.
    """

    weight: Tensor
    keep: Tensor | None
    removed: float
    total: float
    finite: bool
