"""The linears of one stage, quantised: from rows as they are to be to FP8 codes and their scales.

HWPQ (arXiv 2501.16376v1) prunes and quantises a weight in one visit. Where the recipe refits, the rounding is part of
the same problem: what one weight loses by it, those that are rounded after it make up for (methods/fp8.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from streamprune.disk.float_quantized import SCALE
from streamprune.disk.header import DTYPE_BITS, TensorRef
from streamprune.errors import UnsupportedError
from streamprune.methods.fp8 import compensate, dequantise, quantise
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping
from streamprune.model.skeleton import Skeleton


@dataclass(frozen=True)
class Quantisation:
    """How a job quantises: `scale` is "amax" or "mse", `compensates` whether rounding is compensated for in a refit."""

    scale: str = "amax"
    compensates: bool = False
    backend: str | None = None


@dataclass
class LinearCodes:
    """One linear on its way to FP8, a few rows after the other. Errors are sums over its rows."""

    how: Quantisation
    dtype: torch.dtype
    """Of the scales: the dtype that the weights had."""
    power: Tensor | None
    """E[x_j²] (in,) float32 where it is known."""
    scales: list[Tensor] = field(default_factory=list)
    whole: float = 0.0
    lost: float = 0.0

    def rows(self, exact: Tensor, weight: Tensor, gram: Gram | None, damping: Damping | None) -> Tensor:
        """Codes (n, in) float8_e4m3fn of rows `weight`, pruned and refitted, that stand for `exact`, both (n, in).

        `gram` is that of a refit, if there is one. Rounding is compensated for, if that is asked for, where the linear
        was refitted: `damping` says how, None that a refit would have done harm.
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

        `error_fp8` is ‖(W − Ŵ)X‖² / ‖WX‖² of all that was done where there was a Gram; without one, `rounding_error` is
        what rounding alone loses, by the inputs' powers: Σ a_j (ŵ_j − s q_j)² / Σ a_j ŵ_j².
        """
        return {"error_fp8" if refitted else "rounding_error": self.lost / self.whole if self.whole else 0.0}


def coded(ref: TensorRef) -> tuple[TensorRef, TensorRef]:
    """What a weight is stored as: its codes and its scales."""
    rows, size = ref.shape[0], ref.shape[0] * ref.shape[1]
    width = DTYPE_BITS[ref.dtype] // 8
    codes = replace(ref, dtype="F8_E4M3", begin=0, end=size)
    return codes, replace(ref, name=ref.name + SCALE, shape=(rows, 1), begin=0, end=rows * width)


def check_codable(linears: Mapping[str, TensorRef], skeleton: Skeleton) -> None:
    """Raises UnsupportedError for a linear that no `float-quantized` checkpoint can hold, before anything runs."""
    homes = Counter(ref.name for stage in skeleton.layer_stages for ref in stage.linears.values())
    for name, ref in linears.items():
        if homes[ref.name] > 1:
            raise UnsupportedError(
                f"{name} is a part of {ref.name}, which holds all experts, and FP8 checkpoints have no scales for such "
                "tensors; --skip '\\.experts\\.' leaves them as they are"
            )
        if name in skeleton.transposed:
            raise UnsupportedError(
                f"{name} is a Conv1D, which FP8 checkpoints cannot hold; pass --quantize none, or --skip it"
            )
        if not ref.name.endswith("weight"):
            raise UnsupportedError(f"{name}: its tensor is called {ref.name}, where no scale can follow; --skip it")
        if ref.shape[0] * ref.shape[1] * 8 % DTYPE_BITS[ref.dtype]:
            raise UnsupportedError(
                f"{name} has {ref.shape[0]} x {ref.shape[1]} weights, an odd number of bytes in FP8, after which its "
                "scales would not be aligned; --skip it"
            )
