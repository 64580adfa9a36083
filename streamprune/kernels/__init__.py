"""Mask selection and input statistics: the same functions for Numba (cpu) and Torch (torch_ops)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Selection(NamedTuple):
    """What a pruning kernel returns.

    weight   (rows, in_features), the dtype of the input. Kept weights are bit-identical to the source; every
             zero, pruned or kept, is +0.0.
    keep     (rows, in_features) bool, False where pruned; None unless asked for. It is the selection itself:
             a kept weight that happens to be zero is True.
    removed  sum of the scores of the pruned weights.
    total    sum of all scores.
    """

    weight: Tensor
    keep: Tensor | None
    removed: float
    total: float
