"""The Gram matrix of a linear's input: what a refit needs to know about the calibration tokens.

With X (tokens, in) the inputs, a change E (rows, in) of the weights changes the outputs by X Eᵀ, and the sum of the
squares of that is tr(E G Eᵀ) with G = XᵀX. Only sums occur, so G does not depend on the order of the tokens but for
rounding. A few inputs are kept out of G, to see on them what has been learned from the others.

Asymmetric calibration (as GPTAQ, arXiv 2504.02692): X are the inputs that the model has which is being pruned, and
what should come out is what the dense model makes of its own inputs D, W Dᵀ. With E = (D − X)ᵀX and damping δ diag G,

    min over V   ‖W Dᵀ − V Xᵀ‖² + δ Σ_j G_jj (v_j − w_j)²       is reached by       V = W + W E (G + δ diag G)⁻¹

and a refit that comes close to V in the metric G comes close to the dense model's outputs. Where the outputs are added
to the residual stream, they can make up for what that has lost as well: with R the dense stream less the pruned one, as
it is before the addition, W Dᵀ + Rᵀ takes the place of W Dᵀ, and W E + RᵀX (the `debt`) that of W E. All of V would
trust the calibration tokens too much: `aim` goes PULL of the way from W to V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.methods.inverse import Damping, feature_scale, normalised_inverse

PULL = 0.15
"""How far the weights that a refit aims at go from the dense ones towards those that make up for earlier layers."""

PULL_DAMPING = Damping(0.05)
"""δ of that step."""

_PANEL = 256 << 20
"""Bytes of a mapped matrix that are looked at before its pages are given back."""


class Mapped(NamedTuple):
    """What a matrix in a file brings along: `forget(begin, end)` gives back the memory of rows."""

    forget: Callable[[int, int], None]


class Debt(NamedTuple):
    """What a linear that writes into the residual stream is to make up for."""

    sum: Tensor
    """RᵀX (out, in) float32."""
    held: Tensor
    """R of the inputs that were kept out, (held, out) float32."""


@dataclass(eq=False)
class Gram:
    """G = XᵀX of one linear's input.

    matrix  (in, in) float32, symmetric; on the device of the refit, or a mapped file (`mapped`) on the CPU
    held    (held, in) inputs that are not in `matrix`, in the dtype they were computed in, on the refit's device
    tokens  how many inputs are in `matrix`
    """

    matrix: Tensor
    held: Tensor
    tokens: int
    mapped: Mapped | None = None
    products: torch.dtype = torch.float32
    """What iterations that forgive rounding may multiply in."""
    drift: Tensor | None = None
    """E (in, in) float32 like `matrix`, of asymmetric calibration; None where X is all there is."""
    held_dense: Tensor | None = None
    """(held, in): what the dense model has in the place of `held`."""
    debts: dict[str, Debt] = field(default_factory=dict)
    """By linear, of those that write into the residual stream."""
    diagonal: Tensor = field(init=False)
    """(in,) float32, on the refit's device."""

    def __post_init__(self) -> None:
        self.diagonal = self._diagonal()
        self._pull: Tensor | None = None

    def aim(self, rows: Tensor, name: str = "", which: Tensor | slice = slice(None)) -> Tensor:
        """The weights that a refit of `rows` (n, in) float32 is to come close to: (n, in), `rows` without a drift.

        They are rows `which` of the linear `name`. Raises UnsupportedError, see inverse.py.
        """
        if self.drift is None:
            return rows
        if self._pull is None:
            scale = feature_scale(self.matrix)
            reciprocal = torch.where(scale > 0, 1 / scale, 0.0)
            inverse = normalised_inverse(self.matrix, PULL_DAMPING, 0.0).matrix
            self._pull = inverse.mul_(PULL * reciprocal).mul_(reciprocal[:, None])
        missing = rows @ self.drift
        if name in self.debts:
            missing += self.debts[name].sum[which]
        return torch.addmm(rows, missing, self._pull)

    @property
    def device(self) -> torch.device:
        """Where the refit computes."""
        return self.held.device

    def times(self, rows: Tensor) -> Tensor:
        """rows (n, in) float32 · G, (n, in) float32."""
        if self.mapped is None:
            return rows @ self.matrix
        out = torch.empty_like(rows)
        for begin, end in self._panels():
            out[:, begin:end] = rows @ self.matrix[begin:end].to(self.device).T
            self.mapped.forget(begin, end)
        return out

    def energy(self, rows: Tensor) -> Tensor:
        """e G eᵀ of each of `rows` (n, in) float32: the squared change of the outputs. (n,) float64, not negative."""
        return (self.times(rows) * rows).sum(1, dtype=torch.float64).clamp_min_(0)

    def held_by_token(
        self, rows: Tensor, fitted: Tensor | None = None, name: str = "", which: Tensor | slice = slice(None)
    ) -> Tensor:
        """The squared outputs of `rows` on each of the inputs that were kept out, (held,) float64; the dense model's,
        if there are such. With `fitted`, how far its outputs on `held` are from what is wanted; see `aim`."""
        if self.held_dense is None:
            rows = rows if fitted is None else rows - fitted
            return (rows @ self.held.to(rows.dtype).T).square_().sum(0, dtype=torch.float64)
        made = rows @ self.held_dense.to(rows.dtype).T
        if fitted is not None:
            made -= fitted @ self.held.to(fitted.dtype).T
            if name in self.debts:
                made += self.debts[name].held[:, which].T
        return made.square_().sum(0, dtype=torch.float64)

    def absorb_held_(self) -> None:
        """Adds the held-out inputs to the sums, in place, as the underscore says: `held` is empty afterwards.

        Changes the arrays `matrix`, `drift` and the sums of `debts` themselves: copies would take the Gram's memory
        twice, which the budget does not have, and a mapped matrix lies in a file.
        """
        held = self.held.float()
        width = self.matrix.shape[0]
        step = max(1, _PANEL // (8 * max(width, 1)))
        for begin in range(0, width if len(held) else 0, step):
            end = min(begin + step, width)
            part = self.matrix[begin:end]
            if part.device == held.device:
                part.addmm_(held[:, begin:end].T, held)
            else:
                part += (held[:, begin:end].T @ held).to(part.device)
            if self.mapped is not None:
                self.mapped.forget(begin, end)
        if self.drift is not None and self.held_dense is not None:
            self.drift.addmm_((self.held_dense.float() - held).T, held)
            self.held_dense, self._pull = self.held_dense[:0], None
            for name, debt in self.debts.items():
                debt.sum.addmm_(debt.held.T, held)
                self.debts[name] = debt._replace(held=debt.held[:0])
        self.tokens += len(held)
        self.held = self.held[:0]
        self.diagonal = self._diagonal()

    def _diagonal(self) -> Tensor:
        found = []
        for begin, end in self._panels():
            found.append(self.matrix[begin:end].diagonal(begin).clone())
            if self.mapped is not None:
                self.mapped.forget(begin, end)
        return torch.cat(found).to(self.device)

    def _panels(self) -> list[tuple[int, int]]:
        """Rows of the matrix, a panel at a time."""
        width = self.matrix.shape[0]
        step = width if self.mapped is None else max(1, _PANEL // (4 * max(width, 1)))
        return [(begin, min(begin + step, width)) for begin in range(0, width, max(step, 1))]
