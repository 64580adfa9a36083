"""The Gram matrix of a linear's input: what a refit needs to know about the calibration tokens.

With inputs X (tokens, in), a change E (rows, in) of the weights changes the outputs by X Eᵀ, whose squared norm is
tr(E G Eᵀ) with the Gram matrix G = XᵀX. G is a sum over tokens, so that their order matters only for rounding. A few
tokens are held out of G; refits are judged on these.

Asymmetric calibration (as GPTAQ, arXiv 2504.02692): X are the inputs in the partly pruned model, D those of the same
tokens in the dense model, and the target is the dense model's output W Dᵀ. With the drift E = (D − X)ᵀX and damping
δ diag G,

    min over V   ‖W Dᵀ − V Xᵀ‖² + δ Σ_j G_jj (v_j − w_j)²       is reached by       V = W + W E (G + δ diag G)⁻¹

so that a refit that is close to V in the metric G gives outputs close to the dense model's. A linear whose outputs are
added to the residual stream can also correct errors that the stream already has. With R the dense minus the pruned
stream before the addition, the target becomes W Dᵀ + Rᵀ, and W E is replaced by W E + RᵀX; RᵀX is the linear's `Debt`.
Going all the way to V overfits the calibration tokens, so `aim` goes only a fraction PULL of the way from W to V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from streamprune.methods.inverse import Damping, Factor, feature_scale, normalised_inverse
from streamprune.process.ranks import ALONE, Ranks

PULL = 0.15
"""Fraction of the way from the dense weights W to the weights V that fully correct the errors of earlier layers."""

PULL_DAMPING = Damping(0.05)
"""δ in the formula for V."""

_PANEL = 256 << 20
"""Bytes of a mapped matrix that are processed before their pages are given back."""


class Mapped(NamedTuple):
    """For a matrix in a mapped file: `forget(begin, end)` gives back the memory of these rows."""

    forget: Callable[[int, int], None]


class Debt(NamedTuple):
    """The error of the residual stream that a linear which writes into it should correct (see the top)."""

    sum: Tensor
    """RᵀX (out, in) float32."""
    held: Tensor
    """R of the held-out tokens, (held, out) float32."""


@dataclass(eq=False)
class Gram:
    """G = XᵀX of one linear's input.

    matrix  (in, in) float32, symmetric; on the device of the refit, or in a mapped file (`mapped`) on the CPU
    held    (held, in) held-out inputs, not in `matrix`; in the dtype they were computed in, on the refit's device
    tokens  how many tokens are summed in `matrix`
    """

    matrix: Tensor
    held: Tensor
    tokens: int
    mapped: Mapped | None = None
    products: torch.dtype = torch.float32
    """Dtype of matrix products in iterations that tolerate rounding errors."""
    drift: Tensor | None = None
    """E (in, in) float32, like `matrix`; None unless calibration is asymmetric."""
    held_dense: Tensor | None = None
    """(held, in): the dense model's inputs of the held-out tokens; None unless calibration is asymmetric."""
    debts: dict[str, Debt] = field(default_factory=dict)
    """By name of the linear, for those that write into the residual stream."""
    ranks: Ranks = ALONE
    """Those that have the same Gram, and share the arithmetic with it."""
    diagonal: Tensor = field(init=False)
    """(in,) float32, on the refit's device."""

    def __post_init__(self) -> None:
        self.diagonal = self._diagonal()
        self._pull: tuple[Tensor, Factor] | None = None

    def aim(self, rows: Tensor, name: str = "", which: Tensor | slice = slice(None)) -> Tensor:
        """The target weights (n, in) float32 of a refit: W + PULL (V − W), or `rows` itself if there is no drift.

        `rows` (n, in) float32 are the rows `which` of the linear `name`. Raises UnsupportedError, see inverse.py.
        """
        if self.drift is None:
            return rows
        pull, _ = self._pulling()
        missing = rows @ self.drift
        if name in self.debts:
            missing += self.debts[name].sum[which]
        return torch.addmm(rows, missing, pull)

    def _pulling(self) -> tuple[Tensor, Factor]:
        """The matrix that turns what is missing into a change of the weights, and the diagonal of the inverse."""
        if self._pull is None:
            scale = feature_scale(self.matrix)
            reciprocal = torch.where(scale > 0, 1 / scale, 0.0)
            inverse = normalised_inverse(self.matrix, PULL_DAMPING, 0.0, self.ranks)
            diagonal = inverse._replace(matrix=inverse.matrix.diagonal().clone())
            self._pull = inverse.matrix.mul_(PULL * reciprocal).mul_(reciprocal[:, None]), diagonal
        return self._pull

    def known_diagonal(self, damping: Damping) -> Factor | None:
        """What inverse_diagonal(matrix, damping) gives, if `aim` needs that inverse anyway; else None."""
        return self._pulling()[1] if self.drift is not None and damping == PULL_DAMPING else None

    def settle(self) -> None:
        """Does what all ranks must do together, before each of them calls `aim` for rows of its own."""
        if self.drift is not None:
            self._pulling()

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
        """e G eᵀ of each row e of `rows` (n, in) float32, the squared norm of its outputs: (n,) float64, >= 0."""
        return (self.times(rows) * rows).sum(1, dtype=torch.float64).clamp_min_(0)

    def held_by_token(
        self, rows: Tensor, fitted: Tensor | None = None, name: str = "", which: Tensor | slice = slice(None)
    ) -> Tensor:
        """The squared norm of the outputs of `rows` for each held-out token, (held,) float64.

        `rows` (n, in) are applied to the dense model's inputs if calibration is asymmetric. With `fitted` (n, in), it
        is the squared error instead: of the outputs of `fitted` on `held`, against those of `rows` plus, for a linear
        with a debt, R. `name` and `which` as in `aim`.
        """
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
        """(begin, end) of the row panels in which the matrix is processed: one unless it is mapped."""
        width = self.matrix.shape[0]
        step = width if self.mapped is None else max(1, _PANEL // (4 * max(width, 1)))
        return [(begin, min(begin + step, width)) for begin in range(0, width, max(step, 1))]
