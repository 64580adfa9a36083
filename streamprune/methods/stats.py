"""Statistics of a linear's inputs over the calibration tokens, kept as sums so that merging is addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Sums = np.ndarray[Any, np.dtype[np.float64]]
"""(in_features,) float64."""


@dataclass(frozen=True, eq=False)
class InputStats:
    """Sums over `tokens` calibration tokens of one linear's input x.

    tokens  number of tokens seen
    sum     (in_features,) float64: sum of x_j; no score reads it, but statistics files of version 1 hold it
    sumsq   (in_features,) float64: sum of x_j²

    Arrays of numpy, so that pruning from a file needs no torch. Linears that read the same input (q, k and v; gate and
    up) share one object. Raises ValueError for any other shape or dtype.
    """

    tokens: int
    sum: Sums
    sumsq: Sums

    def __post_init__(self) -> None:
        for name, values in (("sum", self.sum), ("sumsq", self.sumsq)):
            if not isinstance(values, np.ndarray) or values.dtype != np.float64 or values.ndim != 1:
                raise ValueError(f"{name} must be a 1-D float64 array")
        if self.sum.shape != self.sumsq.shape or self.tokens < 0:
            raise ValueError("sum and sumsq must have one length, and tokens must not be negative")

    @classmethod
    def zeros(cls, in_features: int) -> InputStats:
        """No tokens seen yet."""
        return cls(0, np.zeros(in_features), np.zeros(in_features))

    def __add__(self, other: InputStats) -> InputStats:
        """Statistics of both sets of tokens together."""
        if self.in_features != other.in_features:
            raise ValueError(f"cannot add statistics of {self.in_features} and {other.in_features} features")
        return InputStats(self.tokens + other.tokens, self.sum + other.sum, self.sumsq + other.sumsq)

    @property
    def in_features(self) -> int:
        return self.sum.size

    @property
    def mean_square(self) -> Sums:
        """a_j = E[x_j²], (in_features,) float64, not negative; zero where no token was seen."""
        found: Sums = self.sumsq / max(self.tokens, 1)
        return found
