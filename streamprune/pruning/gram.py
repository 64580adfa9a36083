"""The Gram matrix of a linear's input: what a refit needs to know about the calibration tokens.

With X (tokens, in) the inputs, a change E (rows, in) of the weights changes the outputs by X Eᵀ, and the sum of the
squares of that is tr(E G Eᵀ) with G = XᵀX. Only sums occur, so G does not depend on the order of the tokens but for
rounding. A few inputs are kept out of G, to see on them what has been learned from the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_PANEL = 256 << 20
"""Bytes of a mapped matrix that are looked at before its pages are given back."""


class Mapped(NamedTuple):
    """What a matrix in a file brings along: `forget(begin, end)` gives back the memory of rows."""

    forget: Callable[[int, int], None]


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
    diagonal: Tensor = field(init=False)
    """(in,) float32, on the refit's device."""

    def __post_init__(self) -> None:
        self.diagonal = self._diagonal()

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

    def held_energy(self, rows: Tensor) -> Tensor:
        """As energy, of the inputs that were kept out. (n,) float64."""
        change = rows @ self.held.to(rows.dtype).T
        return change.square_().sum(1, dtype=torch.float64)

    def held_by_token(self, rows: Tensor) -> Tensor:
        """The squared change of all outputs on each of the inputs that were kept out, (held,) float64."""
        return (rows @ self.held.to(rows.dtype).T).square_().sum(0, dtype=torch.float64)

    def absorb(self) -> None:
        """Puts the inputs that were kept out into `matrix` after all: this object changes, and so does `matrix`."""
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
