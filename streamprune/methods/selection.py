"""Selection: which weights of a linear are pruned, given their scores.

A sparsity prunes the same number of weights in every row, by one of two selectors:

    ewma   SwiftPrune's: the weights furthest below an exponentially weighted moving average of their row's scores
    exact  the weights with the lowest scores of the row

A pattern N:M keeps the N weights with the highest scores of every M consecutive inputs of a row. The formulas are in
kernels/cpu.py.
"""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from streamprune.errors import UsageError
from streamprune.kernels import EWMA_ALPHA, EWMA_BLOCK, Selection
from streamprune.methods.recipes import SELECTORS

if TYPE_CHECKING:
    from torch import Tensor

    from streamprune.kernels.cpu_arrays import Outcome, Rows

LARGEST_GROUP = 32


class Pattern(NamedTuple):
    """n weights kept of every m consecutive inputs."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m


def parse_pattern(text: str) -> Pattern:
    """Turn "2:4" into Pattern(2, 4): N kept of every M, 1 <= N < M <= 32. Raises UsageError."""
    numbers = text.strip().split(":")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise UsageError(f"pattern {text!r} is not N:M, N weights kept of every M; for example --pattern 2:4")
    n, m = (int(number) for number in numbers)
    if m > LARGEST_GROUP:
        raise UsageError(f"pattern {text!r}: groups of at most {LARGEST_GROUP} inputs are supported")
    if n < 1:
        raise UsageError(f"pattern {text!r} would keep no weight at all; N must be at least 1")
    if n >= m:
        hint = f"; did you mean {m}:{n}?" if 1 <= m < n <= LARGEST_GROUP else ""
        raise UsageError(f"pattern {text!r} would prune nothing: N of every M are kept, so N < M{hint}")
    return Pattern(n, m)


class Amount(NamedTuple):
    """How much to prune: either a fraction of each row or a pattern, never both."""

    sparsity: float | None = None
    pattern: Pattern | None = None

    @property
    def share(self) -> float:
        """The fraction of the weights that is pruned; approximate, as each row prunes a whole number of weights."""
        return self.sparsity or 0.0 if self.pattern is None else 1 - self.pattern.n / self.pattern.m

    def count(self, in_features: int) -> int:
        """How many weights of each row are pruned, exactly. With a pattern, in_features must be a multiple of M."""
        if self.pattern is None:
            return prune_count(self.sparsity or 0.0, in_features)
        return in_features // self.pattern.m * (self.pattern.m - self.pattern.n)

    def at(self, share: float) -> Amount:
        """The amount for a step of gradual pruning: `share` (0 to 1) of the final sparsity.

        For a pattern N:M this is a pattern with the same M and a larger N, rounded and never below the final N; or a
        sparsity of 0 while N would still equal M.
        """
        if self.pattern is None:
            return Amount((self.sparsity or 0.0) * share)
        n, m = self.pattern
        reached = max(n, math.floor(m - share * (m - n) + 0.5))
        return Amount(pattern=Pattern(reached, m)) if reached < m else Amount(0.0)


def check_pattern(pattern: Pattern, in_features: int) -> None:
    """Raises UsageError unless in_features is a multiple of M; the caller adds the linear's name."""
    if in_features % pattern.m:
        raise UsageError(
            f"pattern {pattern} needs a multiple of {pattern.m} inputs, not {in_features} "
            f"(leave the linear dense with --skip)"
        )


def parse_sparsity(text: str | float) -> float:
    """Turn "0.5" into 0.5, the fraction of each row to prune, 0 <= sparsity < 1. Raises UsageError."""
    try:
        sparsity = float(text)
    except (TypeError, ValueError):
        sparsity = math.nan
    if math.isnan(sparsity):
        raise UsageError(f"sparsity {text!r} is not a number; for example --sparsity 0.5, or --pattern 2:4")
    if not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise UsageError(f"sparsity {text!r} is not a fraction (0 <= S < 1){hint}")
    return abs(sparsity)


def prune_count(sparsity: float, in_features: int) -> int:
    """floor(sparsity * in_features), with the sparsity taken as the decimal number that the user wrote.

    As a float, 0.7 is slightly less than 7/10, so that a rounded product may land on either side of a whole number.
    The shortest decimal that reads back as the same float is what the user wrote; with it the product is exact:
    prune_count(0.7, 10) == 7. Raises UsageError for a sparsity outside 0 <= S < 1.
    """
    return math.floor(Fraction(repr(parse_sparsity(sparsity))) * in_features)


def select(
    weight: Tensor,
    feature: Tensor,
    power: int,
    *,
    selector: str = "ewma",
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    out: Tensor | None = None,
    want_keep: bool = False,
    backend: str | None = None,
) -> Selection:
    """Prunes rows of one linear to `sparsity` with `selector`, or to `pattern`: give exactly one of the two.

    weight (rows, in_features) bf16, fp16 or fp32, on any device; feature (in_features,) and power as in scores.py, the
    feature is moved to the weight's device; `out`, like the weight, receives the pruned weights. Rows are independent,
    so a linear may be passed in chunks of rows. backend None uses Numba for CPU tensors and Torch for all others;
    "numba" or "torch" forces one. Raises UsageError for an invalid sparsity, pattern, selector or backend.
    """
    if (sparsity is None) == (pattern is None):
        raise UsageError("give either a sparsity or a pattern")
    kernels = _kernels(backend or ("numba" if weight.device.type == "cpu" else "torch"))
    feature = feature.to(weight.device)
    pruned: Selection
    if pattern is not None:
        check_pattern(pattern, weight.shape[1])
        n, m = pattern
        pruned = kernels.prune_n_of_m(weight, feature, power, n, m, out=out, want_keep=want_keep)
        return pruned
    assert sparsity is not None
    if selector not in SELECTORS:
        raise UsageError(f"selector {selector!r} is not one of {', '.join(SELECTORS)}")
    count = prune_count(sparsity, weight.shape[1])
    prune = getattr(kernels, f"prune_{selector}")
    pruned = prune(weight, feature, power, count, out=out, want_keep=want_keep)
    return pruned


def select_bits(rows: Rows, amount: Amount, selector: str) -> Outcome:
    """As `select` with Numba, for rows of weights as arrays of numpy (kernels/cpu_arrays.py)."""
    if amount.pattern is not None:
        return rows.n_of_m(*amount.pattern)
    count = amount.count(rows.weight.shape[1])
    return rows.ewma(count, EWMA_BLOCK if selector == "ewma" else 0, EWMA_ALPHA if selector == "ewma" else 0.0)


def _kernels(backend: str) -> ModuleType:
    if backend == "numba":
        from streamprune.kernels import cpu

        return cpu
    if backend == "torch":
        from streamprune.kernels import torch_ops

        return torch_ops
    raise UsageError(f"backend {backend!r} is neither numba nor torch")
