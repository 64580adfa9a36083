"""Quantises the pruned linears of one stage: from their final rows to FP8 codes and scales.

HWPQ (arXiv 2501.16376v1) prunes and quantises a weight in one pass. If the recipe has a refit, rounding errors are
compensated for by the weights that are rounded later (methods/fp8.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamprune.methods.fp8 import compensate, dequantise, quantise
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping
from streamprune.pruning.codes import Quantisation


@dataclass
class LinearCodes:
    """Quantises one linear, chunk by chunk of its rows, and sums its error over them."""

    how: Quantisation
    dtype: torch.dtype
    """dtype of the scales: that of the unquantised weights."""
    power: Tensor | None
    """E[x_j²] (in,) float32, if known."""
    scales: list[Tensor] = field(default_factory=list)
    whole: float = 0.0
    lost: float = 0.0

    def fresh(self) -> LinearCodes:
        """The same settings, without sums and scales."""
        return LinearCodes(self.how, self.dtype, self.power)

    def add_(self, other: LinearCodes) -> None:
        """Adds the next rows' sums and scales."""
        self.whole, self.lost = self.whole + other.whole, self.lost + other.lost
        self.scales += other.scales

    def rows(self, exact: Tensor, weight: Tensor, gram: Gram | None, damping: Damping | None) -> Tensor:
        """Codes (n, in) float8_e4m3fn for the pruned and refitted rows `weight`, an approximation of `exact` (n, in).

        `gram` is that of the refit, if there is one. Rounding errors are compensated for, if the job does that, with
        the `damping` of the refit; None means that the linear was not refitted, as that would have been worse.
        """
        found = quantise(weight, self.dtype, self.how.scale, self.power, self.how.backend)
        codes = found.codes
        if gram is None:
            self.whole, self.lost = self.whole + found.total, self.lost + found.error
        else:
            dense, kept = exact.float(), weight.float()
            if self.how.compensates and damping is not None:
                keep = weight != 0
                codes = compensate(dense, kept, keep, gram, found.scale, backend=self.how.backend, damping=damping)
            self.whole += float(gram.energy(dense).sum())
            self.lost += float(gram.energy(dense - dequantise(codes, found.scale, torch.float32)).sum())
        self.scales.append(found.scale)
        return codes

    def report(self, refitted: bool) -> dict[str, Any]:
        """For streamprune.json: relative errors of the outputs.

        With a Gram, `error_fp8` is ‖(W − Ŵ)X‖² / ‖WX‖² of pruning, refit and rounding together. Without one,
        `rounding_error` is that of rounding alone, from the inputs' powers: Σ a_j (ŵ_j − s q_j)² / Σ a_j ŵ_j².
        """
        return {"error_fp8" if refitted else "rounding_error": self.lost / self.whole if self.whole else 0.0}
