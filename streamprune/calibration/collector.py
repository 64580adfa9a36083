"""Gathers statistics of what linears are given, while a layer is run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import CheckpointError
from streamprune.methods.stats import InputStats
from streamprune.process.share import Share

Accumulate = Callable[[Tensor, Tensor, Tensor], None]
"""A kernel: adds x (tokens, in) to its second argument (in,) float64, and x² to its third."""


class _Part:
    """The sums of one batch, or of all."""

    def __init__(self) -> None:
        self.groups: dict[str, str] = {}
        """Linear -> the first one with the same input."""
        self.sums: dict[str, tuple[int, Any, Any]] = {}
        """First linear with an input -> tokens, sums and sums of squares (in,) float64, as tensors or arrays."""
        self.updated = 0
        """Tokens in `relative_updates`."""
        self.relative_updates: Tensor | float = 0.0

    def __bool__(self) -> bool:
        return bool(self.sums or self.updated)

    def add_(self, other: _Part) -> None:
        """Adds the sums of the next batch."""
        for name in other.sums.keys() & self.groups.keys() - self.sums.keys():  # no longer shared
            tokens, total, squares = self.sums[self.groups[name]]
            self.sums[name] = (tokens, total.clone(), squares.clone())
        late = {name: other.sums[other.groups[name]] for name in self.sums if name in other.groups.keys() - other.sums}
        for name, (tokens, *both) in (other.sums | late).items():
            total, squares = (torch.as_tensor(values) for values in both)
            if name in self.sums:
                before, into, into_squares = self.sums[name]
                into += total
                into_squares += squares
                self.sums[name] = (before + tokens, into, into_squares)
            else:
                self.sums[name] = (tokens, total.clone(), squares.clone())  # no tensors of inference mode
        for name, first in other.groups.items():
            self.groups[name] = name if name in self.sums else self.groups.get(name, first)
        self.updated += other.updated
        self.relative_updates = self.relative_updates + other.relative_updates

    def told(self) -> _Part:
        """The same as arrays, which are sent to other ranks faster."""
        found = _Part()
        found.sums = {n: (tokens, a.cpu().numpy(), b.cpu().numpy()) for n, (tokens, a, b) in self.sums.items()}
        found.updated, found.relative_updates = self.updated, float(self.relative_updates)
        found.groups = self.groups
        return found


class Collector:
    """Gathers the statistics of one layer. `watch` must be called with each linear's input, in the order of use.

    Each batch is summed on its own and then added to the sums, in the order of the batches, so that it does not matter
    which rank sees which (`share`).
    """

    def __init__(self, accumulate: Accumulate, share: Share | None = None) -> None:
        self._accumulate, self._share = accumulate, share
        self._all, self._part = _Part(), _Part()
        self._apart: set[str] = set()
        """Linears that have been called with an input of their own after one that they shared."""
        self._own: list[tuple[int, _Part]] = []
        """With several ranks: number of a batch, and its sums."""
        self._batch = 0
        self._complete = False
        self._last: tuple[Tensor, str] | None = None

    def watch(self, name: str, x: Tensor) -> None:
        """Adds x (…, in), unless it is the same tensor as for the linear before.

        A linear that is called once more with an input of its own has sums of its own from then on.
        """
        groups, sums = self._part.groups, self._part.sums
        leader = groups.get(name)
        if self._last is not None and x is self._last[0]:
            if name not in sums and name not in self._apart:
                groups[name] = self._last[1]
                return
        else:
            self._last = (x, name)
        groups[name] = name
        if name not in sums and leader is not None:
            tokens, total, squares = sums[leader]
            sums[name] = (tokens, total.clone(), squares.clone())
            self._apart.add(name)
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        if name not in sums:
            zeros = [torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device) for _ in range(2)]
            sums[name] = (0, zeros[0], zeros[1])
        tokens, total, squares = sums[name]
        self._accumulate(rows, total, squares)
        sums[name] = (tokens + rows.shape[0], total, squares)

    def end_batch(self) -> None:
        """Frees the last input, and adds the batch to the sums."""
        self._last = None
        part, self._part = self._part, _Part()
        if self._share is None or self._share.ranks.size == 1:
            self._all.add_(part)
        else:
            self._own.append((self._share.number(self._batch), part.told()))
        self._batch += 1

    @property
    def groups(self) -> dict[str, str]:
        """Linear -> the first one with the same input, in the order of use."""
        self.gathered()
        return self._all.groups

    def flow(self, before: Tensor, after: Tensor) -> None:
        """Adds the relative size of the layer's update, from states (batch, seqlen, hidden) before and after it."""
        out = after.detach().float()
        norm, change = (torch.linalg.vector_norm(states, dim=-1).double() for states in (out, out - before.to(out)))
        self._part.relative_updates += torch.where(norm > 0, change / norm, 0.0).square().sum()
        self._part.updated += norm.numel()

    def gathered(self) -> None:
        """Adds the batches of all ranks. To be called on each of them, when all batches are done."""
        if self._part:
            self.end_batch()
        if self._share is not None and self._share.ranks.size > 1 and not self._complete:
            self._complete = True
            told = self._share.ranks.gather(self._own)
            self._own = []
            for _, part in sorted(chain(*told), key=lambda pair: pair[0]):
                self._all.add_(part)

    def tokens(self, name: str) -> int:
        """How many tokens a linear saw."""
        return self._all.sums[self.groups[name]][0]

    @property
    def update(self) -> tuple[float, float]:
        """(tokens, sum of relative updates) of the layer; see `updates` in statistics.py."""
        self.gathered()
        return float(self._all.updated), float(self._all.relative_updates)

    def finish(self) -> dict[str, InputStats]:
        """First linear of a group -> its statistics. Raises CheckpointError when an activation was NaN or infinite."""
        self.gathered()
        result = {}
        for name, (tokens, total, squares) in self._all.sums.items():
            bad = (~torch.isfinite(total + squares)).nonzero()
            if len(bad):
                raise CheckpointError(
                    f"the input of {name} is not finite (feature {int(bad[0])}): the model overflows on this text; "
                    "try --dtype float32"
                )
            result[name] = InputStats(tokens, total.cpu().numpy(), squares.cpu().numpy())
        return result
